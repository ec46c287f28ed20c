"""Text condition: projection of the encoder's token states, the optional token refiner, and the learned null token.

Also the tokens that join the text in some bases: those of a second text encoder and of an image encoder.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from omnihuman_jax.models.dit.attention import attend
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.layers import TIME_FREQUENCIES, ZEROS, Embedder, linear, sinusoid
from omnihuman_jax.tokens import Tokens

KINDS = ("text", "text2", "image")  # rows of the embedding of a token's kind
TEXT2_INNER = 2048  # inner width of the second text's projection, whatever the network's


class TextMLP(nnx.Module):
    """fc2(gelu(fc1 x)) from the text encoder's width to the hidden size."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.fc1 = linear(config, config.text_dim, config.hidden_size, rngs=rngs)
        self.fc2 = linear(config, config.hidden_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


def make_text_embed(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The projection of text states (B, L, text_dim) to (B, L, hidden)."""
    if config.text_embed == "mlp":
        return TextMLP(config, rngs=rngs)
    return linear(config, config.text_dim, config.hidden_size, rngs=rngs)


def _norm(config: ModelConfig, size: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(size, epsilon=1e-5, dtype=jnp.float32, param_dtype=jnp.dtype(config.param_dtype), rngs=rngs)


class Text2Embedder(nnx.Module):
    """States of a second text encoder (B, L2, text2_dim) -> tokens (B, L2, hidden) (HunyuanVideo-1.5: Glyph-ByT5)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm = _norm(config, config.text2_dim, rngs)
        self.fc1 = linear(config, config.text2_dim, TEXT2_INNER, rngs=rngs)
        self.fc2 = linear(config, TEXT2_INNER, TEXT2_INNER, rngs=rngs)
        self.fc3 = linear(config, TEXT2_INNER, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(self.fc1(self.norm(x)), approximate=False)
        return self.fc3(jax.nn.gelu(self.fc2(x), approximate=False))


class ImageEmbedder(nnx.Module):
    """States of an image encoder (B, I, image_embed_dim) -> tokens (B, I, hidden) (Motif-Video)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config, dim = config, config.image_embed_dim
        self.norm_in, self.norm_out = _norm(config, dim, rngs), _norm(config, config.hidden_size, rngs)
        self.fc1 = linear(config, dim, dim, rngs=rngs)
        self.fc2 = linear(config, dim, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.fc2(jax.nn.gelu(self.fc1(self.norm_in(x)), approximate=False))
        return self.norm_out(x).astype(self.config.compute_dtype)


def joining_tokens(embedded: jax.Array, mask: jax.Array) -> Tokens:
    """Tokens without positions that join the text, from embedded (B, n, hidden) and mask (B, n) bool."""
    size = embedded.shape[1]
    return Tokens(embedded, jnp.zeros((1, size, 3)), mask.astype(jnp.int32), jnp.zeros((1, size), bool))


def text_tokens(embedded: jax.Array, mask: jax.Array, null: jax.Array) -> Tokens:
    """Text tokens of the joint attention; a sample without text has only the learned null token.

    Args:
      embedded: (B, L, hidden).
      mask: (B, L) bool, all false if the text is absent.
      null: (hidden,) learned token.
    """
    absent = ~mask.any(-1)
    first = jnp.arange(embedded.shape[1]) == 0
    value = jnp.where(mask[..., None], embedded, 0)
    value = jnp.where((absent[:, None] & first)[..., None], null.astype(embedded.dtype), value)
    index = jnp.arange(embedded.shape[1], dtype=jnp.float32)
    position = jnp.stack([index] * 3, -1)[None]
    segment = (mask | (absent[:, None] & first)).astype(jnp.int32)
    return Tokens(value, position, segment, jnp.zeros((1, index.size), bool))


class RefinerBlock(nnx.Module):
    """Self-attention and MLP over text tokens, gated by the time and the mean text state (HunyuanVideo)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, inner = config.hidden_size, config.attention_dim
        norm = {"epsilon": config.norm_eps, "dtype": jnp.float32, "param_dtype": jnp.dtype(config.param_dtype)}
        self.norm1, self.norm2 = nnx.LayerNorm(dim, rngs=rngs, **norm), nnx.LayerNorm(dim, rngs=rngs, **norm)
        self.q = linear(config, dim, inner, rngs=rngs)
        self.k = linear(config, dim, inner, rngs=rngs)
        self.v = linear(config, dim, inner, rngs=rngs)
        self.out = linear(config, inner, dim, rngs=rngs)
        self.fc1 = linear(config, dim, config.mlp_hidden, rngs=rngs)
        self.fc2 = linear(config, config.mlp_hidden, dim, rngs=rngs)
        self.mod = linear(config, dim, 2 * dim, rngs=rngs, init=ZEROS, dtype=jnp.float32)

    def __call__(self, x: jax.Array, segment: jax.Array, vec: jax.Array) -> jax.Array:
        dtype = self.config.compute_dtype
        gates = jnp.split(self.mod(jax.nn.silu(vec))[:, None], 2, -1)
        h = self.norm1(x).astype(dtype)
        q, k, v = (
            f(h).reshape(*h.shape[:2], self.config.num_heads, self.config.head_dim) for f in (self.q, self.k, self.v)
        )
        h = attend(q, k, v, segment, segment, implementation=self.config.attention)
        x = x + (gates[0] * self.out(h.reshape(*x.shape[:2], -1))).astype(dtype)
        h = self.fc2(jax.nn.silu(self.fc1(self.norm2(x).astype(dtype))))
        return x + (gates[1] * h).astype(dtype)


class TokenRefiner(nnx.Module):
    """HunyuanVideo's refiner of causal language-model states: a few bidirectional blocks."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.depth = config.text_refiner_depth
        self.time_embed = Embedder(config, TIME_FREQUENCIES, rngs=rngs)
        self.text_embed = Embedder(config, config.text_dim, rngs=rngs)
        for i in range(self.depth):
            setattr(self, f"block{i}", RefinerBlock(config, rngs=rngs))

    def __call__(self, x: jax.Array, states: jax.Array, mask: jax.Array, t: jax.Array) -> jax.Array:
        """Embedded x (B, L, hidden), states (B, L, text_dim), mask (B, L) bool, t (B,) in [0, 1] -> (B, L, hidden)."""
        weight = mask[..., None].astype(jnp.float32)
        mean = (jnp.where(mask[..., None], states, 0) * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
        vec = self.time_embed(sinusoid(1000 * t)) + self.text_embed(mean)
        for i in range(self.depth):
            x = getattr(self, f"block{i}")(x, mask.astype(jnp.int32), vec)
        return x
