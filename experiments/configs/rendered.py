"""The demo's stages for longer, on thousands of clips: more than an hour on 2 idle cores."""

from ml_collections import ConfigDict

from experiments.configs import demo


def get_config(recipe: str = "published") -> ConfigDict:
    """The demo's network on the same kind of data, trained for longer."""
    config = demo.get_config(recipe)
    config.data.dir = "runs/rendered/data"
    config.simulated_devices = 0
    config.mesh.update({"data": 1, "fsdp": -1})
    config.data.omit_absent = True
    rows = (
        ("stage1", 300, 2e-3),
        ("stage2_warmup", 2000, 2e-3),
        ("stage2", 800, 1.5e-3),
        ("stage3_warmup", 300, 1.5e-3),
        ("stage3", 800, 1e-3),
    )
    demo.set_rows(config, rows, warmup_steps=40)
    config.ema_decay = 0.995
    config.checkpoint.update({"every": 250, "keep": 2})
    config.log_every = 20
    return config
