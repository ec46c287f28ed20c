"""`make demo`: OmniHuman's three stages at small size, from a pretrained base, on 8 simulated devices in minutes."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from experiments.configs import base


def teach_speech_and_pose(config: ConfigDict) -> None:
    """What lets a small network learn speech in minutes: crops of the face, half of the loss on the mouth, more noise.

    The mouth is about a hundredth of the loss of a full frame, and low noise and neighbours give it away. In the
    warm-up row of speech every sample is a crop with a reference, nine of ten with sound; in that of pose nine of ten
    have keypoints. The published ratios follow each.
    """
    config.stages.stage2_warmup.update({"bucket_weights": "6x6=1", "time_mean": 1.0})
    # Low noise shows where the limbs are, as it does the mouth.
    config.stages.stage3_warmup.time_mean = 1.0
    # What a warm-up row adds has learned nothing yet, and the base has.
    config.stages.stage2_warmup.rate_factors = "audio=3"
    config.stages.stage3_warmup.rate_factors = "pose=3"
    for name in ("stage2_warmup", "stage2", "stage3"):
        config.stages[name].region_shares = "mouth=0.5"
    config.stages.stage3_warmup.region_shares = "mouth=0.3,limbs=0.3"
    for name in ("stage2", "stage3"):
        config.stages[name].time_mean_by_condition = "audio=1,pose=1"
    for name in ("stage2_warmup", "stage2", "stage3_warmup", "stage3"):
        config.stages[name].motion_ratio = 0.5  # what has motion frames can go on without listening


def set_rows(config: ConfigDict, rows: Iterable[tuple[str, int, float]], *, warmup_steps: int) -> None:
    """Sets steps and learning rate of rows (name, steps, rate) of the stage table."""
    for name, steps, rate in rows:
        config.stages[name].update({"steps": steps, "learning_rate": rate, "warmup_steps": warmup_steps})


def get_config(recipe: str = "published") -> ConfigDict:
    """The demo preset; the argument names the ratio recipe: demo.py:v2."""
    config = base.get_config(recipe)
    config.simulated_devices = 8
    config.global_batch_size = 16
    config.mesh.update({"data": 2, "fsdp": -1})
    config.model.update({"hidden_size": 192, "num_heads": 3, "mlp_hidden": 768})
    config.model.dtype = "float32"  # the faster one on CPU
    config.data.dir = "runs/demo/data"
    config.stages.stage1.init_from = "experiments/assets/small_base.safetensors"
    rows = (
        ("stage1", 50, 2e-3),
        ("stage2_warmup", 260, 2e-3),
        ("stage2", 50, 1.5e-3),
        ("stage3_warmup", 60, 1.5e-3),
        ("stage3", 60, 1e-3),
    )
    set_rows(config, rows, warmup_steps=10)
    teach_speech_and_pose(config)
    config.optimizer.b2 = 0.99  # moments over 100 steps, not over 1000
    config.ema_decay = 0.98
    config.checkpoint.update({"every": 100, "keep": 2})
    config.evaluation.batches = 1
    config.log_every = 5
    config.guidance.update({"scale": 3.0, "final_scale": 1.5})
    config.sample.update({"steps": 12})
    config.plan.buckets = ((6, 12, 12), (6, 16, 10), (6, 10, 14), (6, 6, 6))
    return config
