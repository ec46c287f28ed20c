"""A network family from outside the project: the same blocks, with a bias on every velocity."""

import jax
from flax import nnx

from omnihuman_jax.models import registry
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.mmdit import OmniHuman


class Biased(OmniHuman):
    """OmniHuman with one more parameter."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.velocity_bias = nnx.Param(0.5 + jax.numpy.zeros((config.latent_channels,)))

    def __call__(self, *args, **kwargs) -> jax.Array:
        return super().__call__(*args, **kwargs) + self.velocity_bias[...]


registry.register("biased", "tests.extending.family:Biased")
