"""Times to train and sample at: time sampling, resolution-dependent shift, sampler grid."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from omnihuman_jax.errors import UserError

# Tokens of the published anchor clips under the 4x8x8 causal VAE and a (1, 2, 2) patch:
# frames -> 1 + (frames - 1) / 4 latent frames, 16 x 16 pixels a token.
_VIDEO_ANCHORS = ((256 // 16) * (256 // 16) * 10, (1280 // 16) * (720 // 16) * 37)
_IMAGE_ANCHORS = ((256 // 16) * (256 // 16), (1024 // 16) * (1024 // 16))


@dataclasses.dataclass(frozen=True)
class ShiftSchedule:
    """Time shift as a straight line in the number of video (or image) tokens.

    Attributes:
      tokens: the two anchor token counts.
      shifts: the shift at each anchor.
      minimum: lower bound. A shift below 1 would move times towards the data; nothing published does that.
      maximum: upper bound. The published line ends at 5.0, but open models of the family use up to 15.
    """

    tokens: tuple[float, float]
    shifts: tuple[float, float]
    minimum: float = 1.0
    maximum: float = 15.0

    def __call__(self, num_tokens: int) -> float:
        (n0, n1), (s0, s1) = self.tokens, self.shifts
        value = s0 + (s1 - s0) * (num_tokens - n0) / (n1 - n0)
        return float(min(max(value, self.minimum), self.maximum))


# OmniHuman-1 publishes no shift. These lines are in the released code of SeedVR (ByteDance), in pixels there.
VIDEO_SHIFT = ShiftSchedule(tokens=_VIDEO_ANCHORS, shifts=(1.0, 5.0))
IMAGE_SHIFT = ShiftSchedule(tokens=_IMAGE_ANCHORS, shifts=(1.0, 3.2))


def resolution_shift(num_tokens: int, *, is_image: bool = False) -> float:
    """The time shift s >= 1 for a sample of `num_tokens` noisy tokens, T * (H / patch) * (W / patch).

    A single latent frame (`is_image`) follows the image line.
    """
    return (IMAGE_SHIFT if is_image else VIDEO_SHIFT)(num_tokens)


def shift_from_config(setting: float | None, num_tokens: int, *, is_image: bool = False) -> float:
    """`resolution_shift`, or `setting` (the config's `diffusion.shift`) unless it is 0 or None.

    Raises:
      UserError: the setting is not a finite, non-negative number.
    """
    if not setting:
        return resolution_shift(num_tokens, is_image=is_image)
    if isinstance(setting, bool) or not isinstance(setting, int | float) or not 0 < setting < float("inf"):
        raise UserError(f"diffusion.shift={setting!r}: must be a positive number, or 0 to follow the resolution")
    return float(setting)


def sample_times(key: jax.Array, batch: int, mean: jax.Array | float = 0.0, std: jax.Array | float = 1.0) -> jax.Array:
    """Logit-normal training times t = sigmoid(N(mean, std^2)), (B,) float32 in (0, 1).

    `mean` and `std` are scalars or (B,).
    """
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,), dtype=jnp.float32))


def strongest(values: jax.Array, active: jax.Array) -> jax.Array:
    """The value of each row's strongest active condition, (B,).

    Args:
      values: (conditions + 1,), one of each condition, weak to strong; the last is of rows without any.
      active: bool (B, conditions).
    """
    last = active.shape[1] - 1 - jnp.argmax(active[:, ::-1], axis=1)
    return values[jnp.where(active.any(axis=1), last, active.shape[1])]


def shift(t: jax.Array, s: jax.Array | float) -> jax.Array:
    """Moves times towards noise: t' = s t / (1 + (s - 1) t). Keeps 0 and 1; s = 1 is the identity."""
    return s * t / (1.0 + (s - 1.0) * t)


def time_grid(steps: int, s: float = 1.0) -> np.ndarray:
    """The sampler's times from 1 (noise) down to 0 (data), (steps + 1,) float32, shifted by `s`.

    Raises:
      UserError: `steps` is below 1.
    """
    if steps < 1:
        raise UserError(f"sampling steps={steps}; the sampler needs at least 1")
    t = np.linspace(1.0, 0.0, steps + 1, dtype=np.float64)
    return np.asarray(shift(t, s), dtype=np.float32)
