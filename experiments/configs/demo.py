"""`make demo`: all of OmniHuman at small size on 8 simulated devices, in minutes on 2 cores."""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(recipe: str = "published") -> ConfigDict:
    """The demo preset; the argument names the ratio recipe: demo.py:v2."""
    config = base.get_config(recipe)
    config.simulated_devices = 8
    config.global_batch_size = 16
    config.mesh.update({"data": 2, "fsdp": -1})
    config.model.update({"hidden_size": 192, "num_heads": 3, "mlp_hidden": 768})
    config.model.dtype = "float32"  # the faster one on CPU
    config.data.dir = "runs/demo/data"
    for name, steps, rate in (("stage1", 130, 4e-3), ("stage2", 130, 3e-3), ("stage3", 130, 2e-3)):
        config.stages[name].update({"steps": steps, "learning_rate": rate, "warmup_steps": 20})
    config.optimizer.b2 = 0.99  # moments over 100 steps, not over 1000
    config.ema_decay = 0.98
    config.checkpoint.update({"every": 100, "keep": 2})
    config.log_every = 5
    config.guidance.update({"scale": 3.0, "final_scale": 1.5})
    config.sample.update({"steps": 12})
    config.plan.buckets = ((6, 12, 12), (6, 16, 10), (6, 10, 14))
    return config
