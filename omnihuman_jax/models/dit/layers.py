"""Small pieces shared by the blocks: projections, norms, MLPs, time embedding, per-token modulation."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from omnihuman_jax.models.dit.attention import mesh_axis
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.sharding.rules import constrain

ZEROS = nnx.initializers.zeros_init()
XAVIER = nnx.initializers.xavier_uniform()
TIME_FREQUENCIES = 256


def _unchanged(columns: jax.Array) -> jax.Array:
    return columns


class Linear(nnx.Module):
    """x @ kernel + bias with kernel (inputs, outputs), bias (outputs,); computes in `dtype`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype, param_dtype, init, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), param_dtype))
        self.use_bias = bias
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,), param_dtype))

    def __call__(self, x: jax.Array, reorder: Callable[[jax.Array], jax.Array] = _unchanged) -> jax.Array:
        """x (..., inputs) -> (..., outputs); `reorder` permutes the outputs."""
        kernel, shape = reorder(self.kernel[...].astype(self.dtype)), x.shape
        x = x.astype(self.dtype)
        if mesh_axis("sequence") == 1:
            # XLA's CPU backend takes twice as long for a weight gradient that contracts two dimensions. If tokens are
            # sharded, merging them with the batch would move them.
            x = x.reshape(-1, shape[-1])
        x = x @ kernel
        if self.use_bias:
            x = x + reorder(self.bias[...].astype(self.dtype))
        return x.reshape(*shape[:-1], -1)


def linear(
    config: ModelConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs, bias: bool = True, init=XAVIER, dtype=None
) -> Linear:
    """A `Linear` in the config's dtypes; `dtype` overrides the compute dtype."""
    dtypes = {"dtype": dtype or config.compute_dtype, "param_dtype": jnp.dtype(config.param_dtype)}
    return Linear(inputs, outputs, bias=bias, init=init, rngs=rngs, **dtypes)


def elementwise(function: Callable, static: tuple[int, ...] = ()) -> Callable:
    """Recomputes a cheap function's intermediates in the backward pass, whatever the remat policy.

    A scan would otherwise store them for every block: several times the memory of the inputs of the matmuls.
    """
    return jax.checkpoint(function, prevent_cse=False, static_argnums=static)


@elementwise
def gelu(x: jax.Array) -> jax.Array:
    """GELU, tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


@elementwise
def swiglu(x: jax.Array, gate: jax.Array) -> jax.Array:
    """silu(gate) * x."""
    return jax.nn.silu(gate) * x


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis without affine parameters; float32 out."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


class HeadNorm(nnx.Module):
    """RMSNorm over the head size with a learned scale (D,), or the identity with qk_norm="none"; float32 out."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        self.active = config.qk_norm == "rms"
        if self.active:
            self.scale = nnx.Param(jnp.ones((config.head_dim,), jnp.dtype(config.param_dtype)))

    def __call__(self, x: jax.Array, reorder: Callable[[jax.Array], jax.Array] = _unchanged) -> jax.Array:
        """x (..., D), in the order that `reorder` gives the scale."""
        x = x.astype(jnp.float32)
        if not self.active:
            return x
        scale = reorder(self.scale[...].astype(jnp.float32))
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * scale


class CrossAttention(nnx.Module):
    """Projections of a cross-attention: queries from one stream, keys and values from another, with HeadNorm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, out_init=XAVIER):
        self.config = config
        dim, inner, bias = config.hidden_size, config.attention_dim, config.qkv_bias
        self.q = linear(config, dim, inner, rngs=rngs, bias=bias)
        self.k = linear(config, dim, inner, rngs=rngs, bias=bias)
        self.v = linear(config, dim, inner, rngs=rngs, bias=bias)
        self.q_norm, self.k_norm = HeadNorm(config), HeadNorm(config)
        self.out = linear(config, inner, dim, rngs=rngs, init=out_init)


class MLP(nnx.Module):
    """fc2(gelu(fc1 x)), or fc2(silu(gate x) * fc1 x) for swiglu."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.fc1 = linear(config, config.hidden_size, config.mlp_hidden, rngs=rngs)
        if config.mlp_activation == "swiglu":
            self.gate = linear(config, config.hidden_size, config.mlp_hidden, rngs=rngs)
        self.fc2 = linear(config, config.mlp_hidden, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = constrain(self.fc1(x), "batch", "tokens", "mlp")
        hidden = swiglu(hidden, self.gate(x)) if hasattr(self, "gate") else gelu(hidden)
        return self.fc2(hidden)


class Embedder(nnx.Module):
    """fc2(silu(fc1 x)): projects a vector (time, pooled text, guidance) to the modulation width, in float32."""

    def __init__(self, config: ModelConfig, inputs: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.fc1 = linear(config, inputs, config.hidden_size, rngs=rngs, init=init, dtype=jnp.float32)
        self.fc2 = linear(config, config.hidden_size, config.hidden_size, rngs=rngs, init=init, dtype=jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(x.astype(jnp.float32))))


def sinusoid(x: jax.Array, size: int = TIME_FREQUENCIES) -> jax.Array:
    """[cos, sin] features (..., size) float32 of x on a scale of 0..1000, periods up to 10000 (DiT, HunyuanVideo)."""
    half = size // 2
    angles = x.astype(jnp.float32)[..., None] * jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def per_token(table: jax.Array, clean: jax.Array) -> jax.Array:
    """Row 1 (clean) or 0 (noisy) of table for each token: (B, 2, D), bool (B or 1, N) -> (B, N, D)."""
    return jnp.where(clean[..., None], table[:, 1:], table[:, :1])


@functools.partial(elementwise, static=(4,))
def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, clean: jax.Array, config: ModelConfig) -> jax.Array:
    """Normalises x (B, N, D) and applies each token's shift and scale (rows of (B, 2, D)); float32 inside."""
    x = layer_norm(x, config.norm_eps) * (1 + per_token(scale, clean)) + per_token(shift, clean)
    return x.astype(config.compute_dtype)


@elementwise
def gated(x: jax.Array, gate: jax.Array, clean: jax.Array, update: jax.Array) -> jax.Array:
    """x + gate * update, with each token's gate; in the dtype of x."""
    return x + (per_token(gate, clean) * update).astype(x.dtype)
