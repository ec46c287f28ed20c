"""Cuts a raw clip into training clips of a fixed length and one of the training sizes."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from data_pipelines.raw import media
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.errors import UserError

MAX_OVERLAP = 0.25  # the last frames become one more clip if it shares at most this part with the previous one


class Box(NamedTuple):
    """A rectangle of a picture in pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """A training clip cut from a raw clip."""

    first: int  # index of its first frame in the raw clip at 25 fps
    source: np.ndarray  # (F,H,W,3) uint8 frames at the file's size
    box: Box  # the part of `source` to use
    size: tuple[int, int]  # training size (height, width)

    def cropped(self) -> np.ndarray:
        """(F,h,w,3) frames inside the box, as a view."""
        box = self.box
        return self.source[:, box.top : box.top + box.height, box.left : box.left + box.width]

    def resized(self) -> np.ndarray:
        """(F,height,width,3) uint8 frames at training size."""
        height, width = self.size
        if (self.box.height, self.box.width) == self.size:
            return np.ascontiguousarray(self.cropped())
        method = cv2.INTER_AREA if self.box.height >= height else cv2.INTER_CUBIC
        return np.stack([cv2.resize(frame, (width, height), interpolation=method) for frame in self.cropped()])

    @property
    def untouched(self) -> bool:
        """Whether the frames are used without cropping and resizing."""
        return self.source.shape[1:3] == self.size == (self.box.height, self.box.width)


def parse_sizes(text: str, flag: str = "sizes") -> list[tuple[int, int]]:
    """ "96x96,128x80" -> [(96, 96), (128, 80)], height x width; UserError naming the flag unless divisible by 16."""
    sizes = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) != 2 or not all(number.isdigit() and int(number) for number in numbers):
            raise UserError(f"--{flag}: {part!r} is not HEIGHTxWIDTH; for example 96x96,128x80")
        height, width = map(int, numbers)
        if height % 16 or width % 16:
            raise UserError(f"--{flag}: {part.strip()} must be divisible by 16 (VAE 8 x patch 2) in both directions")
        sizes.append((height, width))
    return sizes


def _difference(size: tuple[int, int], height: float, width: float) -> float:
    """How far the aspect ratios are apart, as |log|."""
    return abs(math.log(size[0] / size[1]) - math.log(height / width))


def choose_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size with the aspect ratio nearest to height x width."""
    return min(sizes, key=lambda size: _difference(size, height, width))


def by_aspect(height: float, width: float, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """All sizes, those with the aspect ratio nearest to height x width first, of equal ones the larger first."""
    return sorted(sizes, key=lambda size: (round(_difference(size, height, width), 6), -size[0] * size[1]))


def centre_box(box: Box, size: tuple[int, int]) -> Box:
    """The largest centred part of `box` with the aspect ratio of `size`."""
    scale = min(box.height / size[0], box.width / size[1])
    height, width = min(round(size[0] * scale), box.height), min(round(size[1] * scale), box.width)
    return Box(box.left + (box.width - width) // 2, box.top + (box.height - height) // 2, width, height)


def _box(clip: RawClip, height: int, width: int) -> Box:
    if clip.crop is None:
        return Box(0, 0, width, height)
    box = Box(*clip.crop)
    if box.left + box.width > width or box.top + box.height > height:
        raise UserError(f"{clip.path}: crop {clip.crop} exceeds the picture of {width}x{height} pixels; correct it")
    return box


def cuts(clip: RawClip, sizes: Sequence[tuple[int, int]], clip_frames: int) -> Iterator[Cut]:
    """Yields consecutive cuts of `clip_frames` frames.

    If enough frames are left at the end, one more cut overlaps its predecessor. A clip that is too short yields
    nothing. Only the frames of one cut are in memory. Raises UserError if the video cannot be read, or the crop exceeds
    the picture.
    """
    recent: deque[np.ndarray] = deque(maxlen=clip_frames)
    count = done = 0

    def cut() -> Cut:
        source = np.stack(recent)
        box = _box(clip, *source.shape[1:3])
        size = choose_size(box.height, box.width, sizes)
        return Cut(count - clip_frames, source, centre_box(box, size), size)

    for frame in media.iter_video(clip.path, start=clip.start, end=clip.end):
        if recent and frame.shape != recent[0].shape:
            raise UserError(f"{clip.path} changes its picture size; convert it to one size")
        recent.append(frame)
        count += 1
        if count - done == clip_frames:
            yield cut()
            done = count
    if done and count - done >= (1 - MAX_OVERLAP) * clip_frames:
        yield cut()
