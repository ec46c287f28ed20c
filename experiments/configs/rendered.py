"""Longer training on rendered people: more than an hour on 2 idle cores."""

from ml_collections import ConfigDict

from experiments.configs import demo


def get_config(recipe: str = "published") -> ConfigDict:
    """The demo's network on the same kind of data, trained for longer."""
    config = demo.get_config(recipe)
    config.data.dir = "runs/rendered/data"
    config.simulated_devices = 0
    config.mesh.update({"data": 1, "fsdp": -1})
    rows = (("stage1", 500, 4e-3), ("stage2_warmup", 1500, 3e-3), ("stage2", 1000, 3e-3), ("stage3", 900, 2e-3))
    for name, steps, rate in rows:
        config.stages[name].update({"steps": steps, "learning_rate": rate, "warmup_steps": 40})
    config.ema_decay = 0.995
    config.checkpoint.update({"every": 250, "keep": 2})
    config.log_every = 20
    return config
