"""Metrics of a run: `metrics.jsonl`, `data_log.jsonl` and TensorBoard."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from omnihuman_jax.conditions import CONDITIONS


class RatioCounter:
    """Counts, over a stage so far, how many samples had each condition; part of the checkpoint so a resume goes on."""

    def __init__(self, rows: int = 0, active: Sequence[int] = (0, 0, 0, 0), scheduled: Sequence[int] = (0, 0, 0, 0)):
        self.rows = rows
        self.active = np.array(active, np.int64)
        self.scheduled = np.array(scheduled, np.int64)

    def add(self, active: np.ndarray, scheduled: np.ndarray) -> None:
        """Adds a batch: bool (B, 4) each."""
        self.rows += len(active)
        self.active += active.sum(0)
        self.scheduled += scheduled.sum(0)

    def state(self) -> dict[str, Any]:
        """JSON form, the constructor's arguments."""
        return {"rows": self.rows, "active": self.active.tolist(), "scheduled": self.scheduled.tolist()}

    def ratios(self, counts: np.ndarray) -> dict[str, float]:
        """Condition -> share of the samples."""
        return {name: float(n / max(1, self.rows)) for name, n in zip(CONDITIONS, counts, strict=True)}


def loss_by_condition(sample_loss: np.ndarray, active: np.ndarray) -> dict[str, float]:
    """Mean loss (B,) of the samples that have each condition (bool (B, 4)), and of those without audio and pose."""
    losses = {name: float(sample_loss[active[:, i]].mean()) for i, name in enumerate(CONDITIONS) if active[:, i].any()}
    weak = ~active[:, 2] & ~active[:, 3]
    if weak.any():
        losses["no_audio_no_pose"] = float(sample_loss[weak].mean())
    return losses


class MetricsWriter:
    """Appends JSON lines and TensorBoard events under a run directory."""

    def __init__(self, workdir: str | Path, *, log_records: bool):
        workdir = Path(workdir)
        self._metrics = open(workdir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close)
        self._records = open(workdir / "data_log.jsonl", "a", buffering=1) if log_records else None  # noqa: SIM115
        self._board = SummaryWriter(str(workdir / "tensorboard"))

    def step(self, line: Mapping[str, Any], targets: Mapping[str, float]) -> None:
        """Writes one logged step; `targets` are the stage's ratios, shown beside the realised ones."""
        self._metrics.write(json.dumps(line) + "\n")
        step = line["step"]
        for name in ("loss", "grad_norm", "learning_rate", "step_seconds", "data_seconds", "tokens_per_second"):
            self._board.add_scalar(f"train/{name}", line[name], step)
        for name, value in line["loss_by_condition"].items():
            self._board.add_scalar(f"loss_by_condition/{name}", value, step)
        for name, value in line["scheduled_ratio"].items():
            self._board.add_scalars(f"ratio/{name}", {"realised": value, "target": targets[name]}, step)

    def records(self, step: int, records: Sequence[str], active: Sequence[Sequence[str]]) -> None:
        """Writes which record was in each global row of a step and which conditions it had."""
        if self._records:
            line = {"step": step, "records": list(records), "active": [list(a) for a in active]}
            self._records.write(json.dumps(line) + "\n")

    def video(self, tag: str, path: str | Path, size: tuple[int, int], step: int) -> None:
        """Shows an animated GIF file of (height, width) in TensorBoard's image tab."""
        image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=Path(path).read_bytes())
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def close(self) -> None:
        """Flushes and closes every file."""
        self._metrics.close()
        if self._records:
            self._records.close()
        self._board.close()


def write_gif(path: str | Path, frames: np.ndarray, fps: float = 25.0) -> None:
    """Writes uint8 frames (F, H, W, 3) as an endlessly looping GIF."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
