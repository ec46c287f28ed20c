"""Everything but the latents of a raw clip: sound, annotations and keypoints."""

from __future__ import annotations

import dataclasses
import threading
import zipfile
from collections.abc import Callable, Mapping

import numpy as np

from data_pipelines import keypoints as kp
from data_pipelines.encoders.speech import SpeechEncoder
from data_pipelines.encoders.text import TextEncoder
from data_pipelines.encoders.text_states import StatesFile
from data_pipelines.prepare.cut import Cut
from data_pipelines.raw import media
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError

SILENCE = 3e-4  # root mean square below which sound counts as silence (-70 dB of full scale)


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The encoders of one run; `detect` makes keypoints (F,K,3) or (0,K,3) from frames (F,H,W,3) uint8."""

    text: TextEncoder | StatesFile
    speech: SpeechEncoder
    detect: Callable[[np.ndarray], np.ndarray] | None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


def sound(clip: RawClip, num_frames: int) -> np.ndarray | None:
    """The clip's sound (num_frames * 640,) at 16 kHz, or None if it is missing, silent or unreadable.

    A clip with unreadable sound still trains the other conditions (principle 1).
    """
    if not media.has_audio(clip.path):
        return None
    try:
        wave = media.read_audio(clip.path, start=clip.start, end=clip.start + num_frames / media.FPS)
    except UserError as error:
        print(f"going on without sound: {error}", flush=True)
        return None
    return wave if np.sqrt(np.mean(wave**2)) > SILENCE else None


def annotations(clip: RawClip) -> Mapping[str, np.ndarray]:
    """The arrays of the clip's annotation file: ground truth of rendered clips and conditions; empty without a file.

    Raises UserError if the file cannot be read, or the rows of a condition have the wrong shape.
    """
    if clip.annotations is None:
        return {}
    try:
        with np.load(clip.annotations, allow_pickle=False) as file:
            notes = {name: file[name] for name in ("mouth", "attributes", *_annotated()) if name in file}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {clip.annotations} ({error}); make the raw clips again") from error
    for name, row in _annotated().items():
        if name in notes and notes[name].shape[1:] != row:
            raise UserError(
                f"{clip.annotations}: {name} has shape {notes[name].shape}, not (F, {', '.join(map(str, row))})"
            )
    return notes


def _annotated() -> dict[str, tuple[int, ...]]:
    """Record field -> row shape of every condition with one row per frame, except speech."""
    sizes = {"num_keypoints": kp.NUM_KEYPOINTS}
    tracks = (c for c in conditions.table() if c.kind is conditions.Kind.TRACK and c.name != "audio")
    return {c.record: c.row_shape(sizes) for c in tracks}


def tracks(clip: RawClip, cut: Cut, notes: Mapping[str, np.ndarray], encoders: Encoders) -> dict[str, np.ndarray]:
    """Record field -> rows of the cut, (F, *row) or (0, *row), of the conditions in `_annotated`."""
    found = {}
    for name, row in _annotated().items():
        rows = notes[name][cut.first : cut.first + len(cut.source)] if name in notes else ()
        found[name] = np.asarray(rows, np.float32).reshape(-1, *row)
    return found | {"keypoints": keypoints(clip, cut, found["keypoints"], encoders)}


def keypoints(clip: RawClip, cut: Cut, annotated: np.ndarray, encoders: Encoders) -> np.ndarray:
    """Keypoints (F,K,3) relative to the cut's box, annotated or detected; (0,K,3) if there are none."""
    none = np.zeros((0, kp.NUM_KEYPOINTS, 3), np.float32)
    if not clip.pose:
        return none
    if len(annotated):
        _, height, width, _ = cut.source.shape
        box = cut.box
        return kp.crop(annotated, box.left / width, box.top / height, box.width / width, box.height / height)
    if encoders.detect is None:
        return none
    with encoders.lock:  # one detector serves all threads
        return encoders.detect(np.ascontiguousarray(cut.cropped()))


def truth(name: str, cut: Cut, notes: Mapping[str, np.ndarray]) -> np.ndarray:
    """The annotated "mouth" (F,) of the cut or "attributes" (A,) of its clip; (0,) without annotation."""
    values = np.asarray(notes.get(name, np.zeros(0)), np.float32)
    return values[cut.first : cut.first + len(cut.source)] if name == "mouth" else values
