"""HunyuanVideo's form: 20 dual + 40 single blocks of width 3072, token refiner; 12.8B, and 2.3B of audio attention.

Without HunyuanVideo's pooled CLIP vector and distilled guidance: records have no pooled text, and training does not
distil.
"""

from ml_collections import ConfigDict

from experiments.configs import base
from experiments.configs.omni_2b import full_size


def get_config(recipe: str = "published") -> ConfigDict:
    """The 13B preset; the argument names the ratio recipe."""
    config = full_size(base.get_config(recipe))
    config.model.update({"hidden_size": 3072, "num_heads": 24, "head_dim": 128, "mlp_hidden": 12288})
    config.model.update({"num_dual_blocks": 20, "num_single_blocks": 40})
    config.model.update({"text_dim": 4096, "text_refiner_depth": 2, "text_embed": "linear"})
    config.global_batch_size = 64
    return config
