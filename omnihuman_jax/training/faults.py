"""What can go wrong while training and is not the fault of the config: signals, stalls, steps that are not finite."""

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

STALLED = 3  # exit status of a run that the watchdog ended


class StopSignal:
    """Turns SIGTERM, which a preemption notice sends too, and the first Ctrl-C into a flag to stop at the next step."""

    def __init__(self):
        self.name = ""
        self._before = {}

    def __enter__(self) -> "StopSignal":
        # Only the main thread may set handlers; elsewhere (tests, notebooks) signals keep their meaning.
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
    """Ends the process when no step has finished for `seconds`: stacks of all threads on stderr, exit status 3.

    A stalled collective or file system cannot be interrupted from Python, and a job that ends is restarted.

    Args:
      seconds: longest time between two `step_done`; 0 switches the watchdog off.
      last_good: called for the message; names the newest checkpoint.
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
        """Starts the clock again."""
        self._alive = time.monotonic()

    def __enter__(self) -> "Watchdog":
        """Within this block the clock stands still: compiling, restoring and sampling have no fixed length."""
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
                    f"stacks are above; the last checkpoint is {self._last_good()}; start the same command again to "
                    f"continue",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STALLED)


class BadSteps:
    """Counts the steps that were skipped because they were not finite: loss, gradient or what they would have left.

    `total` and `in_a_row` are part of the checkpoint, so that a restart goes on counting.

    Args:
      limit: that many in a row end the run.
      last_good: called for the message; names the newest checkpoint.
    """

    def __init__(self, limit: int, last_good):
        self._limit, self._last_good = limit, last_good
        self.total, self.in_a_row = 0, 0

    def add(self, bad: bool, step: int, loss: float, grad_norm: float, records: Sequence[str]) -> str:
        """Counts a step; returns the message to log, "" for a good one.

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
