"""A fifth condition from outside the project: where the person looks, a direction (x, y, z) for every pixel frame.

`--plugins=tests.extending.gaze` brings it into any command; docs/extending.md walks through it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnihuman_jax import conditions
from omnihuman_jax.conditions import Condition, Kind
from omnihuman_jax.frames import STRIDE
from omnihuman_jax.models.dit import entries
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.entries import Entry, Way
from omnihuman_jax.models.dit.layers import ZEROS, linear


class GazeEncoder(nnx.Module):
    """The directions of a latent frame's four pixel frames -> a vector that is added to its video tokens."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.fc1 = linear(config, 3 * STRIDE, 16, rngs=rngs)
        self.fc2 = linear(config, 16, config.hidden_size, rngs=rngs, init=ZEROS)

    def __call__(self, directions: jax.Array, present: jax.Array) -> jax.Array:
        """directions (B, 4T, 3), present (B,) bool -> (B, T, hidden); exactly 0 where absent."""
        frames = directions.reshape(len(directions), -1, 3 * STRIDE)
        return jnp.where(present[:, None, None], self.fc2(jax.nn.silu(self.fc1(frames))), 0)

    @staticmethod
    def flops(config: ModelConfig, frames: int, rows: int, columns: int) -> int:
        """Forward FLOPs of one sample."""
        return 2 * frames * (3 * STRIDE * 16 + 16 * config.hidden_size)


conditions.register(Condition("gaze", Kind.TRACK, "gaze", "gaze", np.float32, row=(3,), selects=True), after="audio")
entries.register("gaze", Entry(Way.ADDITION, GazeEncoder))
