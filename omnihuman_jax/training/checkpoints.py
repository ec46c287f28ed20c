"""Orbax checkpoints: `checkpoints/STEP/` while running, `stages/NAME/` at each stage's end, kept for good.

Each holds the whole train state and a JSON item with the step, the stage, the resolved config, the loop's counters and
the fingerprint and dtype of every array. What cannot be read, or does not have its fingerprint, is set aside in
`damaged/` by name, and the one before is used; where no running one is whole, the newest stage.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.config import ModelConfig
from omnihuman_jax.sharding.mesh import local_mesh
from omnihuman_jax.sharding.rules import path_name
from omnihuman_jax.training.processes import agreed_problem, agreed_steps, first_says, is_main, say
from omnihuman_jax.training.state import TrainState, make_network

# Model keys that change how the network is computed, not what its parameters are.
_COMPUTE_KEYS = (
    *("attention", "remat", "dtype", "scan_blocks", "reference_time_slot", "norm_eps", "rope_theta"),
    *("guidance_default", "pooled_required", "sequence_attention"),
)
_META_KEYS = ("step", "stage", "config")
_HALF_WRITTEN = ".orbax-checkpoint-tmp"  # in the names of what Orbax is writing
_DELETED = ".deleted"
RETRY_SECONDS = (0.5, 2.0, 8.0)  # pauses before a state that could not be read is tried again
_LOOK_SECONDS = 5.0  # longest wait for a file system that may hang
_SAVE_SECONDS = 6 * 3600  # after that Orbax gives a save up
# Replicas share the writing of an array from this size a replica on. Orbax shares out every array, and cutting hundreds
# of small ones takes longer than writing them, while training waits.
_SHARED_WRITE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored train state with the JSON item saved beside it and the folder it came from."""

    state: TrainState
    meta: dict[str, Any]
    path: Path


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sums(leaves: list[jax.Array], mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> jax.Array:
    """Sums of the bit patterns (leaves,) uint32. Each device adds up what it holds, once; one collective joins them."""

    def local(leaves: list[jax.Array]) -> jax.Array:
        sums = []
        for x, spec in zip(leaves, specs, strict=True):
            unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
            total = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)
            used = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
            for axis in mesh.axis_names:  # of copies, the first one counts
                total = total if axis in used else jnp.where(jax.lax.axis_index(axis) == 0, total, 0)
            sums.append(total)
        return jax.lax.psum(jnp.stack(sums), mesh.axis_names)

    whole = PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=whole, check_vma=False)(leaves)


def fingerprint(tree: Any) -> dict[str, int]:
    """Path of every array -> sum of its bit patterns modulo 2^32: the same on any mesh, another after a bit flip.

    Args:
      tree: arrays on one mesh, or on one device without any.
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = [leaf for _, leaf in flat]
    if not isinstance(leaves[0].sharding, NamedSharding):
        leaves = jax.device_put(leaves, NamedSharding(local_mesh(), PartitionSpec()))
    sums = _sums(leaves, leaves[0].sharding.mesh, tuple(leaf.sharding.spec for leaf in leaves))
    return {path_name(path): int(x) for (path, _), x in zip(flat, jax.device_get(sums), strict=True)}


class Checkpoints:
    """Writer and reader of one run's checkpoints.

    A save that fails (a full disk) is told. A run of one process goes on, and `failed` tells what is missing at its
    end; a process of several raises UserError, because the others wait for it.

    Args:
      workdir: run directory, shared by all processes.
      every: save every that many steps.
      keep: number of running checkpoints kept; stage checkpoints are always kept.
      keep_every: besides, keep the steps that it divides (0 = none).
      stages: name -> last step; the running checkpoint of that step is kept until `stages/NAME/` is whole.
      tell: called with lines for the log.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        every: int,
        keep: int,
        keep_every: int = 0,
        stages: Mapping[str, int] | None = None,
        tell: Callable[[str], None] = say,
    ):
        self._workdir = Path(workdir).absolute()
        self._every, self._keep, self._keep_every, self._tell = every, keep, keep_every, tell
        self._last_steps = dict(stages or {})
        self._failed: dict[Path, str] = {}
        self._writing: Path | None = None
        self._replacing = False  # whether something had the name of what is being written
        self._last_good = "none yet"
        self._begun = 0.0  # `time.perf_counter()` of the save under way
        # Of the newest save: until all is written (None: not yet), and how long the loop waited for it.
        self.times: dict[str, float | None] = {}
        self._deleter = concurrent.futures.ThreadPoolExecutor(1)
        self._remove_half_written()
        options = _process_options()
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=options), **_item_handlers(options)
            ),
            multiprocessing_options=options,
            async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS, post_finalization_callback=self._written),
        )

    @property
    def failed(self) -> str:
        """What could not be written and is still missing, "" for nothing."""
        return "; ".join(self._failed.values())

    def _remove_half_written(self) -> None:
        for room in ("checkpoints", "stages") if is_main() else ():
            for part in sorted((self._workdir / room).glob(f"*{_HALF_WRITTEN}*")):
                self._tell(f"{part}: half-written when an earlier start ended; removed")
                shutil.rmtree(part, ignore_errors=True)
            for part in (self._workdir / room).glob(f"*{_DELETED}"):
                shutil.rmtree(part, ignore_errors=True)

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

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves asynchronously; the arrays are copied off the device before this returns."""
        self._write(self._running(step), state, meta)

    def save_stage(self, name: str, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves the stage's end to `stages/NAME/`, asynchronously; it is whole before a later running one begins."""
        path = self._workdir / "stages" / name
        there, meta = _meta_or_none(path), meta | describe(state)
        wanted = (meta["step"], meta["fingerprint"])
        if first_says(bool(there and (there["step"], there.get("fingerprint")) == wanted)):
            return  # the step came again after a restart
        if there:
            self._tell(f"{path}: replaced; it held step {there['step']} of another training of this stage")
        self._write(path, state, meta)

    def end_stages(self, last_steps: Mapping[str, int]) -> None:
        """Other last steps of the stages than those given at first, where the config has moved them."""
        self._last_steps = dict(last_steps)

    def mend_stages(self, done: int) -> None:
        """Makes `stages/NAME/` from the running checkpoint of the stage's last step where it could not be written."""
        for name, step in self._last_steps.items():
            path = self._workdir / "stages" / name
            running = _meta_or_none(self._running(step)) if step <= done and _meta_or_none(path) is None else None
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
            self._tell(f"{path}: was missing; copied from {self._running(step)}")
            self._failed.pop(path, None)

    def _write(self, path: Path, state: TrainState, meta: dict[str, Any]) -> None:
        begun = time.perf_counter()
        meta = meta if "fingerprint" in meta else meta | describe(state)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state._asdict()), meta=ocp.args.JsonSave(meta | {"sha256": _digest(meta)})
        )
        self.wait()  # for the save before; its failure is not this one's
        self._failed = {p: why for p, why in self._failed.items() if p != path and p.parent.name == "stages"}
        self._writing, self._replacing = path, path.is_dir()
        self._begun, self.times = time.perf_counter(), {"seconds": None}
        self._guarded(lambda: self._saver.save(path, args=args, force=True))
        self.times["blocked_seconds"] = time.perf_counter() - begun

    def _written(self) -> None:
        """Called by Orbax's thread of the first process when all files are written."""
        self.times["seconds"] = time.perf_counter() - self._begun

    def check(self) -> None:
        """Finds out whether a save under way has ended or failed; call often."""
        self._guarded(self._saver.check_for_errors)

    def _guarded(self, action: Callable[[], Any], *, ends: bool = False) -> None:
        """Runs an action of the saver, after which the save under way has ended or not, and sees to what it says."""
        try:
            action()
        # The file system's refusals: Orbax raises OSError, tensorstore ValueError with the errno's text.
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not _is_disk_error(error):
                raise
            self._failed_to_write(error)
        # It is whole when it has lost its temporary name, or, where another had the name, when the saver has ended.
        if self._writing and (ends or not self._replacing and self._writing.is_dir()):
            path, self._writing = self._writing, None
            if path.parent.name == "checkpoints":
                self._last_good = str(path)
            self._prune()

    def _failed_to_write(self, error: Exception) -> None:
        path, self._writing = self._writing, None
        if path is None:
            return  # a second error of a save that has been told of
        late = isinstance(error, TimeoutError)
        why = "not all processes have written their part" if late else " ".join(str(error).split())[:300]
        told = f"a checkpoint could not be written: {path}: {why}"
        last = f"the last whole one is {self.last_good()}"
        if jax.process_count() > 1:
            then = "see what the others say" if late else "make room and start again"
            raise UserError(f"process {jax.process_index()}: {told}; {last}; {then}") from error
        self._failed[path] = told
        self._tell(f"{told}; {last}; training goes on")
        for part in path.parent.glob(f"{path.name}{_HALF_WRITTEN}*"):
            shutil.rmtree(part, ignore_errors=True)  # it may be what fills the disk; a new start looks again

    def _prune(self) -> None:
        """Removes the running checkpoints that the policy does not keep, and what is left of saves that failed."""
        if not is_main():
            return
        for part in self._workdir.glob(f"*/*{_HALF_WRITTEN}*"):  # nothing is being written now
            shutil.rmtree(part, ignore_errors=True)
        missing = [name for name in self._last_steps if _meta_or_none(self._workdir / "stages" / name) is None]
        wanted = {self._last_steps[name] for name in missing}
        for step in running_steps(self._workdir)[: -self._keep]:
            if step not in wanted and not (self._keep_every and step % self._keep_every == 0):
                # Renamed first, so that what a kill leaves of it is never taken for a checkpoint.
                with contextlib.suppress(OSError):  # tried again after the next save
                    gone = self._running(step).rename(self._running(step).with_suffix(_DELETED))
                    self._deleter.submit(shutil.rmtree, gone, ignore_errors=True)

    def restore_latest(self, abstract: TrainState, config: ConfigDict) -> Restored | None:
        """The newest running checkpoint that is whole, or None when the run has none at all.

        Where all running ones are damaged, the stages' are tried. All processes decide together: one that a single
        process cannot read is used by none.

        Raises:
          UserError: the checkpoint holds a model of another shape, or there are checkpoints and none can be read.
        """
        folder = self._workdir / "checkpoints"
        steps = agreed_steps([int(p.name) for p in folder.glob("*") if p.name.isdigit()])
        if not steps:
            return None
        stages = [self._workdir / "stages" / name for name in reversed(self._last_steps)]
        broken: list[tuple[Path, str]] = []
        for path in [*(self._running(step) for step in reversed(steps)), *stages]:
            restored, problem = self._try(path, abstract, config)
            if restored:
                self._set_aside(broken)
                self._last_good = str(path)
                return restored
            if first_says(path.is_dir()):
                broken.append((path, problem))
        told = "; ".join(f"{path}: {problem}" for path, problem in broken)
        raise UserError(
            f"{self._workdir}: no checkpoint can be read ({told}); repair one, or move the folder checkpoints/ "
            f"away to train from the start"
        )

    def _try(self, path: Path, abstract: TrainState, config: ConfigDict) -> tuple[Restored | None, str]:
        """The checkpoint, or why it cannot be used; the same in all processes."""
        meta, problem = None, ""
        try:
            meta = read_meta(path)
            if path.name.isdigit() and meta["step"] != int(path.name):
                problem = f"damaged: it says that it holds step {meta['step']}"
        except UserError as error:
            problem = str(error)
        if problem := agreed_problem(problem):
            return None, problem
        check_same_model(meta["config"]["model"], config.model.to_dict(), path)
        # Restored as it was saved and cast afterwards: a config may change the moments' dtypes.
        saved = _with_dtypes(abstract, meta.get("dtypes", {}))
        state, problem = _read_state(path, saved)
        if problem:
            differ = _optimizer_differences(meta["config"], config)
            problem += f"; the config differs from the checkpoint's in {differ}" if differ else ""
        if problem := agreed_problem(problem):
            return None, problem
        wrong = _differences(meta.get("fingerprint", {}), fingerprint(state))
        if wrong:
            return None, f"damaged: other values than were saved in {wrong}"
        state = jax.tree.map(
            lambda x, wanted: (
                x
                if x.dtype == wanted.dtype
                else jax.jit(lambda x: x.astype(wanted.dtype), out_shardings=wanted.sharding)(x)
            ),
            state,
            abstract,
        )
        return Restored(state, meta, path), ""

    def _set_aside(self, broken: list[tuple[Path, str]]) -> None:
        for path, problem in broken:
            if is_main():
                target = self._workdir / "damaged" / path.name
                target.parent.mkdir(exist_ok=True)
                if target.exists():
                    shutil.rmtree(target)
                path.rename(target)
            self._tell(f"checkpoint {path} is skipped and moved to damaged/: {problem}")
        if broken:
            agreed_problem("")  # nobody goes on before they are moved

    def wait(self) -> None:
        """Waits for the save under way; `failed` tells how it ended."""
        self._guarded(self._saver.wait_until_finished, ends=True)

    def close(self) -> None:
        """Waits for the save under way and closes the writer."""
        self.wait()
        self._saver.close()
        self._deleter.shutdown()


def running_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that a run directory holds whole, in order."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / "meta").is_dir())


def _meta_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return read_meta(path)
    except UserError:
        return None


def describe(state: TrainState) -> dict[str, Any]:
    """What a checkpoint's JSON says of its arrays: `fingerprint` and `dtypes` by name. All processes call it."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {"fingerprint": fingerprint(state), "dtypes": {path_name(path): str(x.dtype) for path, x in flat}}


def _with_dtypes(abstract: Any, dtypes: Mapping[str, str]) -> Any:
    """The abstract arrays with the dtypes that a checkpoint names."""

    def saved(path, x):
        return jax.ShapeDtypeStruct(x.shape, dtypes.get(path_name(path), x.dtype), sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(saved, abstract)


def _read_state(path: Path, abstract: TrainState) -> tuple[TrainState | None, str]:
    """This process's part of the arrays, or why they cannot be read. Nothing here waits for other processes."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return TrainState(**_restore(path, abstract._asdict())), ""
        # Whatever a damaged file makes Orbax, tensorstore or the decompressor raise, it is told and the run goes on
        # from an older checkpoint, or ends.
        except Exception as error:  # noqa: BLE001
            if pause is None:
                return None, f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            time.sleep(pause)  # a file system that fails for a moment is no damage
    raise AssertionError


def _optimizer_differences(saved: Mapping[str, Any], config: ConfigDict) -> str:
    there, here = saved.get("optimizer", {}), config.optimizer.to_dict()
    return "; ".join(
        f"optimizer.{key}={there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]
    )


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _is_disk_error(error: Exception) -> bool:
    text = str(error)
    return any(word in text for word in ("No space left", "File too large", "quota", "RESOURCE_EXHAUSTED", "OS error"))


def _differences(saved: dict[str, int], found: dict[str, int]) -> str:
    names = [name for name in found if name in saved and saved[name] != found[name]]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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


def _restore(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Restores the named parts of a state straight into the shardings of `abstract`, each process its own shards."""
    args = ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    # The handler by itself: Orbax's Checkpointer ends with a barrier, where a process that cannot read never arrives.
    return ocp.PyTreeCheckpointHandler().restore(path / "state", args=args)


def check_same_model(saved: dict[str, Any], wanted: dict[str, Any], path: str | Path) -> None:
    """Raises UserError naming the model keys in which a checkpoint differs from the config."""
    # A key that a checkpoint does not have yet was introduced after it, with a default that means what was before.
    saved, wanted = (dataclasses.asdict(ModelConfig()) | dict(model) for model in (saved, wanted))
    differ = [
        f"model.{key}={_plain(saved.get(key))} there, {_plain(wanted.get(key))} here"
        for key in sorted(saved.keys() | wanted.keys())
        if key not in _COMPUTE_KEYS and _plain(saved.get(key)) != _plain(wanted.get(key))
    ]
    if differ:
        raise UserError(
            f"{path}: checkpoint of another model shape ({'; '.join(differ)}); use the config it was trained with or "
            f"another --workdir"
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by a workdir, `checkpoints/STEP`, `stages/NAME` or a folder of those.

    A workdir means its newest running checkpoint, or the last stage when there is none.

    Raises:
      UserError: nothing there.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(
            f"{path}: no such checkpoint directory; give a run's --workdir, checkpoints/STEP or stages/NAME"
        )
    if (path / "state").is_dir() and (path / "meta").is_dir():
        return path
    for root in (path / "checkpoints", path):
        steps = [p for p in root.iterdir() if p.name.isdigit() and (p / "meta").is_dir()] if root.is_dir() else []
        if steps:
            return max(steps, key=lambda p: int(p.name))
    for root in (path / "stages", path):
        stages = [p for p in root.iterdir() if (p / "meta").is_dir()] if root.is_dir() else []
        if stages:
            return max(stages, key=lambda p: read_meta(p)["step"])
    raise UserError(f"{path}: holds no checkpoint; expected checkpoints/STEP/ or stages/NAME/ in it")


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON item of a checkpoint folder.

    Raises:
      UserError: it cannot be read, or is not what was written.
    """
    try:
        meta = json.loads((Path(path) / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:  # not JSON, or not text
        raise UserError(f"{path}: not a readable checkpoint ({error}); use another one of the run") from error
    missing = [key for key in _META_KEYS if not isinstance(meta, dict) or key not in meta]
    if missing or meta.get("sha256") not in (None, _digest({k: v for k, v in meta.items() if k != "sha256"})):
        why = f"no {missing[0]}" if missing else "another sha256 than was saved"
        raise UserError(f"{path}: damaged meta/metadata ({why}); use another one of the run")
    return meta


def load_for_inference(
    path: str | Path, *, use_ema: bool = True, shardings: Any = None
) -> tuple[ConfigDict, Any, dict[str, Any]]:
    """Loads only the parameters (or their EMA) of a checkpoint.

    Args:
      path: workdir, `checkpoints/STEP` or `stages/NAME`.
      use_ema: the EMA instead of the raw parameters.
      shardings: nested dict of shardings to load into; None = one device.

    Returns:
      (resolved config, nested dict of parameters, info with `step`, `stage` and `path`).
    """
    path = find_checkpoint(path)
    meta = read_meta(path)
    config = ConfigDict(meta["config"])
    shapes = make_network(config).abstract_params
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    abstract = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    part = "ema" if use_ema else "params"
    params = _restore(path, {part: abstract})[part]
    return config, params, {"step": meta["step"], "stage": meta["stage"], "path": str(path)}
