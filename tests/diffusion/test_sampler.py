"""ODE solvers against flows with known solutions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnihuman_jax.diffusion import sampler, time
from omnihuman_jax.errors import UserError

MEAN, STD = 2.0, 0.5


def gaussian_velocity(x, t):
    """Exact E[eps - x0 | x_t] for data N(MEAN, STD^2): the ODE carries noise z to MEAN + STD * z."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = x - (1 - t) * MEAN
    return t / variance * centred - (MEAN + (1 - t) * STD**2 / variance * centred)


def run(solver, steps, shift=1.0):
    step = jax.jit(lambda x, t, t_next, progress: sampler.get_solver(solver)(gaussian_velocity, x, t, t_next))
    noise = jnp.linspace(-2, 2, 9)[None]
    return np.asarray(sampler.integrate(step, noise, time.time_grid(steps, shift))), MEAN + STD * np.asarray(noise)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_solvers_converge_to_the_analytic_flow_with_their_order(solver, order):
    errors = [np.abs(np.subtract(*run(solver, steps))).max() for steps in (16, 32, 64)]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.05
    assert np.all(rates > order - 0.3), (errors, rates)


def test_shifted_grid_converges_too():
    got, expected = run("heun", 64, shift=3.0)
    np.testing.assert_allclose(got, expected, atol=5e-3)


def test_euler_is_exact_on_a_straight_path():
    x0, eps = jnp.array([[1.0, -2.0]]), jnp.array([[0.3, 0.7]])
    step = functools.partial(lambda x, t, t_next, progress: sampler.euler(lambda *_: eps - x0, x, t, t_next))
    np.testing.assert_allclose(sampler.integrate(step, eps, time.time_grid(3, 2.0)), x0, atol=1e-6)


def test_progress_runs_from_zero_to_one_and_is_reported():
    seen, reported = [], []

    def step(x, t, t_next, progress):
        seen.append((float(t), float(t_next), float(progress)))
        return x

    sampler.integrate(step, jnp.zeros((1,)), time.time_grid(5), lambda i, n: reported.append((i, n)))
    assert [p for *_, p in seen] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert seen[0][0] == 1.0 and seen[-1][1] == 0.0
    assert reported == [(i, 5) for i in range(1, 6)]
    assert sampler.step_progress(1).tolist() == [0.0]


def test_noise_is_a_pure_function_of_seed_and_segment():
    make = functools.partial(sampler.initial_noise, shape=(4, 8, 8, 16))
    np.testing.assert_array_equal(make(1, 0), make(1, 0))
    others = [make(1, 1), make(2, 0), make(0, 1)]
    assert all(not np.array_equal(make(1, 0), other) for other in others)
    assert float(jnp.std(make(1, 0))) == pytest.approx(1.0, abs=0.03)


def test_unknown_solver_is_refused():
    with pytest.raises(UserError, match="euler"):
        sampler.get_solver("rk4")
