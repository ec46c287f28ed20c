"""The 28 body, hand and face keypoints, the same for rendered and detected people.

A keypoint array is (..., K, 3) float32: x and y as fractions of the frame's width and height (0,0 is the top left
corner), and a confidence in 0..1, 0 if the point is not in the picture. "left" is the person's own left.
"""

import numpy as np

KEYPOINTS = tuple(
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle left_index_tip right_index_tip "
    "left_thumb_tip right_thumb_tip mouth_left mouth_right mouth_top mouth_bottom chin brow_left brow_right".split()
)
NUM_KEYPOINTS = len(KEYPOINTS)
INDEX = {name: i for i, name in enumerate(KEYPOINTS)}


def _mirrored(name: str) -> str:
    swap = {"left": "right", "right": "left"}
    return "_".join(swap.get(part, part) for part in name.split("_"))


# FLIP[k]: the point that replaces point k when the picture is mirrored.
FLIP = tuple(INDEX[_mirrored(name)] for name in KEYPOINTS)


def hide_outside(keypoints: np.ndarray) -> np.ndarray:
    """Zeroes the keypoints (..., K, 3) that are outside the frame, not finite, or not seen."""
    keypoints = np.asarray(keypoints, np.float32)
    position = keypoints[..., :2]
    inside = np.isfinite(keypoints).all(-1) & (position >= 0).all(-1) & (position <= 1).all(-1)
    return np.where((inside & (keypoints[..., 2] > 0))[..., None], keypoints, 0).astype(np.float32)


def crop(keypoints: np.ndarray, left: float, top: float, width: float, height: float) -> np.ndarray:
    """Keypoints (..., K, 3) relative to a crop; left, top, width and height are fractions of the full frame."""
    if width <= 0 or height <= 0:
        raise ValueError(f"a crop needs a positive size, got {width} x {height}")
    moved = np.array(keypoints, np.float32)
    moved[..., 0] = (moved[..., 0] - left) / width
    moved[..., 1] = (moved[..., 1] - top) / height
    return hide_outside(moved)
