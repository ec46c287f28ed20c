"""The device mesh, with axes data, fsdp, sequence and tensor; with several slices, data runs over DCN."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from omnihuman_jax.errors import UserError, nearest

AXES = ("data", "fsdp", "sequence", "tensor")
SEQUENCE_ATTENTION = ("ulysses", "all_gather")  # see `models.dit.attention.attend`


def resolve_shape(sizes: Mapping[str, Any], num_devices: int) -> dict[str, int]:
    """The size of every axis of `config.mesh`; an axis given as -1 gets the remaining devices.

    Raises UserError for an unknown axis, more than one -1, or sizes whose product is not the number of devices.
    """
    for name in sizes:
        if name not in (*AXES, "sequence_attention"):
            raise UserError(f"mesh.{name}: unknown mesh axis{nearest(name, AXES)}")
    shape = {name: int(sizes.get(name, 1)) for name in AXES}
    free = [name for name, size in shape.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh: only one axis can be -1 (the rest), but {' and '.join(free)} are")
    if any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(f"mesh: sizes must be positive or -1, got {shape}")
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if free:
        if num_devices % fixed:
            raise UserError(f"mesh: {num_devices} devices do not divide by {fixed} ({shape}); change the sizes")
        shape[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        raise UserError(f"mesh: {shape} needs {fixed} devices, but there are {num_devices}; set one axis to -1")
    return shape


def make_mesh(
    sizes: Mapping[str, Any], devices: Sequence[jax.Device] | None = None, *, num_slices: int | None = None
) -> Mesh:
    """Builds the mesh over `devices` (default: all), with Auto axes.

    With several slices (default: those of the devices), the data axis spans them, over DCN; all other axes stay within
    a slice.
    """
    devices = list(jax.devices() if devices is None else devices)
    num_slices = num_slices or len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1
    shape = resolve_shape(sizes, len(devices))
    dims = tuple(shape.values())
    if num_slices > 1:
        if shape["data"] % num_slices:
            raise UserError(f"mesh.data={shape['data']} must be a multiple of the {num_slices} slices")
        per_slice = (shape["data"] // num_slices, *dims[1:])
        array = mesh_utils.create_hybrid_device_mesh(per_slice, (num_slices, 1, 1, 1), devices)
    elif devices[0].platform == "cpu":
        array = np.array(devices).reshape(dims)
    else:
        array = mesh_utils.create_device_mesh(dims, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def training_mesh(
    config: ConfigDict, devices: Sequence[jax.Device] | None = None, *, num_slices: int | None = None
) -> Mesh:
    """The mesh of a resolved config; UserError if devices, batch or attention heads do not divide over it."""
    mesh = make_mesh(config.mesh, devices, num_slices=num_slices)
    check_batch(config.global_batch_size, mesh, config.optimizer.accumulate)
    check_heads(config.model.num_heads, mesh, sequence_attention(config))
    return mesh


def local_mesh() -> Mesh:
    """A mesh of a single device of this process."""
    return Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(global_batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError unless the batch divides over data x fsdp, in each of `accumulate` micro-batches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * max(accumulate, 1)
    if accumulate < 1 or global_batch_size < 1 or global_batch_size % shards:
        parts = "" if accumulate == 1 else f" x optimizer.accumulate = {accumulate}"
        raise UserError(
            f"global_batch_size={global_batch_size} is not divisible by mesh data x fsdp = {mesh.shape['data']} x "
            f"{mesh.shape['fsdp']}{parts} = {shards}; use a multiple of {shards}"
        )


def sequence_attention(config: ConfigDict) -> str:
    """`mesh.sequence_attention` of a resolved config; UserError if it is none of `SEQUENCE_ATTENTION`."""
    chosen = config.mesh.sequence_attention
    if chosen not in SEQUENCE_ATTENTION:
        raise UserError(f"mesh.sequence_attention={chosen!r}: must be one of {', '.join(SEQUENCE_ATTENTION)}")
    return chosen


def check_heads(num_heads: int, mesh: Mesh, sequence_attention: str = SEQUENCE_ATTENTION[0]) -> None:
    """Raises UserError unless the attention heads divide: over sequence x tensor (Ulysses), or tensor (all-gather)."""
    sequence, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    shards = sequence * tensor if sequence_attention == "ulysses" else tensor
    if num_heads % shards == 0:
        return
    valid = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
    heads = f"mesh: {num_heads} attention heads (model.num_heads) do not divide over"
    if sequence_attention == "all_gather":
        raise UserError(f"{heads} mesh.tensor = {tensor}; it can be {valid}, with any mesh.sequence")
    raise UserError(
        f"{heads} mesh.sequence x mesh.tensor = {sequence} x {tensor} = {shards}; their product can be {valid}; with "
        f"mesh.sequence_attention=all_gather only mesh.tensor has to be one of these"
    )
