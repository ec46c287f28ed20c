"""Motif-Video-2B as diffusers' `MotifVideoTransformer3DModel` (902 tensors; Apache-2.0).

An older layout of the checkpoint, with `cross_attn_query_proj`, reuses the keys and values of self-attention. It is
another network (its query norm has a bias) and is refused.
"""

from typing import Any

from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.weights.hunyuan_diffusers import dual_rows, outer_rows, shared_config, single_rows
from omnihuman_jax.weights.names import NORM, Row, row

OTHER_LAYOUT = "cross_attn_query_proj"


def _cross_rows(theirs: str, group: str) -> list[Row]:
    ours = f"{group}.blocks.{{}}.cross"
    return [
        *(row(f"{theirs}.{{}}.cross_attn.to_{name}", f"{ours}.{name}") for name in "qkv"),
        *(row(f"{theirs}.{{}}.cross_attn.norm_{name}", f"{ours}.{name}_norm", layout=NORM) for name in "qk"),
        row(f"{theirs}.{{}}.cross_attn.to_out.0", f"{ours}.out"),
    ]


def image_rows() -> list[Row]:
    """Projection of the image states, as also in diffusers' HunyuanVideo-1.5."""
    return [
        row("image_embedder.norm_in", "image_embed.norm_in", layout=NORM),
        row("image_embedder.linear_1", "image_embed.fc1"),
        row("image_embedder.linear_2", "image_embed.fc2"),
        row("image_embedder.norm_out", "image_embed.norm_out", layout=NORM),
    ]


def rows(config: ModelConfig) -> list[Row]:
    """The table; the decoder tail is the end of their single blocks."""
    return [
        *outer_rows(),
        row("context_embedder.linear_1", "text_embed.fc1"),
        row("context_embedder.linear_2", "text_embed.fc2"),
        *image_rows(),
        *dual_rows(),
        *single_rows(),
        *single_rows("decoder", config.num_single_blocks),
        *_cross_rows("transformer_blocks", "dual"),
        *_cross_rows("single_transformer_blocks", "single"),
    ]


def class_config(config: ModelConfig) -> dict[str, Any]:
    """diffusers' config.json for this model."""
    return {
        "_class_name": "MotifVideoTransformer3DModel",
        **shared_config(config),
        "num_single_layers": config.num_single_blocks + config.num_decoder_blocks,
        "num_decoder_layers": config.num_decoder_blocks,
        "image_embed_dim": config.image_embed_dim or None,
        "enable_text_cross_attention_dual": config.text_cross_attention_dual,
        "enable_text_cross_attention_single": config.text_cross_attention_single,
        "qk_norm": "rms_norm" if config.qk_norm == "rms" else None,
        "norm_type": "layer_norm",
    }
