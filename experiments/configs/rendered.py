"""Longer training on rendered people: up to 20 minutes of one data-centre GPU, or 3 hours on 2 cores."""

from ml_collections import ConfigDict

from experiments.configs import demo


def get_config(recipe: str = "published") -> ConfigDict:
    """The demo's network and data form, trained longer."""
    config = demo.get_config(recipe)
    config.data.dir = "runs/rendered/data"
    config.simulated_devices = 0
    config.mesh.update({"data": 1, "fsdp": -1})
    for name, steps in (("stage1", 1500), ("stage2", 6000), ("stage3", 3000)):
        config.stages[name].update({"steps": steps, "learning_rate": 2e-3, "warmup_steps": 100})
    config.ema_decay = 0.999
    config.checkpoint.update({"every": 500, "keep": 2})
    config.log_every = 20
    return config
