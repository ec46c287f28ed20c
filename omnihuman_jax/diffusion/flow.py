"""The rectified-flow path between data and noise, and its loss.

Convention (omnihuman.md, "Objective"): t = 0 is data, t = 1 is pure noise,

    x_t = (1 - t) * x0 + t * eps,      v = dx_t / dt = eps - x0.

Some public code runs time the other way round; convert there, never here.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def _per_sample(t: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes t (B,) or () so that it broadcasts over `like` (B, ...)."""
    t = jnp.asarray(t, dtype=jnp.float32)
    return t.reshape(t.shape + (1,) * (like.ndim - 1)) if t.ndim else t


def interpolate(x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """The noisy sample x_t (B, ...) on the straight path from data `x0` to noise `eps`.

    Args:
      x0: clean sample, (B, ...).
      eps: standard normal noise, the same shape.
      t: time in [0, 1], (B,) or a scalar.
    """
    chex.assert_equal_shape([x0, eps])
    t = _per_sample(t, x0)
    return (1.0 - t) * x0 + t * eps


def velocity(x0: jax.Array, eps: jax.Array) -> jax.Array:
    """The regression target v = eps - x0, the shape of `x0`."""
    return eps - x0


def x0_from_velocity(x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    """The clean sample (B, ...) that `x_t` and `v` at time `t` imply."""
    return x_t - _per_sample(t, x_t) * v


def eps_from_velocity(x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    """The noise (B, ...) that `x_t` and `v` at time `t` imply."""
    return x_t + (1.0 - _per_sample(t, x_t)) * v


def flow_loss(pred: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean squared velocity error of each sample, in float32.

    Args:
      pred: predicted velocity, (B, ...).
      target: `velocity(x0, eps)`, the same shape.
      weight: optional weight or mask that broadcasts against `pred` after axes of size one are
        appended on the right, e.g. (B,), (B, T) or (B, T, H, W, 1). The result is the weighted
        mean over all axes but the first; a sample whose weights are all zero has loss 0.

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
