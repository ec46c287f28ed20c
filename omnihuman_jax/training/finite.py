"""Rejects a step whose resulting state holds a non-finite value."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from omnihuman_jax.sharding import rules

State = TypeVar("State")


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree of parameters or optimizer state is finite, () bool; traceable.

    With a mesh in context, arrays sharded as in `rules.parameter_spec` are checked in place, and one collective joins
    the devices. (If left to the compiler, one reduction per array makes compilation take three times as long.)
    """
    flat = [(p, x) for p, x in jax.tree_util.tree_leaves_with_path(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    leaves, mesh = [x for _, x in flat], jax.sharding.get_abstract_mesh()

    def bad(leaves: list[jax.Array]) -> jax.Array:
        return sum((~jnp.isfinite(x)).any().astype(jnp.int32) for x in leaves)

    if mesh.empty:
        return bad(leaves) == 0
    specs = [rules.parameter_spec(rules.path_name(path), x.shape, mesh) for path, x in flat]
    joined = jax.shard_map(
        lambda leaves: jax.lax.psum(bad(leaves), mesh.axis_names),
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return joined(leaves) == 0


def take_if_finite(made: State, before: State, *judged: jax.Array) -> tuple[State, jax.Array]:
    """The new state of a step if it is finite, else the previous state.

    Args:
      judged: further scalars that must be finite, such as the loss and the gradient norm.

    Returns:
      (state, whether the step was skipped () bool).
    """
    finite = all_finite(made) & jnp.isfinite(jnp.stack(judged)).all()
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), made, before), ~finite
