"""The protocol of what happens every so many steps beside training: saves, evaluations, profiles."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class StepDone:
    """A step that has been started on the devices.

    Attributes:
      step: its number.
      state: the state after it; the next step takes its buffers.
      metrics: of the step, on the devices.
      stopping: whether the run stops with it: the time that is left before a kill is for saving.
    """

    step: int
    state: Any
    metrics: Any
    stopping: bool


class Hook:
    """Called around every step, in all processes. By itself it does nothing."""

    def before_step(self, step: int) -> None:
        """Called before the batch of a step is read."""

    def after_step(self, done: StepDone) -> None:
        """Called when a step has been started on the devices."""

    def after_restore(self, step: int, state: Any) -> None:
        """Called when a run continues after `step`: makes up for what a stop has left out."""

    def close(self) -> None:
        """Called when the run ends."""
