"""Frame-wise cross-attention: video tokens see condition tokens of their own latent frame (paper section 3.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from omnihuman_jax.models.dit.attention import attend
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.layers import ZEROS, CrossAttention, elementwise, layer_norm
from omnihuman_jax.sharding.rules import constrain
from omnihuman_jax.tokens import Tokens


class FrameTokens(NamedTuple):
    """Condition tokens and the segments of the attention to them: one per latent frame, 0 sees nothing.

    Attributes:
      value: (B, A, hidden).
      query: (B, N) int32, segments of the visual tokens.
      key: (B, A) int32, segments of the condition tokens.
    """

    value: jax.Array
    query: jax.Array
    key: jax.Array


def frame_segments(tokens: Tokens) -> jax.Array:
    """1 + latent frame (in patches) of each token, (B, N) int32; 0 for absent and clean tokens."""
    return jnp.where((tokens.segment > 0) & ~tokens.clean, tokens.position[..., 0].astype(jnp.int32) + 1, 0)


def frame_tokens(visual: Tokens, condition: Tokens) -> FrameTokens:
    """The tokens of a condition as visual tokens see them; a visual token whose frame has none sees nothing."""
    query, key = frame_segments(visual), frame_segments(condition)
    seen = (query[:, :, None] == key[:, None, :]).any(-1)
    return FrameTokens(condition.value, jnp.where(seen, query, 0), key)


class FrameAttention(CrossAttention):
    """Cross-attention of video tokens to the condition tokens of their own latent frame.

    The output is zero-initialised, so an untrained condition changes nothing. A token that sees nothing gets exactly 0.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs, out_init=ZEROS)

    def __call__(self, x: jax.Array, tokens: FrameTokens) -> jax.Array:
        """x (B, N, hidden), tokens of `frame_tokens` for these N -> update (B, N, hidden)."""
        config = self.config
        heads = (config.num_heads, config.head_dim)
        value, query, key = tokens
        x = elementwise(layer_norm, (1,))(x, config.norm_eps).astype(config.compute_dtype)
        q = elementwise(self.q_norm)(self.q(x).reshape(*x.shape[:2], *heads)).astype(config.compute_dtype)
        k = self.k_norm(self.k(value).reshape(*value.shape[:2], *heads)).astype(config.compute_dtype)
        v = self.v(value).reshape(*value.shape[:2], *heads)
        out = attend(q, k, v, query, key, implementation=config.attention, sequence="replicated")
        out = constrain(self.out(out.reshape(*x.shape[:2], -1)), "batch", "tokens", None)
        return jnp.where((query > 0)[..., None], out, 0)
