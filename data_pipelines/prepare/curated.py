"""From the curation to the data set: which clips are to be encoded, and what became of them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from data_pipelines.curate import manifest, run
from data_pipelines.curate.eligibility import DROPPED
from data_pipelines.curate.store import Store
from data_pipelines.prepare import extend, names
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Curation:
    """A finished curation, its directory, what its output held before, and whether people were detected."""

    result: run.Result
    directory: pathlib.Path
    done: dict[str, list[str]]
    detected: bool


def curate(
    raw: Sequence[RawClip], directory: pathlib.Path, config: ConfigDict, machine: run.Machine, output: pathlib.Path
) -> Curation:
    """Scores and judges raw clips, and prints the result. Raises UserError as `run.curate`, or for a strange output."""
    done = extend.done_in(output)
    result = run.curate(raw, directory, config, machine, frozenset(entry[0] for entry in done.values()))
    print(manifest.table(result.clips, result.fates))
    print(f"fates, scores and report: {directory}/{manifest.MANIFEST}, {manifest.SCORES}, report.html", flush=True)
    return Curation(result, directory, done, machine.detect)


def pending(curation: Curation, ready: Sequence[RawClip], output: pathlib.Path) -> list[extend.Item] | None:
    """Clips to encode, those that are ready without curation last; None, with a line, if all are in the data set.

    Raises UserError if two have one name, nothing is kept, or the data set holds clips that would be others now.
    """
    clips = [*(kept.clip for kept in curation.result.kept), *ready]
    files = {path for clip in clips for path in (clip.path, clip.annotations) if path is not None}
    digest = Store(curation.directory).digests(sorted(files)).__getitem__
    items = [extend.item(kept.clip, kept.identity, digest) for kept in curation.result.kept]
    assigned = names.assign(ready)
    named = [dataclasses.replace(c, id=n.whole.removeprefix(f"{c.source}/")) for c, n in zip(ready, assigned)]
    items += [extend.item(clip, "", digest) for clip in named]
    if len({item.name for item in items}) < len(items):
        raise UserError("two inputs have clips of the same name; rename one of their folders")
    fates = zip(curation.result.clips, curation.result.fates)
    dropped = [clip.name for clip, fate in fates if fate.fate == DROPPED]
    waiting = extend.pending(items, dropped, curation.done, output)
    if not items:
        raise UserError(f"every clip was dropped; {curation.directory}/{manifest.MANIFEST} says why")
    if waiting or not output.is_dir():
        return waiting
    finish(curation, output)
    print(f"{output} is up to date: {len(items)} clips")
    return None


def finish(curation: Curation, output: pathlib.Path) -> None:
    """Notes in the manifest which clips were kept but could not be encoded."""
    problems = {name: entry[2] for name, entry in extend.done_in(output).items() if entry[2]}
    manifest.write(curation.directory, curation.result.clips, curation.result.fates, problems)
