"""wav2vec 2.0 (Baevski et al. 2020): sound at 16 kHz -> features at 50 Hz of every layer.

Both published forms: base (group norm in the first convolution, normalisation after each residual) and large (layer
norm in every convolution, "stable" normalisation before). Parameters are named as in Hugging Face's `Wav2Vec2Model`,
and the outputs agree with it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.speech.layers import Affine, Attention, Conv, LayerNorm, conv1d, gelu, standardised

RATE = 16_000


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """Sizes; the names are those of Hugging Face's config.json, the defaults those of wav2vec2-base.

    Attributes:
      feat_extract_norm: "group" (the first convolution, over time) or "layer" (every convolution, over channels).
      do_stable_layer_norm: normalise before attention and MLP instead of after.
      do_normalize: whether the input needs zero mean and unit variance (preprocessor_config.json).
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    feat_extract_norm: str = "group"
    do_stable_layer_norm: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    layer_norm_eps: float = 1e-5
    do_normalize: bool = True

    def __post_init__(self):
        for name in ("conv_dim", "conv_kernel", "conv_stride"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise UserError("wav2vec2: conv_dim, conv_kernel and conv_stride must have the same length")
        if self.feat_extract_norm not in ("group", "layer"):
            raise UserError(f"wav2vec2: feat_extract_norm={self.feat_extract_norm!r}: must be group or layer")

    @classmethod
    def from_hf(cls, settings: Mapping[str, Any]) -> "Wav2Vec2Config":
        """From Hugging Face's config.json.

        Raises:
          UserError: another model, or an unsupported part.
        """
        kind = settings.get("model_type")
        if kind != "wav2vec2":
            raise UserError(f"config.json: model_type is {kind!r}, not 'wav2vec2'; give a wav2vec 2.0 checkpoint")
        for name in ("hidden_act", "feat_extract_activation"):
            if settings.get(name, "gelu") != "gelu":
                raise UserError(f"config.json: {name}={settings[name]!r}; only 'gelu' is supported")
        for name in ("add_adapter", "adapter_attn_dim"):
            if settings.get(name):
                raise UserError(f"config.json: {name}={settings[name]}; adapters are not supported")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in names})

    @property
    def hop(self) -> int:
        """Samples between output rows."""
        return int(np.prod(self.conv_stride))

    @property
    def field(self) -> int:
        """Samples that one output row sees."""
        size = 1
        for kernel, stride in zip(self.conv_kernel[::-1], self.conv_stride[::-1], strict=True):
            size = (size - 1) * stride + kernel
        return size

    def rows(self, samples: Any) -> Any:
        """Output rows for a number (or an array of numbers) of samples."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples


class ConvLayer(nnx.Module):
    """Convolution, optional norm ("group": each channel over time; "layer": over channels), GELU."""

    def __init__(self, config: Wav2Vec2Config, index: int, *, rngs: nnx.Rngs):
        inputs, outputs = (1, *config.conv_dim)[index : index + 2]
        size, stride = config.conv_kernel[index], config.conv_stride[index]
        self.conv = Conv(inputs, outputs, size, stride=stride, bias=config.conv_bias, rngs=rngs)
        self.over_time = config.feat_extract_norm == "group"
        self.layer_norm = LayerNorm(outputs) if index == 0 or not self.over_time else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        if self.layer_norm is not None:
            norm = self.layer_norm
            x = standardised(x, 1, norm.eps, norm.scale[...], norm.bias[...]) if self.over_time else norm(x)
        return gelu(x)


class FeatureExtractor(nnx.Module):
    """(B, N) samples -> (B, rows, channels)."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.conv_layers = nnx.List([ConvLayer(config, i, rngs=rngs) for i in range(len(config.conv_dim))])

    def __call__(self, wave: jax.Array) -> jax.Array:
        x = wave[..., None]
        for layer in self.conv_layers:
            x = layer(x)
        return x


class FeatureProjection(nnx.Module):
    """LayerNorm and a projection to the hidden size."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.layer_norm = LayerNorm(config.conv_dim[-1], config.layer_norm_eps)
        self.projection = Affine(config.conv_dim[-1], config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projection(self.layer_norm(x))


class PositionalConv(nnx.Module):
    """Grouped convolution over time as position embedding; its kernel is direction times length for every tap.

    Parameters: `direction` (k, in / groups, out), `length` (k,), `bias` (out,).
    """

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        size, width, groups = config.num_conv_pos_embeddings, config.hidden_size, config.num_conv_pos_embedding_groups
        init = nnx.initializers.lecun_normal()
        self.direction = nnx.Param(init(rngs.params(), (size, width // groups, width), jnp.float32))
        self.length = nnx.Param(jnp.linalg.norm(self.direction[...], axis=(1, 2)))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        direction = self.direction[...]
        norm = jnp.sqrt(jnp.square(direction).sum((1, 2), keepdims=True))
        kernel = direction * (self.length[...][:, None, None] / norm)
        out = conv1d(x, kernel, padding=len(kernel) // 2, groups=self.groups) + self.bias[...].astype(x.dtype)
        return gelu(out[:, : x.shape[1]])  # an even kernel gives one row too many


class FeedForward(nnx.Module):
    """Two layers with GELU."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.intermediate_dense = Affine(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.output_dense = Affine(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output_dense(gelu(self.intermediate_dense(x)))


class EncoderLayer(nnx.Module):
    """Attention and MLP with residuals; normalised before ("stable") or after."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.stable = config.do_stable_layer_norm
        self.attention = Attention(config.hidden_size, config.num_attention_heads, rngs=rngs)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        if self.stable:
            x = x + self.attention(self.layer_norm(x), mask)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + self.attention(x, mask))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nnx.Module):
    """Position embedding and layers, with a norm before the layers, or after them in the stable form."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.stable = config.do_stable_layer_norm
        self.pos_conv_embed = PositionalConv(config, rngs=rngs)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, list[jax.Array]]:
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        x = x + self.pos_conv_embed(x)
        if not self.stable:
            x = self.layer_norm(x)
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return (self.layer_norm(states[-1]) if self.stable else states[-1]), states


class Wav2Vec2(nnx.Module):
    """The encoder."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.feature_extractor = FeatureExtractor(config, rngs=rngs)
        self.feature_projection = FeatureProjection(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)

    def __call__(self, wave: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, list[jax.Array]]:
        """Features of sound.

        Args:
          wave: (B, N) at 16 kHz, N at least `config.field`; see `normalised`.
          lengths: (B,) samples of each row without padding; None means all. In the group-norm form padding affects the
            statistics of the first convolution, as in the reference: run base models without padding.

        Returns:
          The output (B, rows, hidden), rows = `config.rows(N)`, 320 samples apart; and layers + 1 hidden states: the
          input of the first layer and the output of each. In the stable form the output is the norm of the last state.

        Raises:
          UserError: fewer samples than one row needs.
        """
        if wave.shape[1] < self.config.field:
            raise UserError(f"wav2vec2: {wave.shape[1]} samples of sound; one row needs {self.config.field}")
        x = self.feature_projection(self.feature_extractor(wave))
        mask = None
        if lengths is not None:
            mask = jnp.arange(x.shape[1]) < self.config.rows(jnp.asarray(lengths))[:, None]
        return self.encoder(x, mask)


def normalised(wave: np.ndarray) -> np.ndarray:
    """(..., N) with zero mean and unit variance, as from Hugging Face's feature extractor."""
    wave = np.asarray(wave, np.float32)
    return (wave - wave.mean(-1, keepdims=True)) / np.sqrt(wave.var(-1, keepdims=True) + 1e-7)
