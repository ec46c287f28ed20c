"""A tiny random model and VAE, for tests of everything that samples."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from experiments.configs import base
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.functional import Network
from omnihuman_jax.models.vae.vae import VAE, VAEConfig, save_vae

MODEL = {
    "latent_channels": 4,
    "hidden_size": 32,
    "num_heads": 2,
    "num_dual_blocks": 1,
    "num_single_blocks": 1,
    "mlp_hidden": 32,
    "text_dim": 6,
    "text_len": 5,
    "audio_dim": 3,
    "audio_tokens": 2,
    "audio_hidden": 8,
    "pose_channels": 4,
    "pose_widths": (4, 4),
}


@functools.cache
def network() -> Network:
    """The network, one object for all tests of a process, so that compiled steps are shared."""
    return Network(ModelConfig.from_dict(MODEL))


def _random(shapes: Any) -> Any:
    """Small random arrays for a tree of shapes. NumPy, because initialising layer by layer compiles for a minute."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype), shapes)


@functools.cache
def params() -> Any:
    """Random parameters; none is zero, or every velocity would be."""
    return _random(network().abstract_params)


@functools.cache
def vae() -> VAE:
    """A random VAE with the strides of the real one (4 x 8 x 8)."""
    config = VAEConfig(dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1, z_dim=4)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, _random(state))


def portrait(height: int = 50, width: int = 40) -> np.ndarray:
    """A picture of noise, uint8."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def latents(size: int = 1, rows: int = 4, columns: int = 6) -> jax.Array:
    """Random reference latents (size, rows, columns, C)."""
    return jax.random.normal(jax.random.key(2), (size, rows, columns, MODEL["latent_channels"]), jnp.float32)


def config(directory: pathlib.Path, **model: Any) -> ConfigDict:
    """A resolved config of the tiny model, as a checkpoint holds it; the VAE's file is written into `directory`."""
    config = base.get_config()
    config.model = ConfigDict(dataclasses.asdict(ModelConfig.from_dict(MODEL | model)))
    config.vae.checkpoint = str(directory / "vae.safetensors")
    save_vae(config.vae.checkpoint, vae())
    config.compilation_cache = ""
    config.sample.steps = 2
    config.data.latent_frames = 2
    config.guidance.update({"scale": 2.0, "final_scale": 1.5})
    config.plan.buckets = ((2, 4, 6), (2, 6, 4))
    config.dataset = ConfigDict({"encoders": {"audio": "log-mel", "text": "minilm-l6-v2"}})
    return config
