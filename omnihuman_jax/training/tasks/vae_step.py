"""The train step of the causal VAE and its state, as pure functions over plain parameter trees.

The loss is the sum of L1 at several scales, L1 of spatial differences (edges), a small KL term, LPIPS if its weights
are given, and an adversarial term from a given step on. With `loss.latent_noise` the decoder reads latents with noise,
like those that a diffusion model makes: it learns to hide their errors. With `encoder_from` only the decoder learns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from jax import lax
from ml_collections import ConfigDict

from omnihuman_jax.models.vae.discriminator import PatchDiscriminator, discriminator_loss, generator_loss
from omnihuman_jax.models.vae.vae import VAE, VAEConfig, is_of_encoder
from omnihuman_jax.random_keys import CRITIC_INIT, POSTERIOR, VAE_INIT, purpose_key
from omnihuman_jax.sharding.rules import path_name
from omnihuman_jax.training.finite import take_if_finite
from omnihuman_jax.training.tasks.vae_losses import kl_divergence, perceptual_distance, psnr, reconstruction_losses

Params = dict[str, Any]


class VAEState(NamedTuple):
    """Everything a step changes; both trees of the discriminator are empty if adversarial.weight is 0."""

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params
    critic: Params
    critic_opt_state: Any


class Functional:
    """A module as functions of a plain parameter tree."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        self._graph, self._state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters (traceable)."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key))))

    def bind(self, params: Params) -> Any:
        """The module with these parameters."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def make_vae(config: ConfigDict) -> Functional:
    """The VAE of a config, as functions."""
    settings = VAEConfig.from_dict(config.vae.to_dict())
    return Functional(lambda rngs: VAE(settings, rngs=rngs))


def make_critic(config: ConfigDict) -> Functional:
    """The discriminator of a config, as functions."""
    return Functional(lambda rngs: PatchDiscriminator(config.adversarial.width, rngs=rngs))


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up, then cosine decay to a hundredth of the peak at the last step."""
    opt = config.optimizer
    warmup = min(opt.warmup_steps, max(config.steps - 1, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0, opt.learning_rate, warmup, max(config.steps, warmup + 1), opt.learning_rate / 100
    )


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith("kernel"), params)


def _muon_dimensions(params: Any) -> Any:
    """Convolution kernels (kt, kh, kw, Cin, Cout) as matrices (kt kh kw Cin) x Cout; everything else goes to Adam."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2, 3), output_axis=4)
    return jax.tree.map(lambda x: matrix if x.ndim == 5 else None, params)


def _optimizer(
    config: ConfigDict, rate: optax.ScalarOrSchedule, muon_rate: optax.ScalarOrSchedule | None = None
) -> optax.GradientTransformation:
    """Clip, then AdamW at `rate`; with `muon_rate`, Muon at that rate for the convolution kernels.

    On this network Muon (optax.contrib) reaches in 100 steps what takes AdamW several hundred.
    """
    opt = config.optimizer
    if muon_rate is None:
        update = optax.adamw(rate, b1=opt.b1, b2=opt.b2, weight_decay=opt.weight_decay, mask=_kernels)
    else:
        update = optax.contrib.muon(
            muon_rate,
            adam_learning_rate=rate,
            adam_b1=opt.b1,
            adam_b2=opt.b2,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    return optax.chain(optax.clip_by_global_norm(opt.clip), update)


def _vae_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    schedule, opt = learning_rate(config), config.optimizer
    if not opt.muon_learning_rate:
        return _optimizer(config, schedule)
    return _optimizer(config, schedule, lambda step: schedule(step) * opt.muon_learning_rate / opt.learning_rate)


def create_state(config: ConfigDict) -> VAEState:
    """A fresh state from `config.seed` (traceable)."""
    params = make_vae(config).init(purpose_key(config.seed, VAE_INIT))
    critic = make_critic(config).init(purpose_key(config.seed, CRITIC_INIT)) if config.adversarial.weight else {}
    return VAEState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=_vae_optimizer(config).init(params),
        ema=params,
        critic=critic,
        critic_opt_state=_optimizer(config, config.adversarial.learning_rate).init(critic) if critic else {},
    )


def latent_noise(key: jax.Array, mean: jax.Array, unit: Sequence[float] | None, largest: float) -> jax.Array:
    """Noise for latents (B, T, H, W, C): normal, of a size drawn per clip from 0 to `largest` units.

    `unit` (C,) is the scale by which a channel is normalised; None: its standard deviation in this batch.
    """
    size = jax.random.uniform(key, (len(mean), 1, 1, 1, 1), maxval=largest)
    unit = lax.stop_gradient(jnp.std(mean, axis=(0, 1, 2, 3))) if unit is None else jnp.asarray(unit)
    return size * unit * jax.random.normal(jax.random.fold_in(key, 1), mean.shape)


def with_encoder(params: Params, source: Params) -> Params:
    """`params` with the encoder of `source`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, here, there: there if is_of_encoder(path_name(path).replace("/", ".")) else here, params, source
    )


def make_train_step(
    config: ConfigDict, *, adversarial: bool = False, unit: Sequence[float] | None = None
) -> Callable[..., tuple[VAEState, dict]]:
    """step(state, video (B, F, Hp, Wp, 3) in [-1, 1], perceptual=None) -> (state, metrics); donate the state.

    If the loss, gradient or new state is not finite, the step changes only the step number.

    `perceptual` is the state of an LPIPS module (`nnx.state`); if given, its mean distance over all frames is added to
    the loss with `config.loss.lpips_weight`. It is an argument, because constants of that size slow down compilation.
    The posterior noise is a function of (seed, step), so a restarted run repeats the same steps.

    Args:
      config: the resolved configuration.
      unit: scale of each latent channel, for `loss.latent_noise`, if it is known.
      adversarial: adds the adversarial term and discriminator update (`config.adversarial.weight` must not be 0).
    """
    vae, critic = make_vae(config), make_critic(config)
    schedule = learning_rate(config)
    optimizer = _vae_optimizer(config)
    critic_optimizer = _optimizer(config, config.adversarial.learning_rate)
    weights = config.loss

    def loss_fn(params, critic_params, video, key, perceptual):
        module = vae.bind(params)
        mean, logvar = module.encode_moments(video)
        if config.encoder_from:
            mean, logvar = lax.stop_gradient((mean, logvar))
        z = mean
        if not config.encoder_from:
            z += jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        if weights.latent_noise:
            z += latent_noise(jax.random.fold_in(key, 1), mean, unit, weights.latent_noise)
        output = module.decode_raw(z)
        terms = reconstruction_losses(video, output, weights.scales)
        terms["kl"] = kl_divergence(mean, logvar)
        loss = terms["pyramid"] + weights.edge * terms["edge"] + weights.kl * terms["kl"]
        if perceptual is not None:
            terms["lpips"] = perceptual_distance(perceptual, video, output)
            loss += weights.lpips_weight * terms["lpips"]
        if adversarial:
            terms["generator"] = generator_loss(critic.bind(critic_params)(output))
            loss += config.adversarial.weight * terms["generator"]
        return loss, (terms | {"loss": loss, "psnr": jnp.mean(psnr(video, output))}, output)

    def critic_update(state, video, output):
        def critic_loss(params):
            module = critic.bind(params)
            return discriminator_loss(module(video), module(jax.lax.stop_gradient(output)))

        loss, grads = jax.value_and_grad(critic_loss)(state.critic)
        updates, opt_state = critic_optimizer.update(grads, state.critic_opt_state, state.critic)
        return optax.apply_updates(state.critic, updates), opt_state, loss

    def step(state: VAEState, video: jax.Array, perceptual: Any = None) -> tuple[VAEState, dict[str, jax.Array]]:
        key = jax.random.fold_in(purpose_key(config.seed, POSTERIOR), state.step)
        grads, (metrics, output) = jax.grad(loss_fn, has_aux=True)(state.params, state.critic, video, key, perceptual)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, params)
        if config.encoder_from:
            params, ema = with_encoder(params, state.params), with_encoder(ema, state.ema)
        metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": schedule(state.step)}
        critic_params, critic_opt_state = state.critic, state.critic_opt_state
        if adversarial:
            critic_params, critic_opt_state, metrics["critic"] = critic_update(state, video, output)
        made = VAEState(state.step, params, opt_state, ema, critic_params, critic_opt_state)
        made, metrics["skipped"] = take_if_finite(made, state, metrics["loss"], metrics["grad_norm"])
        return made._replace(step=state.step + 1), metrics

    return step


def make_eval_step(config: ConfigDict) -> Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]:
    """eval(params, video) -> (PSNR of each clip (B,) in dB, posterior means (B, T, H, W, C)), without noise."""
    vae = make_vae(config)

    def evaluate(params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        module = vae.bind(params)
        mean, _ = module.encode_moments(video)
        return psnr(video, module.decode_raw(mean)), mean

    return evaluate
