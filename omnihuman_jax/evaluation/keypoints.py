"""Visibility and error of keypoints: NumPy in float64. F pixel frames, K keypoints."""

from __future__ import annotations

import chex
import numpy as np


def keypoint_error(predicted: np.ndarray, truth: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance of the `visible` keypoints in percent of the frame diagonal; NaN if there are none.

    Args:
      predicted: (F,K,>=2) x, y in [0,1] of frame width and height.
      truth: (F,K,3) x, y and confidence.
      size: (height, width) in pixels.
    """
    height, width = size
    predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    chex.assert_equal_shape_prefix([predicted, truth], 2)
    distance = np.hypot(*np.moveaxis((predicted[..., :2] - truth[..., :2]) * (width, height), -1, 0))
    counted = visible(truth)
    return float(100 * distance[counted].mean() / np.hypot(height, width)) if counted.any() else float("nan")


def visible(keypoints: np.ndarray) -> np.ndarray:
    """(…,K,3) keypoints -> bool (…,K): confidence above 0.5 and inside the frame."""
    inside = (keypoints[..., :2] >= 0).all(-1) & (keypoints[..., :2] <= 1).all(-1)
    return inside & (keypoints[..., 2] > 0.5)
