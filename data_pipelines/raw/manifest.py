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
with its caption in NAME.txt (default "A person."), and its sound counts as speech. Data sets, linked folders and other
files below it are left out, and counted in a line.

A clip that cannot be used does not hide the others: it is listed with its `problem`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.raw import text_file
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
    problem: str = ""  # why it cannot be used
    sound_late: float = 0.0  # seconds by which the sound is behind the picture; set by curation


def write_manifest(directory: pathlib.Path, source: str, clips: Sequence[Mapping[str, Any]], **notes: Any) -> None:
    """Writes manifest.json; `notes` are more top-level keys."""
    text = json.dumps({"raw_version": RAW_VERSION, "source": source, **notes, "clips": list(clips)}, indent=1)
    partial = directory / f".{MANIFEST}.partial"
    partial.write_text(text + "\n")
    partial.replace(directory / MANIFEST)


def read(directory: str | pathlib.Path) -> list[RawClip]:
    """The clips of a raw directory, in a fixed order; prints what a plain folder holds besides.

    Raises UserError if it is missing or has no video, or its manifest is damaged or uses an id twice.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"input directory {directory} does not exist; give a directory of videos")
    clips = _from_manifest(directory) if (directory / MANIFEST).is_file() else _from_files(directory)
    if not clips:
        raise UserError(f"input directory {directory} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
    return clips


def _from_files(directory: pathlib.Path) -> list[RawClip]:
    videos, others, left_out = [], [], Counter()
    for folder, names, files in os.walk(directory):
        kept = []
        for name in names:
            path = pathlib.Path(folder, name)
            if path.is_symlink():
                left_out["linked folders"] += 1
            elif (path / "dataset.json").is_file() or (name.startswith(".") and name.endswith(".partial")):
                left_out["prepared data sets"] += 1
            else:
                kept.append(name)
        names[:] = kept
        for path in (pathlib.Path(folder, name) for name in files):
            is_video = path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
            (videos if is_video else others).append(path)
    videos.sort()
    captions = {path.with_suffix(".txt") for path in videos}
    for path in others:
        if path in captions:
            continue
        is_caption = path.suffix.lower() == ".txt"
        left_out["text files without a video of the same name" if is_caption else path.suffix or "no suffix"] += 1
    if left_out:
        counts = ", ".join(f"{count} {_printable(what)}" for what, count in sorted(left_out.items()))
        print(f"not read in {_printable(directory)}: {counts}", flush=True)
    return [_from_file(directory, path) for path in videos]


def _from_file(directory: pathlib.Path, path: pathlib.Path) -> RawClip:
    name, source = path.relative_to(directory).with_suffix("").as_posix(), directory.absolute().name
    clip = RawClip(_printable(name), path, _printable(source))
    if (clip.id, clip.source) != (name, source):
        return dataclasses.replace(clip, problem=f"the name of {_printable(path)} is not UTF-8; rename it")
    sidecar = path.with_suffix(".txt")
    try:
        caption = text_file.read(sidecar) if sidecar.is_file() else ""
    except UserError as error:
        return dataclasses.replace(clip, problem=str(error))
    return dataclasses.replace(clip, caption=caption or DEFAULT_CAPTION)


def _printable(name: str | pathlib.Path) -> str:
    """The name with bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _from_manifest(directory: pathlib.Path) -> list[RawClip]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version, source, entries = manifest["raw_version"], manifest["source"], list(manifest["clips"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); make the raw clips again") from error
    if version != RAW_VERSION:
        raise UserError(f"{path} has version {version}, not {RAW_VERSION}; make the raw clips again")
    clips = [_entry(directory, str(source), number, entry) for number, entry in enumerate(entries)]
    for name, count in Counter(clip.id for clip in clips).most_common(1):
        if count > 1:
            raise UserError(f"{directory} has two clips called {name!r}; rename one")
    return clips


def _entry(directory: pathlib.Path, source: str, number: int, entry: Any) -> RawClip:
    name = entry.get("id") if isinstance(entry, dict) else None
    name = str(name) if isinstance(name, (str, int)) and str(name).strip() else ""
    name = name.encode("utf-8", "backslashreplace").decode()  # JSON can hold half a character, which nothing can print
    clip = RawClip(name or f"entry-{number}", directory, source)
    problem = _problem(directory, name, entry)
    if problem:
        return dataclasses.replace(clip, problem=f"{directory / MANIFEST}: clip {clip.id!r}: {problem}")
    fields = {field.name for field in dataclasses.fields(RawClip)} - {
        "id", "path", "source", "annotations", "crop", "problem", "sound_late"
    }  # fmt: skip
    values = {field: entry[field] for field in fields if entry.get(field) is not None}
    notes = directory / entry["annotations"] if entry.get("annotations") else None
    crop = tuple(int(value) for value in entry["crop"]) if entry.get("crop") else None
    return dataclasses.replace(clip, path=directory / entry["file"], annotations=notes, crop=crop, **values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _problem(directory: pathlib.Path, name: str, entry: Any) -> str:
    """What is wrong with a manifest's entry, or ""."""
    if not isinstance(entry, dict):
        return f"{entry!r} is not an object; give id and file"
    if not name or not isinstance(entry.get("file"), str):
        return "id or file is missing or not text; give both"
    given = {key: value for key, value in entry.items() if value is not None}
    for key in ("file", "caption", "split", "speaker", "sentence", "annotations"):
        if not isinstance(given.get(key, ""), str):
            return f"{key} is {given[key]!r}; give text"
        try:
            given.get(key, "").encode()
        except UnicodeEncodeError:
            return f"{key} has half a character; write the manifest again"
    for key in ("speech", "pose"):
        if not isinstance(given.get(key, True), bool):
            return f"{key} is {given[key]!r}; give true or false"
    start, end = given.get("start", 0.0), given.get("end")
    if not _is_number(start) or start < 0 or not (end is None or (_is_number(end) and end > start)):
        return f"start {start!r} and end {end!r} are no span; give seconds, start before end"
    if given.get("split", "train") not in SPLITS:
        return f"split {given['split']!r} is not one of {SPLITS}"
    crop = given.get("crop") or [0, 0, 1, 1]
    whole = isinstance(crop, list) and len(crop) == 4 and all(_is_number(side) and side == int(side) for side in crop)
    if not whole or min(crop[:2]) < 0 or min(crop[2:]) < 1:
        return f"crop is {crop!r}; give left, top, width, height in pixels"
    for needed in filter(None, (entry["file"], entry.get("annotations"))):
        if not (directory / needed).is_file():
            return f"{directory / needed} does not exist; make the raw clips again"
    return ""
