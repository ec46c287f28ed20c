"""3D patch discriminator for VAE training: one score per frame and 8x8 pixel patch, with hinge losses."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from omnihuman_jax.models.vae.layers import CausalConv3d, RMSNorm


class PatchDiscriminator(nnx.Module):
    """Three convolutions that halve rows and columns, `width` channels in the first and twice as many in each next."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        widths = [3, width, 2 * width, 4 * width]
        make = {"dtype": jnp.float32, "rngs": rngs}
        self.convs = nnx.List([CausalConv3d(cin, cout, (3, 4, 4), **make) for cin, cout in itertools.pairwise(widths)])
        self.norms = nnx.List([RMSNorm(w) for w in widths[2:]])  # the first layer keeps the input's scale
        self.head = CausalConv3d(widths[-1], 1, (3, 3, 3), **make)

    def __call__(self, video: jax.Array) -> jax.Array:
        """Video (B, F, Hp, Wp, 3) in [-1, 1] -> scores (B, F, Hp/8, Wp/8); higher means more like real video."""
        x = video
        for layer, module in enumerate(self.convs):
            x = module(x, spatial=((1, 1), (1, 1)), stride=2)
            x = jax.nn.leaky_relu(x if layer == 0 else self.norms[layer - 1](x), 0.2)
        return self.head(x)[..., 0]


def discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Hinge loss of the discriminator from its scores."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def generator_loss(fake: jax.Array) -> jax.Array:
    """Loss of the VAE: minus the mean score of its reconstructions."""
    return -jnp.mean(fake)
