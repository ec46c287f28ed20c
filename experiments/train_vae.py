"""Trains the causal VAE on a directory of video files; started again on the same --workdir it continues.

python -m experiments.train_vae --config=experiments/configs/demo_vae.py --workdir=DIR --config.data.dir=DIR[,DIR…]
    [--config.KEY=VALUE …]

The workdir gets config.json, metrics.jsonl, checkpoints/STEP/, stages/NAME/, tensorboard/ and, at the end,
vae.safetensors (EMA parameters, config and latent statistics), for `vae.checkpoint` of the other commands.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from data_pipelines.input_pipeline.video_batches import VideoBatches
from experiments.common import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding.processes import log
from omnihuman_jax.training import config_ranges, loop
from omnihuman_jax.training.tasks.vae import VAETask


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    cli.define_config_flag()
    flags.DEFINE_string("workdir", None, "Run directory: config, metrics, checkpoints; continued if it exists.")
    cli.define_process_flags()


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains; raises the UserErrors of `VideoBatches`, `VAETask` and `loop.train`."""
    videos = VideoBatches(config)
    task = VAETask(config, videos, workdir / "vae.safetensors")
    log(f"videos: {videos.folder.count('train')} train, {videos.folder.count('heldout')} heldout")
    loop.train(task, config, cli.to_plain(config), cli.make_workdir(str(workdir)), started=cli.process_started())


def main(_: list[str]) -> None:
    """Entry point."""
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if config is None:
        raise UserError("--config is missing; give a preset such as --config=experiments/configs/demo_vae.py")
    config_ranges.check(config, config_ranges.VAE_RANGES)
    if not workdir:
        raise UserError("--workdir is missing; give the directory this run should live in")
    if not config.data.dir:
        raise UserError("data.dir is empty; set --config.data.dir=DIR to a directory with video files")
    if config.output.dtype not in ("float16", "float32"):
        raise UserError(f"output.dtype={config.output.dtype!r}: must be float16 or float32")
    with cli.one_of_several(config):
        train(config, Path(workdir))


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
