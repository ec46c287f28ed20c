"""Extra clip from a cut: a fixed crop of the face, in which the lips cover more pixels and latent cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines import boxes
from data_pipelines.prepare.cut import Box, Cut, by_aspect

MIN_SEEN = 0.9  # share of frames in which the face must be known, and of those, in which the crop must contain it
EXTENT = 1.25  # side of the crop as a multiple of the face extent over the clip
LEAST_EXTENT = 1.05  # minimum of this multiple, if the picture or `MAX_PART` leave less room
MAX_ENLARGED = 1.6  # enlargement limit; more would train on blur
MAX_PART = 0.85  # of the area of the cut; a larger crop would look the same as the cut
OUTLIERS = 0.02  # share of frames ignored at either end of the extent, since a detector jumps occasionally


def choose(cut: Cut, found: np.ndarray, sizes: Sequence[tuple[int, int]]) -> Cut | None:
    """The cut cropped to the face, at the first size that fits; None if no size fits.

    Sizes (height, width) are tried by aspect ratio, nearest to the face first, then from large to small. A size does
    not fit if the crop would be enlarged by more than `MAX_ENLARGED`, would have to cover more than `MAX_PART` of the
    cut, or would lose the face.

    Args:
      found: (F,4,4) boxes relative to the box of the cut, or no rows.
    """
    if not len(found) or not sizes:
        return None
    face, mouth = (found[:, boxes.NAMES.index(name)].astype(np.float64) for name in ("face", "mouth"))
    seen = boxes.known(face) & boxes.known(mouth)
    if seen.mean() < MIN_SEEN:
        return None
    picture = np.array([cut.box.width, cut.box.height])
    face, mouth = face[seen] * np.tile(picture, 2), mouth[seen] * np.tile(picture, 2)
    low, high = np.quantile(face[:, :2], OUTLIERS, axis=0), np.quantile(face[:, 2:], 1 - OUTLIERS, axis=0)
    # Across the middle of the mouth, and down at the upper edge of its box, which lies between nose and lips.
    centre = np.array([(mouth[:, 0] + mouth[:, 2]).mean() / 2, mouth[:, 1].mean()])
    for size in by_aspect(*(high - low)[::-1], sizes):
        box = _box(picture, low, high, centre, size)
        if box is None:
            continue
        inside = (face[:, :2] >= [box.left - 1, box.top - 1]).all(1)
        inside &= (face[:, 2:] <= [box.left + box.width + 1, box.top + box.height + 1]).all(1)
        small = box.height * MAX_ENLARGED < size[0] or box.width * MAX_ENLARGED < size[1]
        if not small and inside.mean() >= MIN_SEEN:
            box = box._replace(left=cut.box.left + box.left, top=cut.box.top + box.top)
            return dataclasses.replace(cut, box=box, size=size)
    return None


def _box(
    picture: np.ndarray, low: np.ndarray, high: np.ndarray, centre: np.ndarray, size: tuple[int, int]
) -> Box | None:
    """A box in the picture around `centre` with the aspect ratio of `size` that holds low..high; None if too big.

    Args:
      picture: width, height in pixels.
      low, high: (x, y) corners of the face over the clip, pixels.
      centre: (x, y), pixels.
    """
    shape = np.array([size[1], size[0]])
    face = ((high - low) / shape).max()
    room = min((picture / shape).min(), np.sqrt(MAX_PART * picture.prod() / shape.prod()))
    if room < LEAST_EXTENT * face:
        return None
    sides = np.maximum(np.floor(shape * min(EXTENT * face, room) + 1e-6), 1)
    corner = np.clip(centre - sides / 2, high - sides, np.maximum(low, high - sides))  # keeps an off-centre face inside
    corner = np.rint(np.clip(corner, 0, picture - sides))
    return Box(*(int(value) for value in (*corner, *sides)))


def place(whole: Cut, part: Cut) -> tuple[float, float, float, float]:
    """Left, top, width and height of the box of `part` as fractions of the box of `whole`."""
    outer, inner = whole.box, part.box
    return (
        (inner.left - outer.left) / outer.width,
        (inner.top - outer.top) / outer.height,
        inner.width / outer.width,
        inner.height / outer.height,
    )
