"""What the training loop needs of what it trains (see `training.tasks`), and what it calls around a step."""

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
    """A step dispatched to the devices, with its metrics there.

    Attributes:
      state: the state after it; the next step takes its buffers.
      stopping: whether the run stops after it: the time left before a kill is for saving.
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
        """Called when a step has been dispatched to the devices."""

    def after_restore(self, step: int, state: Any) -> None:
        """Called when a run continues after `step`: does what the stop skipped."""

    def close(self) -> None:
        """Called when the run ends."""


class Task(Protocol):
    """A model, its data and its step. Batches and noise are functions of the seed and the step alone.

    Attributes:
      mesh: of the devices; the loop calls everything inside `jax.set_mesh(mesh)`.
      stages: rows of the stage table in use; `restore` may change it.
      saved: what a checkpoint restores, for the log.
    """

    mesh: Mesh
    stages: Sequence[Span]
    saved: str

    def digests(self) -> dict[str, str]:
        """Name -> hex digest of what must be the same in all processes in addition to the config; one is "data set"."""

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state."""

    def init_state(self) -> State:
        """The state before step 1."""

    def check_saved(self, saved: Mapping[str, Any], config: ConfigDict, path: Path) -> None:
        """Raises UserError where a checkpoint's config is of another model than the run's."""

    def meta(self) -> dict[str, Any]:
        """Plain JSON that a checkpoint holds in addition to the state."""

    def restore(self, meta: Mapping[str, Any]) -> list[str]:
        """Continues after a checkpoint with this `meta`; returns lines about what changes from there on."""

    def enter_stage(self, state: State, step: int, log: Callable[[str], None]) -> State:
        """The state that the stage beginning with `step` starts from."""

    def batches(self, first_step: int) -> Iterator[Any]:
        """This process's rows of the batches of steps first_step, first_step + 1, … on the host."""

    def train_step(self, step: int) -> Any:
        """The jitted (state, *arguments) -> (state, metrics) of a step, the state donated.

        Metrics hold at least `loss`, `grad_norm` and `skipped`, scalars that are alike in all processes.
        """

    def arguments(self, step: int, batch: Any) -> tuple[Any, ...]:
        """The arguments of a step after the state, on the devices."""

    def describe(self, step: int, batch: Any) -> dict[str, Any]:
        """`records` (record ids of the global rows of a step) and what else `log_line` needs; called once a step.

        `active` (condition names of every row) is for data_log.jsonl, `target_ratio` for TensorBoard.
        """

    def log_line(self, step: int, described: Mapping[str, Any], metrics: Any, seconds: float) -> dict[str, Any]:
        """The task's own fields of a line of metrics.jsonl."""

    def hooks(self, run: Any) -> list[Hook]:
        """What happens every so many steps of a `run.Run`, in this order, after the checkpoint of the step."""

    def finish(self, state: State) -> None:
        """Called when the last step is done and saved."""
