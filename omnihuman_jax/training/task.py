"""Interfaces of the training loop: the task that it trains (see `training.tasks`) and hooks around each step."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnihuman_jax.training.stages import Span

State = Any  # NamedTuple of pytrees of arrays


@dataclasses.dataclass(frozen=True)
class StepDone:
    """A step dispatched to the devices, with its metrics still on them.

    Attributes:
      state: the state after the step; the next step donates its buffers.
      stopping: whether the run stops after the step, so that the time left before a kill is used for saving.
    """

    step: int
    state: Any
    metrics: Any
    stopping: bool


class Hook:
    """Called around every step, in all processes; does nothing by default."""

    def before_step(self, step: int) -> None:
        """Called before the batch of a step is read."""

    def after_step(self, done: StepDone) -> None:
        """Called after a step has been dispatched to the devices."""

    def after_restore(self, step: int, state: Any) -> None:
        """Called when a run continues after `step`, to do what the stop skipped."""

    def close(self) -> None:
        """Called when the run ends."""


class Task(Protocol):
    """A model with its data and train step. Batches and noise depend only on the seed and the step.

    Attributes:
      mesh: device mesh; the loop calls everything inside `jax.set_mesh(mesh)`.
      stages: rows of the stage table in use; `restore` may change it.
      saved: contents of a checkpoint, for the log.
    """

    mesh: Mesh
    stages: Sequence[Span]
    saved: str

    def digests(self) -> dict[str, str]:
        """Name -> hex digest of whatever, besides the config, must be equal in all processes; one is "data set"."""

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state."""

    def init_state(self) -> State:
        """The state before step 1."""

    def check_saved(self, saved: Mapping[str, Any], config: ConfigDict, path: Path) -> None:
        """Raises UserError if the config of a checkpoint describes a different model."""

    def meta(self) -> dict[str, Any]:
        """Plain JSON that is saved with the state."""

    def restore(self, meta: Mapping[str, Any]) -> list[str]:
        """Continues from a checkpoint with this `meta`; returns log lines about changes from there on."""

    def enter_stage(self, state: State, step: int, log: Callable[[str], None]) -> State:
        """The initial state of the stage that begins at `step`."""

    def batches(self, first_step: int) -> Iterator[Any]:
        """Host arrays with the rows of this process, for the batches of steps first_step, first_step + 1, …"""

    def train_step(self, step: int) -> Any:
        """The jitted (state, *arguments) -> (state, metrics) of a step, with the state donated.

        Metrics hold at least the scalars `loss`, `grad_norm` and `skipped`, equal in all processes.
        """

    def arguments(self, step: int, batch: Any) -> tuple[Any, ...]:
        """The arguments of a step after the state, on the devices."""

    def describe(self, step: int, batch: Any) -> dict[str, Any]:
        """`records` (record ids of the global rows of a step) and other inputs of `log_line`; called once per step.

        `active` (condition names of every row) goes to data_log.jsonl, `target_ratio` to TensorBoard.
        """

    def log_line(self, step: int, described: Mapping[str, Any], metrics: Any, seconds: float) -> dict[str, Any]:
        """Task-specific fields of a line of metrics.jsonl."""

    def hooks(self, run: Any) -> list[Hook]:
        """Hooks of a `run.Run`, called in this order after the checkpoint hook."""

    def finish(self, state: State) -> None:
        """Called after the last step is done and saved."""
