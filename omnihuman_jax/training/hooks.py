"""Hooks that run around the training steps: saves, evaluations, profiles."""

import pathlib
import tempfile
from typing import Any

import jax

from omnihuman_jax import stores
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding.processes import broadcast_from_main, log
from omnihuman_jax.stores import AnyPath
from omnihuman_jax.training.run import Run
from omnihuman_jax.training.run_config import config_digest
from omnihuman_jax.training.stages import ends_stage, stage_at
from omnihuman_jax.training.task import Hook, StepDone


class Save(Hook):
    """Saves a checkpoint every `checkpoint.every` steps, at the end of a stage and before a stop."""

    def __init__(self, run: Run):
        self._run = run

    def after_step(self, done: StepDone) -> None:
        """Saves in the background."""
        run, ends = self._run, ends_stage(self._run.task.stages, done.step)
        if not (ends or done.stopping or run.checkpoints.due(done.step)):
            return
        stage = stage_at(run.task.stages, done.step).name
        with run.aside("save"):
            meta = {
                "step": done.step,
                "stage": stage,
                "seed": run.config.seed,
                "next_data_step": done.step + 1,
                "data": run.data,
                "bad_steps": [run.bad_steps.total, run.bad_steps.in_a_row],
                "config": run.plain_config,
                "config_digest": config_digest(run.plain_config),
            }
            run.writer.sync()  # or a run continued from this checkpoint could lack lines of the steps before it
            run.checkpoints.save(done.step, done.state, meta | run.task.meta(), ends=stage if ends else "")


class Evaluation(Hook):
    """Evaluates the state after certain steps; an evaluation skipped by a stop runs at the next start."""

    def __init__(self, run: Run):
        self.run = run

    def due(self, step: int) -> bool:
        """Whether to evaluate after a step."""
        raise NotImplementedError

    def is_there(self, step: int) -> bool:
        """Whether the run directory holds the result for a step."""
        raise NotImplementedError

    def evaluate(self, step: int, state: Any) -> None:
        """Evaluates; the watchdog and the step clock are paused."""
        raise NotImplementedError

    def after_step(self, done: StepDone) -> None:
        """Evaluates if due."""
        if self.due(done.step) and not done.stopping:
            with self.run.aside("evaluate"):
                self.evaluate(done.step, done.state)

    def after_restore(self, step: int, state: Any) -> None:
        """Evaluates if due and if the result is missing."""
        if self.due(step) and not broadcast_from_main(self.is_there(step)):
            with self.run.aside("evaluate"):
                self.evaluate(step, state)


class Profile(Hook):
    """Writes a JAX profiler trace of some steps to `workdir/profile`, for TensorBoard or Perfetto.

    `steps` is "FIRST:LAST", or "" for none; raises UserError for any other form.
    """

    def __init__(self, steps: str, workdir: AnyPath):
        self._first = self._last = 0
        self._folder, self._running = workdir / "profile", False
        # The profiler writes files; those of a run in an object store are uploaded at the end.
        self._local = tempfile.TemporaryDirectory() if steps and stores.is_remote(workdir) else None
        if steps:
            parts = steps.split(":")
            if len(parts) != 2 or not all(part.isdigit() for part in parts) or not 1 <= int(parts[0]) <= int(parts[1]):
                raise UserError(f"profile.steps={steps!r}: give FIRST:LAST, such as 20:25")
            self._first, self._last = int(parts[0]), int(parts[1])

    def before_step(self, step: int) -> None:
        """Starts the trace at its first step."""
        if step == self._first:
            jax.profiler.start_trace(self._local.name if self._local else str(self._folder))
            self._running = True

    def after_step(self, done: StepDone) -> None:
        """Ends the trace after its last step."""
        if self._running and done.step >= self._last:
            jax.block_until_ready(done.metrics)
            self.close()

    def close(self) -> None:
        """Ends a running trace."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            if self._local:
                try:
                    stores.upload(pathlib.Path(self._local.name), self._folder)
                except OSError as error:
                    log(f"{self._folder}: the trace could not be uploaded ({error.strerror}); training goes on")
