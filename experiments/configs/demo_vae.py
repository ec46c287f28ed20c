"""The demo's causal VAE: small enough to encode and decode 2 s of 96x96 video in well under a second on 2 cores."""

import dataclasses

from ml_collections import ConfigDict

from experiments.configs import base
from omnihuman_jax.models.vae.vae import VAEConfig


def get_config() -> ConfigDict:
    """Every key of `experiments.train_vae` with its value for the demo."""
    config = base.run_config()
    config.compilation_cache = ""
    config.mesh.update({"data": -1, "fsdp": 1})
    config.steps = 1200
    config.log_every = 25
    config.ema_decay = 0.999
    vae = VAEConfig(dim=24, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True))
    vae = dataclasses.replace(vae, patch_size=2, linear_path=True, linear_context=1)
    # A VAE file whose encoder is kept, and only the decoder trained: records made with it stay valid. "" = train both.
    config.encoder_from = ""
    # The latent statistics are measured at the end of training.
    config.vae = ConfigDict({k: v for k, v in dataclasses.asdict(vae).items() if not k.startswith("latent_")})

    config.data = ConfigDict(
        {
            "log_records": False,
            "dir": "",  # comma-separated directories of video files, each drawn equally often
            "exclude": "",  # regular expression of paths in them to ignore
            "heldout": 0.05,  # share of held-out files, if no manifest.json or dataset.json defines the split
            "min_scale": 0.5,  # smallest crop, as a share of the frame
            "short_side": 160,  # larger frames are shrunk to this many pixels on their short side
            "cache_mb": 1500,  # decoded video kept in memory
            # frames, height, width, batch size, share of the steps
            "buckets": ((5, 64, 64, 4, 0.5), (17, 64, 64, 2, 0.3), (1, 96, 96, 6, 0.2)),
        }
    )
    # See omnihuman_jax/training/tasks/vae_step.py; latent_noise: largest noise on the latents that the decoder reads,
    # in units of normalised latents; `lpips` is a file (omnihuman_jax/weights/lpips.py), "" for none.
    config.loss = ConfigDict(
        {"edge": 1.0, "scales": 3, "kl": 1e-4, "latent_noise": 0.5, "lpips": "", "lpips_weight": 0.1}
    )
    config.adversarial = ConfigDict({"weight": 0.0, "start_step": 0, "learning_rate": 1e-4, "width": 32})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 2e-3,
            "muon_learning_rate": 0.02,  # of convolution kernels, without weight decay; 0 = AdamW for everything
            "warmup_steps": 30,
            "b1": 0.9,
            "b2": 0.99,
            "weight_decay": 1e-4,
            "clip": 1.0,
        }
    )
    config.checkpoint.update({"every": 500, "keep": 2})
    config.evaluation = ConfigDict({"every": 500, "frames": 17, "height": 96, "width": 96, "clips": 8})
    # statistics_clips: clips for the latent statistics; spectrum: `VAETask.statistics`.
    config.output = ConfigDict({"dtype": "float16", "statistics_clips": 64, "spectrum": 0.5})
    return config
