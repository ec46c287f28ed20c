"""Breakdown of the wall time of a run: useful steps, and the rest by cause."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

CAUSES = ("start", "compile", "data", "save", "evaluate", "repeat")


class Goodput:
    """Wall seconds of this process by cause; unclaimed time counts as useful steps.

    Args:
      started: `time.time()` of the process's start; the time up to now counts as "start" (imports, restoring).
    """

    def __init__(self, started: float):
        self._started = started
        self.seconds = dict.fromkeys(CAUSES, 0.0)
        self.seconds["start"] = time.time() - started

    @contextmanager
    def cause(self, name: str) -> Iterator[None]:
        """Attributes the time spent in the block to a cause."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def claimed(self) -> float:
        """Seconds attributed to causes so far."""
        return sum(self.seconds.values())

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds that were measured elsewhere, such as a step repeated after a restart ("repeat")."""
        self.seconds[name] += max(0.0, seconds)

    def report(self) -> dict[str, float]:
        """Share of the wall time of `useful` steps and of each cause."""
        wall = max(time.time() - self._started, 1e-9)
        shares = {name: seconds / wall for name, seconds in self.seconds.items()}
        return {"useful": max(0.0, 1.0 - sum(shares.values())), **shares}
