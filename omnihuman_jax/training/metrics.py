"""Metrics of a run: `metrics.jsonl`, `data_log.jsonl` and TensorBoard."""

import itertools
import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
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

    def add(self, told: Mapping[str, Any]) -> None:
        """Adds a step: `active` and `scheduled` condition names of every global row."""
        self.rows += len(told["active"])
        for counts, name in ((self.active, "active"), (self.scheduled, "scheduled")):
            counts += [sum(condition in row for row in told[name]) for condition in CONDITIONS]

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


TIME_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


def loss_by_time(sample_loss: np.ndarray, times: np.ndarray) -> dict[str, float]:
    """Mean loss (B,) of the samples in each quarter of the noise levels t (B,), "0.25-0.5" and so on."""
    losses = {}
    for low, high in itertools.pairwise(TIME_EDGES):
        inside = (times >= low) & (times < high)
        if inside.any():
            losses[f"{low:g}-{high:g}"] = float(sample_loss[inside].mean())
    return losses


def memory_bytes() -> int:
    """High-water mark of the device's memory, or of the process where the device (a CPU) does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def last_logged_step(workdir: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 without one."""
    return max((line["step"] for line in _tail(workdir)), default=0)


def typical_step_seconds(workdir: Path) -> float:
    """Median step time of the last lines of metrics.jsonl; 0 without any."""
    times = [line["step_seconds"] for line in _tail(workdir)]
    return float(np.median(times)) if times else 0.0


def _tail(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines()[-20:] if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _open_lines(path: Path) -> TextIO:
    """Opens a file of JSON lines to append to, without the half line that a killed process may have left."""
    if path.exists():
        with open(path, "r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    return open(path, "a", buffering=1)


class MetricsWriter:
    """Appends JSON lines and TensorBoard events under a run directory; on other processes than the first, nothing."""

    def __init__(self, workdir: str | Path, *, log_records: bool, enabled: bool = True):
        self._workdir = workdir = Path(workdir)
        self._metrics = _open_lines(workdir / "metrics.jsonl") if enabled else None
        self._records = _open_lines(workdir / "data_log.jsonl") if enabled and log_records else None
        self._board = SummaryWriter(str(workdir / "tensorboard")) if enabled else None

    def step(self, line: Mapping[str, Any], targets: Mapping[str, float]) -> None:
        """Writes one logged step; `targets` are the stage's ratios, shown beside the realised ones."""
        if not self._metrics:
            return
        # JSON has no NaN: null instead.
        plain = json.loads(json.dumps(line), parse_constant=lambda _: None)
        self._metrics.write(json.dumps(plain) + "\n")
        step = line["step"]
        for name, value in line.items():
            if isinstance(value, dict) and name not in ("active_ratio", "scheduled_ratio"):
                for key, part in value.items():
                    self._board.add_scalar(f"{name}/{key}", part, step)
            elif isinstance(value, float):
                self._board.add_scalar(f"train/{name}", value, step)
        for name, value in line["scheduled_ratio"].items():
            self._board.add_scalars(f"ratio/{name}", {"realised": value, "target": targets[name]}, step)

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Writes the held-out losses of a step to evaluation.jsonl and TensorBoard."""
        if not self._metrics:
            return
        with _open_lines(self._workdir / "evaluation.jsonl") as file:
            file.write(json.dumps({"step": step, "held_out_loss": dict(losses)}) + "\n")
        for name, value in losses.items():
            self._board.add_scalar(f"held_out_loss/{name}", value, step)

    def records(self, step: int, records: Sequence[str], active: Sequence[Sequence[str]]) -> None:
        """Writes which record was in each global row of a step and which conditions it had."""
        if self._records:
            line = {"step": step, "records": list(records), "active": [list(a) for a in active]}
            self._records.write(json.dumps(line) + "\n")

    def video(self, tag: str, path: str | Path, size: tuple[int, int], step: int) -> None:
        """Shows an animated GIF file of (height, width) in TensorBoard's image tab."""
        if not self._board:
            return
        image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=Path(path).read_bytes())
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def close(self) -> None:
        """Flushes and closes every file."""
        for file in (self._metrics, self._records, self._board):
            if file:
                file.close()


def write_gif(path: str | Path, frames: np.ndarray, fps: float = 25.0) -> None:
    """Writes uint8 frames (F, H, W, 3) as an endlessly looping GIF."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
