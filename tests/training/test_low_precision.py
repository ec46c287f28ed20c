"""Rounding to bfloat16, to nearest and stochastically, and Adam with moments of either type."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from omnihuman_jax.errors import UserError
from omnihuman_jax.training import state as state_lib
from omnihuman_jax.training.low_precision import descend, round_to, scale_by_adam
from omnihuman_jax.training.step import rounding_key
from tests.training.tiny import tiny_config

ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


def neighbours(x):
    """The bfloat16 values below and above a float32 one in size."""
    low = (np.float32(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return low, (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32)


@pytest.mark.parametrize("value", [1.001, -3.3333, 7.7e-5, 1e-38, 2.9999e30])
def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean(value):
    count = 40_000
    x = {"x": jnp.full((count,), value, jnp.float32)}
    out = round_to(x, {"x": jnp.bfloat16}, jax.random.key(0))["x"]
    assert out.dtype == jnp.bfloat16
    out, (low, high) = np.asarray(out, np.float64), neighbours(value)
    assert set(np.unique(out)) == {float(low), float(high)}
    # Five standard errors of a coin's mean.
    assert abs(out.mean() - np.float32(value)) < 5 * abs(float(high) - float(low)) * 0.5 / count**0.5


def test_values_of_the_type_and_what_is_not_finite_stay():
    exact = np.array([0.0, -0.0, 1.0, -2.5, 3e38, np.inf, -np.inf, np.nan], np.float32)
    exact = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    for seed in range(5):
        out = round_to([jnp.asarray(exact)], [jnp.bfloat16], jax.random.key(seed))[0]
        np.testing.assert_array_equal(np.asarray(out, np.float32), exact)


def test_without_a_key_it_is_to_nearest_and_float32_and_integers_pass():
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    tree = {"a": jnp.asarray(x), "b": jnp.asarray(x), "c": jnp.int32(3)}
    types = {"a": jnp.bfloat16, "b": jnp.float32, "c": jnp.int32}
    near, random = round_to(tree, types, None), round_to(tree, types, jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(near["a"]), x.astype(ml_dtypes.bfloat16))
    for out in (near, random):
        np.testing.assert_array_equal(out["b"], x)
        assert out["c"] == 3
    assert (near["a"] != random["a"]).any()


def test_arrays_of_one_tree_are_rounded_by_different_bits():
    x = jnp.full((1000,), 1.003)
    a, b = round_to([x, x], [jnp.bfloat16] * 2, jax.random.key(0))
    assert 0.2 < float((a != b).mean()) < 0.6


def run_adam(optimizer, grads):
    state, updates = optimizer.init(grads[0]), []
    for grad in grads:
        update, state = jax.jit(optimizer.update)(grad, state)
        updates.append(update["w"])
    return np.stack(updates), state


def gradients(steps, size=2000):
    rng = np.random.default_rng(1)
    return [{"w": jnp.asarray(rng.normal(0.1, 1, size), jnp.float32)} for _ in range(steps)]


def test_in_float32_it_is_optax_adam_to_the_bit():
    grads = gradients(5)
    ours, mine = run_adam(scale_by_adam(**ADAM, mu_dtype=jnp.float32, nu_dtype=jnp.float32, seed=3), grads)
    theirs, expected = run_adam(optax.scale_by_adam(**ADAM), grads)
    np.testing.assert_array_equal(ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, mine, expected)


def test_bfloat16_second_moments_need_stochastic_rounding():
    """Gradients shrink tenfold: of 300 steps at 1 - b2 = 0.1% nearest rounding takes none, stochastic follows."""
    grads = [{"w": jnp.full((2000,), g)} for g in [1.0] * 5 + [0.1] * 300]
    nu = {}
    for name, seed, dtype in (("exact", None, "float32"), ("nearest", None, "bfloat16"), ("stochastic", 0, "bfloat16")):
        _, state = run_adam(scale_by_adam(**ADAM, mu_dtype=jnp.float32, nu_dtype=jnp.dtype(dtype), seed=seed), grads)
        assert state.nu["w"].dtype == dtype
        nu[name] = float(state.nu["w"].astype(jnp.float32).mean())
    assert nu["stochastic"] == pytest.approx(nu["exact"], rel=0.01)
    assert abs(nu["nearest"] / nu["exact"] - 1) > 0.1


@pytest.mark.parametrize("stochastic", [False, True])
def test_small_updates_reach_bfloat16_parameters_by_stochastic_rounding_only(stochastic):
    config = tiny_config("unused")
    config.optimizer.stochastic_rounding = stochastic
    parameter, update = {"w": jnp.ones((4000,), jnp.bfloat16)}, {"w": jnp.ones((4000,))}
    move = jax.jit(lambda parameter, step: descend(parameter, update, 1e-4, rounding_key(config, step)))
    for step in range(100):
        parameter = move(parameter, step)
    mean = float(parameter["w"].astype(jnp.float32).mean())
    assert mean == pytest.approx(0.99, abs=1e-3) if stochastic else mean == 1


@pytest.mark.parametrize("key", ["mu_dtype", "nu_dtype"])
def test_a_type_that_there_is_not_is_refused(key):
    config = tiny_config("unused")
    config.optimizer[key] = "float16"
    with pytest.raises(UserError, match=f"optimizer.{key}='float16': must be one of float32, bfloat16"):
        state_lib.make_optimizer(config)
