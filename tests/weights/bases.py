"""Tiny models in the form of each open base, and checkpoints of them in that base's naming."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from omnihuman_jax.checkpoints.export import to_tensors
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.functional import Network
from omnihuman_jax.weights import formats
from omnihuman_jax.weights.write import Renamed
from tests.inference import tiny

MOTIF = {
    "num_decoder_blocks": 1,
    "text_cross_attention_single": True,
    "first_frame_channels": 5,
    "image_embed_dim": 6,
    "text_embed": "mlp",
}
HUNYUAN = {
    "text_refiner_depth": 1,
    "pooled_text_dim": 6,
    "pooled_required": False,
    "guidance_embed": True,
    "guidance_default": 1.0,
}
HUNYUAN15 = {
    "patch_size": (1, 1, 1),
    "num_single_blocks": 0,
    "text_refiner_depth": 1,
    "first_frame_channels": 5,
    "text2_dim": 9,
    "image_embed_dim": 6,
    "token_kinds": True,
}
FORMS = {"motif": MOTIF, "hunyuan": HUNYUAN, "hunyuan_diffusers": HUNYUAN, "hunyuan15_diffusers": HUNYUAN15}


@functools.cache
def network_of(naming: str) -> Network:
    """A tiny network that the format has names for."""
    return Network(ModelConfig.from_dict(tiny.MODEL | FORMS[naming]))


def random_params(network: Network, seed: int = 0) -> Any:
    """Random NumPy parameters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(s.dtype), network.abstract_params)


def write_base(path: Path, naming: str, params: Any, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """Writes the base part of `params` to a file in a format's naming; returns its tensors, with `changes`."""
    network = network_of(naming)
    entries = formats.base_entries(naming, network.config, network.abstract_params)
    renamed = Renamed(to_tensors(params), entries)
    tensors = {name: np.ascontiguousarray(renamed[name]) for name in renamed} | changes
    safetensors.numpy.save_file(tensors, path)
    return tensors
