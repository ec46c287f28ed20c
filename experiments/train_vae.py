"""Trains the causal VAE on a directory of video files; started again on the same --workdir it continues.

python -m experiments.train_vae --config=experiments/configs/demo_vae.py --workdir=DIR --config.data.dir=DIR[,DIR…]
    [--config.KEY=VALUE …]

The workdir gets config.json, metrics.jsonl, checkpoints/STEP/ and, at the end, vae.safetensors (EMA parameters, config
and latent statistics), which `vae.checkpoint` of the other commands takes.
"""

import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.input_pipeline.video_windows import Bucket, VideoFolder
from experiments.common import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae.vae import VAEConfig, save_vae
from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.training import config_ranges, vae_train
from omnihuman_jax.weights import lpips


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    cli.define_config_flag()
    flags.DEFINE_string("workdir", None, "Run directory: config, metrics, checkpoints; continued if it exists.")


def buckets_of(config: ConfigDict, devices: int) -> list[Bucket]:
    """The training buckets, checked against the VAE and the number of devices.

    Raises:
      UserError: a row that is not five numbers, a size the VAE does not divide, a batch the devices do not divide.
    """
    settings = VAEConfig.from_dict(config.vae.to_dict())
    buckets = []
    for row in config.data.buckets:
        if len(row) != 5:
            raise UserError(f"data.buckets: {tuple(row)} is not (frames, height, width, batch, share)")
        bucket = Bucket(*(int(n) for n in row[:4]), float(row[4]))
        settings.check_clip(bucket.frames, bucket.height, bucket.width)
        if bucket.batch % devices:
            raise UserError(f"data.buckets: batch {bucket.batch} is not divisible by the {devices} devices")
        buckets.append(bucket)
    if not any(bucket.share for bucket in buckets):
        raise UserError("data.buckets: every share is 0; one must be above")
    return buckets


def batches(folder: VideoFolder, config: ConfigDict, buckets: list[Bucket], first_step: int) -> Iterator[np.ndarray]:
    """Batches of steps first_step, …, read ahead by one in a thread."""

    def make(step: int) -> np.ndarray:
        return folder.batch(buckets, config.seed, step, min_scale=config.data.min_scale)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, first_step), pool.submit(make, first_step + 1)]
        for step in range(first_step + 2, config.steps + 3):
            yield waiting.pop(0).result()
            waiting.append(pool.submit(make, step))


class Checkpoints:
    """Orbax checkpoints of the VAE's train state under `workdir`/checkpoints."""

    def __init__(self, workdir: Path, config: ConfigDict):
        self._config, self._vae = config, cli.to_plain(config.vae)
        options = ocp.CheckpointManagerOptions(max_to_keep=config.checkpoint.keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(), item_names=("state", "meta"), options=options
        )

    def restore(self, sharding: NamedSharding) -> vae_train.VAEState | None:
        """The newest state, or None when there is none.

        Raises:
          UserError: the checkpoint is of a VAE with other settings.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        directory = self._manager.directory / str(step)
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if meta["vae"] != self._vae:
            raise UserError(
                f"{directory}: checkpoint of another VAE ({meta['vae']}); use its config or another --workdir"
            )
        shapes = jax.eval_shape(lambda: vae_train.create_state(self._config))._asdict()
        abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return vae_train.VAEState(**restored.state)

    def save(self, step: int, state: vae_train.VAEState) -> None:
        """Saves in the background."""
        items = {"state": ocp.args.StandardSave(state._asdict()), "meta": ocp.args.JsonSave({"vae": self._vae})}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def close(self) -> None:
        """Waits for the saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


class Evaluator:
    """PSNR of fixed windows of held-out videos, and the statistics of the latents of training videos."""

    def __init__(self, config: ConfigDict, folder: VideoFolder):
        e = config.evaluation
        self._bucket = Bucket(e.frames, e.height, e.width, 1)
        VAEConfig.from_dict(config.vae.to_dict()).check_clip(e.frames, e.height, e.width)
        self._config, self._folder = config, folder
        self._step = jax.jit(vae_train.make_eval_step(config))

    def _windows(self, split: str, count: int) -> Iterator[np.ndarray]:
        for index in range(count):  # whole frames, from a seed of their own: the same windows at every evaluation
            yield self._folder.batch([self._bucket], self._config.seed + 1, index, min_scale=1.0, split=split)

    def start_at_principal_components(self, state: vae_train.VAEState) -> vae_train.VAEState:
        """The state with the linear path at the principal components of training windows."""
        linear = vae_train.make_vae(self._config).bind(state.params).linear
        windows = self._windows("train", self._config.output.statistics_clips)
        blocks = np.concatenate(
            [np.asarray(linear.blocks(v)).reshape(-1, linear.encode_matrix.shape[0]) for v in windows]
        )
        start = linear.principal_components(blocks)
        return state._replace(params=state.params | {"linear": start}, ema=state.ema | {"linear": start})

    def psnr(self, params: Any) -> np.ndarray:
        """Held-out PSNR in dB of `evaluation.clips` windows."""
        return np.array([self._step(params, v)[0][0] for v in self._windows("heldout", self._config.evaluation.clips)])

    def statistics(self, params: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each latent channel over training windows."""
        means = [
            np.asarray(self._step(params, v)[1]) for v in self._windows("train", self._config.output.statistics_clips)
        ]
        flat = np.concatenate(means).reshape(-1, self._config.vae.z_dim).astype(np.float64)
        if not np.isfinite(flat).all():
            raise UserError("the VAE's latents are not finite: training diverged; lower optimizer.learning_rate")
        return tuple(flat.mean(0).round(6).tolist()), tuple(np.maximum(flat.std(0), 1e-6).round(6).tolist())


def train(config: ConfigDict, workdir: Path) -> Path:
    """Runs the training and returns the path of vae.safetensors; the module's docstring says what lands in workdir."""
    mesh = make_mesh({"data": -1})
    buckets = buckets_of(config, mesh.size)
    d = config.data
    folder = VideoFolder(
        d.dir, exclude=d.exclude, heldout=d.heldout, cache_bytes=d.cache_mb << 20, short_side=d.short_side
    )
    evaluator = Evaluator(config, folder)
    workdir.mkdir(parents=True, exist_ok=True)
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    checkpoints = Checkpoints(workdir, config)
    try:
        state = checkpoints.restore(whole)
        (workdir / "config.json").write_text(json.dumps(cli.to_plain(config), indent=2))
        if state is None:
            state = jax.jit(lambda: vae_train.create_state(config), out_shardings=whole)()
            if config.vae.linear_path:
                state = jax.device_put(evaluator.start_at_principal_components(state), whole)
        done = int(state.step)
        print(f"{folder.count('train')} training videos, {folder.count('heldout')} held out; {done} steps done")
        input_pipeline = (jax.device_put(video, rows) for video in batches(folder, config, buckets, done + 1))
        state = _steps(config, workdir, state, input_pipeline, evaluator, checkpoints)
    finally:
        checkpoints.close()  # an interrupted run, too, keeps the save under way
    return _finish(config, workdir, evaluator, state.ema)


def _steps(config, workdir, state, input_pipeline: Iterator[jax.Array], evaluator: Evaluator, checkpoints: Checkpoints):
    """Steps state.step + 1 … config.steps: next batch, step, log, save, evaluate. Returns the last state."""
    done, perceptual = int(state.step), None
    if config.loss.lpips:
        perceptual = jax.device_put(nnx.state(lpips.load(config.loss.lpips)), jax.tree.leaves(state.params)[0].sharding)
    steps = {}  # with and without the adversarial term, built when first needed
    clock, logged = time.perf_counter(), done
    with open(workdir / "metrics.jsonl", "a", buffering=1) as log:
        bar = tqdm(input_pipeline, total=config.steps, initial=done, unit="step")
        for step, video in enumerate(bar, done + 1):
            adversarial = bool(config.adversarial.weight) and step > config.adversarial.start_step
            if adversarial not in steps:
                function = vae_train.make_train_step(config, adversarial=adversarial)
                steps[adversarial] = jax.jit(function, donate_argnums=0)
            state, metrics = steps[adversarial](state, video, perceptual)
            last = step == config.steps
            if step % config.log_every == 0 or last:
                line = {name: float(value) for name, value in metrics.items()}
                _check_finite(line["loss"], step)
                seconds, clock, logged = (time.perf_counter() - clock) / (step - logged), time.perf_counter(), step
                log.write(json.dumps({"step": step, "frames": video.shape[1], **line, "step_seconds": seconds}) + "\n")
                bar.set_postfix(loss=f"{line['loss']:.4f}", psnr=f"{line['psnr']:.1f}")
            if step % config.checkpoint.every == 0 or last:
                checkpoints.save(step, state)
            if step % config.evaluation.every == 0 or last:
                values = evaluator.psnr(state.ema)
                result = {"heldout_psnr": float(values.mean()), "heldout_psnr_std": float(values.std())}
                log.write(json.dumps({"step": step, "heldout_clips": len(values), **result}) + "\n")
                bar.write(f"step {step}: held-out PSNR {values.mean():.2f} dB (std {values.std():.2f})")
    return state


def _check_finite(loss: float, step: int) -> None:
    if not np.isfinite(loss):
        raise UserError(f"loss is {loss} at step {step}: training diverged; lower optimizer.learning_rate")


def _finish(config: ConfigDict, workdir: Path, evaluator: Evaluator, ema: Any) -> Path:
    """Measures the latent statistics and writes vae.safetensors."""
    mean, std = evaluator.statistics(ema)
    vae = vae_train.make_vae(config).bind(jax.tree.map(jnp.asarray, ema))
    vae.config = dataclasses.replace(vae.config, latent_mean=mean, latent_std=std)
    path, psnr = workdir / "vae.safetensors", evaluator.psnr(ema)
    notes = {"command": "python -m experiments.train_vae", "steps": str(config.steps), "seed": str(config.seed)}
    notes["heldout_psnr"] = f"{psnr.mean():.2f} dB over {len(psnr)} clips, std {psnr.std():.2f}"
    save_vae(path, vae, dtype=config.output.dtype, notes=notes)
    print(f"wrote {path}: held-out PSNR {notes['heldout_psnr']}")
    return path


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
    cli.setup_platform(config)
    train(config, Path(workdir))


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
