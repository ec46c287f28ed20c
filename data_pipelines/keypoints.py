"""The 28 body, hand and face points of a person, the same for rendered and detected people.

A keypoint array is (..., K, 3) float32: x and y as fractions of the frame's width and height (0,0 the top left corner),
and a confidence in 0..1 that is 0 where the point is not in the picture. "left" is the person's own left.
"""

import numpy as np

KEYPOINTS = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
    "left_index_tip",
    "right_index_tip",
    "left_thumb_tip",
    "right_thumb_tip",
    "mouth_left",
    "mouth_right",
    "mouth_top",
    "mouth_bottom",
    "chin",
    "brow_left",
    "brow_right",
)
NUM_KEYPOINTS = len(KEYPOINTS)
INDEX = {name: i for i, name in enumerate(KEYPOINTS)}

# Pairs of names joined by a line when a skeleton is drawn.
LIMBS = (
    ("left_shoulder", "right_shoulder"),
    ("left_shoulder", "left_elbow"),
    ("left_elbow", "left_wrist"),
    ("left_wrist", "left_index_tip"),
    ("left_wrist", "left_thumb_tip"),
    ("right_shoulder", "right_elbow"),
    ("right_elbow", "right_wrist"),
    ("right_wrist", "right_index_tip"),
    ("right_wrist", "right_thumb_tip"),
    ("left_shoulder", "left_hip"),
    ("right_shoulder", "right_hip"),
    ("left_hip", "right_hip"),
    ("left_hip", "left_knee"),
    ("left_knee", "left_ankle"),
    ("right_hip", "right_knee"),
    ("right_knee", "right_ankle"),
    ("nose", "left_eye"),
    ("nose", "right_eye"),
    ("left_eye", "left_ear"),
    ("right_eye", "right_ear"),
    ("mouth_left", "mouth_top"),
    ("mouth_top", "mouth_right"),
    ("mouth_right", "mouth_bottom"),
    ("mouth_bottom", "mouth_left"),
)


def _mirrored(name: str) -> str:
    swap = {"left": "right", "right": "left"}
    return "_".join(swap.get(part, part) for part in name.split("_"))


# FLIP[k] is the point that takes the place of point k when the picture is mirrored.
FLIP = tuple(INDEX[_mirrored(name)] for name in KEYPOINTS)


def flip(keypoints: np.ndarray) -> np.ndarray:
    """The keypoints (..., K, 3) of the picture mirrored left to right."""
    mirrored = np.array(keypoints[..., FLIP, :], copy=True)
    mirrored[..., 0] = np.where(mirrored[..., 2] > 0, 1 - mirrored[..., 0], mirrored[..., 0])
    return mirrored


def hide_outside(keypoints: np.ndarray) -> np.ndarray:
    """Keypoints (..., K, 3) with x = y = confidence = 0 for points outside the frame, not finite, or not seen."""
    keypoints = np.asarray(keypoints, np.float32)
    position = keypoints[..., :2]
    inside = np.isfinite(keypoints).all(-1) & (position >= 0).all(-1) & (position <= 1).all(-1)
    return np.where((inside & (keypoints[..., 2] > 0))[..., None], keypoints, 0).astype(np.float32)


def crop(keypoints: np.ndarray, left: float, top: float, width: float, height: float) -> np.ndarray:
    """Keypoints (..., K, 3) of a part of the frame; left, top, width, height are fractions of the old frame.

    Raises:
      ValueError: a width or height that is not positive.
    """
    if width <= 0 or height <= 0:
        raise ValueError(f"a crop needs a positive size, got {width} x {height}")
    moved = np.array(keypoints, np.float32, copy=True)
    moved[..., 0] = (moved[..., 0] - left) / width
    moved[..., 1] = (moved[..., 1] - top) / height
    return hide_outside(moved)


def to_pixels(keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    """Positions (..., K, 2) in pixels, where pixel i covers i..i+1."""
    return keypoints[..., :2] * np.asarray([width, height], np.float32)


def mouth_opening(keypoints: np.ndarray) -> np.ndarray:
    """Height of the mouth over its width in the frame's units (...,): a rough measure that needs no pixels.

    Zero where one of the four mouth points is not seen.
    """
    top, bottom, left, right = (
        keypoints[..., INDEX[name], :] for name in ("mouth_top", "mouth_bottom", "mouth_left", "mouth_right")
    )
    seen = (np.stack([top, bottom, left, right])[..., 2] > 0).all(0)
    height = np.linalg.norm(bottom[..., :2] - top[..., :2], axis=-1)
    width = np.linalg.norm(left[..., :2] - right[..., :2], axis=-1)
    return np.where(seen & (width > 1e-6), height / np.maximum(width, 1e-6), 0.0)
