"""Trains OmniHuman through its stages; restarted with the same --workdir, it continues.

python -m experiments.train --config=experiments/configs/PRESET.py[:ARG] --workdir=DIR [--config.KEY=VALUE …]

DIR and data.dir may be gs://BUCKET/… or s3://BUCKET/….
"""

import dataclasses
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from data_pipelines.input_pipeline.batches import read_record
from data_pipelines.input_pipeline.pipeline import InputPipeline
from data_pipelines.raw import media
from data_pipelines.schema import Dataset, Meta, check_sizes, condition_arrays, full_records
from experiments.common import cli
from omnihuman_jax import conditions, stores
from omnihuman_jax.checkpoints.load import load_config
from omnihuman_jax.checkpoints.read import check_same_model, running_steps
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import pixel_frames
from omnihuman_jax.inference.generate import decode_latents
from omnihuman_jax.inference.inputs import Inputs
from omnihuman_jax.inference.sampling import Settings, sample_latents
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.models.vae.vae import VAE, load_vae
from omnihuman_jax.pixels import to_pixels
from omnihuman_jax.sharding.processes import log
from omnihuman_jax.stores import AnyPath
from omnihuman_jax.training import config_ranges, loop
from omnihuman_jax.training.stages import Stage, check_init_from, curriculum, loads_init_from
from omnihuman_jax.training.tasks.omnihuman import OmniHumanTask

# Flags and config keys that may be in an object store.
IN_STORES = ("workdir", "config.data.dir", "config.compilation_cache", "config.stages.*.init_from")


class SampleVideos:
    """Writes `samples/NAME.gif` at the end of a stage: for each clip, the real one above the generated one.

    Uses held-out clips of the data set or, if it has none, training clips.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, vae: VAE, workdir: AnyPath):
        self._config, self._dataset, self._vae = config, dataset, vae
        self._folder = workdir / "samples"
        held = [i for i in full_records(dataset, "heldout") if dataset.index[i]["audio"]]
        shown = held or full_records(dataset)
        shape = dataset.index[shown[0]]["shape"]
        same = [i for i in shown if dataset.index[i]["shape"] == shape]
        self._records = [read_record(dataset, i) for i in same[: config.sample.count]]

    def path(self, step: int, stage: Stage) -> AnyPath:
        """The GIF of a stage that ended with this step."""
        return self._folder / f"{stage.name}-{step:06d}.gif"

    def __call__(self, params: Any, step: int, stage: Stage) -> tuple[AnyPath, tuple[int, int]]:
        """Generates one window of each clip; returns the GIF and its (height, width)."""
        config, records = self._config, self._records
        network = make_network(config)
        window = min(stage.latent_frames, *(len(r["latents"]) for r in records))
        # Driven by the guided conditions (text and speech) that this stage trains and all clips have.
        trained = [name for name in conditions.guided() if name in conditions.selecting() and stage.ratios[name] > 0]
        drives = [name for name in trained if all(len(record[conditions.get(name).record]) for record in records)]
        arrays = [condition_arrays(record, ["text", "reference", *drives]) for record in records]
        inputs, settings = Inputs.of(network.config, arrays), Settings.from_config(config, window=window)
        seeds = range(config.seed, config.seed + len(records))
        made = sample_latents(network, params, inputs, settings, frames=pixel_frames(window), seeds=seeds)
        real = np.stack([r["latents"][:window] for r in records]).astype(np.float32)
        pair = [np.concatenate(list(decode_latents(self._vae, x)), axis=2) for x in (real, np.asarray(made))]
        video = to_pixels(np.concatenate(pair, axis=1))
        path = self.path(step, stage)
        if stores.is_remote(path):
            with tempfile.TemporaryDirectory() as folder:
                media.write_gif(Path(folder) / path.name, video)
                stores.upload(Path(folder) / path.name, path)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}")
            media.write_gif(part, video)
            part.replace(path)  # so that an existing sample is complete
        return path, video.shape[1:3]


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    cli.define_config_flag()
    flags.DEFINE_string("workdir", None, "Run directory: config, metrics, checkpoints; continued if it exists.")
    flags.DEFINE_list(
        "replace_parameters_at", [], "STAGE[,STAGE]: stages whose init_from may replace the parameters trained so far."
    )
    cli.define_process_flags()


def check_start(
    config: ConfigDict, stages: Sequence[Stage], workdir: AnyPath, replace_parameters_at: Collection[str] = ()
) -> dict[str, ConfigDict]:
    """Checks what the run starts from: the config of every `init_from` that will be loaded, by its path.

    Raises UserError for sampling settings or initial parameters that would fail hours into the run.
    """
    Settings.from_config(config)
    done, starts = max(running_steps(workdir), default=0), {}
    check_init_from(stages, replace_parameters_at, fresh=not done)
    for stage in stages:  # stages that have started no longer need init_from
        if done < stage.first_step and loads_init_from(stages, stage.first_step, replace_parameters_at):
            start = load_config(stage.init_from)
            advice = f"change --config.stages.{stage.name}.init_from (empty: start from nothing), or model.*"
            check_same_model(start.model.to_dict(), config.model.to_dict(), stage.init_from, advice)
            starts[stage.init_from] = start
    return starts


def other_features(start: ConfigDict, meta: Meta) -> list[str]:
    """What the training data of a checkpoint has, as text, where a data set was encoded differently."""
    trained, lines = start.get("dataset", {}), []
    if trained.get("vae_sha256", meta.vae_sha256) != meta.vae_sha256:
        lines.append("latents of another VAE")
    for name, encoder in meta.encoders.items():
        if (before := trained.get("encoders", {}).get(name, encoder)) != encoder:
            lines.append(f"{name} features of {before}, not {encoder}")
    return lines


def describe(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint records about its training data: sizes, encoders and latent shapes (Tclip, H, W)."""
    shapes = sorted({tuple(entry["shape"]) for entry in dataset.index})
    return dataclasses.asdict(dataset.meta) | {"records": len(dataset), "shapes": shapes}


def main(_: list[str]) -> None:
    """Entry point."""
    config = flags.FLAGS.config
    if config is None:
        raise UserError("--config is missing; give a preset such as --config=experiments/configs/demo.py")
    config_ranges.check(config)
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing; give a directory for this run")
    if not config.data.dir:
        raise UserError("data.dir is empty; set --config.data.dir=DIR to a directory made by data_pipelines.prepare")
    stages = curriculum(config)
    starts = check_start(config, stages, cli.check_workdir(flags.FLAGS.workdir), flags.FLAGS.replace_parameters_at)
    dataset = Dataset.open(config.data.dir)
    check_sizes(dataset, config.model)
    cli.check_vae(config.vae.checkpoint, dataset.meta.vae_sha256)
    input_pipeline = InputPipeline.from_config(config, stages, dataset)
    with cli.one_of_several(config):
        for path, start in starts.items():
            for line in other_features(start, dataset.meta):
                log(f"{path} was trained on {line}: its weights are only a rough start on {config.data.dir}")
        _train(config, dataset, input_pipeline)


def _train(config: ConfigDict, dataset: Dataset, input_pipeline: InputPipeline) -> None:
    f = flags.FLAGS
    vae = load_vae(config.vae.checkpoint) if config.sample.at_stage_end else None
    sample = SampleVideos(config, dataset, vae, stores.get_path(f.workdir)) if vae else None
    # Errors in the mesh or the network are raised before the run directory is made.
    task = OmniHumanTask(config, input_pipeline, sample, f.replace_parameters_at)
    plain = cli.to_plain(config) | {"dataset": describe(dataset), "conditions": list(conditions.names())}
    loop.train(task, config, plain, cli.make_workdir(f.workdir), started=cli.process_started())


if __name__ == "__main__":
    define_flags()
    cli.run_main(main, IN_STORES)
