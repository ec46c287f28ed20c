"""Every config key with its default; a preset is the difference from this or from another preset."""

import dataclasses

from ml_collections import ConfigDict

from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.models.dit.config import ModelConfig

# A warm-up row trains a new condition at a high ratio before its stage; presets switch it on by giving it steps.
STAGES = ("pretrain_image", "pretrain_video", "stage1", "stage2_warmup", "stage2", "stage3_warmup", "stage3")


def stage(**changes) -> ConfigDict:
    """One row of the stage table."""
    row = ConfigDict(
        {
            "steps": 0,  # 0 leaves the stage out
            "learning_rate": 5e-5,
            "warmup_steps": 500,
            "ratios": conditions.complete_ratios({"text": 0.9, "reference": 0.7}),
            "latent_frames": 0,  # noisy latent frames T; 0 = data.latent_frames, 1 = images
            "motion_ratio": 0.75,  # share of windows that continue from motion frames
            "bucket_weights": "",  # "12x12=2,16x10=1": latent HxW = share of the steps; empty = as in the data
            "inverted_ratios": False,  # true: a warm-up row, in which a stronger condition may have the higher ratio
            # Mean and spread of the logit-normal times before the shift; by the strongest active condition, "audio=1".
            "time_mean": 0.0,
            "time_std": 1.0,
            "time_mean_by_condition": "",
            "rate_factors": "",  # "audio=4": learning rate of a condition's own modules as a multiple
            # What the paper does not have: "mouth=0.5" = share of the loss that a region of the picture gets, and
            # share of the samples in which nothing else counts. Regions: face, mouth, limbs.
            "region_shares": "",
            "region_only": "",
            # Checkpoint or export (also of experiments.import_weights) with the initial parameters of the run's
            # first stage, or with --replace_parameters_at of a later one.
            "init_from": "",
        }
    )
    row.update(changes)
    return row


def warmup(**ratios: float) -> dict[str, float]:
    """Ratios of a row that trains a new condition in nine of ten samples: guidance needs the tenth."""
    return conditions.complete_ratios({"text": 0.9, "reference": 1.0} | ratios)


def apply_recipe(config: ConfigDict, name: str) -> ConfigDict:
    """Sets the ratios of stages 1-3 to a published recipe ("published" or "v2")."""
    if name not in conditions.RECIPES:
        raise UserError(f"recipe {name!r} is unknown{nearest(name, conditions.RECIPES)}")
    for stage_name, ratios in conditions.RECIPES[name].items():
        config.stages[stage_name].ratios.update(ratios)
    return config


def run_config() -> ConfigDict:
    """The defaults of every training run, whatever it trains."""
    config = ConfigDict()
    config.seed = 0
    config.simulated_devices = 0  # > 0: run on that many simulated CPU devices
    config.compilation_cache = "cache/jax"  # persistent XLA compilation cache; "" = none
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1})
    config.log_every = 10
    # keep: number of latest checkpoints; keep_every: also every step that it divides (0 = none). Stage ends are always
    # kept. copy_on_device: continue training as soon as the devices hold a copy of the state, if they have room for it;
    # False: wait until the state has been read.
    config.checkpoint = ConfigDict({"every": 1000, "keep": 3, "keep_every": 0, "copy_on_device": True})
    # Limits that end a run: consecutive steps that are not finite (each is skipped); seconds without a finished step.
    config.faults = ConfigDict({"max_bad_steps": 10, "watchdog_seconds": 1800.0})
    config.profile = ConfigDict({"steps": ""})  # "20:25": a trace of these steps under workdir/profile
    return config


def get_config(recipe: str = "published") -> ConfigDict:
    """The defaults: a small model, the published optimiser settings, the recipe's ratios and no steps."""
    config = run_config()
    config.global_batch_size = 256
    # What the sequence axis divides in self-attention. "ulysses": heads (sequence x tensor must divide them);
    # "all_gather": queries, against all keys and values (only tensor must divide the heads).
    config.mesh.sequence_attention = "ulysses"

    # head_dim 0 and rope_axes () are derived from the other sizes.
    config.model = ConfigDict(dataclasses.asdict(ModelConfig()) | {"head_dim": 0, "rope_axes": ()})
    config.model.dtype = "bfloat16"  # compute; parameters stay float32 (param_dtype)
    del config.model.sequence_attention  # set as mesh.sequence_attention
    config.vae = ConfigDict({"checkpoint": "experiments/assets/demo_vae.safetensors"})

    config.data = ConfigDict(
        {
            "dir": "",
            "log_records": False,
            "latent_frames": 6,  # noisy latent frames T of a window
            "source_weights": "",  # "real=2,synthetic=1"; empty = in proportion to the number of records
            "cache_mb": 2048,  # decoded records kept in memory
            # Leave out of the batches what a stage never has: references, motion frames, audio or pose. Its steps are
            # faster and the same up to rounding; every stage and size then compiles for itself.
            "omit_absent": False,
            # Guidance dropout on top of the ratios, which already drop conditions; it lowers `active_ratio` below
            # `scheduled_ratio`.
            **{f"drop_{name}": 0.0 for name in conditions.guided()},
        }
    )

    config.stage_order = STAGES
    text_only = conditions.complete_ratios({"text": 0.9})
    config.stages = ConfigDict(
        {
            "pretrain_image": stage(ratios=text_only, latent_frames=1, motion_ratio=0.0, learning_rate=1e-4),
            "pretrain_video": stage(ratios=text_only, motion_ratio=0.0, learning_rate=1e-4),
            "stage1": stage(),
            "stage2_warmup": stage(ratios=warmup(audio=0.9), inverted_ratios=True),
            "stage2": stage(),
            "stage3_warmup": stage(ratios=warmup(audio=0.5, pose=0.9), inverted_ratios=True),
            "stage3": stage(),
        }
    )
    apply_recipe(config, recipe)
    config.allow_inverted_ratios = False  # true: accept a stronger condition with the higher ratio

    config.optimizer = ConfigDict(
        {
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip": 1.0,
            # Parameters of a condition that a stage switches on have had no gradient yet. With the old moments, Adam's
            # bias correction no longer applies and its steps on them are up to 6 times too long.
            "reset_at_stage": True,
            # First and second moments; bfloat16 saves two bytes per parameter each.
            "mu_dtype": "float32",
            "nu_dtype": "float32",
            "stochastic_rounding": False,  # of bfloat16 moments, and of parameters with model.param_dtype=bfloat16
            "accumulate": 1,  # micro-batches per step
        }
    )
    config.diffusion = ConfigDict({"shift": 0.0})  # shift 0 = by token count
    config.ema_decay = 0.9998
    # Of the EMA on `batches` held-out batches at fixed noise: the loss every `every` steps, and what each condition
    # gains (36 forward passes a batch) every `gain_every` steps; 0 = never.
    config.evaluation = ConfigDict({"every": 0, "gain_every": 0, "batches": 2})
    config.guidance = ConfigDict({"scale": 6.5, "final_scale": 3.5, "mode": "joint", "schedule": "cosine"})
    config.sample = ConfigDict({"at_stage_end": True, "steps": 50, "count": 2})
    config.plan = ConfigDict({"buckets": ((6, 12, 12),)})  # latent (T, H, W) that tpu.plan compiles; T 0 = the stage's
    return config
