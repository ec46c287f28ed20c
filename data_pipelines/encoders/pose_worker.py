"""Detects one person's keypoints with MediaPipe; pose.py starts it in the environment of requirements-prepare.txt.

MediaPipe needs a different protobuf version, so this runs in its own process and imports nothing from the project.
Standard input, per clip: a JSON line {"frames": F, "height": H, "width": W, "names": [...]}, then F*H*W*3 bytes of RGB.
Standard output: the line "ready", then per clip F*K*3 float32 (x and y as fractions of the frame, confidence).
"""

import json
import os
import sys

import cv2
import mediapipe
import numpy as np

# MediaPipe's indices for each point: BlazePose's 33 body points, the face mesh's 468. "left" is the person's own left.
BODY = {
    "nose": 0, "left_eye": 2, "right_eye": 5, "left_ear": 7, "right_ear": 8, "left_shoulder": 11, "right_shoulder": 12,
    "left_elbow": 13, "right_elbow": 14, "left_wrist": 15, "right_wrist": 16, "left_hip": 23, "right_hip": 24,
    "left_knee": 25, "right_knee": 26, "left_ankle": 27, "right_ankle": 28, "left_index_tip": 19, "right_index_tip": 20,
    "left_thumb_tip": 21, "right_thumb_tip": 22,
}  # fmt: skip
FACE = {
    "nose": (1,), "left_eye": (362, 263), "right_eye": (33, 133), "mouth_left": (291,), "mouth_right": (61,),
    "mouth_top": (13,), "mouth_bottom": (14,), "chin": (152,), "brow_left": (334,), "brow_right": (105,),
}  # fmt: skip
HAND = {"index_tip": 8, "thumb_tip": 4}
MIN_VISIBILITY = 0.5  # BlazePose also guesses hidden points; those below this visibility count as not found
SHORTER_SIDE = 256  # smaller pictures are enlarged to it, because the detectors expect people of a certain pixel size


def _points(landmarks) -> np.ndarray | None:
    if landmarks is None:
        return None
    return np.array([(p.x, p.y, p.visibility) for p in landmarks.landmark], np.float32)


def keypoints(result, names) -> np.ndarray:
    """Keypoints (K,3) of one holistic result; zeros for points not found or outside the frame."""
    body, face = _points(result.pose_landmarks), _points(result.face_landmarks)
    hands = {"left": _points(result.left_hand_landmarks), "right": _points(result.right_hand_landmarks)}
    found = {}
    if body is not None:
        found |= {name: body[i] for name, i in BODY.items()}
    for side, hand in hands.items():
        if hand is not None:
            found |= {f"{side}_{name}": np.array([*hand[i, :2], 1]) for name, i in HAND.items()}
    if face is not None:
        found |= {name: np.array([*face[list(i), :2].mean(0), 1]) for name, i in FACE.items()}
    points = np.stack([np.asarray(found.get(name, np.zeros(3)), np.float32) for name in names])
    seen = ((points[:, :2] >= 0) & (points[:, :2] <= 1)).all(1) & (points[:, 2] >= MIN_VISIBILITY)
    return np.where(seen[:, None], np.clip(points, 0, 1), 0)


def detect(frames: np.ndarray, names) -> np.ndarray:
    """(F,H,W,3) uint8 -> (F,K,3) float32."""
    scale = max(1.0, SHORTER_SIDE / min(frames.shape[1:3]))
    results = []
    with mediapipe.solutions.holistic.Holistic(model_complexity=1, smooth_landmarks=True) as detector:
        for frame in frames:
            if scale > 1:
                frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
            results.append(keypoints(detector.process(np.ascontiguousarray(frame)), names))
    return np.stack(results)


def main() -> None:
    """Answers clips from standard input until it closes."""
    # MediaPipe's C++ code may print to standard output: keep the real one for the results and send prints to stderr.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    results.write(b"ready\n")
    results.flush()
    while line := sys.stdin.buffer.readline():
        clip = json.loads(line)
        shape = (clip["frames"], clip["height"], clip["width"], 3)
        data = sys.stdin.buffer.read(int(np.prod(shape)))
        results.write(detect(np.frombuffer(data, np.uint8).reshape(shape), clip["names"]).tobytes())
        results.flush()


if __name__ == "__main__":
    main()
