"""Hooks that every run has, or builds on: saves and evaluations."""

from typing import Any

from omnihuman_jax.sharding.processes import broadcast_from_main
from omnihuman_jax.training.hooks import Hook, StepDone
from omnihuman_jax.training.run import Run
from omnihuman_jax.training.run_config import config_digest
from omnihuman_jax.training.stages import ends_stage, stage_at


class Save(Hook):
    """Checkpoints: every `checkpoint.every` steps, at a stage's end and before a stop."""

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
            run.checkpoints.save(done.step, done.state, meta | run.task.meta(), ends=stage if ends else "")


class Evaluation(Hook):
    """Looks at the state of some steps, but for the last one before a stop, which the next start makes up for."""

    def __init__(self, run: Run):
        self.run = run

    def due(self, step: int) -> bool:
        """Whether there is something to do after a step."""
        raise NotImplementedError

    def is_there(self, step: int) -> bool:
        """Whether it has been done after a step, as far as the run directory tells."""
        raise NotImplementedError

    def evaluate(self, step: int, state: Any) -> None:
        """Does it; the watchdog and the clock of the steps stand still."""
        raise NotImplementedError

    def after_step(self, done: StepDone) -> None:
        """Evaluates where it is due."""
        if self.due(done.step) and not done.stopping:
            with self.run.aside("evaluate"):
                self.evaluate(done.step, done.state)

    def after_restore(self, step: int, state: Any) -> None:
        """Evaluates where it is due and not there."""
        if self.due(step) and not broadcast_from_main(self.is_there(step)):
            with self.run.aside("evaluate"):
                self.evaluate(step, state)
