"""Batches: their fields, from the table of conditions, and their placement on the devices."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnihuman_jax import conditions, regions
from omnihuman_jax.conditions import Kind
from omnihuman_jax.sharding import rules

Bucket = tuple[int, int, int]  # latent frames T, rows H, columns W


def never_present(ratios: Mapping[str, float], motion_ratio: float) -> frozenset[str]:
    """Fields that no sample of a stage with these ratios has, and without which the network does less work."""
    absent = {c.field for c in conditions.table() if c.kind is not Kind.TOKENS and not ratios.get(c.name)}
    return frozenset(absent if motion_ratio else absent | {"motion"})


def fields(model: Any, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], type]]:
    """Name -> (shape without the batch axis, dtype) of the fields that the train step reads."""
    frame = (*bucket[1:], model.latent_channels)
    found: dict[str, tuple[tuple[int, ...], type]] = {
        "latents": ((bucket[0], *frame), np.float32),
        "motion": ((model.motion_frames, *frame), np.float32),
        "has_motion": ((), np.bool_),
        "regions": ((*bucket, len(regions.NAMES)), np.bool_),
    }
    for condition in conditions.table():
        found |= condition.batch_fields(model, bucket)
    return found | {"active": ((len(conditions.table()),), np.bool_)}


def pad_tokens(states: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token states (n, *row), cut or zero-padded to float32 (length, *row), and their mask (length,)."""
    used = min(len(states), length)
    padded = np.zeros((length, *states.shape[1:]), np.float32)
    padded[:used] = states[:used]
    return padded, np.arange(length) < used


def bucket_of(batch: Mapping[str, Any]) -> Bucket:
    """Latent (T, H, W) of a batch."""
    return batch["latents"].shape[1:4]


def place(
    config: ConfigDict, mesh: Mesh, batch: Mapping[str, np.ndarray], leave_out: Collection[str] = ()
) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch onto the mesh as global arrays, one for each of `fields` not in `leave_out`.

    Raises:
      ValueError: a field does not have the shape that `fields` gives.
    """
    sharding, size = rules.batch_sharding(mesh), config.global_batch_size
    placed = {}
    for name, (shape, _) in fields(config.model, bucket_of(batch)).items():
        if name in leave_out:
            continue
        if batch[name].shape[1:] != shape:
            raise ValueError(f"batch field {name} has rows of shape {batch[name].shape[1:]}, expected {shape}")
        placed[name] = jax.make_array_from_process_local_data(sharding, batch[name], (size, *shape))
    return placed


def abstract(config: ConfigDict, mesh: Mesh, bucket: Bucket) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch of a bucket as shapes with shardings, for compilation."""
    sharding, size = rules.batch_sharding(mesh), config.global_batch_size
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in fields(config.model, bucket).items()
    }
