"""Motif-Video-2B as the base (Apache-2.0): 12 dual, 16 single and 8 decoder blocks of width 1536, Wan2.1's VAE.

`experiments.import_weights --format=motif` imports the weights, and compares the checkpoint's config.json with this
preset.
"""

from ml_collections import ConfigDict

from experiments.configs import omni_2b


def get_config(recipe: str = "published") -> ConfigDict:
    """The Motif preset; the argument names the ratio recipe."""
    config = omni_2b.get_config(recipe)
    config.model.update({"num_single_blocks": 16, "num_decoder_blocks": 8, "text_cross_attention_single": True})
    config.model.update({"first_frame_channels": 17, "image_embed_dim": 1152, "rope_axes": (16, 56, 56)})
    config.model.update({"text_len": 512})
    return config
