"""Step 1: a source's shots and black bars -> clips.

Shots by PySceneDetect (Castellano, BSD): AdaptiveDetector, or ContentDetector.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import cv2
import numpy as np

from data_pipelines.curate import picture
from data_pipelines.curate.config import CONTENT
from data_pipelines.prepare.cut import Box
from data_pipelines.raw import media
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS

VERSION = 1
SIDE = 144  # pixels of the shorter side at which shots are detected
BARS_EVERY = 12  # frames
MIN_SHOT = 10  # frames


@dataclasses.dataclass(frozen=True)
class Span:
    """A clip of a source.

    Attributes:
      first, last: its frames at 25 fps, from the source's `start`; last is excluded.
      box: the picture without black bars, and inside the source's crop, in pixels; None for all of it.
      problem: why it is dropped without being scored, or "".
    """

    first: int
    last: int
    box: Box | None = None
    problem: str = ""


def _detector(cuts: dict[str, Any]):
    from scenedetect.detectors import AdaptiveDetector, ContentDetector

    if cuts["detector"] == CONTENT:
        return ContentDetector(threshold=cuts["content_threshold"], min_scene_len=MIN_SHOT)
    return AdaptiveDetector(adaptive_threshold=cuts["adaptive_threshold"], min_scene_len=MIN_SHOT)


def find(clip: RawClip, cuts: dict[str, Any]) -> dict[str, Any]:
    """Decodes a source once.

    Args:
      cuts: the section of the config.

    Returns:
      frames: their number at 25 fps. height, width: pixels of the whole picture. cuts: the first frame of each new
      shot. bars: [frame, left, top, right, bottom] of some frames, in pixels, inside the source's crop.

    Raises UserError if it cannot be decoded, or changes its size.
    """
    from scenedetect.common import FrameTimecode

    detector, found, bars, count, shape = _detector(cuts), [], [], 0, None
    for frame in media.iter_video(clip.path, start=clip.start, end=clip.end):
        if shape is not None and frame.shape != shape:
            raise UserError(f"{clip.path} changes its picture size; convert it to one size")
        shape = frame.shape
        inside = _cropped(frame, clip)
        if count % BARS_EVERY == 0 and (bar := picture.bars(inside)) is not None:
            bars.append([count, *bar])
        scale = min(1.0, SIDE / min(inside.shape[:2]))
        small = cv2.resize(inside, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        code = FrameTimecode(count, float(FPS))
        found += detector.process_frame(code, cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        count += 1
    found += detector.post_process(FrameTimecode(count, float(FPS)))
    starts = sorted({code.frame_num for code in found})
    return {"frames": count, "height": shape[0], "width": shape[1], "cuts": starts, "bars": bars}


def _cropped(frame: np.ndarray, clip: RawClip) -> np.ndarray:
    if clip.crop is None:
        return frame
    left, top, width, height = clip.crop
    if left + width > frame.shape[1] or top + height > frame.shape[0]:
        size = f"{frame.shape[1]}x{frame.shape[0]}"
        raise UserError(f"{clip.path}: crop {clip.crop} exceeds the picture of {size} pixels; correct it")
    return frame[top : top + height, left : left + width]


def spans(clip: RawClip, found: dict[str, Any], cuts: dict[str, Any]) -> list[Span]:
    """The clips of a source, those that are too short included, from the result of `find`."""
    least, most = round(cuts["min_seconds"] * FPS), round(cuts["max_seconds"] * FPS)
    edges = [0, *found["cuts"], found["frames"]]
    short_source = found["frames"] < least
    clips = []
    for first, last in zip(edges[:-1], edges[1:]):
        length = last - first
        if length < least and not (short_source and cuts["keep_short"] and len(edges) == 2):
            hint = "; cuts.keep_short keeps such sources" if short_source and len(edges) == 2 else ""
            what = f"{length / FPS:g} s, shorter than {cuts['min_seconds']:g} s{hint}"
            clips.append(Span(first, last, problem=what))
            continue
        parts = math.ceil(length / most)
        marks = np.linspace(first, last, parts + 1).round().astype(int).tolist()
        clips += [Span(a, b, _box(clip, found, a, b)) for a, b in zip(marks[:-1], marks[1:])]
    return clips


def _box(clip: RawClip, found: dict[str, Any], first: int, last: int) -> Box | None:
    """The source's crop without the black bars of these frames."""
    outer = Box(*clip.crop) if clip.crop else Box(0, 0, found["width"], found["height"])
    bars = [tuple(bar) for frame, *bar in found["bars"] if first <= frame < last]
    inner = picture.without_bars(bars, outer.height, outer.width)
    if inner is None:
        return outer if clip.crop else None
    return inner._replace(left=outer.left + inner.left, top=outer.top + inner.top)
