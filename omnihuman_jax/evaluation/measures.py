"""Measures on observed numbers and frames: pure NumPy functions in float64, nothing learned.

Letters: F pixel frames, K keypoints, R regions. Colours are sRGB in 0..255 or CIE L*a*b* (D65, 2 degrees).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REGIONS = ("skin", "hair", "clothes", "background")
_XYZ_OF_RGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)  # IEC 61966-2-1
_WHITE = _XYZ_OF_RGB.sum(1)


def pearson(a: np.ndarray, b: np.ndarray, *, min_std: float = 1e-3) -> float:
    """Pearson correlation of two series (F,).

    Returns:
      The correlation in [-1, 1], or NaN when either series (nearly) does not vary: its standard deviation is below
      `min_std`, so that the correlation would be one of rounding errors.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two series of one length are needed, not {a.shape} and {b.shape}")
    if len(a) < 3 or a.std() < min_std or b.std() < min_std:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1, 1))


def best_lag(a: np.ndarray, b: np.ndarray, max_lag: int = 5) -> tuple[int, float]:
    """The shift of `a` (F,) against `b` (F,) in frames, up to ±max_lag, at which they correlate most.

    Returns:
      (lag, correlation); a positive lag says that `a` comes later. (0, NaN) when no shift has a correlation.
    """
    known = {}
    for lag in range(-max_lag, max_lag + 1):
        value = pearson(a[max(0, lag) : len(a) + min(0, lag)], b[max(0, -lag) : len(b) - max(0, lag)])
        if np.isfinite(value):
            known[lag] = value
    if not known:
        return 0, float("nan")
    lag = max(known, key=lambda k: (known[k], -abs(k)))
    return lag, known[lag]


def keypoint_error(predicted: np.ndarray, truth: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance between keypoints in percent of the frame diagonal.

    Args:
      predicted: (F,K,>=2) x, y in [0,1] of frame width and height.
      truth: (F,K,3) x, y and confidence; only confidences above 0.5 inside the frame count.
      size: (height, width) in pixels.

    Returns:
      The mean over counted keypoints of all frames, NaN when there is none.
    """
    height, width = size
    predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    if predicted.shape[:2] != truth.shape[:2]:
        raise ValueError(f"keypoints of one shape are needed, not {predicted.shape} and {truth.shape}")
    distance = np.hypot(*np.moveaxis((predicted[..., :2] - truth[..., :2]) * (width, height), -1, 0))
    counted = visible(truth)
    return float(100 * distance[counted].mean() / np.hypot(height, width)) if counted.any() else float("nan")


def visible(keypoints: np.ndarray) -> np.ndarray:
    """(…,K,3) keypoints -> bool (…,K): confidence above 0.5 and inside the frame."""
    inside = (keypoints[..., :2] >= 0).all(-1) & (keypoints[..., :2] <= 1).all(-1)
    return inside & (keypoints[..., 2] > 0.5)


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (…,3) in 0..255 -> CIE L*a*b* (…,3), white D65."""
    c = np.asarray(rgb, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ_OF_RGB.T / _WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def colour_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """CIE76 difference (Delta E) of L*a*b* colours (…,3) -> (…,); about 2.3 is just noticeable."""
    return np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64), axis=-1)


def region_boxes(points: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float, float, float]]:
    """Boxes (x0, y0, x1, y1), in pixels, that hold skin, hair and clothes, from keypoints in pixels.

    Args:
      points: x, y of at least nose, left_eye, right_eye, chin, left_shoulder, right_shoulder.
    """
    eyes = (points["left_eye"] + points["right_eye"]) / 2
    face = max(float(np.linalg.norm(points["chin"] - eyes)), 2.0)  # eyes to chin
    shoulders = (points["left_shoulder"] + points["right_shoulder"]) / 2
    return {
        "skin": _box(points["nose"], 0.35 * face, 0.2 * face),
        "hair": _box(eyes - np.array([0, 0.95 * face]), 0.3 * face, 0.15 * face),
        "clothes": _box(shoulders + np.array([0, 0.6 * face]), 0.6 * face, 0.3 * face),
    }


def _box(centre: np.ndarray, half_width: float, half_height: float) -> tuple[float, float, float, float]:
    return (centre[0] - half_width, centre[1] - half_height, centre[0] + half_width, centre[1] + half_height)


def region_colours(frame: np.ndarray, points: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean L*a*b* colour of each of `REGIONS` (R,3); NaN where less than 4 pixels of a region are in the frame.

    Args:
      frame: uint8 (height, width, 3) sRGB.
      points: as for `region_boxes`; the background is the frame's two upper corners.
    """
    height, width = frame.shape[:2]
    image = lab(frame)
    colours = np.full((len(REGIONS), 3), np.nan)
    for name, (x0, y0, x1, y1) in region_boxes(points).items():
        rows = slice(max(0, round(y0)), max(0, min(height, round(y1) + 1)))
        columns = slice(max(0, round(x0)), max(0, min(width, round(x1) + 1)))
        part = image[rows, columns].reshape(-1, 3)
        if len(part) >= 4:
            colours[REGIONS.index(name)] = part.mean(0)
    h, w = max(2, height // 8), max(2, width // 8)
    corners = np.concatenate([image[:h, :w].reshape(-1, 3), image[:h, -w:].reshape(-1, 3)])
    colours[REGIONS.index("background")] = corners.mean(0)
    return colours


def attribute_distance(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Root mean square difference of attributes (…,A) in units of `scale` (A,), their spread over people -> (…,)."""
    difference = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) / np.asarray(scale, np.float64)
    return np.sqrt((difference**2).mean(-1))


def summarise(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Number, mean, spread and a bootstrap interval of one value a clip; NaN values are left out and counted.

    Returns:
      {"n", "left_out", "mean", "std" (sample standard deviation), "low", "high" (95 % percentile bootstrap interval of
      the mean over clips), "values"}; numbers are None where they do not exist, so that the dict is valid JSON.
    """
    values = [float(v) for v in values]
    known = np.array([v for v in values if np.isfinite(v)])
    result: dict[str, Any] = {"n": len(known), "left_out": len(values) - len(known)}
    result |= dict.fromkeys(("mean", "std", "low", "high"))
    if len(known):
        result["mean"] = float(known.mean())
    if len(known) > 1:
        rows = np.random.default_rng(seed).integers(0, len(known), (resamples, len(known)))
        low, high = np.percentile(known[rows].mean(1), (2.5, 97.5))
        result |= {"std": float(known.std(ddof=1)), "low": float(low), "high": float(high)}
    result["values"] = [v if np.isfinite(v) else None for v in values]
    return result
