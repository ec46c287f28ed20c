"""Functional view of the NNX module: parameters are a nested dict, a plain pytree for jit, optax and Orbax."""

from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.registry import network_class
from omnihuman_jax.sharding.mesh import sequence_attention

Params = dict[str, Any]


class Network:
    """init/apply pair of the network class that the config names.

    `abstract_params` is a nested dict of `jax.ShapeDtypeStruct`.
    """

    def __init__(self, config: ModelConfig):
        self.config, self._class = config, network_class(config.family)
        abstract = nnx.eval_shape(lambda: self._class(config, rngs=nnx.Rngs(0)))
        self._graphdef, self._state = nnx.split(abstract)
        self.abstract_params: Params = nnx.to_pure_dict(self._state)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters from a PRNG key; traceable."""
        return nnx.to_pure_dict(nnx.state(self._class(self.config, rngs=nnx.Rngs(key))))

    def apply(self, params: Params, *args, **kwargs) -> jax.Array:
        """Calls the module with these parameters; see `models.dit.mmdit.OmniHuman`."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graphdef, state)(*args, **kwargs)


def make_network(config: ConfigDict) -> Network:
    """The network of a resolved config."""
    model = config.model.to_dict() | {"sequence_attention": sequence_attention(config)}
    return Network(ModelConfig.from_dict(model))
