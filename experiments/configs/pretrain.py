"""The demo with pretraining of the base: text-to-image, then text-to-video, then the three stages."""

from ml_collections import ConfigDict

from experiments.configs import demo


def get_config(recipe: str = "published") -> ConfigDict:
    """The demo preset with both pretraining rows of the stage table switched on."""
    config = demo.get_config(recipe)
    config.stages.stage1.init_from = ""
    for name in ("pretrain_image", "pretrain_video"):
        config.stages[name].update({"steps": 100, "learning_rate": 1e-3, "warmup_steps": 20})
    return config
