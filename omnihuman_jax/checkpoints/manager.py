"""A run's Orbax checkpoints: `checkpoints/STEP/` while running, `stages/NAME/` at each stage's end, kept for good.

Each holds the whole train state and a JSON item with the step, the stage, the resolved config, the loop's counters and
the fingerprint and dtype of every array.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from omnihuman_jax.checkpoints.fingerprint import Fingerprint, start_fingerprint
from omnihuman_jax.checkpoints.read import digest, meta_or_none, running_steps
from omnihuman_jax.checkpoints.restore import Restored, restore_newest, same_network
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding import processes
from omnihuman_jax.sharding.processes import broadcast_from_main, is_main
from omnihuman_jax.sharding.rules import path_name

State = Any  # NamedTuple of pytrees of arrays

_HALF_WRITTEN = ".orbax-checkpoint-tmp"  # in the names of what Orbax is writing
_DELETED = ".deleted"
# What saving a copy of the state takes on the devices, in sizes of the state: the copy, and what Orbax cuts out of it
# for each of several replicas to write, at most a half.
COPY_SIZE = 1.5
_LOOK_SECONDS = 5.0  # longest wait for a file system that may hang
_SAVE_SECONDS = 6 * 3600  # after that Orbax gives a save up
# Replicas share the writing of an array from this size a replica on. Orbax shares out every array, and cutting hundreds
# of small ones takes longer than writing them.
_SHARED_WRITE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class _Save:
    """A save under way.

    Attributes:
      paths: checkpoint folders that get the same, one after the other.
      state: what is saved.
      own: whether the state is a copy that nobody else uses.
      meta: what is said of it, without the fingerprint.
      found: gives the fingerprint.
      times: `Checkpoints.times` of this save.
      begun: `time.perf_counter()` at its beginning.
      read: set when the state is no longer needed.
    """

    paths: list[Path]
    state: State
    own: bool
    meta: dict[str, Any]
    found: Callable[[], Fingerprint]
    times: dict[str, float | None]
    begun: float
    read: threading.Event

    def let_go(self) -> None:
        """The state has been read, or will not be."""
        if self.own:  # by name: Orbax refers to it until all is written
            jax.tree.map(lambda x: x.delete(), self.state)
        self.read.set()


class Checkpoints:
    """Writes one run's checkpoints, and reads the newest.

    A save that fails (a full disk) is told. A run of one process goes on, and `failed` tells what is missing at its
    end; a process of several raises UserError, because the others wait for it.

    Args:
      workdir: run directory, shared by all processes.
      every: save every that many steps.
      keep: number of running checkpoints kept; stage checkpoints are always kept.
      keep_every: besides, keep the steps that it divides (0 = none).
      copy_on_device: training goes on as soon as the devices hold a copy of the state, which goes when it has been
        read. False, where they have no room for one, and at a stage's end, when what comes next needs the room:
        training goes on when the state has been read.
      stages: name -> last step; the running checkpoint of that step is kept until `stages/NAME/` is whole.
      log: called with lines for the log.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        every: int,
        keep: int,
        keep_every: int = 0,
        copy_on_device: bool = True,
        stages: Mapping[str, int] | None = None,
        log: Callable[[str], None] = processes.log,
    ):
        self._workdir = Path(workdir).absolute()
        self._every, self._keep, self._keep_every, self._log = every, keep, keep_every, log
        self._copy_on_device = copy_on_device
        self._copy: Callable[[State], State] | None = None
        self._last_steps = dict(stages or {})
        self._failed: dict[Path, str] = {}
        self._last_good = "none yet"
        # Of the newest save: until all is written (None: not yet), and how long the loop waited for it.
        self.times: dict[str, float | None] = {}
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[dict[Path, str]] | None = None
        self._deleter = concurrent.futures.ThreadPoolExecutor(1)
        self._remove_half_written()
        self._unraisable, sys.unraisablehook = sys.unraisablehook, _without_closed_loops(sys.unraisablehook)
        options = _process_options()
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=options), **_item_handlers(options)
            ),
            multiprocessing_options=options,
            async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
        )

    @property
    def failed(self) -> str:
        """What could not be written and is still missing, "" for nothing."""
        return "; ".join(self._failed.values())

    def _remove_half_written(self) -> None:
        if not is_main():
            return
        for part in self._half_written():
            self._log(f"{part}: half-written when an earlier start ended; removed")
        for part in [*self._half_written(), *self._workdir.glob(f"checkpoints/*{_DELETED}")]:
            shutil.rmtree(part, ignore_errors=True)

    def _half_written(self) -> list[Path]:
        """What Orbax has begun, or is about, to write."""
        return sorted(self._workdir.glob(f"checkpoints/*{_HALF_WRITTEN}*")) + sorted(
            self._workdir.glob(f"stages/*{_HALF_WRITTEN}*")
        )

    def due(self, step: int) -> bool:
        """Whether a running checkpoint is wanted after this step."""
        return step % self._every == 0

    def last_good(self) -> str:
        """The newest whole checkpoint, for messages; the newest known of where the file system does not answer."""
        found: list[int] = []
        look = threading.Thread(target=lambda: found.extend(running_steps(self._workdir)), daemon=True)
        look.start()
        look.join(_LOOK_SECONDS)
        return str(self._running(found[-1])) if found else self._last_good

    def _running(self, step: int) -> Path:
        return self._workdir / "checkpoints" / str(step)

    def restore_latest(
        self, abstract: State, config: ConfigDict, check: Callable[..., None] = same_network
    ) -> Restored | None:
        """`restore.restore_newest` of this run: running checkpoints first, then the stages'."""
        stages = [self._workdir / "stages" / name for name in reversed(self._last_steps)]
        restored = restore_newest(self._workdir, stages, abstract, config, self._log, check)
        if restored:
            self._last_good = str(restored.path)
        return restored

    def save(self, step: int, state: State, meta: dict[str, Any], *, ends: str = "") -> None:
        """Saves in the background; the state may be donated once this returns. Waits for the save before.

        Args:
          step: of the running checkpoint.
          state: what is saved.
          meta: what is said of it.
          ends: name of the stage that ends with this step. `stages/NAME/` is written first, and whole before the
            running one begins.

        Raises:
          UserError: the save before could not be written, where others wait for it. A state with values that are not
            finite is not written: the next `check`, `wait` or `save` raises it.
        """
        begun = time.perf_counter()
        self.wait()
        own = not ends and self._can_copy(state)
        if own:
            state = self._copy(state)
        # All that the devices do is started here: programs of all processes have to begin in one order.
        found = start_fingerprint(state)
        paths = [self._running(step)]
        if ends and not self._stage_is_there(self._workdir / "stages" / ends, step, found):
            paths.insert(0, self._workdir / "stages" / ends)
        self._failed = {p: why for p, why in self._failed.items() if p not in paths and p.parent.name == "stages"}
        self.times = {"seconds": None, "blocked_seconds": None}
        meta = meta | {"dtypes": _dtypes(state)}
        save = _Save(paths, state, own, meta, found, self.times, begun, threading.Event())
        self._saving = self._writer.submit(self._write, save)
        if not own:
            save.read.wait()
        save.times["blocked_seconds"] = time.perf_counter() - begun

    def _can_copy(self, state: State) -> bool:
        """Whether to save a copy; found out at the first save, when the devices know what training takes."""
        if self._copy_on_device and self._copy is None:
            self._copy_on_device = broadcast_from_main(_room_for(state))
            if not self._copy_on_device:
                self._log("the devices have no room for a copy of the state: training waits while a save reads it")
            shardings = jax.tree.map(lambda x: x.sharding, state)
            self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
        return self._copy_on_device

    def _stage_is_there(self, path: Path, step: int, found: Callable[[], Fingerprint]) -> bool:
        """Whether it holds this state already, because the step came again after a restart."""
        there = meta_or_none(path) or {}
        if not broadcast_from_main(bool(there)):
            return False
        if broadcast_from_main(there.get("step") == step and there.get("fingerprint") == found().sums):
            return True
        self._log(f"{path}: replaced; it held step {there.get('step')} of another training of this stage")
        return False

    def end_stages(self, last_steps: Mapping[str, int]) -> None:
        """Other last steps of the stages than those given at first, where the config has moved them."""
        self._last_steps = dict(last_steps)

    def mend_stages(self, done: int) -> None:
        """Makes `stages/NAME/` from the running checkpoint of the stage's last step where it could not be written."""
        for name, step in self._last_steps.items():
            path = self._workdir / "stages" / name
            running = meta_or_none(self._running(step)) if step <= done and meta_or_none(path) is None else None
            if running is None or running["stage"] != name:
                continue
            if is_main():
                half = path.with_name(f"{name}{_HALF_WRITTEN}-copy")
                try:
                    shutil.copytree(self._running(step), half)
                    shutil.rmtree(path, ignore_errors=True)
                    half.rename(path)
                except OSError as error:
                    shutil.rmtree(half, ignore_errors=True)
                    self._failed[path] = f"{path} could not be written: {error}"
                    continue
            self._log(f"{path}: was missing; copied from {self._running(step)}")
            self._failed.pop(path, None)

    def _write(self, save: _Save) -> dict[Path, str]:
        """Writes, in the background; what could not be written, and why."""
        failed = {}
        try:
            found = save.found()
            if found.not_finite:
                raise UserError(
                    f"the state after step {save.meta['step']} holds NaN or infinity in {found.not_finite} and is not "
                    f"saved; the last good checkpoint is {self.last_good()}; start the same command again to continue "
                    f"from it"
                )
            meta = save.meta | {"fingerprint": found.sums}
            args = ocp.args.Composite(
                state=ocp.args.PyTreeSave(save.state._asdict()),
                meta=ocp.args.JsonSave(meta | {"sha256": digest(meta)}),
            )
            for path in save.paths:
                try:
                    self._saver.save(path, args=args, force=True)
                    if path == save.paths[-1]:
                        save.let_go()
                    self._saver.wait_until_finished()
                except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
                    failed[path] = _why_not_written(error)
                    if jax.process_count() > 1:
                        return failed  # the others wait for this process's part, and what they write is theirs
                    with contextlib.suppress(OSError, ValueError):
                        self._saver.wait_until_finished()  # which tells the same again
                else:
                    if path == save.paths[-1]:
                        self._last_good = str(path)
                        save.times["seconds"] = time.perf_counter() - save.begun
        finally:
            save.let_go()
        self._prune()
        return failed

    def check(self) -> None:
        """Finds out whether a save under way has failed; call often."""
        if self._saving and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way; `failed` tells how it ended."""
        if self._saving is None:
            return
        try:
            failed = self._saving.result()
        finally:
            if self._saving.done():  # not where Ctrl-C ends the waiting
                self._saving = None
        for path, why in failed.items():
            self._report_failure(path, why)

    def close(self) -> None:
        """Waits for the save under way and closes the writer."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._saver.close()
            self._deleter.shutdown()
            sys.unraisablehook = self._unraisable

    def _report_failure(self, path: Path, why: str) -> None:
        told = f"a checkpoint could not be written: {path}: {why}"
        last = f"the last whole one is {self.last_good()}"
        if jax.process_count() > 1:
            raise UserError(f"process {jax.process_index()}: {told}; {last}; make room and start again")
        self._failed[path] = told
        self._log(f"{told}; {last}; training goes on")

    def _prune(self) -> None:
        """Removes the running checkpoints that the policy does not keep, and what is left of saves that failed."""
        if not is_main():
            return
        for part in self._half_written():  # nothing is being written now, and it may be what fills the disk
            shutil.rmtree(part, ignore_errors=True)
        missing = [name for name in self._last_steps if meta_or_none(self._workdir / "stages" / name) is None]
        wanted = {self._last_steps[name] for name in missing}
        for step in running_steps(self._workdir)[: -self._keep]:
            if step not in wanted and not (self._keep_every and step % self._keep_every == 0):
                # Renamed first, so that what a kill leaves of it is never taken for a checkpoint.
                with contextlib.suppress(OSError):  # tried again after the next save
                    gone = self._running(step).rename(self._running(step).with_suffix(_DELETED))
                    self._deleter.submit(shutil.rmtree, gone, ignore_errors=True)


def _dtypes(state: State) -> dict[str, str]:
    """Array path -> dtype."""
    return {path_name(path): str(x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The hook, but for what Orbax leaves when a write fails: each other write under way finds its event loop closed.

    Hundreds of tracebacks would hide the line that tells the file and the reason.
    """

    def filtered(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return filtered


def _why_not_written(error: Exception) -> str:
    """What a failed save says to a user; raises the error where it is no refusal of the file system.

    Orbax raises OSError for those, tensorstore ValueError with the errno's text.
    """
    text = " ".join(str(error).split())
    if isinstance(error, TimeoutError | jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        return f"not all processes have written their part, see what the others say ({text[:300]})"
    disk = ("No space left", "File too large", "quota", "RESOURCE_EXHAUSTED", "OS error")
    if not isinstance(error, OSError) and not (isinstance(error, ValueError) and any(word in text for word in disk)):
        raise error
    return text[:300]


def _room_for(state: State) -> bool:
    """Whether this process's devices can hold the state once more beside what training takes, as far as they tell."""
    here: dict[jax.Device, int] = {}
    for x in jax.tree.leaves(state):
        for shard in x.addressable_shards:
            here[shard.device] = here.get(shard.device, 0) + shard.data.nbytes
    for device, size in here.items():
        stats = _memory_stats(device)
        if stats.get("peak_bytes_in_use", 0) + COPY_SIZE * size > stats.get("bytes_limit", math.inf):
            return False
    return True


def _memory_stats(device: jax.Device) -> dict[str, int]:
    return device.memory_stats() or {}  # a CPU does not tell


def _process_options() -> ocp.options.MultiprocessingOptions:
    # Naming the processes makes Orbax wait at the coordinator's barriers, which end with an error when a process is
    # gone. Its default is a collective of the devices, which waits for ever and gets between those of the training.
    everyone = set(range(jax.process_count())) if jax.process_count() > 1 else None
    return ocp.options.MultiprocessingOptions(active_processes=everyone)


def _item_handlers(options: ocp.options.MultiprocessingOptions) -> dict[str, ocp.CheckpointHandler]:
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_WRITE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=options),
        "meta": ocp.JsonCheckpointHandler(multiprocessing_options=options),
    }
