"""Optimizer moments and parameters in bfloat16, and the stochastic rounding that lets small updates through."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from omnihuman_jax.random_keys import MOMENT_ROUNDING, purpose_key


def round_to(tree: Any, dtypes: Any, key: jax.Array | None) -> Any:
    """Rounds float32 arrays to other types.

    Nearest rounding drops every update below half of bfloat16's 8 bits, 0.4% of the value. Stochastic rounding goes up
    with the probability of what is cut off, so that the mean of many updates is kept. It is a pure function of the key,
    on every mesh the same. Inf and NaN stay what they are.

    Args:
      tree: float32 arrays.
      dtypes: pytree of the same structure, a dtype or array for every array.
      key: rounds to bfloat16 stochastically; None rounds to nearest.
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
    """float32 x on bfloat16's grid: adds random bits below the 16 that stay, which carry by chance, and cuts."""
    whole = jax.lax.bitcast_convert_type(x, jnp.uint32)
    kept = (whole + bits.astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(kept, jnp.float32), x)


def descend(params: Any, updates: Any, learning_rates: Any, key: jax.Array | None) -> Any:
    """params - learning_rates * updates, computed in float32 and rounded to the parameters' types by `round_to`.

    `learning_rates` is a scalar or a tree with one for each parameter.
    """
    if jax.tree.structure(learning_rates) != jax.tree.structure(params):
        learning_rates = jax.tree.map(lambda _: learning_rates, params)
    moved = jax.tree.map(lambda p, u, rate: p.astype(jnp.float32) - rate * u, params, updates, learning_rates)
    return round_to(moved, params, key)


def scale_by_adam(
    *, b1: float, b2: float, eps: float, mu_dtype: Any, nu_dtype: Any, seed: int | None
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` that computes in float32 and keeps its moments in the given types.

    Args:
      b1: decay of the first moments.
      b2: decay of the second moments.
      eps: added to the root of the second moments.
      mu_dtype: type of the first moments.
      nu_dtype: type of the second moments. In bfloat16 to nearest they stop following gradients that shrink when
        1 - b2 is below 0.4%, so it wants stochastic rounding.
      seed: rounds stochastically; None rounds to nearest.
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
