"""HunyuanVideo-1.5 as the base (Tencent licence, see docs/weights.md): 54 dual blocks of width 2048.

A latent has 32 channels and covers 4 frames of 16 x 16 pixels. This repository does not have its VAE; docs/weights.md
says where to get latents. Without Glyph-ByT5 text, image states and first frame it is in its text-to-video form.
"""

from ml_collections import ConfigDict

from experiments.configs import base
from experiments.configs.omni_2b import full_size


def get_config(recipe: str = "published") -> ConfigDict:
    """The HunyuanVideo-1.5 preset; the argument names the ratio recipe."""
    config = full_size(base.get_config(recipe))
    config.model.update({"hidden_size": 2048, "num_heads": 16, "head_dim": 128, "mlp_hidden": 8192})
    config.model.update({"num_dual_blocks": 54, "num_single_blocks": 0, "rope_axes": (16, 56, 56)})
    config.model.update({"latent_channels": 32, "first_frame_channels": 33, "patch_size": (1, 1, 1)})
    config.model.update({"text_dim": 3584, "text_len": 1000, "text_refiner_depth": 2, "text_embed": "linear"})
    config.model.update({"text2_dim": 1472, "image_embed_dim": 1152, "token_kinds": True})
    config.global_batch_size = 64
    config.sample.at_stage_end = False  # nothing here decodes these latents
    # 480 x 832 pixels, 81 frames: 21 x 30 x 52 latents, 32,760 tokens.
    config.plan.buckets = ((21, 30, 52),)
    return config
