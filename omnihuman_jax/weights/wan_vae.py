"""Wan2.1's VAE, in its own naming (Wan2.1_VAE.pth, converted to safetensors) and in diffusers' (AutoencoderKLWan).

Both namings have the same 194 tensors at the published sizes. The tensors' names show which one a file uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae.vae import VAE, VAEConfig
from omnihuman_jax.weights import modules
from omnihuman_jax.weights.names import PLAIN, Entry, expanded, one_to_one, permuted
from omnihuman_jax.weights.read import Files, open_files
from omnihuman_jax.weights.write import Renamed, write_files

# Statistics of the latents, from the published code.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WAN21 = VAEConfig(latent_mean=LATENT_MEAN, latent_std=LATENT_STD)

# Our path -> theirs, applied in order.
NATIVE = (
    (r"\.norm1\.", ".residual.0."),
    (r"(samples\.\d+|middle\.[02])\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"(samples\.\d+|middle\.[02])\.conv2\.", r"\1.residual.6."),
    (r"\.resample\.", ".resample.1."),
    (r"\.head\.", ".head.2."),
    (r"\.head_norm\.", ".head.0."),
    (r"\.kernel$", ".weight"),
)
DIFFUSERS = (
    (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"\.head_norm\.", ".norm_out."),
    (r"\.head\.", ".conv_out."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.resample\.", ".resample.1."),
    (r"\.kernel$", ".weight"),
)


def their_name(ours: str, config: VAEConfig, naming: str) -> str:
    """Name of one of our parameters in "native" or "diffusers" naming."""
    if naming == "diffusers":
        flat = re.match(r"decoder\.upsamples\.(\d+)\.(.*)", ours)
        if flat:  # nested there; flat here and in the native naming
            block, index = divmod(int(flat[1]), config.num_res_blocks + 2)
            inner = f"resnets.{index}" if index <= config.num_res_blocks else "upsamplers.0"
            ours = f"decoder.up_blocks.{block}.{inner}.{flat[2]}"
    for pattern, replacement in NATIVE if naming == "native" else DIFFUSERS:
        ours = re.sub(pattern, replacement, ours)
    return ours


def entries(config: VAEConfig, naming: str) -> list[Entry]:
    """One entry per parameter: (t, h, w, in, out) <- (out, in, [t,] h, w), gamma (C,) <- (C, 1, 1[, 1])."""
    made = []
    for ours, shape in modules.parameter_shapes(lambda: VAE(config, rngs=nnx.Rngs(0))).items():
        flat = ".middle.1." in ours or ".resample." in ours  # two-dimensional there
        if len(shape) == 5:
            layout = permuted((4, 3, 0, 1, 2), (2,) if flat else ())
        elif ours.endswith(".gamma"):
            layout = expanded((1, 2) if flat else (1, 2, 3))
        else:
            layout = PLAIN
        made.append(one_to_one(their_name(ours, config, naming), ours, shape, layout))
    return made


def naming_of(files: Files) -> str:
    """ "native" or "diffusers"; UserError if it is neither."""
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.", "quant_conv.")) for name in files.stored):
        return "diffusers"
    if any(name.startswith(("encoder.downsamples.", "decoder.upsamples.")) for name in files.stored):
        return "native"
    first = min(files.stored, default="nothing")
    raise UserError(f"{files.path}: not a Wan VAE (its first tensor is {first}); give the VAE's own file")


def config_of(settings: Mapping[str, Any]) -> VAEConfig:
    """Our config for diffusers' config.json; without one ({}) the published Wan2.1 VAE.

    Raises UserError for another architecture.
    """
    if not settings:
        return WAN21
    kind = settings.get("_class_name", "AutoencoderKLWan")
    if kind != "AutoencoderKLWan" or settings.get("is_residual"):
        what = "Wan2.2's residual VAE" if settings.get("is_residual") else kind
        raise UserError(f"config.json: the model is {what}; only the Wan2.1 form of AutoencoderKLWan can be imported")
    if settings.get("attn_scales") or settings.get("decoder_base_dim") not in (None, settings.get("base_dim", 96)):
        raise UserError("config.json: attn_scales and another decoder_base_dim are not supported")
    return VAEConfig(
        dim=settings.get("base_dim", 96),
        dim_mult=tuple(settings.get("dim_mult", WAN21.dim_mult)),
        num_res_blocks=settings.get("num_res_blocks", 2),
        z_dim=settings.get("z_dim", 16),
        temporal_downsample=tuple(settings.get("temperal_downsample", WAN21.temporal_downsample)),
        patch_size=settings.get("patch_size") or 1,
        latent_mean=tuple(settings.get("latents_mean", LATENT_MEAN)),
        latent_std=tuple(settings.get("latents_std", LATENT_STD)),
    )


def load(path: str | Path) -> VAE:
    """Reads a Wan2.1 VAE from a safetensors file, an index or a directory, in either naming.

    The sizes come from diffusers' config.json next to it; without one they are the published ones.

    Raises:
      UserError: it cannot be read, or a tensor is missing, unexpected, misshapen or not finite.
    """
    files = open_files(path)
    naming = naming_of(files)
    config = config_of(files.settings() if naming == "diffusers" else {})
    return modules.load(lambda: VAE(config, rngs=nnx.Rngs(0)), files, entries(config, naming))


def save(folder: str | Path, vae: VAE) -> None:
    """Writes a VAE for diffusers' AutoencoderKLWan: config.json and float32 safetensors in `folder`.

    Raises UserError if diffusers cannot represent a part of the VAE.
    """
    config, folder = vae.config, Path(folder)
    if config.linear_path:
        raise UserError("vae.linear_path=true: diffusers has no such VAE; export one trained without it")
    folder.mkdir(parents=True, exist_ok=True)
    channels = 3 * config.patch_size**2
    settings = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.dim,
        "z_dim": config.z_dim,
        "dim_mult": config.dim_mult,
        "num_res_blocks": config.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": config.temporal_downsample,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": None if config.patch_size == 1 else config.patch_size,
        "scale_factor_spatial": config.spatial_stride,
        "scale_factor_temporal": config.temporal_stride,
        "latents_mean": config.latent_mean or (0.0,) * config.z_dim,
        "latents_std": config.latent_std or (1.0,) * config.z_dim,
    }
    renamed = Renamed(modules.parameters(vae), entries(config, "diffusers"))
    write_files(folder, renamed, "diffusion_pytorch_model", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
