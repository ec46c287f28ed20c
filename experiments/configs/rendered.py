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
        ("stage1", 60, 2e-3),
        ("stage2_warmup", 2000, 2e-3),
        ("stage2", 400, 1.5e-3),
        ("stage3_warmup", 200, 1.5e-3),
        ("stage3", 800, 1e-3),
    )
    demo.set_rows(config, rows, warmup_steps=40)
    # With omit_absent every stage compiles each of its sizes, a minute each; the last one trains on all of them.
    config.stages.stage1.bucket_weights = "12x12=1"
    config.stages.stage2.bucket_weights = "12x12=2,6x6=1"
    config.stages.stage3_warmup.bucket_weights = "12x12=1"
    config.ema_decay = 0.995
    config.checkpoint.update({"every": 250, "keep": 2})
    config.log_every = 20
    return config
