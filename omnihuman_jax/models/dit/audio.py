"""Audio condition: speech features -> audio tokens of each latent frame (paper section 3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from omnihuman_jax.frames import STRIDE
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.layers import layer_norm, linear
from omnihuman_jax.tokens import Tokens


def windows(features: jax.Array, context: int) -> jax.Array:
    """Concatenates each latent frame's own four feature frames and `context` frames on both sides.

    Args:
      features: (B, 4T + 2*context, D) at 25 fps; rows as `frames.window_frames`.
      context: frames of context on each side.

    Returns:
      (B, T, (4 + 2*context) * D): rows 4k .. 4k + 3 + 2*context for latent frame k.
    """
    frames = (features.shape[1] - 2 * context) // STRIDE
    span = STRIDE * (frames - 1) + 1
    return jnp.concatenate([features[:, i : i + span : STRIDE] for i in range(STRIDE + 2 * context)], -1)


class AudioAdapter(nnx.Module):
    """An MLP on every feature frame, then an MLP from the window of adjacent frames to the tokens of a latent frame."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.audio_hidden
        self.fc1 = linear(config, config.audio_dim, width, rngs=rngs)
        self.fc2 = linear(config, width, width, rngs=rngs)
        self.window1 = linear(config, config.audio_window * width, width, rngs=rngs)
        self.window2 = linear(config, width, config.audio_tokens * config.hidden_size, rngs=rngs)

    def __call__(self, features: jax.Array, present: jax.Array) -> Tokens:
        """features (B, 4T + 2*context, audio_dim), present (B,) bool -> Tokens (B, T * audio_tokens, hidden).

        Their position t is the latent frame, in patches. Tokens of absent audio have segment 0 and do not depend on the
        features.
        """
        config = self.config
        features = jnp.where(present[:, None, None], features, 0).astype(config.compute_dtype)
        x = self.fc2(jax.nn.gelu(self.fc1(features), approximate=True))
        x = jax.nn.gelu(self.window1(windows(x, config.audio_context)), approximate=True)
        x = self.window2(x)
        b, frames, _ = x.shape
        x = x.reshape(b, frames * config.audio_tokens, config.hidden_size)
        time = jnp.repeat(jnp.arange(frames) // config.patch_size[0], config.audio_tokens).astype(jnp.float32)
        return Tokens(
            layer_norm(x, config.norm_eps).astype(config.compute_dtype),
            jnp.stack([time, jnp.zeros_like(time), jnp.zeros_like(time)], -1)[None],
            jnp.broadcast_to(present[:, None].astype(jnp.int32), (b, time.size)),
            jnp.zeros((1, time.size), bool),
        )

    @staticmethod
    def width(config: ModelConfig) -> int:
        """Audio tokens per latent frame."""
        return config.audio_tokens

    @staticmethod
    def flops(config: ModelConfig, frames: int, rows: int, columns: int) -> int:
        """Forward FLOPs of one sample."""
        width = config.audio_hidden
        per_feature = config.audio_dim * width + width**2
        per_frame = config.audio_window * width**2 + width * config.audio_tokens * config.hidden_size
        return 2 * ((STRIDE * frames + 2 * config.audio_context) * per_feature + frames * per_frame)
