"""How much the camera moves, and how much the subject, from dense optical flow (Farnebäck 2003)."""

from __future__ import annotations

import cv2
import numpy as np

from omnihuman_jax.frames import FPS

SIDE = 144  # pixels of the shorter side at which flow is computed
GRID = 6  # pixels between the vectors to which the camera's motion is fitted
INLIER = 0.3  # pixels a frame by which a vector may differ from the camera's motion and still be part of it
CHANGE = 2  # levels of 255 by which a place must change to move: a codec changes still pictures by one or two
SUBJECT = 99  # percentile of what is left: a talking head moves little but the mouth


class Motion:
    """Collects the motion between pairs of frames that follow each other."""

    def __init__(self):
        self._rows: list[tuple[float, float]] = []

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Adds two lumas (H,W) uint8, 1/25 s apart."""
        scale = min(1.0, SIDE / min(before.shape))
        small = [cv2.resize(x, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for x in (before, after)]
        flow = cv2.calcOpticalFlowFarneback(*small, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        height, width = flow.shape[:2]
        y, x = np.mgrid[GRID // 2 : height : GRID, GRID // 2 : width : GRID]
        places = np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)
        vectors = flow[y.ravel(), x.ravel()]
        # RANSAC, so that a person in the foreground does not count as the camera.
        fitted, _ = cv2.estimateAffinePartial2D(places, places + vectors, ransacReprojThreshold=INLIER)
        if fitted is None:
            fitted = np.eye(2, 3)
        camera = places @ (fitted[:, :2] - np.eye(2)).T + fitted[:, 2]
        changed = cv2.blur(cv2.absdiff(*small), (5, 5))[y.ravel(), x.ravel()] >= CHANGE
        rest = np.linalg.norm(vectors - camera, axis=1) * changed
        unit = FPS / height
        self._rows.append((np.percentile(rest, SUBJECT) * unit, np.linalg.norm(camera, axis=1).mean() * unit))

    def scores(self) -> dict[str, float | None]:
        """Means over the pairs, in picture heights a second; see `scores.TABLE`. None for a clip of one frame."""
        if not self._rows:
            return {"subject_motion": None, "camera_motion": None}
        subject, camera = np.mean(self._rows, axis=0)
        return {"subject_motion": float(subject), "camera_motion": float(camera)}
