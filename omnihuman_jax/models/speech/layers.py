"""Layers shared by the speech encoders (wav2vec 2.0, Whisper), channels last: (B, N, C)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

_INIT = nnx.initializers.lecun_normal()


class Affine(nnx.Module):
    """x @ kernel + bias, kernel (in, out)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_INIT(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x @ self.kernel[...].astype(x.dtype)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over channels with scale and bias, float32 inside."""

    def __init__(self, channels: int, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return standardised(x, -1, self.eps, self.scale[...], self.bias[...])


def standardised(x: jax.Array, axis: int, eps: float, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias, moments along `axis` in float32; the dtype of x."""
    value = x.astype(jnp.float32)
    value = value - value.mean(axis, keepdims=True)
    value = value * lax.rsqrt(jnp.square(value).mean(axis, keepdims=True) + eps)
    return (value * scale + bias).astype(x.dtype)


def conv1d(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0, groups: int = 1) -> jax.Array:
    """(B, N, Cin), (k, Cin / groups, Cout) -> (B, (N + 2 padding - k) // stride + 1, Cout)."""
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride,),
        ((padding, padding),),
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=groups,
    )


class Conv(nnx.Module):
    """A 1D convolution, kernel (k, in, out)."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, stride: int, padding: int = 0, bias: bool = True, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(_INIT(rngs.params(), (size, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv1d(x, self.kernel[...], self.stride, self.padding)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention; Whisper's keys have no bias."""

    def __init__(self, width: int, heads: int, *, key_bias: bool = True, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj = Affine(width, width, rngs=rngs)
        self.k_proj = Affine(width, width, bias=key_bias, rngs=rngs)
        self.v_proj = Affine(width, width, rngs=rngs)
        self.out_proj = Affine(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x (B, N, C); mask (B, N) bool, False for rows that are not attended to."""
        b, n, width = x.shape
        q, k, v = (f(x).reshape(b, n, self.heads, width // self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        attended = None if mask is None else mask[:, None, None, :]
        return self.out_proj(jax.nn.dot_product_attention(q, k, v, mask=attended).reshape(b, n, width))


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, PyTorch's default."""
    return jax.nn.gelu(x, approximate=False)
