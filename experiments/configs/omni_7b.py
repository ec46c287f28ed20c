"""About 7B parameters, Seaweed-like: dual-stream blocks only, SwiGLU, 32 heads of 112 (width 3584)."""

from ml_collections import ConfigDict

from experiments.configs import base
from experiments.configs.omni_2b import full_size


def get_config(recipe: str = "published") -> ConfigDict:
    """The 7B preset; the argument names the ratio recipe."""
    config = full_size(base.get_config(recipe))
    config.model.update({"hidden_size": 3584, "num_heads": 32, "head_dim": 112, "mlp_hidden": 9472})
    config.model.update({"num_dual_blocks": 14, "num_single_blocks": 0, "mlp_activation": "swiglu"})
    config.model.update({"text_dim": 4096, "text_embed": "mlp"})
    config.global_batch_size = 64
    return config
