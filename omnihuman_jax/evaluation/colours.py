"""Colours of regions of a person, in float64. R regions; sRGB in 0..255 or CIE L*a*b* (D65, 2 degrees)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

REGIONS = ("skin", "hair", "clothes", "background")
_XYZ_OF_RGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)  # IEC 61966-2-1
_WHITE = _XYZ_OF_RGB.sum(1)


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
    """Boxes (x0, y0, x1, y1) of skin, hair and clothes, in pixels, from keypoints in pixels.

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
    """Mean L*a*b* colour of each of `REGIONS` (R,3); NaN if fewer than 4 pixels of a region are in the frame.

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
