"""Reads batches ahead with Grain's threads and passes their errors on to the training loop."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
from absl import logging

from data_pipelines.input_pipeline.batches import Batches
from omnihuman_jax.errors import UserError


class _Read:
    """Makes the batch of a step in one of Grain's threads.

    Returns errors instead of raising them, because Grain adds lines to the messages of raised errors.
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
        # A library that calls sys.exit in a thread must not end the run as if it had finished.
        except BaseException as error:
            logging.exception("making the batch of step %d failed", step)
            return _caused(
                error,
                f"the batch of step {step} cannot be made ({_describe(error)}; traceback above); prepare the data "
                f"again if a record is at fault; the run continues from its last checkpoint",
            )


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _caused(cause: BaseException, message: str) -> UserError:
    error = UserError(message)
    error.__cause__ = cause
    return error


class _Loader(Iterator[dict[str, Any]]):
    """Grain's iterator. After an error it raises that error again, so that no step is skipped silently.

    If a reading thread dies silently, Grain waits forever and `training.faults.Watchdog` ends the run.
    """

    def __init__(self, source: grain.DatasetIterator):
        self._source = source
        self._error: UserError | None = None

    def __next__(self) -> dict[str, Any]:
        if self._error is None:
            try:
                batch = next(self._source)
            except StopIteration:
                raise
            except Exception as error:  # noqa: BLE001 (from Grain itself: `_Read` returns its errors)
                message = f"reading ahead has ended ({_describe(error)}); the run continues from its last checkpoint"
                batch = _caused(error, message)
            if not isinstance(batch, UserError):
                return batch
            self._error = batch
            self._source.close()
        raise self._error


def make_dataset(
    read: Callable[[int], Any], start_step: int, num_steps: int, threads: int = 2, prefetch: int = 4
) -> grain.IterDataset:
    """Grain data set of `read(step)` for `num_steps` steps; `threads` and `prefetch` (batches) affect only speed."""
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
    """Iterator over the batches of the steps.

    Args:
      num_steps: number of steps; default: to the end of the last stage.
      rows: the global rows that this host reads.
      reading: `threads` and `prefetch` of `make_dataset`.

    Raises (from `next`):
      UserError: a batch cannot be made; every later call raises it again.
    """
    if num_steps is None:
        num_steps = max(batches.schedule.num_steps - start_step + 1, 0)
    return _Loader(iter(make_dataset(_Read(batches, rows), start_step, num_steps, **reading)))
