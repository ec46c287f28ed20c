"""HunyuanVideo as the base (Tencent licence, see docs/weights.md): 20 dual and 40 single blocks of width 3072.

The published weights are guidance-distilled and take a guidance scale, here always 1, because sampling applies guidance
itself. Records have no pooled CLIP text, so that vector is zero.
"""

from ml_collections import ConfigDict

from experiments.configs import omni_13b


def get_config(recipe: str = "published") -> ConfigDict:
    """The HunyuanVideo preset; the argument names the ratio recipe."""
    config = omni_13b.get_config(recipe)
    config.model.update({"pooled_text_dim": 768, "pooled_required": False, "rope_axes": (16, 56, 56)})
    config.model.update({"guidance_embed": True, "guidance_default": 1.0})
    return config
