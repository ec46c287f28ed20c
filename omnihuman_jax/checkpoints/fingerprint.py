"""Checksums of arrays, which reveal damage when a checkpoint is restored, and a search for NaN."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omnihuman_jax.sharding.mesh import local_mesh
from omnihuman_jax.sharding.rules import path_name


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sums(leaves: list[jax.Array], mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> jax.Array:
    """Sums of the bit patterns, and the number of devices with non-finite values: (2, leaves) uint32."""

    def local(leaves: list[jax.Array]) -> jax.Array:
        sums, bad = [], []
        for x, spec in zip(leaves, specs, strict=True):
            unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
            total = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)
            used = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
            for axis in mesh.axis_names:  # count only the first replica
                total = total if axis in used else jnp.where(jax.lax.axis_index(axis) == 0, total, 0)
            sums.append(total)
            bad.append((~jnp.isfinite(x)).any().astype(jnp.uint32))
        return jax.lax.psum(jnp.stack([jnp.stack(sums), jnp.stack(bad)]), mesh.axis_names)

    whole = PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=whole, check_vma=False)(leaves)


class Fingerprint(NamedTuple):
    """Checksums of a tree of arrays.

    Attributes:
      sums: path of every array -> sum of its bit patterns modulo 2^32; independent of the mesh.
      not_finite: paths of the arrays that hold NaN or infinity, for messages: the first three and how many more.
    """

    sums: dict[str, int]
    not_finite: str


def start_fingerprint(tree: Any) -> Callable[[], Fingerprint]:
    """`fingerprint` in the background; call the result to wait for it. The arrays may be donated once this returns."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves, names = [leaf for _, leaf in flat], [path_name(path) for path, _ in flat]
    if not isinstance(leaves[0].sharding, NamedSharding):
        leaves = jax.device_put(leaves, NamedSharding(local_mesh(), PartitionSpec()))
    sums = _sums(leaves, leaves[0].sharding.mesh, tuple(leaf.sharding.spec for leaf in leaves))

    def result() -> Fingerprint:
        totals, bad = jax.device_get(sums)
        found = {name: int(x) for name, x in zip(names, totals, strict=True)}
        return Fingerprint(found, listed([name for name, n in zip(names, bad, strict=True) if n]))

    return result


def fingerprint(tree: Any) -> Fingerprint:
    """The fingerprint of arrays on one mesh or one device. All processes call it."""
    return start_fingerprint(tree)()


def listed(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
