"""Output sizes, and fitting a picture of any size to one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from omnihuman_jax.errors import UserError


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises UserError, naming the nearest sizes that work, unless the sides (pixels) are multiples of `multiple`."""
    if height > 0 and width > 0 and height % multiple == 0 and width % multiple == 0:
        return
    down, up = (
        tuple(max(multiple, multiple * rounding(side / multiple)) for side in (height, width))
        for rounding in (math.floor, math.ceil)
    )
    choices = " or ".join(f"--height={h} --width={w}" for h, w in dict.fromkeys((down, up)))
    raise UserError(f"size {height}x{width} (height x width) is not divisible by {multiple}; the nearest are {choices}")


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `sizes` with the nearest aspect ratio; of equally near ones, the largest."""
    aspect = math.log(height / width)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 6), -size[0] * size[1]))


def complete_size(
    height: int | None, width: int | None, image: tuple[int, int], sizes: Sequence[tuple[int, int]], multiple: int
) -> tuple[int, int]:
    """The output size (height, width) in pixels, with missing sides filled in.

    Without both: the trained size of `sizes` nearest in aspect ratio to `image`, the (height, width) of the reference.
    Without one: it follows the reference's aspect ratio, rounded to `multiple`. Raises UserError as `check_size` does.
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
    """Scales a picture uint8 (h, w, 3) to cover height x width, keeping its aspect ratio, and crops the centre."""
    scale = max(height / image.shape[0], width / image.shape[1])
    rows, columns = (max(side, round(old * scale)) for side, old in ((height, image.shape[0]), (width, image.shape[1])))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC  # area averaging shrinks without aliasing
    resized = cv2.resize(image, (columns, rows), interpolation=interpolation)
    top, left = (rows - height) // 2, (columns - width) // 2
    return resized[top : top + height, left : left + width]


def cover_points(points: np.ndarray, size: tuple[int, int], height: int, width: int) -> np.ndarray:
    """Moves keypoints as `cover` moves pixels, from a frame of `size` (height, width) to one of height x width pixels.

    `points` (..., 3) are x and y in [0, 1] of the old frame's width and height, and confidence. The result is in [0, 1]
    of the new frame, and all zeros for a point that is absent or cropped away.
    """
    scale = max(height / size[0], width / size[1])
    seen_x, seen_y = width / (size[1] * scale), height / (size[0] * scale)
    x = (points[..., 0] - 0.5) / seen_x + 0.5
    y = (points[..., 1] - 0.5) / seen_y + 0.5
    seen = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1) & (points[..., 2] > 0)
    return np.where(seen[..., None], np.stack([x, y, points[..., 2]], axis=-1), 0.0).astype(np.float32)
