"""Trains OmniHuman through its stages; started again on the same --workdir it continues.

python -m experiments.train --config=experiments/configs/PRESET.py[:ARG] --workdir=DIR [--config.KEY=VALUE …]
"""

import dataclasses
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from data_pipelines.feed import Feed
from data_pipelines.schema import Dataset
from experiments import cli
from experiments.samples import SampleVideos
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae import load_vae
from omnihuman_jax.training import loop
from omnihuman_jax.training.curriculum import curriculum

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory: config, metrics, checkpoints; continued if it exists.")


def check_sizes(config: ConfigDict, dataset: Dataset) -> None:
    """Raises UserError where the data set's feature sizes are not what the model takes."""
    meta = dataset.meta
    sizes = {
        "latent_channels": meta.latent_channels,
        "audio_dim": meta.audio_dim,
        "text_dim": meta.text_dim,
        "num_keypoints": meta.num_keypoints,
    }
    for key, size in sizes.items():
        if config.model[key] != size:
            raise UserError(
                f"model.{key}={config.model[key]}, but the data set {config.data.dir} has {size}; set "
                f"--config.model.{key}={size}, or prepare the data with the encoders this preset expects"
            )


def describe(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says about the data it was trained on: sizes, encoders and latent shapes (Tclip, H, W)."""
    shapes = sorted({tuple(entry["shape"]) for entry in dataset.index})
    return dataclasses.asdict(dataset.meta) | {"records": len(dataset), "shapes": shapes}


def main(_: list[str]) -> None:
    """Entry point."""
    config = _CONFIG.value
    if config is None:
        raise UserError("--config is missing; give a preset such as --config=experiments/configs/demo.py")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; give the directory this run should live in")
    if not config.data.dir:
        raise UserError("data.dir is empty; set --config.data.dir=DIR to a directory made by data_pipelines.prepare")
    stages = curriculum(config)
    dataset = Dataset.open(config.data.dir)
    check_sizes(config, dataset)
    feed = Feed.from_config(config, stages, dataset)
    cli.setup_platform(config)
    vae = load_vae(config.vae.checkpoint) if config.sample.at_stage_end else None
    workdir = cli.make_workdir(_WORKDIR.value)
    sample = SampleVideos(config, dataset, vae, workdir) if vae else None
    loop.train(config, cli.to_plain(config) | {"dataset": describe(dataset)}, workdir, feed, sample)


if __name__ == "__main__":
    cli.run_main(main)
