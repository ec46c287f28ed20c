"""Sharpness, exposure and black bars."""

from __future__ import annotations

import cv2
import numpy as np

from data_pipelines.prepare.cut import Box

DARK, BRIGHT = 8, 247  # luma beyond which a pixel counts as clipped
GRID, SHARPEST = 8, 90  # cells of a side, and their percentile
BAR_LUMA = 24  # black in limited range, and a codec's noise on it
BAR_SHARE = 0.98  # part of a row that must be black: codecs smear the picture's edge into the bar
MAX_BARS = 0.6  # larger bars are a dark picture


class Picture:
    """Collects the sharpness and exposure of frames."""

    def __init__(self):
        self._rows: list[tuple[float, float, float]] = []

    def add(self, luma: np.ndarray) -> None:
        """Adds a frame (H,W) uint8."""
        clipped = ((luma < DARK) | (luma > BRIGHT)).mean()
        self._rows.append((_sharpness(luma), luma.mean() / 255, clipped))

    def scores(self) -> dict[str, float]:
        """Medians over the frames; see `scores.TABLE`."""
        sharpness, brightness, clipped = np.median(self._rows, axis=0)
        return {"sharpness": float(sharpness), "brightness": float(brightness), "clipped": float(clipped)}


def _sharpness(luma: np.ndarray) -> float:
    """Variance of the Laplacian in the sharper parts of the picture, because a plain or blurred background is fine."""
    edges = cv2.Laplacian(luma, cv2.CV_64F)
    cells = (cell for row in np.array_split(edges, GRID) for cell in np.array_split(row, GRID, axis=1))
    return float(np.percentile([cell.var() for cell in cells], SHARPEST))


def bars(frame: np.ndarray) -> tuple[int, int, int, int] | None:
    """Width in pixels of the black bars (left, top, right, bottom) of an RGB frame; None if it is black all over."""
    black = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) <= BAR_LUMA
    rows, columns = black.mean(1) < BAR_SHARE, black.mean(0) < BAR_SHARE
    if not rows.any() or not columns.any():
        return None
    return int(columns.argmax()), int(rows.argmax()), int(columns[::-1].argmax()), int(rows[::-1].argmax())


def without_bars(found: list[tuple[int, int, int, int]], height: int, width: int) -> Box | None:
    """The picture inside the bars that all frames have, with even sides; None without bars.

    Args:
      found: results of `bars` for some frames of height x width pixels.
    """
    if not found:
        return None
    left, top, right, bottom = np.min(found, axis=0)
    if not (left or top or right or bottom):
        return None
    left, top = left + left % 2, top + top % 2  # chroma is coded for pairs of pixels
    inner_width, inner_height = (width - left - right) // 2 * 2, (height - top - bottom) // 2 * 2
    if inner_width * inner_height < (1 - MAX_BARS) * width * height:
        return None
    return Box(int(left), int(top), int(inner_width), int(inner_height))
