"""Samples the latents of clips of any length, segment by segment.

The last M latent frames of a segment are the motion frames of the next, as sampled: decoding and encoding them again
would drift.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnihuman_jax.diffusion import guidance as cfg
from omnihuman_jax.diffusion import sampler, time
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import latent_frames
from omnihuman_jax.inference import segments
from omnihuman_jax.inference.inputs import Inputs
from omnihuman_jax.models.functional import Network

# (segment, segments, step, steps), segment and step counted from 1.
Progress = Callable[[int, int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample.

    Attributes:
      window: latent frames T of a segment, as in training.
      steps: solver steps per segment.
      solver: a name in `sampler.SOLVERS`.
      shift: time shift; 0 derives it from the number of tokens, as in training.
      guidance: classifier-free guidance.
    """

    window: int
    steps: int = 50
    solver: str = "euler"
    shift: float = 0.0
    guidance: cfg.Guidance = dataclasses.field(default_factory=cfg.Guidance)

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"sampling steps={self.steps}; the sampler needs at least 1")
        sampler.get_solver(self.solver)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> Settings:
        """The settings of a resolved training config; `changes` replace fields, also of `Guidance`, unless None."""
        changes = {name: value for name, value in changes.items() if value is not None}
        fields = {
            "window": config["data"]["latent_frames"],
            "steps": config["sample"]["steps"],
            "shift": config["diffusion"]["shift"],
        } | {name: changes.pop(name) for name in ("window", "steps", "solver", "shift") if name in changes}
        guidance = cfg.Guidance.from_dict(config["guidance"])
        return cls(**fields, guidance=dataclasses.replace(guidance, **changes))


@functools.partial(jax.jit, static_argnames=("network", "solver", "guidance", "rows"))
def _solver_step(params, batch, x, t, t_next, progress, *, network, solver, guidance, rows):
    """One solver step; all guidance passes run as one batch."""
    count, size = len(rows), x.shape[0]

    def tile(value):
        return jnp.tile(value, (count,) + (1,) * (value.ndim - 1))

    inputs = jax.tree.map(tile, batch) | {"active": jnp.repeat(jnp.array(rows), size, axis=0)}

    def velocity(x, t):
        v = network.apply(params, tile(x), jnp.full((count * size,), t, jnp.float32), inputs)
        return cfg.combine(v.reshape(count, *x.shape), np.array(rows), guidance, progress)

    return sampler.get_solver(solver)(velocity, x, t, t_next)


def sample_latents(
    network: Network,
    params: Any,
    inputs: Inputs,
    settings: Settings,
    *,
    frames: int,
    seeds: Sequence[int],
    on_step: Progress | None = None,
) -> jax.Array:
    """Samples normalised float32 latents (B, 1 + ceil((frames - 1) / 4), H, W, C) of B clips of `frames` pixel frames.

    A clip's noise depends only on its own seed and the segment; `on_step` is called after every step.
    """
    model, window = network.config, settings.window
    size, *frame = inputs.values["reference"].shape
    tokens = window * frame[0] * frame[1] // int(np.prod(model.patch_size))
    grid = time.time_grid(settings.steps, time.shift_from_config(settings.shift, tokens, is_image=window == 1))
    rows = tuple(map(tuple, cfg.passes(inputs.active, settings.guidance).tolist()))
    static = {"network": network, "solver": settings.solver, "guidance": settings.guidance, "rows": rows}

    todo, done = segments.plan(frames, window), []
    motion = jnp.zeros((size, model.motion_frames, *frame), jnp.float32)
    for segment in todo:
        batch = inputs.batch(segment, window, model) | {"motion": motion}
        noise = jnp.stack([sampler.initial_noise(seed, segment.number, (window, *frame)) for seed in seeds])
        step = functools.partial(_solver_step, params, batch, **static)
        report = functools.partial(on_step, segment.number + 1, len(todo)) if on_step else None
        done.append(sampler.integrate(step, noise, grid, report))
        motion = jnp.concatenate([motion, done[-1]], axis=1)[:, done[-1].shape[1] :]
    return jnp.concatenate(done, axis=1)[:, : latent_frames(frames)]
