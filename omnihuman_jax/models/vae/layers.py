"""Layers of the causal 3D VAE, in the form of Wan2.1 (`wan/modules/vae.py`), channels last: (B, F, H, W, C).

The reference runs a clip in chunks (1 frame, then 4 at a time) with a two-frame cache per convolution. Here a chunk has
any number of frames, up to the whole clip, with the same result: a `Stream` carries the frames that convolutions still
need, and the first frame skips temporal resampling, as the reference's first chunk does.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

_KERNEL_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default for convolutions
# Pixels per 2D convolution on CPU; with more, Eigen's convolution and its gradients take up to twice as long per pixel.
_CPU_PIXELS = 64 * 64


def _conv3d(x: jax.Array, kernel: jax.Array, spatial: tuple, stride: int) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, stride, stride), ((0, 0), *spatial), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _conv2d_by_taps(x: jax.Array, kernel: jax.Array, spatial: tuple, stride: int) -> jax.Array:
    """Same as `_conv3d`: one 2D convolution per frame of the kernel, over a few frames of the clip at a time.

    Computes in float32, as XLA does on CPU for any dtype, so that the sum over taps is not rounded.
    """
    taps, batch, frames = kernel.shape[0], x.shape[0], x.shape[1] - kernel.shape[0] + 1
    size, dtype = max(1, _CPU_PIXELS // (batch * x.shape[2] * x.shape[3])), x.dtype
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)

    def some(start: int) -> jax.Array:
        count = min(size, frames - start)
        parts = [x[:, start + tap : start + tap + count].reshape(batch * count, *x.shape[2:]) for tap in range(taps)]
        layout = ("NHWC", "HWIO", "NHWC")
        out = sum(
            lax.conv_general_dilated(part, one, (stride, stride), spatial, dimension_numbers=layout)
            for part, one in zip(parts, kernel, strict=True)
        )
        return out.reshape(batch, count, *out.shape[1:])

    return jnp.concatenate([some(start) for start in range(0, frames, size)], axis=1).astype(dtype)


def conv(x: jax.Array, kernel: jax.Array, spatial: tuple = ((0, 0), (0, 0)), stride: int = 1) -> jax.Array:
    """(B, F, H, W, Cin), (kt, kh, kw, Cin, Cout) -> (B, F - kt + 1, H', W', Cout): convolution without padding in time.

    `spatial` zero-pads rows and columns, and `stride` applies to both. The form depends on the platform: XLA's 3D
    convolution on CPU is 2-4 times slower than 2D ones of equal work, so CPU gets the 2D form.
    """

    def form(function):
        return lambda x, kernel: function(x, kernel, spatial, stride)

    return lax.platform_dependent(x, kernel, cpu=form(_conv2d_by_taps), default=form(_conv3d))


class Stream:
    """The frames that causal layers keep from one chunk of a clip for the next, in the order in which the layers run.

    Each chunk needs a new stream; `kept` of one chunk is `past` of the next.

    Attributes:
      first: this chunk begins the clip.
      kept: (B, 2 or 1, H, W, C) arrays, filled as the layers run.
    """

    def __init__(self, past: Sequence[jax.Array] | None = None):
        self.first = past is None
        self._past = iter(past or ())
        self.kept: list[jax.Array] = []

    def extend(self, x: jax.Array, frames: int, *, zeros: bool = True) -> jax.Array:
        """Prepends the last `frames` frames to x (B, F, H, W, C) -> (B, frames + F, H, W, C).

        At the start of the clip they are zeros; with zeros=False x is returned unchanged there.
        """
        if not self.first:
            x = jnp.concatenate([next(self._past), x], axis=1)
        elif zeros:
            x = jnp.pad(x, ((0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)))
        self.kept.append(x[:, x.shape[1] - frames :])
        return x


class CausalConv3d(nnx.Module):
    """Convolution whose output frame f reads frames f-kt+1 .. f; frames before the clip are zeros."""

    def __init__(self, cin: int, cout: int, kernel: tuple[int, int, int], *, dtype, rngs: nnx.Rngs, zero: bool = False):
        shape = (*kernel, cin, cout)
        init = nnx.initializers.zeros if zero else _KERNEL_INIT
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((cout,), jnp.float32))
        self.dtype = dtype

    def __call__(
        self,
        x: jax.Array,
        stream: Stream | None = None,
        *,
        spatial: tuple | None = None,
        stride: int = 1,
        causal: bool = True,
    ) -> jax.Array:
        """(B, F, H, W, Cin) -> (B, F, H', W', Cout); `causal=False` puts no frames before x."""
        kernel, x = self.kernel[...], x.astype(self.dtype)
        taps, rows, columns = kernel.shape[:3]
        if spatial is None:
            spatial = ((rows // 2, rows // 2), (columns // 2, columns // 2))
        if causal and taps > 1:
            x = (stream or Stream()).extend(x, taps - 1)
        return conv(x, kernel.astype(self.dtype), spatial, stride) + self.bias.astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / |x| * sqrt(C) * gamma over channels, with |x| at least 1e-12 as in torch's `normalize`."""

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        scale = lax.rsqrt(jnp.maximum(square, 1e-24)) * x.shape[-1] ** 0.5  # clipped first: the gradient stays finite
        return (x * scale * self.gamma[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1x1 convolution where the width changes)."""

    def __init__(self, cin: int, cout: int, *, dtype, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(cin)
        self.conv1 = CausalConv3d(cin, cout, (3, 3, 3), dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(cout)
        self.conv2 = CausalConv3d(cout, cout, (3, 3, 3), dtype=dtype, rngs=rngs)
        self.shortcut = CausalConv3d(cin, cout, (1, 1, 1), dtype=dtype, rngs=rngs) if cin != cout else None

    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)), stream)
        h = self.conv2(jax.nn.silu(self.norm2(h)), stream)
        return h + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Single-head self-attention over the pixels of each frame; the output projection starts at zero."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.norm = RMSNorm(channels)
        self.to_qkv = CausalConv3d(channels, 3 * channels, (1, 1, 1), dtype=dtype, rngs=rngs)
        self.proj = CausalConv3d(channels, channels, (1, 1, 1), dtype=dtype, rngs=rngs, zero=True)

    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        batch, frames, rows, columns, channels = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(batch * frames, rows * columns, 1, 3 * channels)
        out = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=-1))
        return x + self.proj(out.reshape(x.shape))


class Downsample(nnx.Module):
    """Halves rows and columns; with `temporal`, 1+2n frames become 1+n, with the first unchanged."""

    def __init__(self, channels: int, temporal: bool, *, dtype, rngs: nnx.Rngs):
        self.resample = CausalConv3d(channels, channels, (1, 3, 3), dtype=dtype, rngs=rngs)
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), dtype=dtype, rngs=rngs) if temporal else None

    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        x = self.resample(x, spatial=((0, 1), (0, 1)), stride=2)
        if self.time_conv is None:
            return x
        # Output n reads frames 2n-2..2n of this level, so frame 0 is the left neighbour of the first window.
        window = stream.extend(x, 1, zeros=False)
        rest = self.time_conv(window, causal=False)[:, ::2] if window.shape[1] > 1 else x[:, :0]
        return jnp.concatenate([x[:, :1], rest], axis=1) if stream.first else rest


class Upsample(nnx.Module):
    """Doubles rows and columns, halves channels; with `temporal`, 1+n frames become 1+2n, with the first unchanged."""

    def __init__(self, channels: int, temporal: bool, *, dtype, rngs: nnx.Rngs):
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), dtype=dtype, rngs=rngs) if temporal else None
        self.resample = CausalConv3d(channels, channels // 2, (1, 3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        if self.time_conv is not None:
            first, rest = (x[:, :1], x[:, 1:]) if stream.first else (x[:, :0], x)
            batch, frames, rows, columns, channels = rest.shape
            # Frame 0 is not among the causal inputs: the second frame sees zeros before it.
            window = stream.extend(rest, self.time_conv.kernel.shape[0] - 1)
            if frames:
                pairs = self.time_conv(window, causal=False).reshape(batch, frames, rows, columns, 2, channels)
                rest = jnp.moveaxis(pairs, 4, 2).reshape(batch, 2 * frames, rows, columns, channels)
            x = jnp.concatenate([first, rest], axis=1)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.resample(x)
