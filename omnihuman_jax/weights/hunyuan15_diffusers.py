"""HunyuanVideo-1.5 as diffusers' `HunyuanVideo15Transformer3DModel` (1801 tensors for 8.3B).

Weights under the Tencent Hunyuan Community License; see `hunyuan`. Checkpoints with a second time embedding (MeanFlow:
step-distilled, super-resolution) are another network and are refused.
"""

from typing import Any

from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.weights.hunyuan_diffusers import dual_rows, outer_rows, shared_config, text_rows
from omnihuman_jax.weights.motif import image_rows
from omnihuman_jax.weights.names import NORM, TABLE, Row, row


def rows(_: ModelConfig) -> list[Row]:
    """The table."""
    return [
        *outer_rows("time_embed"),
        *text_rows(),
        row("context_embedder_2.norm", "text2_embed.norm", layout=NORM),
        *(row(f"context_embedder_2.linear_{i}", f"text2_embed.fc{i}") for i in (1, 2, 3)),
        *image_rows(),
        row("cond_type_embed", "kind_embed", layout=TABLE),
        *dual_rows(),
    ]


def class_config(config: ModelConfig) -> dict[str, Any]:
    """diffusers' config.json for this model, without `target_size` and `task_type`, which only pipelines read."""
    return {
        "_class_name": "HunyuanVideo15Transformer3DModel",
        **shared_config(config),
        "num_refiner_layers": config.text_refiner_depth,
        "text_embed_2_dim": config.text2_dim,
        "image_embed_dim": config.image_embed_dim,
        "qk_norm": "rms_norm",
        "use_meanflow": False,
    }
