"""Detects one person's keypoints with MediaPipe; pose.py starts it in the environment of requirements-prepare.txt.

MediaPipe needs a different protobuf version, so this runs in its own process and imports nothing from the project.
Standard input, per clip: a JSON line {"frames": F, "height": H, "width": W, "names": [...]}, then F*H*W*3 bytes of RGB.
Standard output: the line "ready", then per clip F*K*3 float32 (x and y as fractions of the frame, confidence). If the
line has "faces_every": N, a JSON line follows with everybody's faces in frames 0, N, 2N, …: for each frame a list of
[left, top, width, height, score] in fractions of the frame.
"""

import contextlib
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
MIN_FACE_SCORE = 0.5
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


def _boxes(detections) -> list[list[float]]:
    boxes = ((d.location_data.relative_bounding_box, d.score[0]) for d in detections or ())
    return [[round(float(x), 4) for x in (box.xmin, box.ymin, box.width, box.height, score)] for box, score in boxes]


def detect(frames, names, faces_every: int = 0) -> tuple[np.ndarray, list]:
    """Frames (H,W,3) uint8 -> keypoints (F,K,3) float32, and the faces of every n-th frame."""
    results, faces = [], []
    with contextlib.ExitStack() as stack:
        solutions = mediapipe.solutions
        people = stack.enter_context(solutions.holistic.Holistic(model_complexity=1, smooth_landmarks=True))
        if faces_every:
            face = stack.enter_context(solutions.face_detection.FaceDetection(MIN_FACE_SCORE, model_selection=1))
        for number, frame in enumerate(frames):
            scale = SHORTER_SIDE / min(frame.shape[:2])
            if scale > 1:
                frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
            frame = np.ascontiguousarray(frame)
            results.append(keypoints(people.process(frame), names))
            if faces_every and number % faces_every == 0:
                faces.append(_boxes(face.process(frame).detections))
    return np.stack(results), faces


def _read_frames(stream, clip: dict):
    """Yields the clip's frames one by one, because a long clip does not fit into memory."""
    shape = (clip["height"], clip["width"], 3)
    for _ in range(clip["frames"]):
        yield np.frombuffer(stream.read(int(np.prod(shape))), np.uint8).reshape(shape)


def main() -> None:
    """Answers clips from standard input until it closes."""
    # MediaPipe's C++ code may print to standard output: keep the real one for the results and send prints to stderr.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    results.write(b"ready\n")
    results.flush()
    while line := sys.stdin.buffer.readline():
        clip = json.loads(line)
        faces_every = clip.get("faces_every", 0)
        points, faces = detect(_read_frames(sys.stdin.buffer, clip), clip["names"], faces_every)
        results.write(points.tobytes())
        if faces_every:
            results.write(json.dumps(faces).encode() + b"\n")
        results.flush()


if __name__ == "__main__":
    main()
