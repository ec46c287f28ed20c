"""Integrates the flow's ODE from noise (t = 1) to data (t = 0).

A solver is a function `(velocity, x, t, t_next) -> x`, a velocity a function `(x, t) -> v`. Both are pure, so a caller
can compile one step and reuse it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from omnihuman_jax.errors import UserError
from omnihuman_jax.random_keys import SAMPLING, purpose_key

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
# (velocity, x (B, ...), t, t_next) -> x at t_next < t; times are scalars.
Solver = Callable[[Velocity, jax.Array, jax.Array, jax.Array], jax.Array]


def euler(velocity: Velocity, x: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array:
    """First order, one network call a step. Exact for a straight path."""
    return x + (t_next - t) * velocity(x, t)


def midpoint(velocity: Velocity, x: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array:
    """Second order, two network calls a step: the slope at the midpoint."""
    dt = t_next - t
    half = x + 0.5 * dt * velocity(x, t)
    return x + dt * velocity(half, t + 0.5 * dt)


def heun(velocity: Velocity, x: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array:
    """Second order, two network calls a step: the mean of the slopes at both ends."""
    dt = t_next - t
    first = velocity(x, t)
    second = velocity(x + dt * first, t_next)
    return x + 0.5 * dt * (first + second)


SOLVERS: dict[str, Solver] = {"euler": euler, "midpoint": midpoint, "heun": heun}


def get_solver(name: str) -> Solver:
    """The solver called `name`.

    Raises:
      UserError: no such solver.
    """
    if name not in SOLVERS:
        raise UserError(f"sample.solver={name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]


def step_progress(steps: int) -> np.ndarray:
    """Progress of sampling at each step, (steps,) float32 from 0 to 1."""
    return np.linspace(0.0, 1.0, steps, dtype=np.float32)


def integrate(
    step: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    grid: np.ndarray,
    on_step: Callable[[int, int], None] | None = None,
) -> jax.Array:
    """Integrates x (B, ...) from t = grid[0] to t = grid[-1].

    Args:
      step: `(x, t, t_next, progress) -> x`, usually jitted; t, t_next, progress are float32 scalars.
      x: noise at t = grid[0].
      grid: decreasing times, (S + 1,), from `time_grid`.
      on_step: called with (steps done, S) when a step's result is ready; without it the steps are queued.
    """
    steps = len(grid) - 1
    for i, progress in enumerate(step_progress(steps)):
        x = step(x, jnp.float32(grid[i]), jnp.float32(grid[i + 1]), jnp.float32(progress))
        if on_step is not None:
            x.block_until_ready()
            on_step(i + 1, steps)
    return x


def initial_noise(seed: int, segment: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of one segment: a pure function of (seed, segment, shape), float32."""
    return jax.random.normal(jax.random.fold_in(purpose_key(seed, SAMPLING), segment), shape, dtype=jnp.float32)
