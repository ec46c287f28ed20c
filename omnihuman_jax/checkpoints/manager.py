"""A run's Orbax checkpoints: `checkpoints/STEP/` while running, `stages/NAME/` at each stage's end, kept for good.

Each holds the train state and a JSON item: step, stage, resolved config, the loop's counters, and the fingerprint and
dtype of every array. On a disk Orbax renames a checkpoint into its place when it is whole; in an object store, where
nothing can be renamed, it writes an object that marks it as whole last.
"""

import concurrent.futures
import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from omnihuman_jax import stores
from omnihuman_jax.checkpoints import folders, s3
from omnihuman_jax.checkpoints.fingerprint import Fingerprint, start_fingerprint
from omnihuman_jax.checkpoints.read import digest, meta_or_none, running_steps
from omnihuman_jax.checkpoints.restore import Restored, restore_newest, same_network
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding import processes
from omnihuman_jax.sharding.processes import broadcast_from_main, is_main
from omnihuman_jax.sharding.rules import path_name
from omnihuman_jax.stores import AnyPath

State = Any  # NamedTuple of pytrees of arrays

# Device memory for saving a copy, in state sizes: the copy, and at most half of it sliced by Orbax for each replica.
COPY_SIZE = 1.5
_LOOK_SECONDS = 5.0  # longest wait for a file system that may hang
_SAVE_SECONDS = 6 * 3600  # then Orbax aborts a save
# Smallest slice per replica when replicas share the writing of an array: slicing hundreds of small arrays, Orbax's
# default, takes longer than writing them.
_SHARED_WRITE_BYTES = 1 << 20
# In the messages of tensorstore about requests to a store.
_STORE_WORDS = ("HTTP response code", "UNAVAILABLE", "PERMISSION_DENIED", "DEADLINE_EXCEEDED")


class _Save(NamedTuple):
    """A save in progress."""

    paths: list[AnyPath]  # checkpoint folders to write, in order, with the same content
    state: State
    own: bool  # whether the state is a copy, to be deleted after reading
    meta: dict[str, Any]  # the JSON item without the fingerprint
    fingerprint: Callable[[], Fingerprint]  # waits for it
    times: dict[str, float | None]  # `Checkpoints.times` of this save
    begun: float  # `time.perf_counter()` at its start
    read: threading.Event  # set when the state is no longer needed

    def release(self) -> None:
        """Call when the state has been read, or will not be."""
        if self.own:  # explicitly: Orbax keeps references until everything is written
            jax.tree.map(lambda x: x.delete(), self.state)
        self.read.set()


class Checkpoints:
    """Writes one run's checkpoints and restores the newest.

    After a failed save (a full disk), a single process logs it and continues; `failed` lists what is still missing.
    With several processes it raises UserError, because the others wait for this one.

    Args:
      workdir: run directory, shared by all processes.
      every: steps between saves.
      keep: number of running checkpoints kept; stage checkpoints are always kept.
      keep_every: also keep its multiples (0 = none).
      copy_on_device: save a copy of the state on the devices, so that training need not wait until it has been read.
        Not done if memory is short, nor at a stage's end, when the next stage needs the memory.
      stages: name -> last step; the running checkpoint of that step is kept until `stages/NAME/` is complete.
    """

    def __init__(
        self,
        workdir: str | AnyPath,
        *,
        every: int,
        keep: int,
        keep_every: int = 0,
        copy_on_device: bool = True,
        stages: Mapping[str, int] | None = None,
        log: Callable[[str], None] = processes.log,
    ):
        self._workdir = stores.absolute(workdir)
        self._remote = stores.is_remote(self._workdir)
        self._every, self._keep, self._keep_every, self._log = every, keep, keep_every, log
        self._copy_on_device = copy_on_device
        self._copy: Callable[[State], State] | None = None
        self._last_steps = dict(stages or {})
        self._failed: dict[AnyPath, str] = {}
        self._last_good = "none yet"
        # Of the newest save: `seconds` until everything is written (None: not yet), and `blocked_seconds` of the loop.
        self.times: dict[str, float | None] = {}
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[dict[AnyPath, str]] | None = None
        self._deleter = concurrent.futures.ThreadPoolExecutor(1)
        self._remove_half_written()
        self._unraisable, sys.unraisablehook = sys.unraisablehook, _without_closed_loops(sys.unraisablehook)
        self._saver = _make_saver(stores.scheme_of(self._workdir))

    @property
    def failed(self) -> str:
        """What could not be written and is still missing; "" if nothing."""
        return "; ".join(self._failed.values())

    def _remove_half_written(self) -> None:
        if not is_main():
            return
        for part in folders.half_written(self._workdir):
            self._log(f"{part}: half-written, left by an earlier start; removed")
        for part in folders.leftovers(self._workdir):
            folders.remove(part)

    def due(self, step: int) -> bool:
        """Whether to save a running checkpoint after this step."""
        return step % self._every == 0

    def last_good(self) -> str:
        """The newest complete checkpoint, for messages; the last known one if the file system hangs."""
        found: list[int] = []
        look = threading.Thread(target=lambda: found.extend(running_steps(self._workdir)), daemon=True)
        look.start()
        look.join(_LOOK_SECONDS)
        return str(self._running(found[-1])) if found else self._last_good

    def _running(self, step: int) -> AnyPath:
        return self._workdir / "checkpoints" / str(step)

    def restore_latest(
        self, abstract: State, config: ConfigDict, check: Callable[..., None] = same_network
    ) -> Restored | None:
        """`restore.restore_newest` of this run."""
        stages = [self._workdir / "stages" / name for name in reversed(self._last_steps)]
        restored = restore_newest(self._workdir, stages, abstract, config, self._log, check)
        if restored:
            self._last_good = str(restored.path)
        return restored

    def save(self, step: int, state: State, meta: dict[str, Any], *, ends: str = "") -> None:
        """Saves in the background, after the previous save; the state may be donated once this returns.

        Args:
          meta: JSON item to save with the state.
          ends: name of the stage that ends with this step; `stages/NAME/` is completed before the running checkpoint.

        Raises:
          UserError: the previous save failed in a run of several processes, or its state had non-finite values, which
            are not written. `check` and `wait` raise it too.
        """
        begun = time.perf_counter()
        self.wait()
        own = not ends and self._can_copy(state)
        if own:
            state = self._copy(state)
        # Device programs start here, not in the writer: all processes must start them in the same order.
        found = start_fingerprint(state)
        paths = [self._running(step)]
        if ends and not self._stage_is_there(self._workdir / "stages" / ends, step, found):
            paths.insert(0, self._workdir / "stages" / ends)
        self._failed = {p: why for p, why in self._failed.items() if p not in paths and p.parent.name == "stages"}
        self.times = {"seconds": None, "blocked_seconds": None}
        dtypes = {path_name(path): str(x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(state)}
        meta = meta | {"dtypes": dtypes}
        save = _Save(paths, state, own, meta, found, self.times, begun, threading.Event())
        self._saving = self._writer.submit(self._write, save)
        if not own:
            save.read.wait()
        save.times["blocked_seconds"] = time.perf_counter() - begun

    def _can_copy(self, state: State) -> bool:
        """Whether to save a copy; decided at the first save, when the peak memory of training is known."""
        if self._copy_on_device and self._copy is None:
            self._copy_on_device = broadcast_from_main(_room_for(state))
            if not self._copy_on_device:
                self._log("the devices have no room for a copy of the state: training waits while a save reads it")
            shardings = jax.tree.map(lambda x: x.sharding, state)
            self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
        return self._copy_on_device

    def _stage_is_there(self, path: AnyPath, step: int, found: Callable[[], Fingerprint]) -> bool:
        """Whether it already holds this state, because the step was repeated after a restart."""
        there = meta_or_none(path) or {}
        if not broadcast_from_main(bool(there)):
            return False
        if broadcast_from_main(there.get("step") == step and there.get("fingerprint") == found().sums):
            return True
        self._log(f"{path}: replaced; it held step {there.get('step')} of another training of this stage")
        return False

    def end_stages(self, last_steps: Mapping[str, int]) -> None:
        """Replaces the stages' last steps."""
        self._last_steps = dict(last_steps)

    def mend_stages(self, done: int) -> None:
        """Copies missing `stages/NAME/` from the running checkpoints of the stages' last steps, up to step `done`."""
        for name, step in self._last_steps.items():
            path = self._workdir / "stages" / name
            running = meta_or_none(self._running(step)) if step <= done and meta_or_none(path) is None else None
            if running is None or running["stage"] != name:
                continue
            if is_main():
                try:
                    folders.copy(self._running(step), path)
                except OSError as error:
                    self._failed[path] = f"{path} could not be written: {error}"
                    continue
            self._log(f"{path}: was missing; copied from {self._running(step)}")
            self._failed.pop(path, None)

    def _write(self, save: _Save) -> dict[AnyPath, str]:
        """Writes in the background; returns why each failed path could not be written."""
        failed = {}
        try:
            found = save.fingerprint()
            if found.not_finite:
                raise UserError(
                    f"the state after step {save.meta['step']} holds NaN or infinity in {found.not_finite} and is not "
                    f"saved; the last good checkpoint is {self.last_good()}; start the same command again to continue "
                    f"from it"
                )
            meta = save.meta | {"fingerprint": found.sums}
            state, whole = ocp.args.PyTreeSave(save.state._asdict()), meta | {"sha256": digest(meta)}
            args = ocp.args.Composite(state=state, meta=ocp.args.JsonSave(whole))
            for path in save.paths:
                try:
                    if self._remote and is_main():
                        # Orbax would remove what is there in any order; a rest of it must not be marked as whole.
                        stores.remove_tree(path)
                    self._saver.save(path, args=args, force=True)
                    if path == save.paths[-1]:
                        save.release()
                    self._saver.wait_until_finished()
                except Exception as error:
                    failed[path] = _why_not_written(error)
                    if jax.process_count() > 1:
                        return failed  # leave the parts that other processes are writing
                    with contextlib.suppress(Exception):
                        self._saver.wait_until_finished()  # raises the same error
                else:
                    if path == save.paths[-1]:
                        self._last_good = str(path)
                        save.times["seconds"] = time.perf_counter() - save.begun
        finally:
            save.release()
        try:
            with stores.as_os_error(self._workdir):
                self._prune()
        except OSError as error:
            if not self._remote:
                raise
            self._log(f"{self._workdir}: old checkpoints are left until the next save ({error.strerror})")
        return failed

    def check(self) -> None:
        """Reports a finished save, without waiting; call often."""
        if self._saving and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the current save and reports failures."""
        if self._saving is None:
            return
        try:
            failed = self._saving.result()
        finally:
            if self._saving.done():  # not after Ctrl-C
                self._saving = None
        for path, why in failed.items():
            problem = f"a checkpoint could not be written: {path}: {why}"
            last = f"the last complete one is {self.last_good()}"
            if jax.process_count() > 1:
                raise UserError(f"process {jax.process_index()}: {problem}; {last}; make room and start again")
            self._failed[path] = problem
            self._log(f"{problem}; {last}; training goes on")

    def close(self) -> None:
        """Waits for the current save and closes the writer."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._saver.close()
            self._deleter.shutdown()
            sys.unraisablehook = self._unraisable

    def _prune(self) -> None:
        """Removes running checkpoints that are not to be kept, and the remains of failed saves."""
        if not is_main():
            return
        for part in folders.half_written(self._workdir):  # no save is in progress, and they may fill the disk
            folders.remove(part)
        missing = [name for name in self._last_steps if meta_or_none(self._workdir / "stages" / name) is None]
        wanted = {self._last_steps[name] for name in missing}
        for step in running_steps(self._workdir)[: -self._keep]:
            if step not in wanted and not (self._keep_every and step % self._keep_every == 0):
                with contextlib.suppress(OSError):  # tried again after the next save
                    self._deleter.submit(folders.remove, folders.unmark(self._running(step)))


def _without_closed_loops(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The hook without "Event loop is closed": Orbax raises hundreds of those after one failed write."""

    def filtered(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return filtered


def _why_not_written(error: Exception) -> str:
    """The reason for a failed save in one line; raises errors that come neither from the file system nor a store.

    Orbax raises OSError for those, tensorstore ValueError with the errno's text or with the object's path.
    """
    text = " ".join(str(error).split())
    if isinstance(error, TimeoutError | jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        return f"not all processes have written their part; see their logs ({text[:300]})"
    if not isinstance(error, OSError) and (why := stores.reason(error)):
        return why
    disk = ("No space left", "File too large", "quota", "RESOURCE_EXHAUSTED", "OS error", *_STORE_WORDS)
    if not isinstance(error, OSError) and not (isinstance(error, ValueError) and any(word in text for word in disk)):
        raise error
    return text[:300]


def _room_for(state: State) -> bool:
    """Whether this process's devices have memory for a copy of the state; True if they report no limit."""
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
    return device.memory_stats() or {}  # None on CPU


def _make_saver(scheme: str) -> ocp.AsyncCheckpointer:
    if scheme == "s3":
        s3.enable()
    # Orbax marks a checkpoint as whole, instead of renaming it, by itself in gs:// only.
    marked = {"temporary_path_class": ocp.path.atomicity.CommitFileTemporaryPath} if scheme else {}
    # With named processes Orbax uses the coordinator's barriers, which fail when a process dies. Its default, a device
    # collective, waits forever and interleaves with those of training.
    everyone = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.options.MultiprocessingOptions(active_processes=everyone)
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_WRITE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options, **marked),
        state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=options),
        meta=ocp.JsonCheckpointHandler(multiprocessing_options=options),
    )
    limits = ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS)
    return ocp.AsyncCheckpointer(handler, multiprocessing_options=options, async_options=limits, **marked)
