"""The training loop: restore → next batch → step → log → save, through every stage."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from omnihuman_jax.conditions import CONDITIONS
from omnihuman_jax.errors import UserError
from omnihuman_jax.inference import export
from omnihuman_jax.models.functional import Network
from omnihuman_jax.sharding import mesh as mesh_lib
from omnihuman_jax.sharding import rules
from omnihuman_jax.training.checkpoints import Checkpoints, load_for_inference
from omnihuman_jax.training.curriculum import Stage, curriculum, stage_at
from omnihuman_jax.training.metrics import MetricsWriter, RatioCounter, loss_by_condition
from omnihuman_jax.training.state import (
    TrainState,
    abstract_state,
    batch_shapes,
    init_state,
    make_network,
    make_optimizer,
    state_from_params,
)
from omnihuman_jax.training.step import jit_train_step


class Feed(Protocol):
    """Where batches come from; a batch is a pure function of the step."""

    def iterate(self, first_step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the batches of steps first_step, first_step + 1, …"""

    def describe(self, step: int) -> tuple[list[str], list[list[str]]]:
        """Record ids and active condition names of every global row of a step."""


SampleHook = Callable[[Any, int, Stage], tuple[Path, tuple[int, int]]]


def train(
    config: ConfigDict, plain_config: dict[str, Any], workdir: Path, feed: Feed, sample: SampleHook | None
) -> None:
    """Trains through the stages of `config`; called again on the same workdir it continues.

    Args:
      config: resolved config.
      plain_config: the same as plain JSON types, stored in config.json and in every checkpoint.
      workdir: run directory.
      feed: source of batches.
      sample: called at a stage's end with (EMA parameters, step, stage); writes a GIF and returns its path and size.

    Raises:
      UserError: anything wrong with the config or with the checkpoints in `workdir`; a loss that is not finite.
    """
    stages = curriculum(config)
    mesh = mesh_lib.make_mesh(config.mesh)
    mesh_lib.check_batch(config.global_batch_size, mesh)
    network = make_network(config)
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir, every=config.checkpoint.every, keep=config.checkpoint.keep)
        restored = checkpoints.restore_latest(abstract_state(config, mesh, network), config)
        if restored:
            state, done, counter = restored.state, restored.meta["step"], RatioCounter(**restored.meta["counter"])
            print(f"continuing {workdir} after step {done} of {stages[-1].last_step}, in {restored.meta['stage']}")
        else:
            state, done, counter = init_state(config, mesh, network), 0, RatioCounter()
        if done >= stages[-1].last_step:
            print(f"{workdir}: all {done} steps are done; nothing to train")
            checkpoints.close()
            return
        write_config(workdir, plain_config)
        run = _Run(config, plain_config, stages, network, mesh, feed, checkpoints, workdir, sample)
        try:
            run.steps(state, done, counter)
        finally:
            run.close()


class _Run:
    """The running loop and what it holds open."""

    def __init__(self, config, plain_config, stages, network: Network, mesh, feed, checkpoints, workdir, sample):
        self.config, self.plain_config, self.stages, self.mesh = config, plain_config, stages, mesh
        self.feed, self.checkpoints, self.sample = feed, checkpoints, sample
        self.train_step = jit_train_step(config, network, mesh)
        self.writer = MetricsWriter(workdir, log_records=config.data.log_records)
        self.workdir = workdir
        self.pending: dict[str, Any] | None = None

    def steps(self, state: TrainState, done: int, counter: RatioCounter) -> None:
        """Runs steps done + 1 … last."""
        last = self.stages[-1].last_step
        batches = self.feed.iterate(done + 1)
        self.bar = tqdm(total=last, initial=done, unit="step", dynamic_ncols=True, mininterval=1.0)
        self.clock = time.perf_counter()
        for step in range(done + 1, last + 1):
            stage = stage_at(self.stages, step)
            if step == stage.first_step:
                counter = RatioCounter()
                state = self.enter_stage(state, stage)
            waited = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waited
            state, metrics = self.train_step(state, self.place(batch), jnp.float32(stage.learning_rate_at(step)))
            counter.add(batch["active"], batch["scheduled"])
            self.flush()  # reads the metrics of the step before, so the host never stalls the device
            self.pending = {
                "step": step,
                "stage": stage,
                "metrics": metrics,
                "ratios": (counter.ratios(counter.active), counter.ratios(counter.scheduled)),
                "data_seconds": waited,
                "tokens": self.tokens(batch),
            }
            if step == stage.last_step or self.checkpoints.due(step):
                self.save(state, step, stage, counter)
        self.flush()

    def enter_stage(self, state: TrainState, stage: Stage) -> TrainState:
        """The state that a stage starts from: the stage before, or the parameters of `init_from`."""
        self.bar.write(f"{stage.name}: steps {stage.first_step}–{stage.last_step}, ratios {dict(stage.ratios)}")
        shardings = jax.tree.map(lambda x: x.sharding, state)
        if stage.init_from:
            if export.is_exported(stage.init_from):
                _, params, info = export.load(stage.init_from, shardings=shardings.params)
            else:
                _, params, info = load_for_inference(stage.init_from, use_ema=False)
                params = jax.device_put(params, shardings.params)
            self.bar.write(f"{stage.name}: parameters from {info['path']} (step {info['step']}), fresh optimizer")
            fresh = jax.jit(lambda p: state_from_params(self.config, p), out_shardings=shardings)(params)
            return fresh._replace(step=state.step)
        if stage.first_step > 1 and self.config.optimizer.reset_at_stage:
            fresh = jax.jit(make_optimizer(self.config).init, out_shardings=shardings.opt_state)(state.params)
            return state._replace(opt_state=fresh)
        return state

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts this process's rows onto the mesh."""
        sharding = rules.batch_sharding(self.mesh)
        names = batch_shapes(self.config, *batch["latents"].shape[1:4])
        return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in names}

    def tokens(self, batch: dict[str, np.ndarray]) -> int:
        """Noisy visual tokens of a global batch."""
        return (
            self.config.global_batch_size
            * math.prod(batch["latents"].shape[1:4])
            // math.prod(self.config.model.patch_size)
        )

    def save(self, state: TrainState, step: int, stage: Stage, counter: RatioCounter) -> None:
        """Writes the running checkpoint, and at a stage's end the one kept for good and a sample video."""
        self.flush()
        meta = {"step": step, "stage": stage.name, "config": self.plain_config, "counter": counter.state()}
        if step == stage.last_step:
            self.checkpoints.save_stage(stage.name, state, meta)
        self.checkpoints.save(step, state, meta)
        if step == stage.last_step and self.sample:
            path, size = self.sample(jax.device_get(state.ema), step, stage)
            self.writer.video(f"sample/{stage.name}", path, size, step)
        self.clock = time.perf_counter()  # saving is not part of the next step's time

    def flush(self) -> None:
        """Logs the pending step: waits for its metrics, checks them, writes a line every `log_every` steps."""
        if self.pending is None:
            return
        p, self.pending = self.pending, None
        step, stage = p["step"], p["stage"]
        loss = float(p["metrics"]["loss"])
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        records, active = self.feed.describe(step)
        grad_norm = float(p["metrics"]["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"step {step} ({stage.name}): the loss is {loss}, the gradient norm {grad_norm}; "
                f"records {', '.join(records)}; lower the "
                f"learning rate, or continue from the newest checkpoint in {self.workdir}/checkpoints"
            )
        self.writer.records(step, records, active)
        self.bar.update(1)
        self.bar.set_postfix_str(f"{stage.name} loss {loss:.4f} {seconds:.2f} s/step", refresh=False)
        if step % self.config.log_every and step not in (1, stage.last_step):
            return
        sample_loss = np.asarray(p["metrics"]["sample_loss"])
        line = {
            "step": step,
            "stage": stage.name,
            "loss": loss,
            "loss_by_condition": loss_by_condition(sample_loss, self.active_rows(active)),
            "active_ratio": p["ratios"][0],
            "scheduled_ratio": p["ratios"][1],
            "grad_norm": grad_norm,
            "learning_rate": stage.learning_rate_at(step),
            "step_seconds": seconds,
            "data_seconds": p["data_seconds"],
            "tokens_per_second": p["tokens"] / seconds,
        }
        self.writer.step(line, stage.ratios)

    @staticmethod
    def active_rows(active: list[list[str]]) -> np.ndarray:
        """Condition names per global row -> bool (B, 4)."""
        return np.array([[name in row for name in CONDITIONS] for row in active], bool)

    def close(self) -> None:
        """Finishes the saves under way and closes the logs."""
        self.checkpoints.close()
        self.writer.close()
        if hasattr(self, "bar"):
            self.bar.close()


def write_config(workdir: Path, plain_config: dict[str, Any]) -> None:
    """Writes config.json; when the run already has another one, says which keys changed."""
    path = workdir / "config.json"
    if path.exists():
        before, after = _flatten(json.loads(path.read_text())), _flatten(plain_config)
        changed = [k for k in sorted(before | after) if before.get(k) != after.get(k)]
        if changed:
            told = "; ".join(f"{k}: {before.get(k)} -> {after.get(k)}" for k in changed)
            print(f"config differs from the one this run had: {told}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(plain_config, indent=2) + "\n")
    temporary.replace(path)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
