"""Sizes the model can make, and how a picture of any size is fitted to one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from omnihuman_jax.errors import UserError


def check_size(height: int, width: int, multiple: int) -> None:
    """Refuses a size the VAE and the patches do not divide.

    Args:
      height: pixels.
      width: pixels.
      multiple: pixels a token covers along one side (VAE factor times patch size).

    Raises:
      UserError: naming the nearest sizes that work.
    """
    if height > 0 and width > 0 and height % multiple == 0 and width % multiple == 0:
        return
    down, up = (
        tuple(max(multiple, multiple * rounding(side / multiple)) for side in (height, width))
        for rounding in (math.floor, math.ceil)
    )
    choices = " or ".join(f"--height={h} --width={w}" for h, w in dict.fromkeys((down, up)))
    raise UserError(f"size {height}x{width} (height x width) is not divisible by {multiple}; the nearest are {choices}")


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `sizes` whose aspect ratio is nearest; the largest of equally near ones."""
    aspect = math.log(height / width)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 6), -size[0] * size[1]))


def complete_size(
    height: int | None, width: int | None, image: tuple[int, int], sizes: Sequence[tuple[int, int]], multiple: int
) -> tuple[int, int]:
    """The output size: as asked, or with what is not asked for filled in.

    Neither given: the trained size nearest in aspect ratio. One given: the other follows the image's
    aspect ratio, rounded to `multiple`.

    Args:
      height: pixels or None.
      width: pixels or None.
      image: (height, width) of the reference image.
      sizes: trained sizes.
      multiple: see `check_size`.

    Raises:
      UserError: the size is not divisible.
    """
    if height is None and width is None:
        height, width = nearest_size(*image, sizes)
    elif height is None:
        height = multiple * max(1, round(width * image[0] / image[1] / multiple))
    elif width is None:
        width = multiple * max(1, round(height * image[1] / image[0] / multiple))
    check_size(height, width, multiple)
    return height, width


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales a picture to cover height x width, keeping its aspect ratio, and crops the centre.

    Args:
      image: uint8 (h, w, 3).
      height: pixels.
      width: pixels.

    Returns:
      uint8 (height, width, 3).
    """
    scale = max(height / image.shape[0], width / image.shape[1])
    rows, columns = (max(side, round(old * scale)) for side, old in ((height, image.shape[0]), (width, image.shape[1])))
    # Area averaging is the filter that does not alias when shrinking.
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(image, (columns, rows), interpolation=how)
    top, left = (rows - height) // 2, (columns - width) // 2
    return resized[top : top + height, left : left + width]


def cover_points(points: np.ndarray, size: tuple[int, int], height: int, width: int) -> np.ndarray:
    """Moves keypoints the way `cover` moves the pixels.

    Args:
      points: (..., 3) x, y in [0, 1] of the old frame's width and height, confidence.
      size: (height, width) of the old frame.
      height: pixels of the new frame.
      width: pixels of the new frame.

    Returns:
      (..., 3) in [0, 1] of the new frame; all three values of a point that is absent or cropped away are 0.
    """
    scale = max(height / size[0], width / size[1])
    seen_x, seen_y = width / (size[1] * scale), height / (size[0] * scale)
    x = (points[..., 0] - 0.5) / seen_x + 0.5
    y = (points[..., 1] - 0.5) / seen_y + 0.5
    seen = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1) & (points[..., 2] > 0)
    return np.where(seen[..., None], np.stack([x, y, points[..., 2]], axis=-1), 0.0).astype(np.float32)
