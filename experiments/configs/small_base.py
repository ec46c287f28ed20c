"""The small pretrained base: the demo's network, text-to-image, then text-to-video, on thousands of rendered clips.

`experiments/assets/README.md` has the commands that made `experiments/assets/small_base.safetensors`.
"""

from ml_collections import ConfigDict

from experiments.configs import demo


def get_config(recipe: str = "published") -> ConfigDict:
    """Both pretraining rows of the stage table; the three stages are `demo`'s and `rendered`'s."""
    config = demo.get_config(recipe)
    config.simulated_devices = 0
    config.mesh.update({"data": 1, "fsdp": -1})
    config.data.update({"dir": "runs/base/data", "omit_absent": True})
    for name in config.stage_order:
        config.stages[name].update({"steps": 0, "init_from": ""})
    demo.set_rows(config, (("pretrain_image", 1500, 3e-3), ("pretrain_video", 1800, 2e-3)), warmup_steps=50)
    # A crop has a quarter of the tokens; as many of the steps as clips would be too many.
    config.stages.pretrain_video.bucket_weights = "12x12=3,16x10=2,10x14=2,6x6=2"
    config.ema_decay = 0.995
    config.checkpoint.update({"every": 250, "keep": 2})
    config.evaluation.update({"every": 250, "gain_every": 0})
    config.log_every = 20
    return config
