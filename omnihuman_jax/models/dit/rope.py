"""Rotary position embedding from explicit (t, h, w) positions, in float32.

Parameters and files have the pairs (x[2i], x[2i+1]) of HunyuanVideo. Arrays [..., D/2, 2] of activations are slow on
TPUs, whose tiles hold 128 values of the last dimension. So the columns of the query and key projections are reordered,
all first members before all second ones ("halves"), and the rotation is that of (x[i], x[i + D/2]). Products of
queries and keys are the same in any common order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """cos and signed sin per token and head dimension in halves, (B or 1, N, D) float32: [cos, cos], [-sin, sin]."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, axes: tuple[int, int, int], theta: float) -> Rotation:
    """Rotations of tokens at explicit positions, as in HunyuanVideo.

    The head has a part each for t, h and w. Pair i of a part of size n turns by position * theta ** (-2 i / n) radians.

    Args:
      positions: (B or 1, N, 3) in patches.
      axes: sizes of the parts, even, summing to the head size D.
      theta: base of the frequencies.
    """
    angles = []
    for axis, size in enumerate(axes):
        frequencies = theta ** (-np.arange(0, size, 2, dtype=np.float64) / max(size, 1))
        angles.append(positions[..., axis, None].astype(jnp.float32) * frequencies.astype(np.float32))
    angles = jnp.concatenate(angles, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotation(jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1))


def halves(x: jax.Array, head_dim: int) -> jax.Array:
    """Reorders the last axis, heads x D, from pairs to halves within each head: x[0::2] before x[1::2]."""
    order = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    permutation = jnp.asarray(np.eye(head_dim)[:, order], x.dtype)
    heads = x.reshape(*x.shape[:-1], -1, head_dim)
    # As a matrix product, which is exact: a strided copy of a kernel is slow on TPUs.
    return jnp.matmul(heads, permutation, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)


def concatenate(*parts: Rotation) -> Rotation:
    """Joins rotations along the tokens."""
    rows = max(part.cos.shape[0] for part in parts)
    parts = [jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), part) for part in parts]
    return Rotation(*(jnp.concatenate(values, 1) for values in zip(*parts, strict=True)))


def apply(x: jax.Array, turn: Rotation) -> jax.Array:
    """Rotates the pairs (x[i], x[i + D/2]) of queries or keys x (B, N, heads, D) in halves; float32 inside and out."""
    x = x.astype(jnp.float32)
    return x * turn.cos[:, :, None] + jnp.roll(x, x.shape[-1] // 2, -1) * turn.sin[:, :, None]
