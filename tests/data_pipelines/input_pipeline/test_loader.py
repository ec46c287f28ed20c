"""A failure in a reading thread ends the run with a line that says where; nothing waits for ever."""

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from data_pipelines.input_pipeline.loader import make_loader
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.faults import STALLED


class Steps:
    """Batches that hold their step; some steps do something else."""

    class schedule:  # noqa: N801
        num_steps = 12

    def __init__(self, trouble=None):
        self.trouble, self.made = trouble or {}, []

    def batch(self, step, rows=slice(None)):
        self.made.append(step)
        if step in self.trouble:
            self.trouble[step]()
        return {"step": np.full(2, step)}


def _raising(error):
    def trouble():
        raise error

    return trouble


def _steps(loader):
    return [int(batch["step"][0]) for batch in loader]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("keypoints"), r"the batch of step 5 cannot be made \(KeyError: 'keypoints'; traceback above\)"),
        (MemoryError(), r"the batch of step 5 did not fit into host memory; lower data.cache_mb"),
        (SystemExit(0), r"the batch of step 5 cannot be made \(SystemExit: 0; .*last checkpoint"),
        (StopIteration(), r"the batch of step 5 cannot be made \(StopIteration"),
        (UserError("record a/0001 cannot be read"), r"^record a/0001 cannot be read$"),
    ],
)
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_whatever_a_reading_thread_raises_reaches_the_loop(error, told, threads):
    loader, given = make_loader(Steps({5: _raising(error)}), threads=threads), []
    with pytest.raises(UserError, match=told) as raised:
        given.extend(next(loader)["step"][0] for _ in range(12))
    assert "\n" not in str(raised.value)
    for _ in range(2):
        with pytest.raises(UserError, match=told):
            next(loader)  # never the step after the one that failed


DYING = """
from concurrent.futures import Future, thread
from data_pipelines.input_pipeline.loader import make_loader
from omnihuman_jax.training.faults import Watchdog
from tests.data_pipelines.input_pipeline.test_loader import Steps

right, calls = Future.set_result, []

def set_result(self, result):
    calls.append(result)
    if len(calls) > 3:
        raise MemoryError
    right(self, result)

Future.set_result = set_result
thread._base.LOGGER.critical = lambda *_, **__: None
dog = Watchdog(1.0, lambda: "CHECKPOINT")
dog.start()
for batch in make_loader(Steps(), threads=1):
    dog.step_done()
"""


def test_a_reading_thread_that_dies_without_a_word_is_ended_by_the_watchdog():
    """As when memory runs out in the pool's own code: its result never comes, and Grain waits for it for ever."""
    ended = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == STALLED
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no step has finished" in errors[0] and "last checkpoint is CHECKPOINT" in errors[0]
    assert "loader.py" in ended.stderr  # the stacks show that the loop waits for a batch


def test_a_pool_that_is_shut_down_ends_the_run():
    loader = make_loader(Steps(), threads=1)
    next(loader)
    loader._source._executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(UserError, match=r"reading ahead has ended \(\w+Error.*last checkpoint"):
        _steps(loader)


def test_a_slow_batch_is_waited_for():
    assert _steps(make_loader(Steps({4: lambda: time.sleep(0.3)}))) == list(range(1, 13))


def test_an_error_cancels_what_was_read_ahead():
    slow = {step: lambda: time.sleep(0.2) for step in range(3, 13)}
    steps = Steps({2: _raising(KeyError("x"))} | slow)
    loader = make_loader(steps, threads=1, prefetch=8)
    with pytest.raises(UserError):
        _steps(loader)
    time.sleep(1.0)  # enough for five more
    assert max(steps.made) < 6


def test_loaders_leave_no_threads_behind():
    before = set(threading.enumerate())
    for _ in range(3):
        next(make_loader(Steps()))
    assert set(threading.enumerate()) - before
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and set(threading.enumerate()) - before:
        gc.collect()
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before


def test_starts_at_any_step():
    assert _steps(make_loader(Steps(), start_step=3)) == list(range(3, 13))
    assert _steps(make_loader(Steps(), start_step=7)) == list(range(7, 13))
    assert list(make_loader(Steps(), start_step=13)) == list(make_loader(Steps(), start_step=20)) == []
