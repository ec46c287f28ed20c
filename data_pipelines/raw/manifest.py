"""Raw clips, written by `data_pipelines.synthetic` and `data_pipelines.raw.real`, read by `data_pipelines.prepare`.

A raw directory holds videos and, optionally, a manifest.json:

    {"raw_version": 1, "source": "synthetic", "clips": [
      {"id": "000012", "file": "clips/000012.mp4", "caption": "...", "split": "train",
       "speaker": "s03", "sentence": "t07",       ids for hold-out, "" if unknown
       "speech": true,                            false: the sound is not speech of the person shown
       "pose": true,                              false: make no keypoints
       "annotations": "annotations/000012.npz",   exact keypoints (F,K,3), mouth (F,), attributes (A,), or null;
                                                  row 0 is the frame at `start`; truth_keypoints (F,K,3) are for
                                                  boxes and evaluation alone, if the clip is to train without pose
       "start": 0.0, "end": 5.8,                  seconds to use, null for all
       "crop": [left, top, width, height]}]}      pixels to use, null for all

Only id and file are required; unknown keys are ignored. Without a manifest every video below the directory is a clip
with its caption in NAME.txt (default "A person."), and its sound counts as speech.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.raw.media import VIDEO_SUFFIXES
from data_pipelines.schema import SPLITS
from omnihuman_jax.errors import UserError

RAW_VERSION = 1
DEFAULT_CAPTION = "A person."
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class RawClip:
    """One clip of a raw directory; the module docstring describes the fields."""

    id: str
    path: pathlib.Path
    source: str
    caption: str = DEFAULT_CAPTION
    split: str = "train"
    speaker: str = ""
    sentence: str = ""
    speech: bool = True
    pose: bool = True
    annotations: pathlib.Path | None = None
    start: float = 0.0
    end: float | None = None
    crop: tuple[int, int, int, int] | None = None


def write_manifest(directory: pathlib.Path, source: str, clips: Sequence[Mapping[str, Any]], **notes: Any) -> None:
    """Writes manifest.json; `notes` are more top-level keys."""
    text = json.dumps({"raw_version": RAW_VERSION, "source": source, **notes, "clips": list(clips)}, indent=1)
    partial = directory / f".{MANIFEST}.partial"
    partial.write_text(text + "\n")
    partial.replace(directory / MANIFEST)


def read(directory: str | pathlib.Path) -> list[RawClip]:
    """The clips of a raw directory, in a fixed order.

    Raises UserError if it is missing or has no video, or its manifest is damaged or names missing files.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"input directory {directory} does not exist; give a directory of videos")
    clips = _from_manifest(directory) if (directory / MANIFEST).is_file() else _from_files(directory)
    if not clips:
        raise UserError(f"input directory {directory} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
    name, count = Counter(clip.id for clip in clips).most_common(1)[0]
    if count > 1:
        raise UserError(f"{directory} has two clips called {name!r}; rename one")
    return clips


def _from_files(directory: pathlib.Path) -> list[RawClip]:
    clips = []
    for path in sorted(directory.rglob("*")):
        if path.suffix.lower() not in VIDEO_SUFFIXES or not path.is_file():
            continue
        sidecar = path.with_suffix(".txt")
        caption = sidecar.read_text().strip() if sidecar.is_file() else ""
        name = path.relative_to(directory).with_suffix("").as_posix()
        clips.append(RawClip(name, path, directory.absolute().name, caption or DEFAULT_CAPTION))
    return clips


def _from_manifest(directory: pathlib.Path) -> list[RawClip]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, source, entries = manifest["raw_version"], manifest["source"], manifest["clips"]
        clips = [_entry(directory, source, entry) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); make the raw clips again") from error
    if version != RAW_VERSION:
        raise UserError(f"{path} has version {version}, not {RAW_VERSION}; make the raw clips again")
    return clips


def _entry(directory: pathlib.Path, source: str, entry: Mapping[str, Any]) -> RawClip:
    fields = {field.name for field in dataclasses.fields(RawClip)} - {"id", "path", "source", "annotations", "crop"}
    values = {name: entry[name] for name in fields if entry.get(name) is not None}
    path = directory / entry["file"]
    notes = directory / entry["annotations"] if entry.get("annotations") else None
    for needed in filter(None, (path, notes)):
        if not needed.is_file():
            raise UserError(f"{directory / MANIFEST} names {needed}, which does not exist; make the raw clips again")
    if values.get("split", "train") not in SPLITS:
        raise UserError(
            f"{directory / MANIFEST}: split {values['split']!r} of clip {entry['id']} is not one of {SPLITS}"
        )
    crop = tuple(int(value) for value in entry["crop"]) if entry.get("crop") else None
    if crop is not None and (len(crop) != 4 or min(crop[:2]) < 0 or min(crop[2:]) < 1):
        raise UserError(f"{directory / MANIFEST}: clip {entry['id']} has crop {crop}, not left, top, width, height")
    return RawClip(id=str(entry["id"]), path=path, source=str(source), annotations=notes, crop=crop, **values)
