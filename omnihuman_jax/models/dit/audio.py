"""Audio condition: features -> audio tokens per latent frame -> frame-wise cross-attention (paper section 3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from omnihuman_jax.models.dit.attention import attend
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.layers import ZEROS, CrossAttention, elementwise, layer_norm, linear
from omnihuman_jax.sharding.rules import constrain
from omnihuman_jax.tokens import Tokens

STRIDE = 4  # pixel frames of a latent frame
TIME_SLOTS = 1 << 16  # more than any clip's latent frames: keeps the frames of packed samples apart


def windows(features: jax.Array, context: int) -> jax.Array:
    """Stacks each latent frame's own four feature frames and `context` frames on both sides.

    Args:
      features: (B, 4T + 2*context, D) at 25 fps. Row r is pixel frame 4s - 3 - context + r, where s is the latent
        index of the window's first frame; latent frame s + k covers pixel frames 4(s+k) - 3 .. 4(s+k).
      context: frames of context on each side.

    Returns:
      (B, T, (4 + 2*context) * D): rows 4k .. 4k + 3 + 2*context for latent frame k.
    """
    frames = (features.shape[1] - 2 * context) // STRIDE
    span = STRIDE * (frames - 1) + 1
    return jnp.concatenate([features[:, i : i + span : STRIDE] for i in range(STRIDE + 2 * context)], -1)


class AudioAdapter(nnx.Module):
    """Speech features at 25 fps -> `audio_tokens` tokens per latent frame.

    An MLP on every feature frame, the window of adjacent frames concatenated, and an MLP to the tokens of the frame.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.audio_hidden
        self.fc1 = linear(config, config.audio_dim, width, rngs=rngs)
        self.fc2 = linear(config, width, width, rngs=rngs)
        self.window1 = linear(config, config.audio_window * width, width, rngs=rngs)
        self.window2 = linear(config, width, config.audio_tokens * config.hidden_size, rngs=rngs)

    def __call__(self, features: jax.Array, present: jax.Array) -> Tokens:
        """features (B, 4T + 2*context, audio_dim), present (B,) bool -> Tokens (B, T * audio_tokens, hidden).

        The tokens carry their latent frame (in patches) as position t; those of absent audio have segment 0 and do
        not depend on the features.
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


def frame_segments(tokens: Tokens) -> jax.Array:
    """One id per (sample, latent frame), (B, N) int32; 0 for absent and for clean tokens, which hear no audio."""
    frame = tokens.segment * TIME_SLOTS + tokens.position[..., 0].astype(jnp.int32)
    return jnp.where((tokens.segment > 0) & ~tokens.clean, frame, 0)


def listening(visual: Tokens, audio: Tokens) -> tuple[jax.Array, jax.Array]:
    """Segments (query, key) of the audio cross-attention; a visual token without audio of its frame gets 0."""
    q_segment, kv_segment = frame_segments(visual), frame_segments(audio)
    heard = (q_segment[:, :, None] == kv_segment[:, None, :]).any(-1)
    return jnp.where(heard, q_segment, 0), kv_segment


class AudioAttention(CrossAttention):
    """Frame-wise cross-attention of video tokens to the audio tokens of their own latent frame.

    Zero-initialised output, so that an untrained audio path changes nothing; a token that hears nothing gets exactly 0.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs, out_init=ZEROS)

    def __call__(self, x: jax.Array, audio: jax.Array, q_segment: jax.Array, kv_segment: jax.Array) -> jax.Array:
        """x (B, N, hidden), audio (B, A, hidden), segments of `listening` -> update (B, N, hidden)."""
        config = self.config
        heads = (config.num_heads, config.head_dim)
        x = elementwise(layer_norm, (1,))(x, config.norm_eps).astype(config.compute_dtype)
        q = elementwise(self.q_norm)(self.q(x).reshape(*x.shape[:2], *heads)).astype(config.compute_dtype)
        k = self.k_norm(self.k(audio).reshape(*audio.shape[:2], *heads)).astype(config.compute_dtype)
        v = self.v(audio).reshape(*audio.shape[:2], *heads)
        out = attend(q, k, v, q_segment, kv_segment, implementation=config.attention, sequence="replicated")
        out = constrain(self.out(out.reshape(*x.shape[:2], -1)), "batch", "tokens", None)
        return jnp.where((q_segment > 0)[..., None], out, 0)
