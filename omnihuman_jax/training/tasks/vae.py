"""Training of the causal VAE on video windows: reconstruction, then optionally with a discriminator."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae.vae import (
    VAE,
    VAEConfig,
    encoder_sha256,
    encoder_tensors,
    is_of_encoder,
    load_vae,
    save_vae,
)
from omnihuman_jax.random_keys import POSTERIOR, purpose_key
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.sharding.processes import gather, is_main, process_rows, wait_for_all
from omnihuman_jax.training.hooks import Evaluation
from omnihuman_jax.training.log_files import last_step_in
from omnihuman_jax.training.run import Run
from omnihuman_jax.training.stages import Span, stage_at
from omnihuman_jax.training.task import Hook
from omnihuman_jax.training.tasks import vae_step
from omnihuman_jax.training.tasks.vae_step import VAEState
from omnihuman_jax.weights import lpips
from omnihuman_jax.weights.modules import parameter_shapes, parameters

RECONSTRUCTION, ADVERSARIAL = "reconstruction", "adversarial"


class Videos(Protocol):
    """Video windows (B, F, Hp, Wp, 3) float32 in [-1, 1]; a batch is a pure function of the step."""

    def sizes(self) -> Sequence[tuple[int, int, int, int]]:
        """(F, Hp, Wp, B) of every batch shape."""

    def iterate(self, first_step: int, rows: Callable[[int], slice]) -> Iterator[np.ndarray]:
        """Rows of the batches of steps first_step, first_step + 1, …; `rows` maps a batch size to the rows to read."""

    def records(self, step: int) -> list[str]:
        """The source files of the rows of a step."""

    def windows(self, split: str, count: int, size: tuple[int, int, int]) -> Iterator[np.ndarray]:
        """`count` windows (1, F, Hp, Wp, 3) of "train" or "heldout" videos, identical at every call."""

    def fingerprint(self) -> str:
        """Hex digest of the files and their split."""


class VAETask:
    """See `training.task.Task`.

    Args:
      config: resolved config like `experiments/configs/demo_vae.py`.
      videos: source of batches.
      output: the safetensors file to write at the end.

    Raises:
      UserError: the VAE does not support a clip size, the devices do not divide a batch, or the LPIPS weights cannot
        be read.
    """

    saved = "parameters, optimizer, EMA, discriminator and data position"

    def __init__(self, config: ConfigDict, videos: Videos, output: Path):
        self.config, self.videos, self._output = config, videos, output
        self.mesh, self.stages = make_mesh(config.mesh), _stages(config)
        settings, e = VAEConfig.from_dict(config.vae.to_dict()), config.evaluation
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for *size, batch in videos.sizes():
            settings.check_clip(*size)
            if batch % shards:
                raise UserError(f"data.buckets: batch {batch} is not divisible by the {shards} devices")
        self._window = (e.frames, e.height, e.width)
        settings.check_clip(*self._window)
        self._rows, self._replicated = rules.batch_sharding(self.mesh), rules.replicated(self.mesh)
        weights = nnx.state(lpips.load(config.loss.lpips)) if config.loss.lpips else None
        self._perceptual = jax.device_put(weights, self._replicated)
        self._data = videos.fingerprint()
        self._encoder = load_encoder(config) if config.encoder_from else None
        self._unit = self._encoder.config.latent_std if self._encoder else None
        # Every save records it, and making it reads the whole file.
        self._encoder_sha256 = encoder_sha256(config.encoder_from) if config.encoder_from else None
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        self._steps = {
            stage.name: jax.jit(
                vae_step.make_train_step(config, adversarial=stage.name == ADVERSARIAL, unit=self._unit),
                in_shardings=(shardings, self._rows, self._replicated),
                out_shardings=(shardings, self._replicated),
                donate_argnums=0,
            )
            for stage in self.stages
        }
        self._evaluate = jax.jit(
            vae_step.make_eval_step(config),
            in_shardings=(shardings.params, self._replicated),
            out_shardings=self._replicated,
        )

    def digests(self) -> dict[str, str]:
        """Digests of the videos and of the encoder of `encoder_from`, if it is given."""
        return {"data set": self._data} | self.meta()

    def abstract_state(self) -> VAEState:
        """Shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(lambda: vae_step.create_state(self.config))
        return rules.with_shardings(shapes, rules.tree_shardings(shapes, self.mesh))

    def init_state(self) -> VAEState:
        """A fresh state, with the encoder of `encoder_from`. A linear path starts as the best fit to training windows.

        The way in starts as their principal components, the way back as the map with the smallest squared error from
        latents with as much noise as in training.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        state = jax.jit(lambda: vae_step.create_state(self.config), out_shardings=shardings)()
        params = gather(state.params)
        if self._encoder is not None:
            params = vae_step.with_encoder(params, nnx.to_pure_dict(nnx.state(self._encoder)))
        if self.config.vae.linear_path:
            params = params | {"linear": self._fitted(params, shardings.params)}
        # Copied, since the step donates both.
        params, ema = (jax.device_put(jax.tree.map(np.array, params), at) for at in (shardings.params, shardings.ema))
        return state._replace(params=params, ema=ema)

    def _fitted(self, params: Any, shardings: Any) -> dict[str, np.ndarray]:
        """The parameters of the linear path, fitted to training windows."""
        linear = vae_step.make_vae(self.config).bind(params).linear
        windows = list(self.videos.windows("train", self.config.output.statistics_clips, self._window))
        blocks = np.concatenate(
            [np.asarray(linear.blocks(v)).reshape(-1, linear.decode_bias.shape[0]) for v in windows]
        )
        values = params["linear"]
        if self._encoder is None:
            values = values | linear.principal_components(blocks)
        placed = jax.device_put(params | {"linear": values}, shardings)
        key, inputs = purpose_key(self.config.seed, POSTERIOR), []
        for index, video in enumerate(windows):
            mean = self._evaluate(placed, video)[1]
            noise = vae_step.latent_noise(
                jax.random.fold_in(key, index), mean, self._unit, self.config.loss.latent_noise
            )
            inputs.append(np.asarray(linear.neighbours(mean + noise)).reshape(-1, linear.decode_matrix.shape[0]))
        return values | linear.least_squares(np.concatenate(inputs), blocks)

    def check_saved(self, saved: Mapping[str, Any], config: ConfigDict, path: Path) -> None:
        """Raises UserError if the VAE or the discriminator of the checkpoint has a different shape."""
        there, here = _shape(saved), _shape(config.to_dict())
        if there != here:
            raise UserError(f"{path}: checkpoint of another VAE ({there}); use its config or another --workdir")

    def meta(self) -> dict[str, Any]:
        """The digest of the encoder of `encoder_from`; data and stages follow from the config and the step."""
        return {"encoder": self._encoder_sha256} if self._encoder_sha256 else {}

    def restore(self, meta: Mapping[str, Any]) -> list[str]:
        """Nothing to restore. Raises UserError if the run was started with another encoder, or none."""
        if meta.get("encoder") != self._encoder_sha256:
            raise UserError(
                f"encoder_from={self.config.encoder_from!r}: this run was started with "
                f"{'another encoder' if 'encoder' in meta else 'no encoder'}; give that one, or another --workdir"
            )
        return []

    def enter_stage(self, state: VAEState, step: int, log: Callable[[str], None]) -> VAEState:
        """The unchanged state."""
        stage = stage_at(self.stages, step)
        log(f"{stage.name}: steps {stage.first_step}–{stage.last_step}")
        return state

    def batches(self, first_step: int) -> Iterator[np.ndarray]:
        """The rows of this process, for the batches from a step on."""
        return self.videos.iterate(first_step, lambda size: process_rows(self._rows, size))

    def train_step(self, step: int) -> Any:
        """The step with or without the discriminator, by stage."""
        return self._steps[stage_at(self.stages, step).name]

    def arguments(self, step: int, batch: np.ndarray) -> tuple[Any, ...]:
        """(videos on the mesh, LPIPS weights)."""
        return jax.make_array_from_process_local_data(self._rows, batch), self._perceptual

    def describe(self, step: int, batch: np.ndarray) -> dict[str, Any]:
        """The source files and the number of frames."""
        return {"records": self.videos.records(step), "frames": batch.shape[1]}

    def log_line(self, step: int, described: Mapping[str, Any], metrics: Any, seconds: float) -> dict[str, Any]:
        """Terms of the loss, PSNR and learning rate."""
        terms = {name: float(value) for name, value in metrics.items() if name != "skipped"}
        return {"frames": described["frames"], **terms}

    def hooks(self, run: Run) -> list[Hook]:
        """The held-out PSNR."""
        return [HeldOutPSNR(run, self)]

    def psnr(self, params: Any) -> np.ndarray:
        """Held-out PSNR in dB of `evaluation.clips` windows."""
        windows = self.videos.windows("heldout", self.config.evaluation.clips, self._window)
        return np.array([self._evaluate(params, v)[0][0] for v in windows])

    def statistics(self, params: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and scale of each latent channel over training windows, by which latents are normalised.

        With `output.spectrum` = a, a channel that changes the picture by s when it varies by one deviation keeps a
        variance proportional to s^2a, with mean one over the channels. At a = 0 all have variance one, and a diffusion
        model spends as much on the last details as on light and shape; at a = 1 an error counts as much as it shows.
        """
        windows = self.videos.windows("train", self.config.output.statistics_clips, self._window)
        means = [self._evaluate(params, v)[1] for v in windows]
        flat = np.concatenate([np.asarray(z) for z in means]).reshape(-1, self.config.vae.z_dim).astype(np.float64)
        if not np.isfinite(flat).all():
            raise UserError("the VAE's latents are not finite: training diverged; lower optimizer.learning_rate")
        mean, std = flat.mean(0), np.maximum(flat.std(0), 1e-6)
        if self.config.output.spectrum:
            change = self._visible_change(params, means, mean)
            # A channel that shows nothing would get an infinite scale.
            shown = np.maximum(change, 1e-3 * change.max()) ** self.config.output.spectrum
            std = std / (shown / np.sqrt(np.mean(shown**2)))
        return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())

    def _visible_change(self, params: Any, latents: Sequence[np.ndarray], mean: np.ndarray) -> np.ndarray:
        """RMS change of the decoded windows when a channel is replaced by its mean, (C,)."""
        decode = jax.jit(lambda params, z: vae_step.make_vae(self.config).bind(params).decode_raw(z))
        total = np.zeros(len(mean))
        for z in latents[: self.config.evaluation.clips]:
            whole = decode(params, z)
            changed = (decode(params, z.at[..., k].set(mean[k])) for k in range(len(mean)))
            total += [float(jnp.mean(jnp.square(other - whole))) for other in changed]
        return np.sqrt(total / min(len(latents), self.config.evaluation.clips))

    def finish(self, state: VAEState) -> None:
        """Measures the latent statistics and writes the file, from the EMA."""
        psnr, ema = self.psnr(state.ema), gather(state.ema)
        if self._encoder is None:
            mean, std = self.statistics(state.ema)
        else:
            mean, std = self._encoder.config.latent_mean, self._encoder.config.latent_std
        if is_main():
            vae = vae_step.make_vae(self.config).bind(jax.tree.map(jnp.asarray, ema))
            vae.config = dataclasses.replace(vae.config, latent_mean=mean, latent_std=std)
            notes = {"command": "python -m experiments.train_vae", "steps": str(self.config.steps)}
            notes |= {"seed": str(self.config.seed)}
            notes["heldout_psnr"] = f"{psnr.mean():.2f} dB over {len(psnr)} clips, std {psnr.std():.2f}"
            kept = encoder_tensors(self.config.encoder_from) if self.config.encoder_from else None
            save_vae(self._output, vae, dtype=self.config.output.dtype, notes=notes, encoder=kept)
            print(f"wrote {self._output}: held-out PSNR {notes['heldout_psnr']}")
        wait_for_all("written")


def _stages(config: ConfigDict) -> tuple[Span, ...]:
    """Reconstruction, then with the discriminator after `adversarial.start_step`."""
    alone = min(config.adversarial.start_step, config.steps) if config.adversarial.weight else config.steps
    rows = (Span(RECONSTRUCTION, 1, alone), Span(ADVERSARIAL, alone + 1, config.steps - alone))
    return tuple(row for row in rows if row.steps)


def load_encoder(config: ConfigDict) -> VAE:
    """The VAE of `encoder_from`; UserError if its encoder is not of the config's shape."""
    vae = load_vae(config.encoder_from)
    there = {k: v.shape for k, v in parameters(vae).items() if is_of_encoder(k)}
    mine = parameter_shapes(lambda: VAE(VAEConfig.from_dict(config.vae.to_dict()), rngs=nnx.Rngs(0)))
    here = {k: shape for k, shape in mine.items() if is_of_encoder(k)}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise UserError(
                f"encoder_from={config.encoder_from}: {name} is {there.get(name, 'missing')}, the config needs "
                f"{here.get(name, 'none')}; set vae.* as in that file's header"
            )
    return vae


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that determine the shapes of the state, as plain JSON."""
    adversarial = config.get("adversarial", {})
    width = adversarial["width"] if adversarial.get("weight") else None
    return json.loads(json.dumps({"vae": config.get("vae"), "discriminator": width}))


class HeldOutPSNR(Evaluation):
    """PSNR of held-out windows in metrics.jsonl, every `evaluation.every` steps and after the last."""

    def __init__(self, run: Run, task: VAETask):
        super().__init__(run)
        self._task = task

    def due(self, step: int) -> bool:
        """Whether `evaluation.every` divides the step, or it is the last."""
        return step % self._task.config.evaluation.every == 0 or step == self.run.last_step

    def is_there(self, step: int) -> bool:
        """Whether metrics.jsonl has the result."""
        return last_step_in(self.run.workdir / "metrics.jsonl", "heldout_psnr") >= step

    def evaluate(self, step: int, state: VAEState) -> None:
        """Writes a line of metrics.jsonl."""
        values = self._task.psnr(state.ema)
        found = {"heldout_psnr": float(values.mean()), "heldout_psnr_std": float(values.std())}
        self.run.writer.step({"step": step, "heldout_clips": len(values), **found}, {})
        self.run.log(f"step {step}: held-out PSNR {values.mean():.2f} dB (std {values.std():.2f})")
