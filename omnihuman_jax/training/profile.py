"""A JAX profiler trace of some steps, for TensorBoard or Perfetto."""

from pathlib import Path

import jax

from omnihuman_jax.errors import UserError
from omnihuman_jax.training.hooks import Hook, StepDone


class Profile(Hook):
    """Traces the steps of `profile.steps` into `workdir/profile`.

    Args:
      steps: "FIRST:LAST", or "" for none.
      workdir: run directory.

    Raises:
      UserError: another form.
    """

    def __init__(self, steps: str, workdir: Path):
        self._first = self._last = 0
        self._folder, self._running = workdir / "profile", False
        if steps:
            parts = steps.split(":")
            if len(parts) != 2 or not all(part.isdigit() for part in parts) or not 1 <= int(parts[0]) <= int(parts[1]):
                raise UserError(f"profile.steps={steps!r}: give FIRST:LAST, as 20:25")
            self._first, self._last = int(parts[0]), int(parts[1])

    def before_step(self, step: int) -> None:
        """Starts the trace at its first step."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after_step(self, done: StepDone) -> None:
        """Ends the trace when its last step is done."""
        if self._running and done.step >= self._last:
            jax.block_until_ready(done.metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
