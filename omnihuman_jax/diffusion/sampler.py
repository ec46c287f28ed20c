"""Integrates the flow's ODE from noise (t = 1) to data (t = 0).

A solver is a function `(velocity, x, t, t_next) -> x`, a velocity a function `(x, t) -> v`; both are
pure, so a caller compiles one step and runs it as often as it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from omnihuman_jax.errors import UserError
from omnihuman_jax.random_keys import SAMPLING, purpose_key

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


class Solver(Protocol):
    """One step of an ODE solver, x (B, ...) at time t to x at t_next < t (scalars)."""

    def __call__(self, velocity: Velocity, x: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array: ...


def euler(velocity: Velocity, x: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array:
    """First order, one network call a step. Exact for a straight path."""
    return x + (t_next - t) * velocity(x, t)


def midpoint(velocity: Velocity, x: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array:
    """Second order, two network calls a step: the slope half way."""
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
    """How far sampling has come at each step, (steps,) float32 from 0 to 1; (0,) for a single step."""
    return np.linspace(0.0, 1.0, steps, dtype=np.float32) if steps > 1 else np.zeros((1,), np.float32)


def integrate(
    step: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    grid: np.ndarray,
    on_step: Callable[[int, int], None] | None = None,
) -> jax.Array:
    """Runs `step` over the time grid.

    Args:
      step: `(x, t, t_next, progress) -> x`, usually jitted; t, t_next, progress are float32 scalars.
      x: noise at t = grid[0], (B, ...).
      grid: falling times, (S + 1,), from `time_grid`.
      on_step: called after each step with (steps done, S). It waits for the step's result, so that a
        progress bar tells the truth; without it the steps are queued.

    Returns:
      x at t = grid[-1].
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
