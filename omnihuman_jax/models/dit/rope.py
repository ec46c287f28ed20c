"""Rotary position embedding from explicit (t, h, w) positions, interleaved pairs, in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """cos and sin per token and head dimension, (B or 1, N, D) float32; each value appears twice (interleaved)."""

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
    angles = jnp.repeat(jnp.concatenate(angles, -1), 2, axis=-1)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def concatenate(*parts: Rotation) -> Rotation:
    """Joins rotations along the tokens."""
    rows = max(part.cos.shape[0] for part in parts)
    parts = [jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), part) for part in parts]
    return Rotation(*(jnp.concatenate(values, 1) for values in zip(*parts, strict=True)))


def apply(x: jax.Array, turn: Rotation) -> jax.Array:
    """Rotates the pairs (x[2i], x[2i+1]) of queries or keys x (B, N, heads, D); float32 inside and out."""
    x = x.astype(jnp.float32)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape)
    return x * turn.cos[:, :, None] + turned * turn.sin[:, :, None]
