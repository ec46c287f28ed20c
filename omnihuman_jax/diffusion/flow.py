"""The rectified-flow path between data and noise, and its loss.

OmniHuman-1 trains by flow matching (section 3.1). Convention: t = 0 is data, t = 1 is pure noise,

    x_t = (1 - t) * x0 + t * eps,      v = dx_t / dt = eps - x0.

Some public code runs time the other way; convert there, never here.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def interpolate(x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """The noisy sample x_t (B, ...) between data x0 and noise eps (B, ...) at times t in [0, 1], (B,) or a scalar."""
    chex.assert_equal_shape([x0, eps])
    t = jnp.asarray(t, dtype=jnp.float32)
    t = t.reshape(t.shape + (1,) * (x0.ndim - 1)) if t.ndim else t
    return (1.0 - t) * x0 + t * eps


def velocity(x0: jax.Array, eps: jax.Array) -> jax.Array:
    """The regression target v = eps - x0, the shape of `x0`."""
    return eps - x0


def flow_loss(pred: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean squared velocity error of each sample, in float32.

    Args:
      pred: predicted velocity, (B, ...).
      target: `velocity(x0, eps)`, the same shape.
      weight: weights or a mask, e.g. (B,), (B, T) or (B, T, H, W, 1); missing axes on the right broadcast. The loss is
        then the weighted mean over all axes but the first, and 0 for a sample whose weights are all zero.

    Returns:
      (B,) float32.
    """
    chex.assert_equal_shape([pred, target])  # (B, 1) against (B,) would broadcast to (B, B)
    error = jnp.square(pred.astype(jnp.float32) - target.astype(jnp.float32))
    axes = tuple(range(1, error.ndim))
    if weight is None:
        return jnp.mean(error, axis=axes)
    weight = jnp.asarray(weight, dtype=jnp.float32)
    weight = jnp.broadcast_to(weight.reshape(weight.shape + (1,) * (error.ndim - weight.ndim)), error.shape)
    total = jnp.sum(weight, axis=axes)
    return jnp.sum(weight * error, axis=axes) / jnp.where(total > 0, total, 1.0)
