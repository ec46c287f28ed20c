"""A tiny model with every parameter random (nothing zero-initialised) and a batch with every condition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.mmdit import OmniHuman

TINY = {
    "latent_channels": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "num_dual_blocks": 2,
    "num_single_blocks": 2,
    "mlp_hidden": 48,
    "text_dim": 6,
    "text_len": 5,
    "audio_dim": 7,
    "audio_tokens": 2,
    "audio_hidden": 8,
    "num_keypoints": 3,
    "pose_channels": 2,
    "pose_widths": (4, 5),
}
B, T, H, W = 2, 3, 4, 6


def tiny_config(**changes) -> ModelConfig:
    """The tiny configuration with changes."""
    return ModelConfig.from_dict({**TINY, **changes})


def _shapes(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: OmniHuman(config, rngs=nnx.Rngs(0))))


@functools.cache
def initial(config: ModelConfig):
    """(graph definition, parameters as initialised)."""
    params = jax.jit(lambda: nnx.state(OmniHuman(config, rngs=nnx.Rngs(0))))()
    return _shapes(config)[0], params


@functools.cache
def trained(config: ModelConfig):
    """(graph definition, parameters all random, as after training)."""
    graph, shapes = _shapes(config)
    rng = np.random.default_rng(1)

    def random(path, leaf):
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        spread = 0.2 if len(leaf.shape) < 2 else leaf.shape[-2] ** -0.5
        return jnp.asarray(centre + spread * rng.standard_normal(leaf.shape), leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(random, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, params, x_t, t, batch, kwargs):
    return nnx.merge(graph, params)(x_t, t, batch, **kwargs)


def velocity(model, x_t, t, batch, **kwargs) -> np.ndarray:
    """The model's output on a batch; `model` is what `initial` or `trained` returns."""
    graph, params = model
    return np.asarray(_apply(graph, params, x_t, t, batch, kwargs))


def random_batch(
    config: ModelConfig, *, batch: int = B, frames: int = T, rows: int = H, columns: int = W, seed: int = 0
):
    """(x_t, t, batch dict) with every condition present; text of different lengths."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    c = config.latent_channels
    lengths = 2 + np.arange(batch)[:, None] % (config.text_len - 1)
    return (
        normal(batch, frames, rows, columns, c),
        np.linspace(0.2, 0.9, batch, dtype=np.float32),
        {
            "motion": normal(batch, config.motion_frames, rows, columns, c),
            "has_motion": np.ones(batch, bool),
            "reference": normal(batch, rows, columns, c),
            "text": normal(batch, config.text_len, config.text_dim),
            "text_mask": np.arange(config.text_len)[None] < lengths,
            "audio": normal(batch, 4 * frames + 2 * config.audio_context, config.audio_dim),
            "keypoints": rng.uniform(0, 1, (batch, 4 * frames, config.num_keypoints, 3)).astype(np.float32),
            "active": np.ones((batch, 4), bool),
        },
    )
