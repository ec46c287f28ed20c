"""Boxes around the face, the mouth and the lower arms, from keypoints.

A box array is (..., 4, 4) float32: the boxes of `omnihuman_jax.regions.BOXES`, each as left, top, right and bottom in
fractions of the picture; unknown boxes are zeros.
"""

import numpy as np

from data_pipelines import keypoints as kp
from omnihuman_jax import regions

NAMES = regions.BOXES
LIPS = ("mouth_left", "mouth_right", "mouth_top", "mouth_bottom")
FACE = ("nose", "left_eye", "right_eye", "left_ear", "right_ear", "brow_left", "brow_right", "chin", *LIPS)
# Without both eyes and the mouth, the other points do not determine the size of the face.
FACE_NEEDS = ("left_eye", "right_eye", "mouth_top", "mouth_bottom")
ARM = ("elbow", "wrist", "thumb_tip", "index_tip")
ARM_LEAST = 0.04  # minimum padding in picture heights, if only one point is seen or the arm points at the camera


def from_keypoints(keypoints: np.ndarray, aspect: float) -> np.ndarray:
    """The boxes of each frame, clipped to the picture.

    Args:
      keypoints: (F,K,3) in the order of `data_pipelines.keypoints`; confidence 0 if not seen.
      aspect: width / height of the picture in pixels.

    Returns:
      (F,4,4) float32.
    """
    points = np.asarray(keypoints, np.float64) * [aspect, 1, 1]  # in picture heights, so padding is equal in x and y
    points = np.where(np.isfinite(points).all(-1, keepdims=True), points, 0)
    found = {"face": _face(points), "mouth": _mouth(points)}
    found |= {f"{side}_arm": _arm(points, side) for side in ("left", "right")}
    return _clipped(np.stack([found[name] for name in NAMES], 1) / [aspect, 1, aspect, 1])


def crop(boxes: np.ndarray, left: float, top: float, width: float, height: float) -> np.ndarray:
    """Boxes (..., 4, 4) relative to a crop and clipped to it; left, top, width, height are fractions of the picture.

    Raises:
      ValueError: width or height is not positive.
    """
    if width <= 0 or height <= 0:
        raise ValueError(f"a crop needs a positive size, got {width} x {height}")
    moved = (np.asarray(boxes, np.float64) - [left, top, left, top]) / [width, height, width, height]
    return np.where(known(boxes)[..., None], _clipped(moved), 0).astype(np.float32)


def known(boxes: np.ndarray) -> np.ndarray:
    """(...,) bool: which boxes (..., 4) have an area."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def _clipped(boxes: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) float32 inside the picture; zeros if nothing is left or the box is NaN."""
    inside = np.clip(np.nan_to_num(boxes, nan=0.0), 0, 1).astype(np.float32)
    return np.where(known(inside)[..., None], inside, np.float32(0))


def _around(points: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The box (F,4) around the visible named points, NaN if none; and (F,N), which points are visible."""
    chosen = points[:, [kp.INDEX[name] for name in names]]
    seen = chosen[..., 2] > 0
    low = np.where(seen[..., None], chosen[..., :2], np.inf).min(1)
    high = np.where(seen[..., None], chosen[..., :2], -np.inf).max(1)
    return np.where(seen.any(1)[:, None], np.concatenate([low, high], 1), np.nan), seen


def _at(points: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """y (F,) of a point, and whether it is visible (F,)."""
    return points[:, kp.INDEX[name], 1], points[:, kp.INDEX[name], 2] > 0


def _mouth(points: np.ndarray) -> np.ndarray:
    """(F,4): from above the upper lip to halfway between lower lip and chin; NaN unless all four points are visible.

    The points follow the inner edge of the lips, so an open mouth moves the lower edge down.
    """
    box, seen = _around(points, LIPS)
    box = np.where(seen.all(1)[:, None], box, np.nan)
    left, top, right, bottom = box.T
    width = right - left
    chin, has_chin = _at(points, "chin")
    below = np.where(has_chin, np.maximum(0.5 * (chin - bottom), 0.3 * width), 0.45 * width)
    return np.stack([left - 0.35 * width, top - 0.3 * width, right + 0.35 * width, bottom + below], 1)


def _face(points: np.ndarray) -> np.ndarray:
    """(F,4): from the hair line to below the chin, with side margins; NaN unless all of `FACE_NEEDS` are visible."""
    box, _ = _around(points, FACE)
    needed = _around(points, FACE_NEEDS)[1].all(1)
    left, top, right, bottom = np.where(needed[:, None], box, np.nan).T
    # Brows to chin is two thirds of a face. Without the chin, the visible points end at the mouth.
    has_chin = _at(points, "chin")[1]
    below = np.where(has_chin, 0.08, 0.6) * (bottom - top)
    height = np.where(has_chin, 1.0, 1.5) * (bottom - top)
    side = 0.08 * height
    return np.stack([left - side, top - 0.45 * height, right + side, bottom + below], 1)


def _arm(points: np.ndarray, side: str) -> np.ndarray:
    """(F,4): around the visible points of elbow, wrist and fingertips; NaN if none."""
    box, _ = _around(points, tuple(f"{side}_{joint}" for joint in ARM))
    pad = np.maximum(0.2 * np.maximum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]), ARM_LEAST)[:, None]
    return box + np.concatenate([-pad, -pad, pad, pad], 1)
