"""Pose condition: keypoint heatmaps -> pose guider -> channels stacked on the noisy latents (paper section 3.2)."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from omnihuman_jax.frames import STRIDE
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.layers import ZEROS, linear


def heatmaps(keypoints: jax.Array, rows: int, columns: int, sigma: float) -> jax.Array:
    """Gaussian heatmaps of keypoints.

    Args:
      keypoints: (..., K, 3): x, y as fractions of the frame's width and height, confidence 0..1.
      rows, columns: size of a heatmap.
      sigma: standard deviation in heatmap cells.

    Returns:
      (..., rows, columns, K) float32: confidence * exp(-d^2 / (2 sigma^2)), with d the distance in cells from the
      centre ((j + 0.5) / columns, (i + 0.5) / rows) of cell (i, j).
    """
    keypoints = keypoints.astype(jnp.float32)
    x, y, confidence = keypoints[..., 0], keypoints[..., 1], keypoints[..., 2]

    def bump(centre, cells):
        distance = jnp.arange(cells, dtype=jnp.float32)[:, None] + 0.5 - centre[..., None, :] * cells
        return jnp.exp(-jnp.square(distance) / (2 * sigma**2))

    vertical = bump(y, rows) * confidence[..., None, :]
    return vertical[..., :, None, :] * bump(x, columns)[..., None, :, :]


class PoseGuider(nnx.Module):
    """A small strided convolutional network from heatmaps to pose channels on the latent grid.

    The last convolution is zero-initialised, so an untrained pose guider changes nothing. The features of a latent
    frame's four pixel frames are concatenated and projected without bias.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        halvings = config.pose_scale.bit_length() - 1
        widths = (config.num_keypoints, *config.pose_widths)
        self.convolutions = len(config.pose_widths)
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            setattr(self, f"conv{i}", _conv(config, inputs, outputs, 2 if i < halvings else 1, rngs=rngs))
        self.out = _conv(config, widths[-1], config.pose_channels, 1, rngs=rngs, init=ZEROS)
        self.merge = linear(config, STRIDE * config.pose_channels, config.pose_channels, rngs=rngs, bias=False)

    def __call__(self, keypoints: jax.Array, present: jax.Array, rows: int, columns: int) -> jax.Array:
        """keypoints (B, 4T, K, 3), present (B,) bool -> pose channels (B, T, rows, columns, pose_channels).

        Rows 4k .. 4k + 3 of the window belong to its latent frame k. The channels of an absent pose are exactly 0.
        """
        config = self.config
        b, frames = keypoints.shape[:2]
        present = present[:, None, None, None]
        keypoints = jnp.where(present, keypoints, 0)
        x = heatmaps(keypoints, rows * config.pose_scale, columns * config.pose_scale, config.pose_sigma)
        x = x.reshape(b * frames, *x.shape[2:]).astype(config.compute_dtype)
        for i in range(self.convolutions):
            x = jax.nn.silu(getattr(self, f"conv{i}")(x))
        x = self.out(x).reshape(b, frames // STRIDE, STRIDE, rows, columns, config.pose_channels)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(b, frames // STRIDE, rows, columns, -1)
        return jnp.where(present[..., None], self.merge(x), 0)

    @staticmethod
    def width(config: ModelConfig) -> int:
        """Pose channels stacked on the noisy latents."""
        return config.pose_channels

    @staticmethod
    def flops(config: ModelConfig, frames: int, rows: int, columns: int) -> int:
        """Forward FLOPs of one sample."""
        scale, total, cells = config.pose_scale, 0, STRIDE * frames * rows * columns
        widths = (config.num_keypoints, *config.pose_widths, config.pose_channels)
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            if i < config.pose_scale.bit_length() - 1:
                scale //= 2
            total += 2 * cells * scale**2 * 9 * inputs * outputs
        return total + 2 * cells * config.pose_channels**2


def _conv(config: ModelConfig, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs, init=None) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (3, 3),
        strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dtype=config.compute_dtype,
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=init or nnx.initializers.he_normal(),
        rngs=rngs,
    )
