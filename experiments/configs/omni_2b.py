"""About 2B parameters, in the form of Motif-Video-2B: 12 dual + 24 single blocks of width 1536."""

from ml_collections import ConfigDict

from experiments.configs import base


def full_size(config: ConfigDict) -> ConfigDict:
    """What every full-size preset shares: splash attention, block remat, the published optimiser."""
    config.model.update({"attention": "splash", "remat": "full", "text_len": 256})
    config.model.update({"audio_dim": 1024, "audio_tokens": 16, "audio_hidden": 1024, "pose_channels": 64})
    config.model.update({"pose_widths": (32, 64, 128)})
    config.data.latent_frames = 21
    for name in ("stage1", "stage2", "stage3"):
        config.stages[name].steps = 10_000
    config.vae.checkpoint = ""
    # 480 x 832 pixels, 81 frames: 21 x 60 x 104 latents, 32,760 tokens.
    config.plan.buckets = ((21, 60, 104),)
    return config


def get_config(recipe: str = "published") -> ConfigDict:
    """The 2B preset; the argument names the ratio recipe."""
    config = full_size(base.get_config(recipe))
    config.model.update({"hidden_size": 1536, "num_heads": 12, "head_dim": 128, "mlp_hidden": 6144})
    config.model.update({"num_dual_blocks": 12, "num_single_blocks": 24})
    config.model.update({"text_dim": 2560, "text_embed": "mlp", "rope_theta": 10000.0})
    config.global_batch_size = 64
    return config
