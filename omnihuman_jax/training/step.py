"""The one train step: flow matching on a batch, a pure function of (state, batch, learning rate)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnihuman_jax.diffusion import flow, time
from omnihuman_jax.models.functional import Network
from omnihuman_jax.sharding import rules
from omnihuman_jax.training.state import TrainState, abstract_state, make_optimizer

Metrics = dict[str, jax.Array]


def ema_decay_at(step: jax.Array, decay: float) -> jax.Array:
    """EMA decay with warm-up: min(decay, (1 + step) / (10 + step)), so early averages are not the initial values."""
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def draw_noise(config: ConfigDict, step: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Time t (B,) and noise eps of a step: a pure function of (seed, step), whatever the mesh."""
    time_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed + 1), step))
    d = config.diffusion
    t = time.sample_times(time_key, shape[0], mean=d.time_mean, std=d.time_std)
    patch = config.model.patch_size
    tokens = (shape[1] // patch[0]) * (shape[2] // patch[1]) * (shape[3] // patch[2])
    shift = time.shift_from_config(d.shift, tokens, is_image=shape[1] == 1)
    return time.shift(t, shift), jax.random.normal(noise_key, shape, jnp.float32)


def make_train_step(
    config: ConfigDict, network: Network
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]:
    """Builds step(state, batch, learning_rate) -> (state, metrics).

    Metrics: `loss` and `grad_norm` scalars; `sample_loss` (B,) per-sample losses and `time` (B,), from which the loop
    computes losses by condition.
    """
    optimizer = make_optimizer(config)

    def train_step(state: TrainState, batch: dict[str, jax.Array], learning_rate: jax.Array):
        x0 = batch["latents"]
        t, eps = draw_noise(config, state.step, x0.shape)
        x_t = flow.interpolate(x0, eps, t)

        def loss_fn(params: Any):
            sample_loss = flow.flow_loss(network.apply(params, x_t, t, batch), flow.velocity(x0, eps))
            return sample_loss.mean(), sample_loss

        (loss, sample_loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: -learning_rate * u, updates))
        decay = ema_decay_at(state.step, config.ema_decay)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(jnp.float32), state.ema, params)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), "sample_loss": sample_loss, "time": t}
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def jit_train_step(config: ConfigDict, network: Network, mesh: Mesh) -> Any:
    """The train step jitted over the mesh: state donated and kept in its shardings, metrics replicated.

    Call, lower or trace it inside `jax.set_mesh(mesh)`, which the activation constraints read.
    """
    state = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh, network))
    replicated = rules.replicated(mesh)
    return jax.jit(
        make_train_step(config, network),
        in_shardings=(state, rules.batch_sharding(mesh), replicated),
        out_shardings=(state, replicated),
        donate_argnums=0,
    )
