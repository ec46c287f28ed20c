"""The train step: flow matching on a batch, a pure function of (state, batch, stage settings)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnihuman_jax import conditions
from omnihuman_jax.diffusion import flow, loss_weights, time
from omnihuman_jax.models.dit.entries import Way, entering, module_conditions
from omnihuman_jax.models.functional import Network
from omnihuman_jax.random_keys import LOSS_WEIGHTS, NOISE, ROUNDING, purpose_key
from omnihuman_jax.sharding import rules
from omnihuman_jax.training import low_precision
from omnihuman_jax.training.finite import take_if_finite
from omnihuman_jax.training.state import TrainState, abstract_state, make_optimizer
from omnihuman_jax.training.step_settings import StepSettings
from omnihuman_jax.weights.names import STACKED

Metrics = dict[str, jax.Array]


def ema_decay_at(step: jax.Array, decay: float) -> jax.Array:
    """EMA decay with warm-up: min(decay, (1 + step) / (10 + step)), so early averages forget the initial values."""
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def draw_noise(
    config: ConfigDict,
    step: jax.Array,
    shape: tuple[int, ...],
    mean: jax.Array | float = 0.0,
    std: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Time t (B,) and noise eps of a step: a pure function of (seed, step) on any mesh.

    `mean`, a scalar or (B,), and `std` apply to the times before the shift, see `time.sample_times`.
    """
    time_key, noise_key = jax.random.split(jax.random.fold_in(purpose_key(config.seed, NOISE), step))
    t = time.sample_times(time_key, shape[0], mean, std)
    patch = config.model.patch_size
    tokens = (shape[1] // patch[0]) * (shape[2] // patch[1]) * (shape[3] // patch[2])
    shift = time.shift_from_config(config.diffusion.shift, tokens, is_image=shape[1] == 1)
    return time.shift(t, shift), jax.random.normal(noise_key, shape, jnp.float32)


def rounding_key(config: ConfigDict, step: jax.Array) -> jax.Array | None:
    """Key for stochastic rounding of bfloat16 parameters in a step; None without `optimizer.stochastic_rounding`."""
    if not config.optimizer.stochastic_rounding:
        return None
    return jax.random.fold_in(purpose_key(config.seed, ROUNDING), step)


def sample_losses(network: Network, params: Any, batch: Any, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Flow-matching loss (B,) float32 of each row of a batch at times t (B,) and noise eps (B, T, H, W, C).

    `loss_weight` (B, T, H, W) in the batch weights the latent cells.
    """
    x0 = batch["latents"]
    predicted = network.apply(params, flow.interpolate(x0, eps, t), t, batch)
    return flow.flow_loss(predicted, flow.velocity(x0, eps), batch.get("loss_weight"))


def weighs_regions(config: ConfigDict) -> bool:
    """Whether any stage sets region weights or trains samples on one region only."""
    return any(row.region_shares or row.region_only for row in config.stages.values() if row.steps)


def loss_weight(config: ConfigDict, step: jax.Array, batch: Any, settings: StepSettings) -> jax.Array:
    """Weight (B, T, H, W) of every cell; the rows with only one region depend on (seed, step) alone."""
    key = jax.random.fold_in(purpose_key(config.seed, LOSS_WEIGHTS), step)
    only = loss_weights.choose_only(key, len(batch["regions"]), settings.region_only)
    return loss_weights.region_weights(batch["regions"], settings.region_shares, only)


def gradients(
    network: Network, params: Any, batch: Any, t: jax.Array, eps: jax.Array, parts: int
) -> tuple[jax.Array, Any]:
    """Row losses (B,) and the gradient of their mean, over `parts` sequential micro-batches.

    Micro-batch a has the rows a, a + parts, …, so each is sharded over the devices like the batch.
    """

    def loss_fn(params: Any, rows: Any):
        losses = sample_losses(network, params, *rows)
        return losses.mean(), losses

    differentiate = jax.value_and_grad(loss_fn, has_aux=True)
    whole = (batch, t, eps)
    if parts == 1:
        (_, losses), grads = differentiate(params, whole)
        return losses, grads

    def body(total: Any, rows: Any):
        (_, losses), grads = differentiate(params, rows)
        return jax.tree.map(lambda a, g: a + g.astype(a.dtype) / parts, total, grads), losses

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, parts, *x.shape[1:])
        return rules.constrain(jnp.moveaxis(x, 1, 0), None, "batch", *[None] * (x.ndim - 2))

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, losses = jax.lax.scan(body, zero, jax.tree.map(split, whole))
    return losses.T.reshape(-1), grads


def part_of(path: str) -> str:
    """The part of the network of a parameter: its module, or the cross-attention of a condition in all blocks."""
    first, second, *_ = *path.split("/"), ""
    return f"{second}_attention" if first in STACKED and second in entering(Way.CROSS_ATTENTION) else first


def learning_rates(params: Any, settings: StepSettings) -> Any:
    """The learning rate of every parameter; modules of a condition use the factor of that condition."""
    owners = module_conditions()

    def rate(path: Any, _: Any) -> jax.Array:
        owner = next((owners[part] for part in rules.path_name(path).split("/") if part in owners), None)
        factor = 1.0 if owner is None else settings.rate_factors[conditions.index(owner)]
        return settings.learning_rate * factor

    return jax.tree_util.tree_map_with_path(rate, params)


def norms_by_part(grads: Any) -> dict[str, jax.Array]:
    """Part of the network -> gradient norm."""
    parts: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        parts.setdefault(part_of(rules.path_name(path)), []).append(leaf)
    return {name: optax.global_norm(leaves) for name, leaves in sorted(parts.items())}


def make_train_step(
    config: ConfigDict, network: Network
) -> Callable[[TrainState, dict[str, jax.Array], StepSettings], tuple[TrainState, Metrics]]:
    """Builds step(state, batch, settings) -> (state, metrics).

    If the loss, gradient, parameters, moments or EMA are not finite, the step changes only the step number.

    Metrics: `loss`, `grad_norm` and `skipped` scalars; `grad_norm_by_part`; `sample_loss` (B,) per-sample losses
    (weighted, if the stage weights regions) and `time` (B,), from which the loop computes losses by condition and by
    noise level.
    """
    optimizer, parts, weighs = make_optimizer(config), config.optimizer.accumulate, weighs_regions(config)

    def train_step(state: TrainState, batch: dict[str, jax.Array], settings: StepSettings):
        mean = time.strongest(settings.time_mean, batch["active"])
        t, eps = draw_noise(config, state.step, batch["latents"].shape, mean, settings.time_std)
        if weighs:
            batch = batch | {"loss_weight": loss_weight(config, state.step, batch, settings)}
        sample_loss, grads = gradients(network, state.params, batch, t, eps, parts)
        loss, grad_norm = sample_loss.mean(), optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rates = learning_rates(state.params, settings)
        params = low_precision.descend(state.params, updates, rates, rounding_key(config, state.step))
        decay = ema_decay_at(state.step, config.ema_decay)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p.astype(jnp.float32), state.ema, params)
        made, skipped = take_if_finite(TrainState(state.step, params, opt_state, ema), state, loss, grad_norm)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "grad_norm_by_part": norms_by_part(grads),
            "skipped": skipped,
            "sample_loss": sample_loss,
            "time": t,
        }
        return made._replace(step=state.step + 1), metrics

    return train_step


def jit_train_step(config: ConfigDict, network: Network, mesh: Mesh) -> Any:
    """The train step jitted over the mesh: state donated and kept in its shardings, metrics replicated.

    Call, lower or trace it inside `jax.set_mesh(mesh)`: the activation constraints need the mesh.
    """
    state = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh, network))
    replicated = rules.replicated(mesh)
    return jax.jit(
        make_train_step(config, network),
        in_shardings=(state, rules.batch_sharding(mesh), replicated),
        out_shardings=(state, replicated),
        donate_argnums=0,
    )


def jit_evaluation_loss(config: ConfigDict, network: Network, mesh: Mesh) -> Any:
    """loss(params, batch, t (B,), eps) -> (B,) jitted over the mesh, replicated; the same at every step."""
    params = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh, network)).params
    rows = rules.batch_sharding(mesh)
    return jax.jit(
        lambda params, batch, t, eps: sample_losses(network, params, batch, t, eps),
        in_shardings=(params, rows, rows, rows),
        out_shardings=rules.replicated(mesh),
    )
