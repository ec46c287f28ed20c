"""The training loop: restore → next batch → step → log → save → evaluate, through every stage.

It runs alike in every process of a run; only the first writes logs. A batch, the noise and the stage are functions of
the step, so a resume is the train state and a step number.
"""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from omnihuman_jax import batch as batch_lib
from omnihuman_jax import conditions
from omnihuman_jax.checkpoints.load import is_exported, load_parameters
from omnihuman_jax.checkpoints.manager import Checkpoints
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit import flops
from omnihuman_jax.models.functional import Network, make_network
from omnihuman_jax.sharding import mesh as mesh_lib
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.processes import (
    StopConsensus,
    broadcast_from_main,
    check_same_on_all,
    compile_together,
    is_main,
    log,
    process_rows,
    wait_for_all,
)
from omnihuman_jax.training import metrics as metrics_lib
from omnihuman_jax.training.faults import BadSteps, StopSignal, Watchdog
from omnihuman_jax.training.goodput import Goodput
from omnihuman_jax.training.held_out import HeldOutLoss
from omnihuman_jax.training.metrics import MetricsWriter, RatioCounter
from omnihuman_jax.training.profile import Profile
from omnihuman_jax.training.run_config import config_digest, shared_digest, write_config
from omnihuman_jax.training.stages import (
    Stage,
    begins_stage,
    changes,
    continued,
    curriculum,
    ends_stage,
    from_json,
    last_steps,
    learning_rate_at,
    loads_init_from,
    stage_at,
    to_json,
)
from omnihuman_jax.training.state import (
    TrainState,
    abstract_state,
    init_state,
    make_optimizer,
    state_from_params,
)
from omnihuman_jax.training.step import jit_train_step

FPS = 25


class InputPipeline(Protocol):
    """Where batches come from; a batch is a pure function of the step."""

    def iterate(self, first_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        """These global rows of the batches of steps first_step, first_step + 1, …"""

    def describe(self, step: int) -> dict[str, Any]:
        """`records`, `active` and `scheduled`: record id and condition names of every global row of a step."""

    def use_stages(self, stages: Sequence[Stage]) -> None:
        """Draws every step by this table; UserError where the data set cannot."""

    def fingerprint(self) -> str:
        """Hex digest of what the data set says of itself and of every record."""

    def held_out(self, count: int, rows: slice) -> list[dict[str, np.ndarray]]:
        """These global rows of `count` batches that training does not see."""


class SampleHook(Protocol):
    """Writes a sample video at a stage's end."""

    def path(self, step: int, stage: Stage) -> Path:
        """The GIF that a call writes."""

    def __call__(self, params: Any, step: int, stage: Stage) -> tuple[Path, tuple[int, int]]:
        """Writes it from the EMA parameters; its path and (height, width)."""


def train(
    config: ConfigDict,
    plain_config: dict[str, Any],
    workdir: Path,
    input_pipeline: InputPipeline,
    sample: SampleHook | None,
    *,
    replace_parameters_at: Collection[str] = (),
    started: float | None = None,
) -> None:
    """Trains through the stages of `config`; called again on the same workdir it continues.

    SIGTERM, or Ctrl-C once, saves and returns after the step under way, in all processes at the same step.

    Args:
      config: resolved config.
      plain_config: the same as plain JSON types, stored in config.json and in every checkpoint.
      workdir: run directory.
      input_pipeline: source of batches.
      sample: writes a video at every stage's end; None for none.
      replace_parameters_at: stages whose `init_from` may replace what the run has trained; see `loads_init_from`.
      started: `time.time()` of the process's start, for the goodput.

    Raises:
      UserError: anything wrong with the config or with the checkpoints in `workdir`; too many steps in a row that are
        not finite; a checkpoint of a stage, or the last one, that could not be written.
    """
    stages = curriculum(config)
    mesh = mesh_lib.training_mesh(config)
    with jax.set_mesh(mesh), StopSignal() as stop:
        run = _Run(config, plain_config, stages, mesh, input_pipeline, workdir, sample, stop, started or time.time())
        run.replace_parameters_at = replace_parameters_at
        try:
            run.start()
        except BaseException:
            with contextlib.suppress(Exception):  # what happened first is what is told
                run.close()
            raise
        run.close()


class _Run:
    """The running loop and what it holds open."""

    def __init__(self, config, plain_config, stages, mesh, input_pipeline, workdir, sample, stop, started: float):
        self.config, self.plain_config, self.stages, self.mesh = config, plain_config, stages, mesh
        self.input_pipeline, self.sample, self.stop, self.workdir = input_pipeline, sample, stop, workdir
        self.network: Network = make_network(config)
        self.goodput = Goodput(started)
        self.rows = process_rows(rules.batch_sharding(mesh), config.global_batch_size)
        every, count = config.evaluation.every, config.evaluation.batches
        self.held_out_batches = input_pipeline.held_out(count, self.rows) if every else []
        if every and not self.held_out_batches:
            raise UserError(
                f"evaluation.every={every}: the data set has no held-out clips as long as the training window; set it "
                f"to 0, or prepare data with a held-out split"
            )
        self.held_out: HeldOutLoss | None = None
        self.data = input_pipeline.fingerprint()
        c = config.checkpoint
        self.bar = tqdm(disable=True)
        self.checkpoints = Checkpoints(
            workdir,
            every=c.every,
            keep=c.keep,
            keep_every=c.keep_every,
            copy_on_device=c.copy_on_device,
            stages=last_steps(stages),
            log=self.log,
        )
        last_good = self.checkpoints.last_good
        self.watchdog = Watchdog(config.faults.watchdog_seconds, last_good)
        self.bad_steps = BadSteps(config.faults.max_bad_steps, last_good)
        self.writer = MetricsWriter(workdir, log_records=config.data.log_records, enabled=is_main(), log=self.log)
        self.stop_consensus = StopConsensus(mesh)
        self.train_step = jit_train_step(config, self.network, mesh)
        self.profile = Profile(config.profile.steps, workdir)
        self.pending: dict[str, Any] | None = None
        self.compiled: dict[tuple[int, ...], Callable[..., Any]] = {}
        self.repeated_until, self.claimed = 0, 0.0
        self.replace_parameters_at: Collection[str] = ()

    def log(self, message: str) -> None:
        """A line above the progress bar, once for all processes."""
        if is_main():
            self.bar.write(message)

    def start(self) -> None:
        """Restores or initialises, then runs the steps that are left."""
        self.watchdog.start()
        with self.watchdog:
            check_same_on_all("data set", self.data)
            check_same_on_all("config", shared_digest(self.plain_config))
            check_same_on_all("--replace_parameters_at", config_digest({"stages": sorted(self.replace_parameters_at)}))
            restored = self.checkpoints.restore_latest(
                abstract_state(self.config, self.mesh, self.network), self.config
            )
            if restored:
                state, done = restored.state, restored.meta["step"]
                counter = self.restore_counters(restored.path, restored.meta)
            else:
                state, done, counter = init_state(self.config, self.mesh, self.network), 0, RatioCounter()
        if is_main():
            write_config(self.workdir, self.plain_config, restored.meta["config"] if restored else None)
        with self.watchdog:
            self.checkpoints.mend_stages(done)
        last = self.stages[-1].last_step
        if restored and done <= last:
            self.after_save(state, done, stage_at(self.stages, done), resumed=True)
        if done >= last:
            self.finish(done)
            log(f"{self.workdir}: all {done} steps are done; nothing to train")
            return
        self.bar = tqdm(
            total=last, initial=done, unit="step", dynamic_ncols=True, mininterval=1.0, disable=not is_main()
        )
        self.steps(state, done, counter)

    def finish(self, done: int) -> None:
        """Waits for the saves under way.

        Raises:
          UserError: a checkpoint that could not be written and is still missing.
        """
        with self.watchdog:
            self.checkpoints.wait()
            self.checkpoints.mend_stages(done)
        if self.checkpoints.failed:
            raise UserError(
                f"{self.checkpoints.failed}; the last whole one is {self.checkpoints.last_good()}; make room and start "
                f"the same command again: it continues from there"
            )

    def restore_counters(self, path: Path, meta: dict[str, Any]) -> RatioCounter:
        """Takes up what a checkpoint says besides the arrays; one line tells what, others what changes from there."""
        done = meta["step"]
        lines = self.continue_stages(from_json(meta["stages"]), done)
        self.repeated_until, last = metrics_lib.last_logged_step(self.workdir), self.stages[-1].last_step
        self.log(
            f"continuing {self.workdir} after step {done} of {last}, in {meta['stage']}: parameters, optimizer, EMA, "
            f"data position and ratio counts from {path}; {max(0, self.repeated_until - done)} logged steps come "
            f"again; {jax.process_count()} process(es), mesh {dict(self.mesh.shape)}"
        )
        self.bad_steps.total, self.bad_steps.in_a_row = meta.get("bad_steps", (0, 0))
        for line in lines:
            self.log(line)
        if meta.get("data") != self.data:
            self.log("the data set differs from the one the checkpoint was trained on: records may repeat or be left")
        return RatioCounter(**meta.get("counter", {}))

    def continue_stages(self, saved: Sequence[Stage], done: int) -> list[str]:
        """Makes `stages` the table that goes on after step `done` of a saved one; returns what the config changes."""
        own, table = self.stages, continued(saved, self.stages, done)
        try:
            self.input_pipeline.use_stages(table)
        except UserError as error:  # of the saved rows: those of the config have been planned over this data set
            return [
                f"the data set at hand cannot give what steps 1 to {done} drew ({error}); they count as drawn by the "
                f"stages of this config, so records may repeat or be left out once"
            ]
        self.stages = table
        self.checkpoints.end_stages(last_steps(table))
        return changes(saved, own, done)

    def steps(self, state: TrainState, done: int, counter: RatioCounter) -> None:
        """Runs steps done + 1 … last, or until told to stop."""
        last = self.stages[-1].last_step
        batches = self.input_pipeline.iterate(done + 1, self.rows)
        self.start_clock()
        for step in range(done + 1, last + 1):
            stage = stage_at(self.stages, step)
            if step == stage.first_step:
                counter = RatioCounter()  # other ratios are counted from here on
            if begins_stage(self.stages, step):
                with self.watchdog:
                    state = self.enter_stage(state, stage)
            self.profile.before(step)
            waited = time.perf_counter()
            with self.goodput.cause("data"):
                batch = next(batches)
            waited = time.perf_counter() - waited
            state, metrics = self.dispatch(state, batch, learning_rate_at(self.stages, step))
            told = self.input_pipeline.describe(step)
            counter.add(told)
            self.flush()  # reads the metrics of the step before, so the host never stalls the device
            self.pending = {
                "step": step,
                "stage": stage,
                "metrics": metrics,
                "told": told,
                "ratios": (counter.ratios(counter.active), counter.ratios(counter.scheduled)),
                "data_seconds": waited,
                "bucket": batch["latents"].shape[1:4],
            }
            stop = self.stop_consensus.reached(bool(self.stop.name))
            if ends_stage(self.stages, step) or self.checkpoints.due(step) or stop:
                self.save(state, step, stage, counter)
            if not stop:  # the time that is left before a kill is for saving; these are made up for
                self.after_save(state, step, stage)
            self.profile.after(step, metrics)
            if stop:
                self.flush()
                self.finish(step)
                self.log(
                    f"stopped by {self.stop.name or 'another process'} after step {step} of {last}, saved in "
                    f"{self.checkpoints.last_good()}; start the same command again to continue"
                )
                return
        self.flush()
        self.finish(last)

    def dispatch(self, state: TrainState, batch: dict[str, np.ndarray], rate: float) -> tuple[TrainState, Any]:
        """Starts the step; the first of each shape compiles before it returns."""
        placed, shape = batch_lib.place(self.config, self.mesh, batch), batch["latents"].shape
        arguments = (state, placed, jnp.float32(rate))
        if shape not in self.compiled:
            with self.watchdog, self.goodput.cause("compile"):
                self.compiled[shape] = compile_together(self.train_step, *arguments)
        return self.compiled[shape](*arguments)

    def enter_stage(self, state: TrainState, stage: Stage) -> TrainState:
        """The state that a stage starts from: that of the stage before, or parameters from `init_from`."""
        self.log(f"{stage.name}: steps {stage.first_step}–{stage.last_step}, ratios {dict(stage.ratios)}")
        shardings = jax.tree.map(lambda x: x.sharding, state)
        if loads_init_from(self.stages, stage.first_step, self.replace_parameters_at):
            raw = None if is_exported(stage.init_from) else False  # an exported directory holds one kind
            _, params, info = load_parameters(stage.init_from, use_ema=raw, shardings=shardings.params)
            self.log(f"{stage.name}: parameters from {info['path']} (step {info['step']}), fresh optimizer")
            fresh = jax.jit(lambda p: state_from_params(self.config, p), out_shardings=shardings)(params)
            return fresh._replace(step=state.step)
        if stage.init_from:
            self.log(
                f"{stage.name}: keeps the parameters trained so far; --replace_parameters_at={stage.name} would load "
                f"those of init_from={stage.init_from}"
            )
        if stage.first_step > 1 and self.config.optimizer.reset_at_stage:
            fresh = jax.jit(make_optimizer(self.config).init, out_shardings=shardings.opt_state)(state.params)
            return state._replace(opt_state=fresh)
        return state

    def save(self, state: TrainState, step: int, stage: Stage, counter: RatioCounter) -> None:
        """Writes the running checkpoint, and before it at a stage's end the one kept for good."""
        self.flush()
        with self.watchdog, self.goodput.cause("save"):
            ends = stage.name if ends_stage(self.stages, step) else ""
            self.checkpoints.save(step, state, self.meta(step, stage, counter), ends=ends)
        self.start_clock()

    def meta(self, step: int, stage: Stage, counter: RatioCounter) -> dict[str, Any]:
        """What a checkpoint says besides the arrays. Noise and data are functions of the seed and the step."""
        return {
            "step": step,
            "stage": stage.name,
            "seed": self.config.seed,
            "next_data_step": step + 1,
            "stages": to_json(self.stages),
            "data": self.data,
            "bad_steps": [self.bad_steps.total, self.bad_steps.in_a_row],
            "config": self.plain_config,
            "config_digest": config_digest(self.plain_config),
            "counter": counter.state(),
        }

    def after_save(self, state: TrainState, step: int, stage: Stage, *, resumed: bool = False) -> None:
        """A sample video at a stage's end, and the held-out loss; after a resume only what is not there yet."""
        sample, every = self.sample, self.config.evaluation.every
        if (
            sample
            and ends_stage(self.stages, step)
            and not (resumed and broadcast_from_main(sample.path(step, stage).exists()))
        ):
            self.sample_stage(state, step, stage)
        evaluated = resumed and broadcast_from_main(metrics_lib.last_evaluated_step(self.workdir) >= step)
        if every and step % every == 0 and not evaluated:
            self.evaluate(state, step)

    def sample_stage(self, state: TrainState, step: int, stage: Stage) -> None:
        """A sample video of the stage's EMA."""
        self.flush()
        with self.watchdog, self.goodput.cause("evaluate"):
            alone = jax.process_count() == 1
            ema = jax.device_get(state.ema) if alone else multihost_utils.process_allgather(state.ema, tiled=True)
            if is_main():
                # What one process does alone must not be laid out over the devices of all.
                with contextlib.nullcontext() if alone else jax.set_mesh(mesh_lib.local_mesh()):
                    try:
                        path, size = self.sample(ema, step, stage)
                        self.writer.video(f"sample/{stage.name}", path, size, step)
                    except (OSError, UserError) as error:  # as a full disk; the training is worth more
                        self.log(f"{stage.name}: the sample video could not be written: {error}; training goes on")
            wait_for_all("sampled")
        self.start_clock()

    def evaluate(self, state: TrainState, step: int) -> None:
        """Loss of the EMA on held-out clips."""
        self.flush()
        with self.watchdog, self.goodput.cause("evaluate"):
            if self.held_out is None:
                batches = [batch_lib.place(self.config, self.mesh, batch) for batch in self.held_out_batches]
                self.held_out = HeldOutLoss(self.config, self.network, self.mesh, batches)
            self.writer.evaluation(step, self.held_out(state.ema))
        self.start_clock()

    def start_clock(self) -> None:
        """A step's time begins: what came before (a save, an evaluation) is not part of it."""
        self.clock, self.claimed = time.perf_counter(), self.goodput.claimed()

    def flush(self) -> None:
        """Logs the pending step: waits for its metrics, checks them, writes a line every `log_every` steps."""
        if self.pending is None:
            return
        p, self.pending = self.pending, None
        step, stage, metrics, told = p["step"], p["stage"], jax.device_get(p["metrics"]), p["told"]
        self.watchdog.step_done()
        seconds = time.perf_counter() - self.clock
        if step <= self.repeated_until:
            self.goodput.add("repeat", seconds - (self.goodput.claimed() - self.claimed))
        self.start_clock()
        loss, grad_norm, skipped = float(metrics["loss"]), float(metrics["grad_norm"]), bool(metrics["skipped"])
        self.writer.records(step, told["records"], told["active"])
        message = self.bad_steps.add(skipped, step, loss, grad_norm, told["records"])
        if message:
            self.log(message)
        self.checkpoints.check()
        self.bar.update(1)
        self.bar.set_postfix_str(f"{stage.name} loss {loss:.4f} {seconds:.2f} s/step", refresh=False)
        if step % self.config.log_every and step != 1 and not ends_stage(self.stages, step):
            return
        frames, rows, columns = p["bucket"]
        batch, model = self.config.global_batch_size, self.network.config
        flops_per_second = flops.train_step_flops(model, batch, p["bucket"]) / seconds
        peak = flops.PEAK_FLOPS.get(self.mesh.devices.flat[0].device_kind)
        line = {
            "step": step,
            "stage": stage.name,
            "loss": loss,
            "loss_by_condition": metrics_lib.loss_by_condition(metrics["sample_loss"], active_rows(told["active"])),
            "loss_by_condition_set": metrics_lib.loss_by_condition_set(
                metrics["sample_loss"], active_rows(told["active"])
            ),
            "loss_by_time": metrics_lib.loss_by_time(metrics["sample_loss"], metrics["time"]),
            "active_ratio": p["ratios"][0],
            "scheduled_ratio": p["ratios"][1],
            "grad_norm": grad_norm,
            "grad_norm_by_part": {name: float(norm) for name, norm in metrics["grad_norm_by_part"].items()},
            "skipped_steps": self.bad_steps.total,
            "learning_rate": learning_rate_at(self.stages, step),
            "step_seconds": seconds,
            "data_seconds": p["data_seconds"],
            "tokens_per_second": batch * frames * rows * columns // math.prod(model.patch_size) / seconds,
            "video_seconds_per_second": batch * 4 * frames / FPS / seconds,
            "model_flops_per_second": flops_per_second,
            "memory_bytes": metrics_lib.memory_bytes(),
            "checkpoint": dict(self.checkpoints.times),
            "goodput": self.goodput.report(),
        }
        if peak:
            line["mfu"] = flops_per_second / (peak * self.mesh.size)
        self.writer.step(line, stage.ratios)

    def close(self) -> None:
        """Finishes the saves under way and closes the logs."""
        with contextlib.ExitStack() as last:  # all of them, whatever one raises
            for held_open in (self.bar, self.writer, self.checkpoints, self.profile, self.watchdog):
                last.callback(held_open.close)


def active_rows(active: list[list[str]]) -> np.ndarray:
    """Condition names per global row -> bool (B, conditions)."""
    return np.stack([conditions.row(names) for names in active])
