"""The training loop: restore → next batch → step → log → save → evaluate, through every stage.

All processes of a run execute it identically; only process 0 writes logs. Batch, noise and stage are functions of the
step, so resuming needs only the train state and a step number.
"""

import contextlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from omnihuman_jax.sharding.processes import check_same_on_all, is_main
from omnihuman_jax.stores import AnyPath
from omnihuman_jax.training.faults import StopSignal
from omnihuman_jax.training.hooks import Profile, Save
from omnihuman_jax.training.run import Run
from omnihuman_jax.training.run_config import shared_digest, write_config
from omnihuman_jax.training.stages import begins_stage
from omnihuman_jax.training.task import State, StepDone, Task


def train(
    task: Task, config: ConfigDict, plain_config: dict[str, Any], workdir: AnyPath, *, started: float | None = None
) -> None:
    """Trains through the stages of a task; a second call with the same workdir continues the run.

    After SIGTERM or one Ctrl-C, all processes finish the same step, save and return.

    Args:
      task: what is trained.
      config: resolved config.
      plain_config: the same as plain JSON types, stored in config.json and in every checkpoint.
      workdir: run directory, also in an object store.
      started: `time.time()` of the process's start, for goodput.

    Raises:
      UserError: a bad config or bad checkpoints in `workdir`; too many non-finite steps in a row; the last checkpoint
        or that of a stage could not be written.
    """
    with jax.set_mesh(task.mesh), StopSignal() as stop:
        run = Run(task, config, plain_config, workdir, stop, started or time.time())
        try:
            run.hooks += [Save(run), *task.hooks(run), Profile(config.profile.steps, workdir)]
            _train(run)
        except BaseException:
            with contextlib.suppress(Exception):  # report the first error
                run.close()
            raise
        run.close()


def _train(run: Run) -> None:
    state, done = _restore(run)
    if done >= run.last_step:
        run.finish_saves(done)
        run.log(f"{run.workdir}: all {done} steps are done; nothing to train")
    else:
        run.show_progress(done)
        state = _steps(run, state, done)
        if state is None:
            return
        run.finish_saves(run.last_step)
    with run.aside("evaluate"):
        run.task.finish(state)


def _restore(run: Run) -> tuple[State, int]:
    """The state to continue from, and the number of completed steps."""
    run.watchdog.start()
    with run.watchdog:
        for what, digest in (run.task.digests() | {"config": shared_digest(run.plain_config)}).items():
            check_same_on_all(what, digest)
        restored = run.checkpoints.restore_latest(run.task.abstract_state(), run.config, run.task.check_saved)
        if restored:
            state, done = restored.state, restored.meta["step"]
            run.restore_counters(restored.meta, restored.path)
        else:
            state, done = run.task.init_state(), 0
    if is_main():
        write_config(run.workdir, run.plain_config, restored.meta["config"] if restored else None)
    with run.watchdog:
        run.checkpoints.mend_stages(done)
    if restored and done <= run.last_step:
        for hook in run.hooks:
            hook.after_restore(done, state)
    return state, done


def _steps(run: Run, state: State, done: int) -> State | None:
    """Runs steps done + 1 … last; returns the last state, or None after a stop."""
    task, last = run.task, run.last_step
    batches = task.batches(done + 1)
    run.start_clock()
    for step in range(done + 1, last + 1):
        if begins_stage(task.stages, step):
            with run.watchdog:
                state = task.enter_stage(state, step, run.log)
        for hook in run.hooks:
            hook.before_step(step)
        waited = time.perf_counter()
        with run.goodput.cause("data"):
            batch = next(batches)
        waited = time.perf_counter() - waited
        state, metrics = run.dispatch(step, state, batch)
        run.log_later(step, metrics, task.describe(step, batch), waited)
        stopping = run.stop_consensus.reached(bool(run.stop.name))
        for hook in run.hooks:
            hook.after_step(StepDone(step, state, metrics, stopping))
        if stopping:
            run.finish_saves(step)
            run.log(
                f"stopped by {run.stop.name or 'another process'} after step {step} of {last}, saved in "
                f"{run.checkpoints.last_good()}; start the same command again to continue"
            )
            return None
    return state
