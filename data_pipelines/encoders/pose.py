"""Keypoints of the person in a clip, detected by MediaPipe Holistic in its own environment (`make .venv-prepare`)."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile

import numpy as np

from data_pipelines.keypoints import KEYPOINTS, NUM_KEYPOINTS
from omnihuman_jax.errors import UserError

NAME = "mediapipe-holistic-0.10.21"
WORKER = pathlib.Path(__file__).with_name("pose_worker.py")
MIN_FOUND = 0.5  # a clip has no keypoints if the person is found in a smaller share of its frames


def interpreter() -> pathlib.Path:
    """Python of the detector's environment, $OMNIHUMAN_PREPARE_PYTHON or .venv-prepare; UserError if it is missing."""
    default = pathlib.Path(__file__).resolve().parents[2] / ".venv-prepare/bin/python"
    path = pathlib.Path(os.environ.get("OMNIHUMAN_PREPARE_PYTHON") or default)
    if not path.is_file():
        raise UserError(f"keypoint detection needs {path}, which does not exist; run make .venv-prepare")
    return path


class PoseDetector:
    """Context manager around one detector process for many clips; UserError on entry if it does not start."""

    def __enter__(self) -> PoseDetector:
        python = interpreter()
        self._errors = tempfile.TemporaryFile()
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        self._process = subprocess.Popen(
            [str(python), str(WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
        )  # fmt: skip
        try:
            if self._process.stdout.readline() != b"ready\n":
                raise self._failed()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has already exited
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _failed(self) -> UserError:
        self._process.wait(30)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit status {self._process.returncode}"
        return UserError(f"the keypoint detector in {interpreter()} failed ({reason}); run make .venv-prepare again")

    def detect(self, frames: np.ndarray) -> np.ndarray:
        """(F,H,W,3) uint8 RGB, not mirrored -> (F,K,3) float32 in the order of `KEYPOINTS`.

        x and y are fractions of width and height; points not found or outside the frame are zero. Returns (0,K,3) if
        the person is found in fewer than half of the frames. Raises UserError if the detector process exited.
        """
        frames = np.ascontiguousarray(frames, np.uint8)
        head = dict(zip(("frames", "height", "width"), frames.shape[:3], strict=True)) | {"names": KEYPOINTS}
        try:
            self._process.stdin.write(json.dumps(head).encode() + b"\n")
            self._process.stdin.write(frames.data)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failed() from error
        size = len(frames) * NUM_KEYPOINTS * 3 * 4
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise self._failed()
        keypoints = np.frombuffer(data, np.float32).reshape(len(frames), NUM_KEYPOINTS, 3)
        found = (keypoints[..., 2] > 0).any(1)
        return keypoints if found.mean() >= MIN_FOUND else np.zeros((0, NUM_KEYPOINTS, 3), np.float32)
