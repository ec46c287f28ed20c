"""Everything but the latents of a raw clip: sound, annotations and keypoints."""

from __future__ import annotations

import dataclasses
import threading
import zipfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines import boxes
from data_pipelines import keypoints as kp
from data_pipelines.prepare.cut import Cut
from data_pipelines.raw import media
from data_pipelines.raw.manifest import RawClip
from data_pipelines.raw.sound import Sound
from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError

if TYPE_CHECKING:  # they import JAX, which processes that only score do not need
    from data_pipelines.encoders.speech import SpeechEncoder
    from data_pipelines.encoders.text import TextEncoder
    from data_pipelines.encoders.text_states import StatesFile

# Of rendered clips; the keypoints also of those that are to train without pose.
_ONE_AT_A_TIME = threading.Lock()
_TRUTH = ("mouth", "attributes", "truth_keypoints")
FARTHEST = 5.0  # x or y, in pictures, of a point outside of the picture; more are pixels
SILENCE = 3e-4  # root mean square below which sound counts as silence (-70 dB of full scale)


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The encoders of one run; `detect` makes keypoints (F,K,3) or (0,K,3) from frames (F,H,W,3) uint8."""

    text: TextEncoder | StatesFile
    speech: SpeechEncoder
    detect: Callable[[np.ndarray], np.ndarray] | None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


def sound(clip: RawClip, num_frames: int) -> Sound | None:
    """The clip's sound (num_frames * 640,) at 16 kHz, or None if it is missing, silent or unreadable.

    A clip with unreadable sound still trains the other conditions (principle 1).
    """
    try:
        tracks = media.audio_tracks(clip.path)
        if not tracks:
            return None
        start = clip.start + clip.sound_late
        found = media.read_sound(clip.path, start=max(start, 0.0), end=start + num_frames / media.FPS)
        if start < 0:  # the sound is early, so the picture begins before it
            before = round(-start * media.AUDIO_RATE)
            found = Sound(*(np.pad(values, (before, 0)) for values in found))
    except UserError as error:
        print(f"going on without sound: {error}", flush=True)
        return None
    if tracks > 1:
        print(f"{clip.path} has {tracks} sound tracks; the default one is used", flush=True)
    return found if np.sqrt(np.mean(found.wave**2)) > SILENCE else None


def part_of(found: Sound | None, first: int, num_frames: int) -> np.ndarray | None:
    """The sound (num_frames * 640,) of a cut that begins at a frame; None where the file has less than half of it."""
    samples = media.AUDIO_RATE // media.FPS
    part = slice(first * samples, (first + num_frames) * samples)
    if found is None or found.present[part].mean() < 0.5:
        return None
    return found.wave[part]


def annotations(clip: RawClip) -> Mapping[str, np.ndarray]:
    """The arrays of the clip's annotation file: ground truth of rendered clips and conditions; empty without a file.

    Raises UserError if the file cannot be read, or its arrays have a wrong shape, type or range.
    """
    if clip.annotations is None:
        return {}
    try:
        # Headers of arrays are parsed by `ast`, which in CPython 3.11 fails now and then if two threads do it.
        with _ONE_AT_A_TIME, np.load(clip.annotations, allow_pickle=False) as file:
            notes = {name: file[name] for name in (*_TRUTH, *_annotated()) if name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {clip.annotations} ({error}); make the raw clips again") from error
    rows = {"mouth": (), "truth_keypoints": (kp.NUM_KEYPOINTS, 3)} | _annotated()
    for name, values in notes.items():
        where = f"{clip.annotations}: {name}"
        if name in rows and (not values.ndim or values.shape[1:] != rows[name]):
            raise UserError(f"{where} has shape {values.shape}, not (F, {', '.join(map(str, rows[name]))})")
        if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
            raise UserError(f"{where} has values that are not finite numbers; correct them")
        if name in ("keypoints", "truth_keypoints"):
            _check_points(where, values)
    return notes


def _check_points(where: str, points: np.ndarray) -> None:
    """Raises UserError unless keypoints (F,K,3) are x and y relative to the picture, and a confidence."""
    confidence = points[..., 2]
    if points.size and (confidence.min() < 0 or confidence.max() > 1):
        raise UserError(f"{where} has confidences outside 0..1; give x, y, confidence")
    places = np.abs(points[..., :2][confidence > 0])
    if places.size and places.max() > FARTHEST:
        raise UserError(f"{where} has places up to {places.max():g}; give fractions of the picture, not pixels")


def _annotated() -> dict[str, tuple[int, ...]]:
    """Record field -> row shape of every condition with one row per frame, except speech."""
    sizes = {"num_keypoints": kp.NUM_KEYPOINTS}
    tracks = (c for c in conditions.table() if c.kind is conditions.Kind.TRACK and c.name != "audio")
    return {c.record: c.row_shape(sizes) for c in tracks}


def tracks(clip: RawClip, cut: Cut, notes: Mapping[str, np.ndarray], encoders: Encoders) -> dict[str, np.ndarray]:
    """Record field -> rows of the cut, (F, *row) or (0, *row), of the conditions in `_annotated`, and the boxes.

    Raises:
      UserError: an annotation has too few rows, or the detector fails.
    """
    found = {}
    for name, row in _annotated().items():
        found[name] = np.asarray(_rows(clip, cut, notes, name), np.float32).reshape(-1, *row)
    annotated = found["keypoints"]
    found["keypoints"] = np.zeros((0, kp.NUM_KEYPOINTS, 3), np.float32)
    if clip.pose and len(annotated):
        found["keypoints"] = kp.crop(annotated, *fractions(cut))
    elif clip.pose and encoders.detect is not None:
        with encoders.lock:  # one detector serves all threads
            found["keypoints"] = encoders.detect(np.ascontiguousarray(cut.cropped()))
    known = annotated if len(annotated) else _rows(clip, cut, notes, "truth_keypoints")
    return found | {"boxes": _boxes(cut, known, found["keypoints"])}


def _boxes(cut: Cut, annotated: np.ndarray, detected: np.ndarray) -> np.ndarray:
    """Boxes (F,4,4) relative to the cut's box; (0,4,4) without keypoints.

    Args:
      annotated: (F,K,3) relative to the source picture, also of a clip that trains without pose, or no rows.
      detected: (F,K,3) relative to the cut's box, or no rows; used without annotated ones.
    """
    if len(annotated):
        height, width = cut.source.shape[1:3]
        # Boxes of the whole picture are clipped to the cut's; a point outside of it would be lost first.
        return boxes.crop(boxes.from_keypoints(annotated, width / height), *fractions(cut))
    return boxes.from_keypoints(detected, cut.box.width / cut.box.height)


def fractions(cut: Cut) -> tuple[float, float, float, float]:
    """Left, top, width and height of the cut's box as fractions of its source picture."""
    _, height, width, _ = cut.source.shape
    return cut.box.left / width, cut.box.top / height, cut.box.width / width, cut.box.height / height


def _rows(clip: RawClip, cut: Cut, notes: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The cut's rows (F, ...) of an annotation; (0,) without it."""
    if name not in notes:
        return np.zeros(0, np.float32)
    rows = notes[name][cut.first : cut.first + len(cut.source)]
    if len(notes[name]) and len(rows) != len(cut.source):
        raise UserError(
            f"{clip.annotations}: {name} has {len(notes[name])} rows, but {clip.path} has at least "
            f"{cut.first + len(cut.source)} frames; make the raw clips again"
        )
    return rows


def truth(name: str, clip: RawClip, cut: Cut, notes: Mapping[str, np.ndarray]) -> np.ndarray:
    """The annotated "mouth" (F,) of the cut or "attributes" (A,) of its clip; (0,) without annotation.

    Raises:
      UserError: "mouth" has too few rows.
    """
    values = _rows(clip, cut, notes, name) if name == "mouth" else notes.get(name, np.zeros(0))
    return np.asarray(values, np.float32)
