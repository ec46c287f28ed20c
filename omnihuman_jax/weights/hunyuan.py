"""HunyuanVideo under its original names (856 tensors for 13B), with fused query, key and value.

Weights under the Tencent Hunyuan Community License, which excludes the EU, the UK and South Korea and forbids using
works or outputs to improve other models.
"""

from typing import Any

from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.weights.names import NORM, PATCH, UNPATCH, Row, row

_REFINER = "txt_in.individual_token_refiner.blocks.{}"
_DUAL = "double_blocks.{}"
_SINGLE = "single_blocks.{}"


def _stream(stream: str) -> list[Row]:
    ours = f"dual.blocks.{{}}.{stream}"
    return [
        row(f"{_DUAL}.{stream}_mod.linear", f"{ours}_mod"),
        row(f"{_DUAL}.{stream}_attn_qkv", f"{ours}_q", f"{ours}_k", f"{ours}_v"),
        row(f"{_DUAL}.{stream}_attn_q_norm", f"{ours}_q_norm", layout=NORM),
        row(f"{_DUAL}.{stream}_attn_k_norm", f"{ours}_k_norm", layout=NORM),
        row(f"{_DUAL}.{stream}_attn_proj", f"{ours}_out"),
        row(f"{_DUAL}.{stream}_mlp.fc1", f"{ours}_mlp.fc1"),
        row(f"{_DUAL}.{stream}_mlp.fc2", f"{ours}_mlp.fc2"),
    ]


def rows(_: ModelConfig) -> list[Row]:
    """The table."""
    refiner, single = "refiner.block{}", "single.blocks.{}"
    return [
        row("img_in.proj", "x_embed", "first_frame_embed", layout=PATCH, axis=1),
        row("txt_in.input_embedder", "text_embed"),
        row("txt_in.t_embedder.mlp.0", "refiner.time_embed.fc1"),
        row("txt_in.t_embedder.mlp.2", "refiner.time_embed.fc2"),
        row("txt_in.c_embedder.linear_1", "refiner.text_embed.fc1"),
        row("txt_in.c_embedder.linear_2", "refiner.text_embed.fc2"),
        row(f"{_REFINER}.norm1", f"{refiner}.norm1", layout=NORM),
        row(f"{_REFINER}.norm2", f"{refiner}.norm2", layout=NORM),
        row(f"{_REFINER}.self_attn_qkv", f"{refiner}.q", f"{refiner}.k", f"{refiner}.v"),
        row(f"{_REFINER}.self_attn_proj", f"{refiner}.out"),
        row(f"{_REFINER}.mlp.fc1", f"{refiner}.fc1"),
        row(f"{_REFINER}.mlp.fc2", f"{refiner}.fc2"),
        row(f"{_REFINER}.adaLN_modulation.1", f"{refiner}.mod"),
        row("time_in.mlp.0", "time_embed.fc1"),
        row("time_in.mlp.2", "time_embed.fc2"),
        row("vector_in.in_layer", "pooled_embed.fc1"),
        row("vector_in.out_layer", "pooled_embed.fc2"),
        row("guidance_in.mlp.0", "guidance_embed.fc1"),
        row("guidance_in.mlp.2", "guidance_embed.fc2"),
        *_stream("img"),
        *_stream("txt"),
        row(f"{_SINGLE}.linear1", *(f"{single}.{name}" for name in ("q", "k", "v", "mlp_in"))),
        row(f"{_SINGLE}.linear2", f"{single}.out", f"{single}.mlp_out", axis=1),
        row(f"{_SINGLE}.q_norm", f"{single}.q_norm", layout=NORM),
        row(f"{_SINGLE}.k_norm", f"{single}.k_norm", layout=NORM),
        row(f"{_SINGLE}.modulation.linear", f"{single}.mod"),
        row("final_layer.linear", "final.proj", layout=UNPATCH),
        row("final_layer.adaLN_modulation.1", "final.mod"),
    ]


def class_config(_: ModelConfig) -> dict[str, Any]:
    """Empty: the original checkpoint has no config file."""
    return {}
