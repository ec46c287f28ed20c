"""How many people a clip shows, how large, which parts of the body, and how steadily: from keypoints and faces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines import boxes
from data_pipelines import keypoints as kp

SIMILAR = 0.4  # height of a face relative to the largest, from which on it is another person and not the background
TOGETHER = 0.2  # share of the frames looked at in which so many faces must be seen
JUMP = 0.5  # shoulder widths
PARTS = {
    "head": ("nose", "left_eye", "right_eye"),
    "shoulders": ("left_shoulder", "right_shoulder"),
    "elbows": ("left_elbow", "right_elbow"),
    "hips": ("left_hip", "right_hip"),
    "knees": ("left_knee", "right_knee"),
    "ankles": ("left_ankle", "right_ankle"),
}
BODY = ("nose", *(f"{side}_{joint}" for side in ("left", "right") for joint in ("shoulder", "elbow", "wrist", "hip")))


def count(faces: Sequence[np.ndarray]) -> int:
    """The largest number of faces of similar size that are seen together in at least a fifth of the frames.

    Args:
      faces: for each frame looked at, (faces,5) left, top, width, height and score.
    """
    numbers = [int((f[:, 3] >= SIMILAR * f[:, 3].max()).sum()) if len(f) else 0 for f in faces]
    enough = max(1, np.ceil(TOGETHER * len(numbers)))
    return max((n for n in set(numbers) if sum(m >= n for m in numbers) >= enough), default=0)


def scores(keypoints: np.ndarray, faces: Sequence[np.ndarray], width: int, height: int) -> dict[str, float | None]:
    """Scores of people and pose; see `scores.TABLE`. None where nothing was seen to measure.

    Args:
      keypoints: (F,K,3) of the main person in fractions of a picture of width x height pixels; confidence 0 if unseen.
      faces: as in `count`; empty if nobody looked for faces.
    """
    seen = keypoints[..., 2] > 0
    person = _has(seen, PARTS["head"]).any(1) | _has(seen, PARTS["shoulders"]).any(1)
    found: dict[str, float | None] = {"person_share": float(person.mean())}
    found["people"] = float(max(count(faces), int(person.mean() >= 0.5)))
    found |= {f"{part}_share": float(_has(seen, names).all(1).mean()) for part, names in PARTS.items()}
    face = boxes.from_keypoints(keypoints, width / height)[:, boxes.NAMES.index("face")]
    heights = (face[:, 3] - face[:, 1])[boxes.known(face)]
    if len(heights) < 0.2 * len(face):  # too far away for the face's points, but perhaps not for the face detector
        heights = np.array([f[:, 3].max() for f in faces if len(f)])
    found["face_height"] = float(np.median(heights)) if len(heights) else None
    found["face_pixels"] = found["face_height"] and found["face_height"] * height
    return found | _pose(keypoints * [width, height, 1], seen) | _hands(keypoints * [width, height, 1], seen)


def framing(found: dict[str, float | None]) -> str:
    """The framing in words, from `scores`."""
    for part, name in (("ankles", "full body"), ("knees", "three quarters"), ("hips", "half body")):
        if found[f"{part}_share"] >= 0.5:
            return name
    if found["shoulders_share"] >= 0.5:
        return "head and shoulders"
    return "close-up" if found["head_share"] >= 0.5 else "nobody"


def _has(seen: np.ndarray, names: Sequence[str]) -> np.ndarray:
    return seen[:, [kp.INDEX[name] for name in names]]


def _shoulder_width(points: np.ndarray, seen: np.ndarray) -> float | None:
    """In pixels: the widest tenth, because people turn sideways."""
    both = _has(seen, PARTS["shoulders"]).all(1)
    if not both.any():
        return None
    left, right = (points[both, kp.INDEX[name], :2] for name in PARTS["shoulders"])
    return max(float(np.percentile(np.linalg.norm(left - right, axis=1), 90)), 1.0)


def _jitter(points: np.ndarray, seen: np.ndarray, names: Sequence[str]) -> float | None:
    """Median length in pixels of the second difference in time of the named points."""
    index = [kp.INDEX[name] for name in names]
    places, visible = points[:, index, :2], seen[:, index]
    if len(places) < 3:
        return None
    change = np.linalg.norm(places[:-2] - 2 * places[1:-1] + places[2:], axis=-1)
    change = change[visible[:-2] & visible[1:-1] & visible[2:]]
    return float(np.median(change)) if len(change) else None


def _pose(points: np.ndarray, seen: np.ndarray) -> dict[str, float | None]:
    shown = _has(seen, ("nose", *PARTS["shoulders"])).all(1)
    width = _shoulder_width(points, seen)
    found: dict[str, float | None] = {"pose_visibility": float(shown.mean())}
    if width is None or len(points) < 3:
        return found | {"pose_stability": None, "pose_jitter": None}
    nose = points[:, kp.INDEX["nose"], :2]
    both = shown[1:] & shown[:-1]
    jumps = (np.linalg.norm(np.diff(nose, axis=0), axis=1) > JUMP * width) & both
    found["pose_stability"] = float(1 - jumps.sum() / both.sum()) if both.any() else None
    jitter = _jitter(points, seen, BODY)
    return found | {"pose_jitter": None if jitter is None else jitter / width}


def _hands(points: np.ndarray, seen: np.ndarray) -> dict[str, float | None]:
    tips = [(f"{side}_index_tip", f"{side}_thumb_tip") for side in ("left", "right")]
    # The body detector guesses fingertips with a confidence below 1; those of the hand detector have 1.
    sure = seen & (points[..., 2] >= 1)
    visible = np.stack([_has(sure, names).all(1) for names in tips], 1).any(1)
    width, jitter = _shoulder_width(points, seen), _jitter(points, sure, [name for names in tips for name in names])
    relative = None if width is None or jitter is None else jitter / width
    return {"hands_visibility": float(visible.mean()), "hands_jitter": relative}
