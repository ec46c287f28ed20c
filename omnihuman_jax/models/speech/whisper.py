"""The encoder of Whisper (Radford et al. 2022): log-mel spectra at 100 Hz -> features at 50 Hz of every layer.

Parameters are named as in Hugging Face's `WhisperEncoder`, and the outputs agree with it. Unlike it, this one takes any
length up to 30 s.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.speech.layers import Affine, Attention, Conv, LayerNorm, gelu


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Sizes; the names are those of Hugging Face's config.json, the defaults those of tiny."""

    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    max_source_positions: int = 1500

    @classmethod
    def from_hf(cls, settings: Mapping[str, Any]) -> "WhisperConfig":
        """From Hugging Face's config.json.

        Raises:
          UserError: another model, or another activation.
        """
        kind = settings.get("model_type")
        if kind != "whisper":
            raise UserError(f"config.json: model_type is {kind!r}, not 'whisper'; give a Whisper checkpoint")
        if settings.get("activation_function", "gelu") != "gelu":
            raise UserError(f"config.json: activation_function={settings['activation_function']!r}; must be 'gelu'")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in names})


class EncoderLayer(nnx.Module):
    """Attention and MLP with residuals, normalised before."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        width = config.d_model
        self.self_attn_layer_norm = LayerNorm(width)
        self.self_attn = Attention(width, config.encoder_attention_heads, key_bias=False, rngs=rngs)
        self.final_layer_norm = LayerNorm(width)
        self.fc1 = Affine(width, config.encoder_ffn_dim, rngs=rngs)
        self.fc2 = Affine(config.encoder_ffn_dim, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nnx.Module):
    """The encoder; its front end is `data_pipelines.encoders.mel.log_mel`."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.d_model
        self.conv1 = Conv(config.num_mel_bins, width, 3, stride=1, padding=1, rngs=rngs)
        self.conv2 = Conv(width, width, 3, stride=2, padding=1, rngs=rngs)
        self.embed_positions = nnx.Param(jnp.zeros((config.max_source_positions, width), jnp.float32))
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.encoder_layers)])
        self.layer_norm = LayerNorm(width)

    def __call__(self, mel: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Features of log-mel spectra (B, channels, N) at 100 Hz, N at most 2 * max_source_positions (30 s).

        Returns:
          The output (B, (N + 1) // 2, width) and layers + 1 hidden states: the input of the first layer and the output
          of each. The output is the norm of the last state.

        Raises:
          UserError: another number of channels, or too many steps.
        """
        c = self.config
        if mel.shape[1] != c.num_mel_bins or not 1 <= mel.shape[2] <= 2 * c.max_source_positions:
            raise UserError(
                f"whisper: spectra of {mel.shape[1]} channels x {mel.shape[2]} steps; this encoder takes "
                f"{c.num_mel_bins} channels and 1 to {2 * c.max_source_positions} steps of 10 ms"
            )
        x = gelu(self.conv2(gelu(self.conv1(mel.swapaxes(1, 2)))))
        states = [x + self.embed_positions[...][: x.shape[1]].astype(x.dtype)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self.layer_norm(states[-1]), states
