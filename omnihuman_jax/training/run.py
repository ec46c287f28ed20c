"""Resources of one start of a training run: checkpoints, logs, watchdog, hooks."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from omnihuman_jax.checkpoints.manager import Checkpoints
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding.processes import StopConsensus, compile_together, is_main
from omnihuman_jax.stores import AnyPath
from omnihuman_jax.training.faults import BadSteps, StopSignal, Watchdog
from omnihuman_jax.training.goodput import Goodput
from omnihuman_jax.training.log_files import MetricsWriter, last_step_in
from omnihuman_jax.training.metrics import memory_bytes
from omnihuman_jax.training.stages import ends_stage, last_steps, stage_at
from omnihuman_jax.training.task import Hook, Task


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step in flight, with its metrics once the devices have computed them."""

    step: int
    metrics: Any
    described: dict[str, Any]
    data_seconds: float


class Run:
    """One start of a run, in one of its processes.

    Args:
      task: what is trained.
      config: resolved config; uses seed, data.log_records, checkpoint, faults, profile and log_every.
      plain_config: the same as plain JSON types.
      workdir: run directory, also in an object store.
      stop: the stop flag.
      started: `time.time()` of the process's start.
    """

    def __init__(
        self,
        task: Task,
        config: ConfigDict,
        plain_config: dict[str, Any],
        workdir: AnyPath,
        stop: StopSignal,
        started: float,
    ):
        self.task, self.config, self.plain_config = task, config, plain_config
        self.workdir, self.stop, self.goodput = workdir, stop, Goodput(started)
        self.data = task.digests()["data set"]
        self.bar = tqdm(disable=True)
        self.checkpoints = Checkpoints(workdir, **config.checkpoint, stages=last_steps(task.stages), log=self.log)
        last_good = self.checkpoints.last_good
        self.watchdog = Watchdog(config.faults.watchdog_seconds, last_good)
        self.bad_steps = BadSteps(config.faults.max_bad_steps, last_good)
        self.writer = MetricsWriter(workdir, log_records=config.data.log_records, enabled=is_main(), log=self.log)
        self.stop_consensus = StopConsensus(task.mesh)
        self.hooks: list[Hook] = []
        self._pending: Pending | None = None
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._repeated_until, self._clock, self._claimed = 0, 0.0, 0.0

    @property
    def last_step(self) -> int:
        """Last step of the last stage."""
        return self.task.stages[-1].last_step

    def log(self, message: str) -> None:
        """Logs a line above the progress bar, in process 0 only; a failed write does not stop the run."""
        if is_main():
            with contextlib.suppress(OSError):  # stdout may be a file on a full disk
                self.bar.write(message)

    def restore_counters(self, meta: dict[str, Any], path: AnyPath) -> None:
        """Restores the checkpoint contents other than arrays; logs the checkpoint and what changes."""
        done, lines = meta["step"], self.task.restore(meta)
        self.checkpoints.end_stages(last_steps(self.task.stages))
        self._repeated_until = last_step_in(self.workdir / "metrics.jsonl")
        self.log(
            f"continuing {self.workdir} after step {done} of {self.last_step}, in {meta['stage']}: {self.task.saved} "
            f"from {path}; {max(0, self._repeated_until - done)} logged steps will be repeated; {jax.process_count()} "
            f"process(es), mesh {dict(self.task.mesh.shape)}"
        )
        self.bad_steps.total, self.bad_steps.in_a_row = meta.get("bad_steps", (0, 0))
        for line in lines:
            self.log(line)
        if meta.get("data") != self.data:
            self.log("the data set differs from the one the checkpoint was trained on: records may repeat or be missed")

    def show_progress(self, done: int) -> None:
        """Opens the progress bar."""
        options = {"unit": "step", "dynamic_ncols": True, "mininterval": 1.0, "disable": not is_main()}
        self.bar = tqdm(total=self.last_step, initial=done, **options)

    def dispatch(self, step: int, state: Any, batch: Any) -> tuple[Any, Any]:
        """Starts a step on the devices; the first step of each shape compiles before this returns."""
        function, arguments = self.task.train_step(step), (state, *self.task.arguments(step, batch))
        leaves, structure = jax.tree.flatten(arguments[1:])
        key = (function, structure, *(x.shape for x in leaves))
        if key not in self._compiled:
            with self.watchdog, self.goodput.cause("compile"):
                self._compiled[key] = compile_together(function, *arguments)
        return self._compiled[key](*arguments)

    def log_later(self, step: int, metrics: Any, described: dict[str, Any], data_seconds: float) -> None:
        """Logs the previous step and keeps this one for the next call, so the host never stalls the devices."""
        self.flush()
        self._pending = Pending(step, metrics, described, data_seconds)

    def flush(self) -> None:
        """Waits for the metrics of the step in flight and checks them; writes a line every `log_every` steps.

        Raises:
          UserError: too many steps in a row were not finite, or a save failed that other processes wait for.
        """
        if self._pending is None:
            return
        p, self._pending = self._pending, None
        metrics, stage = jax.device_get(p.metrics), stage_at(self.task.stages, p.step)
        self.watchdog.step_done()
        seconds = time.perf_counter() - self._clock
        if p.step <= self._repeated_until:
            self.goodput.add("repeat", seconds - (self.goodput.claimed() - self._claimed))
        self.start_clock()
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        self.writer.records(p.step, p.described)
        message = self.bad_steps.add(bool(metrics["skipped"]), p.step, loss, grad_norm, p.described["records"])
        if message:
            self.log(message)
        self.checkpoints.check()
        with contextlib.suppress(OSError):
            self.bar.update(1)
            self.bar.set_postfix_str(f"{stage.name} loss {loss:.4f} {seconds:.2f} s/step", refresh=False)
        if p.step % self.config.log_every and p.step != 1 and not ends_stage(self.task.stages, p.step):
            return
        line = {
            "step": p.step,
            "stage": stage.name,
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped_steps": self.bad_steps.total,
            "step_seconds": seconds,
            "data_seconds": p.data_seconds,
            "memory_bytes": memory_bytes(),
            "checkpoint": dict(self.checkpoints.times),
            "goodput": self.goodput.report(),
        }
        line |= self.task.log_line(p.step, p.described, metrics, seconds)
        self.writer.step(line, p.described.get("target_ratio", {}))

    def start_clock(self) -> None:
        """Starts timing a step; earlier work (a save, an evaluation) is excluded."""
        self._clock, self._claimed = time.perf_counter(), self.goodput.claimed()

    @contextlib.contextmanager
    def aside(self, cause: str) -> Iterator[None]:
        """For work other than training: logs the step in flight, then pauses the watchdog and the step clock."""
        self.flush()
        with self.watchdog, self.goodput.cause(cause):
            yield
        self.start_clock()

    def finish_saves(self, done: int) -> None:
        """Logs the last step and waits for pending saves.

        Raises:
          UserError: a checkpoint could not be written and is still missing.
        """
        self.flush()
        with self.watchdog:
            self.checkpoints.wait()
            self.checkpoints.mend_stages(done)
        if self.checkpoints.failed:
            raise UserError(
                f"{self.checkpoints.failed}; the last complete one is {self.checkpoints.last_good()}; make room and "
                f"start the same command again: it continues from there"
            )

    def close(self) -> None:
        """Finishes pending saves and closes the logs."""
        with contextlib.ExitStack() as last:  # closes all, even if one raises
            for held_open in (self.bar, self.writer, self.checkpoints, *self.hooks, self.watchdog):
                last.callback(held_open.close)
