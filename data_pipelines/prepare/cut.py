"""Cuts a raw clip into clips of a fixed number of frames at one of the training sizes."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from data_pipelines.raw import media
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.errors import UserError

# The frames left over at the end become one more clip if it shares at most this part with the clip before.
MAX_OVERLAP = 0.25


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of a picture in pixels."""

    left: int
    top: int
    width: int
    height: int

    def of(self, frames: np.ndarray) -> np.ndarray:
        """That part of (...,H,W,3) frames, as a view."""
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width, :]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A clip of a raw clip.

    Attributes:
      first: its first frame, counted at 25 fps from the raw clip's start.
      source: (F,H,W,3) uint8 frames at the size of the file.
      box: the part of `source` that is used.
      size: (height, width) to train at.
    """

    first: int
    source: np.ndarray
    box: Box
    size: tuple[int, int]

    def cropped(self) -> np.ndarray:
        """(F,h,w,3) frames of the used part, not resized."""
        return self.box.of(self.source)

    def resized(self) -> np.ndarray:
        """(F,height,width,3) uint8 frames at training size."""
        height, width = self.size
        if (self.box.height, self.box.width) == self.size:
            return np.ascontiguousarray(self.cropped())
        shrinks = self.box.height >= height
        method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        return np.stack([cv2.resize(frame, (width, height), interpolation=method) for frame in self.cropped()])

    @property
    def untouched(self) -> bool:
        """Whether the used part is the whole picture at its own size."""
        return self.source.shape[1:3] == self.size == (self.box.height, self.box.width)


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "96x96,128x80" -> [(96, 96), (128, 80)], height x width.

    Raises:
      UserError: a malformed size, or one that 16 (the VAE's 8 times the model's 2) does not divide.
    """
    sizes = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) != 2 or not all(number.isdigit() and int(number) for number in numbers):
            raise UserError(f"--sizes: {part!r} is not HEIGHTxWIDTH; for example 96x96,128x80")
        height, width = map(int, numbers)
        if height % 16 or width % 16:
            raise UserError(f"--sizes: {part.strip()} must be divisible by 16 (VAE 8 x patch 2) in both directions")
        sizes.append((height, width))
    return sizes


def choose_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest to that of a picture of height x width."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))


def centre_box(box: Box, size: tuple[int, int]) -> Box:
    """The largest part of `box` with the aspect ratio of `size`, in its middle."""
    scale = min(box.height / size[0], box.width / size[1])
    height, width = min(round(size[0] * scale), box.height), min(round(size[1] * scale), box.width)
    return Box(box.left + (box.width - width) // 2, box.top + (box.height - height) // 2, width, height)


def _box(clip: RawClip, height: int, width: int) -> Box:
    if clip.crop is None:
        return Box(0, 0, width, height)
    box = Box(*clip.crop)
    if box.left + box.width > width or box.top + box.height > height:
        raise UserError(f"the crop of {clip.path} ({clip.crop}) leaves its picture of {width}x{height} pixels")
    return box


def cuts(clip: RawClip, sizes: Sequence[tuple[int, int]], clip_frames: int) -> Iterator[Cut]:
    """Yields the cuts of `clip_frames` frames of a raw clip, one after the other.

    What is left at the end makes one more, overlapping its predecessor, if it is long enough; a clip that is too short
    yields nothing. Only one cut's frames are held at a time.

    Raises:
      UserError: the video cannot be read, or the crop leaves the picture.
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
    left = count - done
    if done and left >= (1 - MAX_OVERLAP) * clip_frames:
        yield cut()
