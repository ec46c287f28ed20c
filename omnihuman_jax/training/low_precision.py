"""Optimizer moments and parameters in bfloat16, with stochastic rounding that preserves small updates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from omnihuman_jax.random_keys import MOMENT_ROUNDING, purpose_key


def round_to(tree: Any, dtypes: Any, key: jax.Array | None) -> Any:
    """Rounds float32 arrays to other dtypes.

    bfloat16 has 8 significant bits, so rounding to nearest drops updates below half a unit, up to 0.4% of the value.
    Stochastic rounding rounds up with a probability equal to the discarded fraction, which preserves the mean of many
    updates. It is a pure function of the key, the same on every mesh. Inf and NaN stay unchanged.

    Args:
      tree: float32 arrays.
      dtypes: pytree of the same structure, with a dtype or array for each leaf.
      key: for stochastic rounding to bfloat16; None rounds to nearest.
    """
    leaves, structure = jax.tree.flatten(tree)
    rounded = []
    for index, (x, like) in enumerate(zip(leaves, structure.flatten_up_to(dtypes), strict=True)):
        dtype = jnp.dtype(getattr(like, "dtype", like))
        if key is not None and dtype == jnp.bfloat16:
            x = _stochastic(x, jax.random.bits(jax.random.fold_in(key, index), x.shape, jnp.uint16))
        rounded.append(x.astype(dtype))
    return structure.unflatten(rounded)


def _stochastic(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds float32 x to the bfloat16 grid: adds random bits to the low 16, which may carry, then truncates."""
    whole = jax.lax.bitcast_convert_type(x, jnp.uint32)
    kept = (whole + bits.astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(kept, jnp.float32), x)


def descend(params: Any, updates: Any, learning_rates: Any, key: jax.Array | None) -> Any:
    """params - learning_rates * updates, computed in float32 and rounded to the parameter dtypes by `round_to`.

    `learning_rates` is a scalar or a tree with one rate per parameter.
    """
    if jax.tree.structure(learning_rates) != jax.tree.structure(params):
        learning_rates = jax.tree.map(lambda _: learning_rates, params)
    moved = jax.tree.map(lambda p, u, rate: p.astype(jnp.float32) - rate * u, params, updates, learning_rates)
    return round_to(moved, params, key)


def scale_by_adam(
    *, b1: float, b2: float, eps: float, mu_dtype: Any, nu_dtype: Any, seed: int | None
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` that computes in float32 and stores its moments in the given dtypes.

    Args:
      b1: decay of the first moments.
      b2: decay of the second moments.
      eps: added to the square root of the second moments.
      mu_dtype: dtype of the first moments.
      nu_dtype: dtype of the second moments. If 1 - b2 is below 0.4%, bfloat16 moments rounded to nearest stop following
        shrinking gradients, so use stochastic rounding.
      seed: for stochastic rounding; None rounds to nearest.
    """
    inner = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def types(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            state.count.dtype, jax.tree.map(lambda _: mu_dtype, state.mu), jax.tree.map(lambda _: nu_dtype, state.nu)
        )

    def init(params: Any) -> optax.ScaleByAdamState:
        state = inner.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
        return round_to(state, types(state), None)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> Any:
        del params
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (state.mu, state.nu))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, made = inner.update(grads, optax.ScaleByAdamState(state.count, *wide))
        key = None if seed is None else jax.random.fold_in(purpose_key(seed, MOMENT_ROUNDING), state.count)
        return updates, round_to(made, types(made), key)

    return optax.GradientTransformation(init, update)
