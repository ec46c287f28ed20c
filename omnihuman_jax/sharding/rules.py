"""Shardings as a table: logical activation axes, and ordered path rules for parameters.

Optimizer state and EMA follow the parameters because their trees end in the same paths.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical activation axis -> mesh axes.
ACTIVATIONS: dict[str, Any] = {
    "batch": ("data", "fsdp"),
    "tokens": "sequence",
    # In attention over all tokens (Ulysses). Tensor first: resharding then splits each device's own heads further, and
    # no device sends all of its heads away.
    "heads": ("tensor", "sequence"),
    "local_heads": "tensor",  # in attention whose queries are sharded over tokens
    "head_dim": None,
    "hidden": None,
    "mlp": "tensor",
}

# Ordered (path pattern, mesh axes of the trailing dimensions). First match wins; a leading scan axis is never sharded.
# Column-parallel layers split the output over tensor, row-parallel ones the input; the other dimension is ZeRO-3 fsdp.
PARAMETERS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r"(^|/)(\w+_)?(q|k|v|fc1|gate|mlp_in|mod)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(\w+_)?(out|fc2)/kernel$", ("tensor", "fsdp")),
    (r"/kernel$", ("fsdp", None)),
    (r".*", ()),
)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation by logical axis names, one per dimension; None = replicated.

    Does nothing without a mesh in context (`jax.set_mesh`). An axis that does not divide its dimension is dropped.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or not set(mesh.axis_names) & {"data", "fsdp", "sequence", "tensor"}:
        return x
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: {len(axes)} axis names {axes} for an array of shape {x.shape}")
    spec = [usable(ACTIVATIONS[axis] if axis else None, size, mesh) for axis, size in zip(axes, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def num_shards(axes: str | tuple[str, ...] | None, mesh: Any) -> int:
    """Product of the sizes of these mesh axes."""
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def usable(axes: Any, size: int, mesh: Any) -> Any:
    """The mesh axes, or None if they do not divide a dimension of this size or have a single device."""
    shards = num_shards(axes, mesh)
    return axes if shards > 1 and size % shards == 0 else None


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """PartitionSpec of a parameter by its slash-separated path; rules apply to the trailing dimensions."""
    axes = next(axes for pattern, axes in PARAMETERS if re.search(pattern, path))
    axes = axes[-len(shape) :] if shape else ()
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    return PartitionSpec(*(usable(axis, size, mesh) for axis, size in zip(axes, shape, strict=True)))


def path_name(path: tuple[Any, ...]) -> str:
    """Slash-separated name of a jax key path: dual/img_mlp/fc1/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of parameters, or of optimizer/EMA state whose paths end in parameter paths."""

    def one(path, leaf):
        return NamedSharding(mesh, parameter_spec(path_name(path), tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes as `jax.ShapeDtypeStruct` with shardings: what to restore into, or to compile for."""
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data x fsdp; every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())
