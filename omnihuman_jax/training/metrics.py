"""Per-step values in `metrics.jsonl`: losses by condition and noise level, ratios, speed, memory."""

import itertools
import math
import resource
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from omnihuman_jax import conditions
from omnihuman_jax.batch import Bucket
from omnihuman_jax.frames import seconds as video_seconds
from omnihuman_jax.models.dit import flops
from omnihuman_jax.models.dit.config import ModelConfig


class RatioCounter:
    """Counts the samples of a stage so far that had each condition; saved in checkpoints, so counting continues."""

    def __init__(self, rows: int = 0, active: Sequence[int] = (), scheduled: Sequence[int] = ()):
        self.rows = rows
        self.active = np.array(active or [0] * len(conditions.table()), np.int64)
        self.scheduled = np.array(scheduled or [0] * len(conditions.table()), np.int64)

    def add(self, described: Mapping[str, Any]) -> None:
        """Adds a step: `active` and `scheduled` condition names of every global row."""
        self.rows += len(described["active"])
        for counts, name in ((self.active, "active"), (self.scheduled, "scheduled")):
            counts += [sum(condition in row for row in described[name]) for condition in conditions.names()]

    def state(self) -> dict[str, Any]:
        """The constructor arguments as JSON."""
        return {"rows": self.rows, "active": self.active.tolist(), "scheduled": self.scheduled.tolist()}

    def ratios(self, counts: np.ndarray) -> dict[str, float]:
        """Condition -> share of the samples."""
        return {name: float(n / max(1, self.rows)) for name, n in zip(conditions.names(), counts, strict=True)}


def loss_by_condition(sample_loss: np.ndarray, active: np.ndarray) -> dict[str, float]:
    """Mean loss (B,) of the samples that have each condition (bool (B, conditions)).

    "no_audio_no_pose" is the mean over samples without any condition that selects records.
    """
    masks = dict(zip(conditions.names(), active.T, strict=True))
    selecting = conditions.selecting()
    masks["_".join(f"no_{name}" for name in selecting)] = ~np.any([masks[name] for name in selecting], axis=0)
    return {name: float(sample_loss[mask].mean()) for name, mask in masks.items() if mask.any()}


def loss_by_condition_set(sample_loss: np.ndarray, active: np.ndarray) -> dict[str, float]:
    """Mean loss (B,) of the samples with exactly each set of conditions (bool (B, conditions)), as "text+reference"."""
    names = np.array(["+".join(conditions.active_names(row)) or "none" for row in active])
    return {str(name): float(sample_loss[names == name].mean()) for name in np.unique(names)}


TIME_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


def loss_by_time(sample_loss: np.ndarray, times: np.ndarray) -> dict[str, float]:
    """Mean loss (B,) of the samples in each quarter of the noise levels t (B,), "0.25-0.5" and so on."""
    losses = {}
    for low, high in itertools.pairwise(TIME_EDGES):
        inside = (times >= low) & ((times < high) | (high == 1.0))
        if inside.any():
            losses[f"{low:g}-{high:g}"] = float(sample_loss[inside].mean())
    return losses


def memory_bytes() -> int:
    """Peak memory of the device, or of the process if the device (a CPU) does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def losses(metrics: Mapping[str, Any], active: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Losses of the rows of a step by condition, by set of conditions and by noise level.

    Args:
      metrics: `sample_loss` (B,) and `time` (B,) of the step.
      active: condition names of every global row.
    """
    rows, loss = np.stack([conditions.row(names) for names in active]), metrics["sample_loss"]
    return {
        "loss_by_condition": loss_by_condition(loss, rows),
        "loss_by_condition_set": loss_by_condition_set(loss, rows),
        "loss_by_time": loss_by_time(loss, metrics["time"]),
    }


def throughput(model: ModelConfig, batch_size: int, bucket: Bucket, mesh: Mesh, seconds: float) -> dict[str, float]:
    """Video tokens, video seconds and model FLOPs per second of a step, and `mfu` if the device peak is known.

    `batch_size` counts the global rows, `bucket` is the latent (T, H, W), `seconds` the duration of the step.
    """
    flops_per_second = flops.train_step_flops(model, batch_size, bucket) / seconds
    rates = {
        "tokens_per_second": batch_size * math.prod(bucket) // math.prod(model.patch_size) / seconds,
        "video_seconds_per_second": batch_size * video_seconds(bucket[0]) / seconds,
        "model_flops_per_second": flops_per_second,
    }
    peak = flops.PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    return rates | ({"mfu": flops_per_second / (peak * mesh.size)} if peak else {})
