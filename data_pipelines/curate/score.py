"""Step 2: the scores of a clip, from one decoding."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from data_pipelines import keypoints as kp
from data_pipelines.curate import people, sync, voice
from data_pipelines.curate.fingerprint import Fingerprint
from data_pipelines.curate.motion import Motion
from data_pipelines.curate.picture import Picture
from data_pipelines.curate.scenes import Span
from data_pipelines.encoders import pose
from data_pipelines.prepare import features
from data_pipelines.prepare.cut import Box
from data_pipelines.raw import media
from data_pipelines.raw.manifest import RawClip
from data_pipelines.raw.sound import Sound
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS

VERSION = 1
SIDE = 480  # pixels of the shorter side, at most, that are measured
PICTURE_EVERY = 5  # frames
FACES_EVERY = 12  # frames
SPEECH = 0.5  # probability of speech
THUMBNAIL = 96  # pixels high


class Detector(Protocol):
    """Finds people, as `encoders.pose.PoseDetector` does."""

    def detect_people(
        self, frames: Iterable[np.ndarray], count: int, faces_every: int
    ) -> tuple[np.ndarray, list[np.ndarray]]: ...


class Tools(NamedTuple):
    """What scoring needs besides the clip: loaded once a process.

    Attributes:
      detector: None to leave people, pose and lip-sync unmeasured, except where a clip has annotations.
      voice_model: ONNX file of the voice activity.
    """

    detector: Detector | None
    voice_model: pathlib.Path


class Scored(NamedTuple):
    """A clip's result.

    Attributes:
      result: scores, notes, framing, hashes, sync_curve, and seconds by step.
      arrays: cells (S,16), and keypoints (F,K,3) in fractions of the whole picture if a person was found.
      thumbnail: a JPEG of three frames side by side.
    """

    result: dict[str, Any]
    arrays: dict[str, np.ndarray]
    thumbnail: bytes


class _Watch:
    """Seconds by step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - begin


def read_sound(clip: RawClip, num_frames: int) -> tuple[Sound | None, str]:
    """The sound of a source of this length at 25 fps, and a note: why there is none, or what is odd about it."""
    try:
        tracks = media.audio_tracks(clip.path)
        if not tracks:
            return None, "no sound"
        found = media.read_sound(clip.path, start=clip.start, end=clip.start + num_frames / FPS)
    except UserError as error:
        return None, f"sound cannot be used: {error}"
    return found, f"{tracks} sound tracks, the default one is used" if tracks > 1 else ""


class _Measures:
    """The measures that see every frame of a clip."""

    def __init__(self, count: int):
        self.picture, self.motion, self.fingerprint = Picture(), Motion(), Fingerprint()
        self._count, self._before, self._number = count, None, 0
        self._shown, self.thumbnails = {int(count * part) for part in (1 / 6, 1 / 2, 5 / 6)}, []

    def add(self, frame: np.ndarray) -> None:
        luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        if self._number % PICTURE_EVERY == 0:
            self.picture.add(luma)
        # Pairs of neighbours, so that fast motion is not lost; the last of a short clip too.
        if self._before is not None and self._number % PICTURE_EVERY == 1:
            self.motion.add(self._before, luma)
        self.fingerprint.add(luma)
        if self._number in self._shown:
            width = round(frame.shape[1] * THUMBNAIL / frame.shape[0])
            self.thumbnails.append(cv2.resize(frame, (width, THUMBNAIL), interpolation=cv2.INTER_AREA))
        self._before, self._number = luma, self._number + 1

    def thumbnail(self) -> bytes:
        strip = np.concatenate(self.thumbnails, axis=1)
        return cv2.imencode(".jpg", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def score(clip: RawClip, span: Span, size: tuple[int, int], sound: tuple[Sound | None, str], tools: Tools) -> Scored:
    """Scores one clip.

    Args:
      size: height and width of the source's picture.
      sound: `read_sound` of the whole source.

    Raises UserError if it cannot be decoded, its annotations are wrong, or the detector fails.
    """
    watch = _Watch()
    count, box = span.last - span.first, span.box or Box(0, 0, size[1], size[0])
    measures = _Measures(count)
    with watch("people"):
        points, faces = _people(clip, span, box, size, _frames(clip, span, box, measures, watch), tools)
    for step in ("decode", "picture"):  # these ran inside
        watch.seconds["people"] -= watch.seconds.get(step, 0.0)
    scores: dict[str, float | None] = {"side": float(min(box.height, box.width))}
    scores |= measures.picture.scores() | measures.motion.scores()
    result: dict[str, Any] = {"frames": count, "notes": [], "framing": "not measured", "sync_curve": []}
    arrays = {"cells": measures.fingerprint.cells().astype(np.float16)}
    if points is not None:
        scores |= people.scores(points, faces, box.width, box.height)
        result["framing"] = people.framing(scores)
        if pose.is_found(points):
            arrays["keypoints"] = _in_whole_picture(points, box, size)
    with watch("sound"):
        scores |= _sound_scores(sound, span, points, box, tools, result)
    if scores.get("people") and scores["people"] > 1:
        result["notes"].append(f"{scores['people']:.0f} people in the picture")
    result["scores"] = {name: value if value is None else round(value, 5) for name, value in scores.items()}
    result["hashes"] = [f"{value:016x}" for value in measures.fingerprint.hashes()]
    result["seconds"] = {step: round(value, 4) for step, value in watch.seconds.items()}
    return Scored(result, arrays, measures.thumbnail())


def _frames(clip: RawClip, span: Span, box: Box, measures: _Measures, watch: _Watch) -> Iterator[np.ndarray]:
    """Yields the clip's frames inside the box, at most 480 pixels high or wide, and measures them on the way."""
    start = clip.start + span.first / FPS
    frames = media.iter_video(clip.path, start=start, end=clip.start + span.last / FPS)
    scale = min(1.0, SIDE / min(box.height, box.width))
    size = (round(box.width * scale), round(box.height * scale))
    while True:
        with watch("decode"):
            frame = next(frames, None)
        if frame is None:
            return
        with watch("picture"):
            frame = frame[box.top : box.top + box.height, box.left : box.left + box.width]
            if scale < 1:
                frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            measures.add(frame)
        yield frame


def _people(
    clip: RawClip, span: Span, box: Box, size: tuple[int, int], frames: Iterator[np.ndarray], tools: Tools
) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """Keypoints (F,K,3) in fractions of the box, and faces; annotated ones if the clip has them, else detected."""
    notes = features.annotations(clip)
    annotated = next((notes[name] for name in ("keypoints", "truth_keypoints") if len(notes.get(name, ()))), None)
    if annotated is None and tools.detector is not None:
        return tools.detector.detect_people(frames, span.last - span.first, FACES_EVERY)
    for _ in frames:  # they are measured on the way
        pass
    if annotated is None:
        return None, []
    rows = annotated[span.first : span.last]
    if len(rows) < span.last - span.first:
        raise UserError(
            f"{clip.annotations} has {len(annotated)} rows, fewer than {clip.path} has frames; make it again"
        )
    place = (box.left / size[1], box.top / size[0], box.width / size[1], box.height / size[0])
    return kp.crop(rows, *place), []


def _in_whole_picture(points: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Keypoints in fractions of a box -> in fractions of the picture (height, width) that it is part of."""
    moved = points.astype(np.float32)
    moved[..., 0] = (box.left + moved[..., 0] * box.width) / size[1]
    moved[..., 1] = (box.top + moved[..., 1] * box.height) / size[0]
    return np.where(moved[..., 2:] > 0, moved, 0)


def _sound_scores(
    sound: tuple[Sound | None, str],
    span: Span,
    points: np.ndarray | None,
    box: Box,
    tools: Tools,
    result: dict[str, Any],
) -> dict[str, float | None]:
    """Scores of speech and lip-sync; adds to the notes of `result`, and its sync curve."""
    found, note = sound
    count = span.last - span.first
    part = features.part_of(found, span.first, count)
    if found is not None and part is None:
        note = "the sound covers less than half of it"
    elif part is not None and np.sqrt(np.mean(part**2)) <= features.SILENCE:
        note, part = "the sound is silence", None
    result["notes"] += [note] if note else []
    opening = None if points is None else sync.mouth_opening(points, box.width, box.height)
    scores: dict[str, float | None] = {"mouth_motion": None if opening is None else float(np.std(opening))}
    if part is None:
        return scores | {"speech_share": 0.0}
    speech = voice.activity(part, count, tools.voice_model)
    if opening is not None:
        result["sync_curve"] = sync.curve(opening, sync.speech_energy(part, count))
    return scores | {"speech_share": float((speech > SPEECH).mean())}
