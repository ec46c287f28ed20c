"""Runtime faults that the config does not cause: signals, stalls and non-finite steps."""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from omnihuman_jax.errors import UserError

STALLED = 3  # exit status after the watchdog ends a run


class StopSignal:
    """Turns SIGTERM (also sent on preemption) and the first Ctrl-C into a flag to stop after the current step."""

    def __init__(self):
        self.name = ""
        self._before = {}

    def __enter__(self) -> "StopSignal":
        # Only the main thread may set handlers; elsewhere (tests, notebooks) the handlers stay unchanged.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _caught(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


class Watchdog:
    """Ends the process if no step finishes for `seconds`: stack traces of all threads on stderr, exit status 3.

    Python cannot interrupt a stalled collective or file system, but a job that exits is restarted.

    Args:
      seconds: longest time between two `step_done` calls; 0 disables the watchdog.
      last_good: returns the newest checkpoint for the message.
    """

    def __init__(self, seconds: float, last_good):
        self._seconds, self._last_good = seconds, last_good
        self._alive, self._paused = time.monotonic(), 0
        self._closed = threading.Event()

    def start(self) -> None:
        """Starts watching."""
        self.step_done()
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step_done(self) -> None:
        """Restarts the clock."""
        self._alive = time.monotonic()

    def __enter__(self) -> "Watchdog":
        """Pauses the clock in this block: compiling, restoring and sampling have no fixed duration."""
        self._paused += 1
        return self

    def __exit__(self, *_) -> None:
        self._alive = time.monotonic()
        self._paused -= 1

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            still = time.monotonic() - self._alive
            if not self._paused and still > self._seconds:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                print(
                    f"error: no step has finished for {still:.0f} s (faults.watchdog_seconds={self._seconds:g}); "
                    f"stack traces are above; the last checkpoint is {self._last_good()}; start the same command again "
                    f"to continue",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STALLED)


class BadSteps:
    """Counts steps skipped because the loss, the gradient or the resulting state was not finite.

    Checkpoints hold `total` and `in_a_row`, so counting continues after a restart.

    Args:
      limit: number of consecutive skipped steps that ends the run.
      last_good: returns the newest checkpoint for the message.
    """

    def __init__(self, limit: int, last_good):
        self._limit, self._last_good = limit, last_good
        self.total, self.in_a_row = 0, 0

    def add(self, bad: bool, step: int, loss: float, grad_norm: float, records: Sequence[str]) -> str:
        """Counts a step; returns the message to log, "" if the step is finite.

        Raises:
          UserError: the limit is reached.
        """
        if not bad:
            self.in_a_row = 0
            return ""
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        message = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            message += ", but the new parameters, moments or EMA are not finite"
        message += f"; records {', '.join(records)}"
        if self.in_a_row >= self._limit:
            raise UserError(
                f"{message}; {self.in_a_row} steps in a row were not finite (faults.max_bad_steps={self._limit}); the "
                f"last good checkpoint is {self._last_good()}; look at these records, or lower the learning rate"
            )
        return f"{message}; skipped ({self.in_a_row} in a row, {self.total} since the start)"
