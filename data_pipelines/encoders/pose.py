"""Keypoints of the person in a clip, detected by MediaPipe Holistic in its own environment (`make .venv-prepare`)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterable

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


class DetectorError(UserError):
    """The detector process could not be started, or exited."""


class PoseDetector:
    """Context manager around one detector process for many clips; DetectorError on entry if it does not start."""

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

    def _failed(self) -> DetectorError:
        self._process.wait(30)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit status {self._process.returncode}"
        return DetectorError(
            f"the keypoint detector in {interpreter()} failed ({reason}); run make .venv-prepare again"
        )

    def detect(self, frames: np.ndarray) -> np.ndarray:
        """(F,H,W,3) uint8 RGB, not mirrored -> (F,K,3) float32 in the order of `KEYPOINTS`.

        x and y are fractions of width and height; points not found or outside the frame are zero. Returns (0,K,3) if
        the person is found in fewer than half of the frames. Raises UserError if the detector process exited.
        """
        keypoints, _ = self.detect_people(frames, len(frames), 0)
        return keypoints if is_found(keypoints) else np.zeros((0, NUM_KEYPOINTS, 3), np.float32)

    def detect_people(
        self, frames: Iterable[np.ndarray], count: int, faces_every: int
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Keypoints of the main person, and the faces of everybody, in frames that need not be in memory together.

        Args:
          frames: (H,W,3) uint8 RGB of one size; the last one is repeated if there are fewer than `count`.
          count: number of frames F, at least 1.
          faces_every: faces are detected in frames 0, n, 2n, …; 0 for none.

        Returns:
          (F,K,3) float32 as of `detect`, zeros where nobody is found; and for each frame looked at, (faces,5): left,
          top, width and height in fractions of the frame, and a score.

        Raises DetectorError if the detector process exited. After an exception of `frames` the detector cannot be used.
        """
        self._send(frames, count, faces_every)
        size = count * NUM_KEYPOINTS * 3 * 4
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise self._failed()
        keypoints = np.frombuffer(data, np.float32).reshape(count, NUM_KEYPOINTS, 3)
        if not faces_every:
            return keypoints, []
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        return keypoints, [np.array(found, np.float32).reshape(-1, 5) for found in json.loads(line)]

    def _send(self, frames: Iterable[np.ndarray], count: int, faces_every: int) -> None:
        sent, stream = 0, self._process.stdin
        try:
            for frame in itertools.islice(frames, count):
                frame = np.ascontiguousarray(frame, np.uint8)
                if not sent:
                    head = {"frames": count, "height": frame.shape[0], "width": frame.shape[1], "names": KEYPOINTS}
                    head |= {"faces_every": faces_every} if faces_every else {}
                    stream.write(json.dumps(head).encode() + b"\n")
                stream.write(frame.data)
                sent += 1
            for _ in range(count - sent):
                stream.write(frame.data)
            stream.flush()
        except BrokenPipeError as error:
            raise self._failed() from error


def is_found(keypoints: np.ndarray) -> bool:
    """Whether a person is found in at least half of the frames of keypoints (F,K,3)."""
    return len(keypoints) > 0 and (keypoints[..., 2] > 0).any(1).mean() >= MIN_FOUND
