"""Train state: parameters, optimizer, EMA and step, sharded by the parameter rules; also abstract, to compile for."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.functional import Network
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.mesh import sequence_attention
from omnihuman_jax.training import low_precision


class TrainState(NamedTuple):
    """Everything a step changes.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: nested dict of parameters.
      opt_state: optax state.
      ema: exponential moving average of the parameters, float32.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def make_network(config: ConfigDict) -> Network:
    """The network of a resolved config."""
    model = config.model.to_dict() | {"sequence_attention": sequence_attention(config)}
    return Network(ModelConfig.from_dict(model))


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW without the learning rate, which the step multiplies in (it changes by stage).

    Weight decay acts on kernels only (matrices and convolutions), not on biases, norms or learned tokens.

    Raises:
      UserError: a type of the moments that there is not.
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
            seed=config.seed + 2 if opt.stochastic_rounding else None,
        ),
        optax.add_decayed_weights(opt.weight_decay, mask=decayed),
    )


def _float_type(optimizer: ConfigDict, key: str) -> Any:
    if optimizer[key] not in ("float32", "bfloat16"):
        raise UserError(f"optimizer.{key}={optimizer[key]!r}: must be one of float32, bfloat16")
    return jnp.dtype(optimizer[key])


def create_state(config: ConfigDict, network: Network) -> TrainState:
    """A fresh state from `config.seed` (traceable; nothing is placed)."""
    params = network.init(jax.random.key(config.seed))
    return state_from_params(config, params)


def state_from_params(config: ConfigDict, params: Any) -> TrainState:
    """A state at step 0 that starts from given parameters (a warm start)."""
    ema = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params), ema)


def abstract_state(config: ConfigDict, mesh: Mesh, network: Network | None = None) -> TrainState:
    """The state as `jax.ShapeDtypeStruct` with shardings: what to restore into, or to compile for."""
    network = network or make_network(config)
    shapes = jax.eval_shape(lambda params: state_from_params(config, params), network.abstract_params)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        rules.tree_shardings(shapes, mesh),
    )


def init_state(config: ConfigDict, mesh: Mesh, network: Network) -> TrainState:
    """A fresh state, initialised directly into its shards."""
    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh, network))
    return jax.jit(lambda: create_state(config, network), out_shardings=shardings)()


def batch_shapes(config: ConfigDict, latent_frames: int, rows: int, columns: int) -> dict[str, tuple[tuple, Any]]:
    """Name -> (shape, dtype) of the arrays of a global batch that the train step reads.

    Args:
      config: resolved config.
      latent_frames: T of the noisy window.
      rows: latent rows H.
      columns: latent columns W.
    """
    m, b, t = config.model, config.global_batch_size, latent_frames
    frame = (rows, columns, m.latent_channels)
    return {
        "latents": ((b, t, *frame), jnp.float32),
        "motion": ((b, m.motion_frames, *frame), jnp.float32),
        "has_motion": ((b,), jnp.bool_),
        "reference": ((b, *frame), jnp.float32),
        "text": ((b, m.text_len, m.text_dim), jnp.float32),
        "text_mask": ((b, m.text_len), jnp.bool_),
        "audio": ((b, 4 * t + 2 * m.audio_context, m.audio_dim), jnp.float32),
        "keypoints": ((b, 4 * t, m.num_keypoints, 3), jnp.float32),
        "active": ((b, 4), jnp.bool_),
    }


def place_batch(config: ConfigDict, mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch onto the mesh: what the train step reads of it, as global arrays."""
    sharding = rules.batch_sharding(mesh)
    shapes = batch_shapes(config, *batch["latents"].shape[1:4])
    return {
        name: jax.make_array_from_process_local_data(sharding, batch[name], shape)
        for name, (shape, _) in shapes.items()
    }


def abstract_batch(config: ConfigDict, bucket: tuple[int, int, int], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A sharded abstract batch for a bucket (T, H, W) in latent units."""
    sharding = rules.batch_sharding(mesh)
    shapes = batch_shapes(config, *bucket)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()}
