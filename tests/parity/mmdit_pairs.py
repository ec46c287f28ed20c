"""diffusers' Motif-Video, HunyuanVideo and 1.5 with random weights, and ours with the same ones from their files."""

from collections import ChainMap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.functional import Network
from omnihuman_jax.weights import formats
from omnihuman_jax.weights.load import Source, load
from omnihuman_jax.weights.names import is_condition, our_shapes
from omnihuman_jax.weights.read import open_files

C, TEXT, HEADS, HEAD_DIM = 4, 12, 2, 16
CONDITION = 5  # channels beside the C noisy ones
OURS = {
    "latent_channels": C,
    "hidden_size": HEADS * HEAD_DIM,
    "num_heads": HEADS,
    "num_dual_blocks": 2,
    "mlp_hidden": 4 * HEADS * HEAD_DIM,
    "rope_axes": (4, 6, 6),
    "text_dim": TEXT,
    "text_len": 7,
    "audio_dim": 3,
    "audio_tokens": 2,
    "audio_hidden": 8,
    "num_keypoints": 3,
    "pose_channels": 2,
    "pose_widths": (4, 4),
}
THEIRS = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "num_layers": 2,
    "rope_axes_dim": (4, 6, 6),
    "text_embed_dim": TEXT,
    "out_channels": C,
}


def motif(*, dual=False, single=False, decoder=0, image=0, theta=256.0):
    """(their class's arguments, our config)."""
    theirs = {
        **THEIRS,
        "in_channels": C + CONDITION,
        "num_single_layers": 2 + decoder,
        "num_decoder_layers": decoder,
        "image_embed_dim": image or None,
        "rope_theta": theta,
        "enable_text_cross_attention_dual": dual,
        "enable_text_cross_attention_single": single,
    }
    ours = {
        **OURS,
        "num_single_blocks": 2,
        "num_decoder_blocks": decoder,
        "first_frame_channels": CONDITION,
        "image_embed_dim": image,
        "rope_theta": theta,
        "text_embed": "mlp",
        "text_cross_attention_dual": dual,
        "text_cross_attention_single": single,
    }
    return theirs, ModelConfig.from_dict(ours)


def hunyuan(*, guidance=True, refiner=2, condition=0):
    """(their class's arguments, our config)."""
    theirs = {
        **THEIRS,
        "in_channels": C + condition,
        "num_single_layers": 2,
        "num_refiner_layers": refiner,
        "guidance_embeds": guidance,
        "pooled_projection_dim": 6,
        "image_condition_type": "latent_concat" if condition else None,
    }
    ours = {
        **OURS,
        "num_single_blocks": 2,
        "first_frame_channels": condition,
        "text_refiner_depth": refiner,
        "pooled_text_dim": 6,
        "guidance_embed": guidance,
    }
    return theirs, ModelConfig.from_dict(ours)


def hunyuan15(*, refiner=2):
    """(their class's arguments, our config)."""
    theirs = {
        **THEIRS,
        "in_channels": C + CONDITION,
        "num_refiner_layers": refiner,
        "text_embed_2_dim": 9,
        "image_embed_dim": 10,
    }
    ours = {
        **OURS,
        "patch_size": (1, 1, 1),
        "num_single_blocks": 0,
        "first_frame_channels": CONDITION,
        "text_refiner_depth": refiner,
        "text2_dim": 9,
        "image_embed_dim": 10,
        "token_kinds": True,
    }
    return theirs, ModelConfig.from_dict(ours)


def build(kind: type, arguments: dict[str, Any]) -> torch.nn.Module:
    """Their class with all parameters random, norms too."""
    torch.manual_seed(0)
    model = kind(**arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def read(path: Path, naming: str, network: Network) -> Any:
    """Our parameters from their file, with condition modules of zeros."""
    files = open_files(path)
    entries = formats.base_entries(naming, network.config, network.abstract_params)
    formats.check_files(naming, files, entries, network.config, network.abstract_params)
    shapes = our_shapes(network.abstract_params)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if is_condition(name)}
    return load(ChainMap(Source(files, entries), zeros), network.abstract_params)


def inputs(
    config: ModelConfig,
    *,
    batch: int,
    size: tuple[int, int, int],
    masked: bool,
    images: int = 0,
    second: tuple[int, ...] = (),
) -> dict:
    """Random inputs as NumPy: x (B, T, H, W, C), t, text, mask, and what the config has beside them.

    Of the second text each sample has as many tokens as `second` says.
    """
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    lengths = 1 + np.arange(batch) % config.text_len if masked else np.full(batch, config.text_len)
    values = {
        "x": normal(batch, *size, C),
        "t": rng.uniform(0.1, 0.9, batch).astype(np.float32),
        "text": normal(batch, config.text_len, TEXT),
        "mask": np.arange(config.text_len)[None] < lengths[:, None],
        "cotangent": normal(batch, *size, C),
    }
    if config.first_frame_channels:
        values["first_frame"] = normal(batch, *size, config.first_frame_channels)
    if images:
        values["image"] = normal(batch, images, config.image_embed_dim)
    if second:
        values["text2"] = normal(batch, max(second), config.text2_dim)
        values["text2_mask"] = np.arange(max(second))[None] < np.array(second)[:, None]
    if config.pooled_text_dim:
        values["pooled"] = normal(batch, config.pooled_text_dim)
    if config.guidance_embed:
        values["guidance"] = rng.uniform(1, 6, batch).astype(np.float32)
    return values


def _channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy())


def run_theirs(model: torch.nn.Module, given: dict, *, dtype=torch.float32, gradients: bool = False):
    """Output (B, T, H, W, C), and with `gradients` that of sum(output * cotangent) for x; parameters keep theirs."""
    hidden = _channels_first(given["x"]).requires_grad_(gradients)
    stacked = [hidden, _channels_first(given["first_frame"])] if "first_frame" in given else [hidden]
    arguments = {
        "hidden_states": torch.cat(stacked, 1).to(dtype),
        "timestep": 1000 * torch.from_numpy(given["t"]),
        "encoder_hidden_states": torch.from_numpy(given["text"]).to(dtype),
        "encoder_attention_mask": torch.from_numpy(given["mask"]),
    }
    if "image" in given:
        arguments["image_embeds"] = torch.from_numpy(given["image"]).to(dtype)
    if "pooled" in given:
        arguments["pooled_projections"] = torch.from_numpy(given["pooled"]).to(dtype)
        arguments["guidance"] = 1000 * torch.from_numpy(given["guidance"]) if "guidance" in given else None
    if "text_embed_2_dim" in model.config:
        # This class takes no "absent": a second text all masked, an image all zero. And it wants t in its own dtype.
        b, config = len(given["t"]), model.config
        arguments["timestep"] = arguments["timestep"].to(dtype)
        second = given.get("text2", np.ones((b, 3, config.text_embed_2_dim), np.float32))
        arguments["encoder_hidden_states_2"] = torch.from_numpy(second).to(dtype)
        arguments["encoder_attention_mask_2"] = torch.from_numpy(given.get("text2_mask", np.zeros((b, 3), bool)))
        arguments.setdefault("image_embeds", torch.zeros(b, 2, config.image_embed_dim, dtype=dtype))
    with torch.set_grad_enabled(gradients):
        out = model(**arguments).sample
        if gradients:
            (out * _channels_first(given["cotangent"])).sum().backward()
    plain = out.detach().float().numpy().transpose(0, 2, 3, 4, 1)
    return (plain, hidden.grad.numpy().transpose(0, 2, 3, 4, 1)) if gradients else plain


def our_batch(config: ModelConfig, given: dict) -> tuple[dict, dict]:
    """(batch with text only, keyword arguments) of our network."""
    b, _, h, w, c = given["x"].shape
    batch = {
        "motion": np.zeros((b, config.motion_frames, h, w, c), np.float32),
        "has_motion": np.zeros(b, bool),
        "reference": np.zeros((b, h, w, c), np.float32),
        "text": given["text"],
        "text_mask": given["mask"],
        "active": np.tile(np.array([1, 0, 0, 0], bool), (b, 1)),
    }
    batch |= {name: given[name] for name in ("first_frame", "image", "text2", "text2_mask") if name in given}
    return batch, {name: given[name] for name in ("pooled", "guidance") if name in given}


def run_ours(network: Network, params: Any, given: dict, *, gradients: bool = False):
    """As `run_theirs`; with `gradients` also those of the parameters."""
    batch, more = our_batch(network.config, given)

    def forward(params, x):
        out = network.apply(params, x, given["t"], batch, **more)
        return (out * given["cotangent"]).sum(), out

    if not gradients:
        return np.asarray(jax.jit(forward)(params, given["x"])[1])
    (_, out), grads = jax.jit(jax.value_and_grad(forward, (0, 1), has_aux=True))(params, given["x"])
    return np.asarray(out), np.asarray(grads[1]), grads[0]


def error(ours: Any, theirs: Any) -> float:
    """||ours - theirs|| / ||theirs||."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
