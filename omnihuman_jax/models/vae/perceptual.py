"""LPIPS with VGG-16 (Zhang et al. 2018): the perceptual distance between two pictures.

Agrees with `lpips.LPIPS(net="vgg")` in evaluation mode: features after the last ReLU before each pooling, normalised to
unit length per pixel; squared differences, weighted by channel, averaged over pixels and summed over five levels.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = (2, 2, 3, 3, 3)
# Per-channel shift and scale of pictures in [-1, 1]: ImageNet's statistics.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Convolution(nnx.Module):
    """3x3 convolution and ReLU, kernel (3, 3, in, out)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (3, 3, inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, self.kernel[...], (1, 1), "SAME", dimension_numbers=numbers)
        return jax.nn.relu(x + self.bias[...])


class LPIPS(nnx.Module):
    """The distance; `widths` are the channels of the five levels (smaller in tests)."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, *, rngs: nnx.Rngs):
        levels = []
        for count, (inputs, outputs) in zip(CONVOLUTIONS, itertools.pairwise((3, *widths)), strict=True):
            sizes = [(inputs, outputs), *[(outputs, outputs)] * (count - 1)]
            levels.append(nnx.List([Convolution(*size, rngs=rngs) for size in sizes]))
        self.levels = nnx.List(levels)
        self.weights = nnx.List([nnx.Param(jnp.full((width,), 1 / width, jnp.float32)) for width in widths])

    def features(self, x: jax.Array) -> list[jax.Array]:
        """Pictures (N, H, W, 3) in [-1, 1] -> five levels (N, H / 2^i, W / 2^i, width), each pixel of unit length."""
        x, found = (x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE), []
        for i, level in enumerate(self.levels):
            if i:
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            for convolution in level:
                x = convolution(x)
            # sqrt has no gradient at 0, where no feature is active.
            square = jnp.square(x).sum(-1, keepdims=True)
            length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
            found.append(x / (length + 1e-10))
        return found

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Distances (N,) of pictures (N, H, W, 3) in [-1, 1], H and W at least 16."""
        total = 0.0
        for weight, one, other in zip(self.weights, self.features(a), self.features(b), strict=True):
            total += (jnp.square(one - other) @ weight[...]).mean((1, 2))
        return total
