"""Train state: parameters, optimizer, EMA and step, sharded by the parameter rules; also abstract, for compilation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import Network, make_network
from omnihuman_jax.random_keys import INIT, purpose_key
from omnihuman_jax.sharding import rules
from omnihuman_jax.training import low_precision


class TrainState(NamedTuple):
    """Everything a step changes.

    Attributes:
      step: int32 scalar, completed optimizer steps.
      params: nested dict of parameters.
      opt_state: optax state.
      ema: exponential moving average of the parameters, float32.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW without the learning rate, which the train step applies (it varies by stage).

    Weight decay acts on kernels only (matrices and convolutions), not on biases, norms or learned tokens.

    Raises:
      UserError: an unknown dtype for the moments.
    """
    opt = config.optimizer

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: rules.path_name(path).endswith("kernel"), params)

    return optax.chain(
        optax.clip_by_global_norm(opt.clip),
        low_precision.scale_by_adam(
            b1=opt.b1,
            b2=opt.b2,
            eps=opt.eps,
            mu_dtype=_float_type(opt, "mu_dtype"),
            nu_dtype=_float_type(opt, "nu_dtype"),
            seed=config.seed if opt.stochastic_rounding else None,
        ),
        optax.add_decayed_weights(opt.weight_decay, mask=decayed),
    )


def _float_type(optimizer: ConfigDict, key: str) -> Any:
    if optimizer[key] not in ("float32", "bfloat16"):
        raise UserError(f"optimizer.{key}={optimizer[key]!r}: must be one of float32, bfloat16")
    return jnp.dtype(optimizer[key])


def create_state(config: ConfigDict, network: Network) -> TrainState:
    """A fresh state from `config.seed` (traceable, without placement)."""
    params = network.init(purpose_key(config.seed, INIT))
    return state_from_params(config, params)


def state_from_params(config: ConfigDict, params: Any) -> TrainState:
    """A state at step 0 that starts from given parameters (a warm start)."""
    ema = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params), ema)


def abstract_state(config: ConfigDict, mesh: Mesh, network: Network | None = None) -> TrainState:
    """The state as `jax.ShapeDtypeStruct` with shardings: the target of a restore, or for compilation."""
    network = network or make_network(config)
    shapes = jax.eval_shape(lambda params: state_from_params(config, params), network.abstract_params)
    return rules.with_shardings(shapes, rules.tree_shardings(shapes, mesh))


def init_state(config: ConfigDict, mesh: Mesh, network: Network) -> TrainState:
    """A fresh state, initialised directly into its shards."""
    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh, network))
    return jax.jit(lambda: create_state(config, network), out_shardings=shardings)()
