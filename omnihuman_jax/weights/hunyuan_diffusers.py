"""HunyuanVideo as diffusers' `HunyuanVideoTransformer3DModel` (1264 tensors for 13B).

Weights under the Tencent Hunyuan Community License; see `hunyuan`.
"""

from typing import Any

from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.weights.names import NORM, PATCH, SWAPPED, UNPATCH, Row, row

_DUAL, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_REFINER = "context_embedder.token_refiner.refiner_blocks.{}"


def dual_rows() -> list[Row]:
    """Dual-stream blocks, as also in diffusers' Motif-Video and HunyuanVideo-1.5."""
    ours = "dual.blocks.{}"
    table = []
    for stream, norm, ff in (("img", "norm1", "ff"), ("txt", "norm1_context", "ff_context")):
        table += [
            row(f"{_DUAL}.{norm}.linear", f"{ours}.{stream}_mod"),
            row(f"{_DUAL}.{ff}.net.0.proj", f"{ours}.{stream}_mlp.fc1"),
            row(f"{_DUAL}.{ff}.net.2", f"{ours}.{stream}_mlp.fc2"),
        ]
    for name in "qkv":
        table.append(row(f"{_DUAL}.attn.to_{name}", f"{ours}.img_{name}"))
        table.append(row(f"{_DUAL}.attn.add_{name}_proj", f"{ours}.txt_{name}"))
    for name in "qk":
        table.append(row(f"{_DUAL}.attn.norm_{name}", f"{ours}.img_{name}_norm", layout=NORM))
        table.append(row(f"{_DUAL}.attn.norm_added_{name}", f"{ours}.txt_{name}_norm", layout=NORM))
    return [
        *table,
        row(f"{_DUAL}.attn.to_out.0", f"{ours}.img_out"),
        row(f"{_DUAL}.attn.to_add_out", f"{ours}.txt_out"),
    ]


def single_rows(group: str = "single", offset: int = 0) -> list[Row]:
    """Single-stream blocks, as also in diffusers' Motif-Video except for its cross-attention."""
    ours = f"{group}.blocks.{{}}"
    table = [row(f"{_SINGLE}.attn.to_{name}", f"{ours}.{name}", offset=offset) for name in "qkv"]
    table += [row(f"{_SINGLE}.attn.norm_{name}", f"{ours}.{name}_norm", layout=NORM, offset=offset) for name in "qk"]
    return [
        *table,
        row(f"{_SINGLE}.norm.linear", f"{ours}.mod", offset=offset),
        row(f"{_SINGLE}.proj_mlp", f"{ours}.mlp_in", offset=offset),
        row(f"{_SINGLE}.proj_out", f"{ours}.out", f"{ours}.mlp_out", axis=1, offset=offset),
    ]


def outer_rows(time: str = "time_text_embed") -> list[Row]:
    """Patch embedding, time embedding and final layer, as also in diffusers' Motif-Video and HunyuanVideo-1.5."""
    return [
        row("x_embedder.proj", "x_embed", "first_frame_embed", layout=PATCH, axis=1),
        row(f"{time}.timestep_embedder.linear_1", "time_embed.fc1"),
        row(f"{time}.timestep_embedder.linear_2", "time_embed.fc2"),
        row("norm_out.linear", "final.mod", layout=SWAPPED),
        row("proj_out", "final.proj", layout=UNPATCH),
    ]


def text_rows() -> list[Row]:
    """Projection and token refiner of the text, as also in diffusers' HunyuanVideo-1.5."""
    refiner, context = "refiner.block{}", "context_embedder.time_text_embed"
    embedders = (
        (f"{context}.timestep_embedder", "refiner.time_embed"),
        (f"{context}.text_embedder", "refiner.text_embed"),
    )
    return [
        row("context_embedder.proj_in", "text_embed"),
        *(row(f"{theirs}.linear_{i}", f"{ours}.fc{i}") for theirs, ours in embedders for i in (1, 2)),
        *(row(f"{_REFINER}.attn.to_{name}", f"{refiner}.{name}") for name in "qkv"),
        row(f"{_REFINER}.attn.to_out.0", f"{refiner}.out"),
        row(f"{_REFINER}.norm1", f"{refiner}.norm1", layout=NORM),
        row(f"{_REFINER}.norm2", f"{refiner}.norm2", layout=NORM),
        row(f"{_REFINER}.ff.net.0.proj", f"{refiner}.fc1"),
        row(f"{_REFINER}.ff.net.2", f"{refiner}.fc2"),
        row(f"{_REFINER}.norm_out.linear", f"{refiner}.mod"),
    ]


def rows(_: ModelConfig) -> list[Row]:
    """The table."""
    embedders = (("text_embedder", "pooled_embed"), ("guidance_embedder", "guidance_embed"))
    return [
        *outer_rows(),
        *(row(f"time_text_embed.{theirs}.linear_{i}", f"{ours}.fc{i}") for theirs, ours in embedders for i in (1, 2)),
        *text_rows(),
        *dual_rows(),
        *single_rows(),
    ]


def shared_config(config: ModelConfig) -> dict[str, Any]:
    """Keys of diffusers' config.json that all classes share."""
    return {
        "in_channels": config.latent_channels + config.first_frame_channels,
        "out_channels": config.latent_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.num_dual_blocks,
        "mlp_ratio": config.mlp_hidden / config.hidden_size,
        "patch_size": config.patch_size[1],
        "patch_size_t": config.patch_size[0],
        "text_embed_dim": config.text_dim,
        "rope_theta": config.rope_theta,
        "rope_axes_dim": list(config.rope_axes),
    }


def class_config(config: ModelConfig) -> dict[str, Any]:
    """diffusers' config.json for this model."""
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        **shared_config(config),
        "num_single_layers": config.num_single_blocks,
        "num_refiner_layers": config.text_refiner_depth,
        "guidance_embeds": config.guidance_embed,
        "pooled_projection_dim": config.pooled_text_dim,
        "qk_norm": "rms_norm",
        "image_condition_type": "latent_concat" if config.first_frame_channels else None,
    }
