"""Batches in the order of the steps, with Grain reading ahead in threads whose failures reach the training loop."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import logging

from data_pipelines.input_pipeline.batches import Batches
from omnihuman_jax.errors import UserError


class _Read:
    """Makes the batch of a step, in one of Grain's threads, or the error that the loop is to raise.

    It is returned, not raised, because Grain writes lines of its own into the messages of errors that pass it.
    """

    def __init__(self, batches: Batches, rows: slice):
        self._batches, self._rows = batches, rows

    def __call__(self, step: int) -> dict[str, Any] | UserError:
        try:
            return self._batches.batch(int(step), self._rows)
        except UserError as error:
            return error
        except MemoryError as error:
            return _caused(
                error,
                f"the batch of step {step} did not fit into host memory; lower data.cache_mb or run fewer processes on "
                f"this host; the run continues from its last checkpoint",
            )
        # A library that calls sys.exit in a thread must not end the run as if it were done.
        except BaseException as error:
            logging.exception("making the batch of step %d failed", step)
            return _caused(
                error,
                f"the batch of step {step} cannot be made ({_told(error)}; traceback above); prepare the data again if "
                f"a record is at fault; the run continues from its last checkpoint",
            )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _caused(cause: BaseException, message: str) -> UserError:
    error = UserError(message)
    error.__cause__ = cause
    return error


class _Loader(Iterator[dict[str, Any]]):
    """Grain's iterator, which after an error gives nothing more: the step that failed would be left out unseen.

    Should a reading thread ever die without a word, Grain waits for its batch for ever; `training.faults.Watchdog` ends
    the run then, as it does where a file system hangs.
    """

    def __init__(self, given: grain.DatasetIterator):
        self._given = given
        self._error: UserError | None = None

    def __next__(self) -> dict[str, Any]:
        if self._error is None:
            try:
                batch = next(self._given)
            except StopIteration:
                raise
            except Exception as error:  # noqa: BLE001 (of Grain's own threads: those of `_Read` are returned)
                message = f"reading ahead has ended ({_told(error)}); the run continues from its last checkpoint"
                batch = _caused(error, message)
            if not isinstance(batch, UserError):
                return batch
            self._error = batch
            self._given.close()
        raise self._error

    def get_state(self) -> dict[str, Any]:
        """One integer: the steps already given."""
        return self._given.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the steps that `state` had given."""
        self._given.set_state(state)


def make_dataset(
    read: Callable[[int], Any], start_step: int, num_steps: int, threads: int = 2, prefetch: int = 4
) -> grain.IterDataset:
    """The batches of `num_steps` steps from `start_step` on, as a Grain data set.

    Args:
      read: makes the batch of a step.
      threads, prefetch: reading threads and batches made ahead; both only change the speed.
    """
    steps = grain.MapDataset.range(start_step, start_step + num_steps).map(read)
    return steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))


def make_loader(
    batches: Batches,
    *,
    start_step: int = 1,
    num_steps: int | None = None,
    rows: slice = slice(None),
    **reading: int,
) -> Iterator[dict[str, Any]]:
    """Iterator over the batches of the steps; its get_state() and set_state() hold one integer, the steps given.

    Args:
      start_step, num_steps: from which step and how many, by default to the end of the last stage.
      rows: the global rows that this host reads.
      reading: `threads` and `prefetch` of `make_dataset`.

    Raises (from `next`):
      UserError: a batch that cannot be made; the loader is at its end then.
    """
    if num_steps is None:
        num_steps = max(batches.schedule.num_steps - start_step + 1, 0)
    return _Loader(iter(make_dataset(_Read(batches, rows), start_step, num_steps, **reading)))
