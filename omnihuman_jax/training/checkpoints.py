"""Orbax checkpoints: `checkpoints/STEP/` while running, `stages/NAME/` at each stage's end, kept for good.

Each holds the whole train state and a JSON item with the step, the stage, the resolved config, the loop's counters and
a fingerprint of every array. What cannot be read, or does not have its fingerprint, is set aside in `damaged/` by name,
and the one before is used.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.config import ModelConfig
from omnihuman_jax.sharding.mesh import local_mesh
from omnihuman_jax.sharding.rules import path_name
from omnihuman_jax.training.processes import is_main, say
from omnihuman_jax.training.state import TrainState, make_network

# Model keys that change how the network is computed, not what its parameters are.
_COMPUTE_KEYS = (
    *("attention", "remat", "dtype", "scan_blocks", "reference_time_slot", "norm_eps", "rope_theta"),
    *("guidance_default", "pooled_required"),
)
_HALF_WRITTEN = "*.orbax-checkpoint-tmp*"
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
    """Writer and reader of one run's checkpoints. A save that fails (a full disk) is told and does not end the run.

    Args:
      workdir: run directory.
      every: save every that many steps.
      keep: number of running checkpoints kept; stage checkpoints are always kept.
      keep_every: besides, keep the steps that it divides (0 = none).
      tell: called with lines for the log.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        every: int,
        keep: int,
        keep_every: int = 0,
        tell: Callable[[str], None] = say,
    ):
        self._workdir = Path(workdir).absolute()
        self._every, self._tell = every, tell
        self.failed = ""  # what went wrong with the newest save, "" when it is whole
        self._remove_half_written()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(
            self._workdir / "checkpoints", item_handlers=_item_handlers(), options=options
        )
        self._stages = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**_item_handlers()))

    def _remove_half_written(self) -> None:
        for part in sorted((self._workdir / "checkpoints").glob(_HALF_WRITTEN)) if is_main() else ():
            self._tell(f"{part}: half-written when an earlier start ended; removed")
            shutil.rmtree(part)
        for part in sorted((self._workdir / "stages").glob(_HALF_WRITTEN)) if is_main() else ():
            shutil.rmtree(part)

    def due(self, step: int) -> bool:
        """Whether a running checkpoint is wanted after this step."""
        return step % self._every == 0

    def last_good(self) -> str:
        """The newest whole checkpoint, for messages."""
        step = self._manager.latest_step()
        return "none yet" if step is None else str(self._workdir / "checkpoints" / str(step))

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves asynchronously; the arrays are copied off the device before this returns."""
        if step in self._manager.all_steps():  # steps run again after a restart
            return
        meta = meta | {"fingerprint": fingerprint(state)}
        # The save before may still be under way, and its failure is not this one's.
        self._guarded("checkpoints", self._manager.wait_until_finished)
        self._guarded("stages", self._stages.wait_until_finished)
        self.failed = ""
        self._guarded("checkpoints", lambda: self._manager.save(step, args=_save_args(state, meta), force=True))

    def save_stage(self, name: str, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves the stage's end to `stages/NAME/`, asynchronously; it is whole before a later running one begins."""
        meta = meta | {"fingerprint": fingerprint(state)}
        path = self._workdir / "stages" / name
        self._guarded("stages", lambda: self._stages.save(path, args=_save_args(state, meta), force=True))

    def has_stage(self, name: str) -> bool:
        """Whether `stages/NAME/` is there."""
        return (self._workdir / "stages" / name / "meta").is_dir()

    def stage_step(self, name: str) -> int:
        """The step that `stages/NAME/` was saved at."""
        return read_meta(self._workdir / "stages" / name)["step"]

    def check(self) -> None:
        """Finds out whether a save under way has failed."""
        self._guarded("checkpoints", self._manager.check_for_errors)
        self._guarded("stages", self._stages.check_for_errors)

    def _guarded(self, root: str, action: Callable[[], Any]) -> None:
        try:
            action()
        # The file system's refusals: Orbax raises OSError, tensorstore ValueError with the errno's text.
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not _is_disk_error(error):
                raise
            self.failed = f"a checkpoint could not be written: {' '.join(str(error).split())[:300]}"
            self._tell(f"{self.failed}; the last whole one is {self.last_good()}; training goes on")
            for part in (self._workdir / root).glob(_HALF_WRITTEN):
                shutil.rmtree(part, ignore_errors=True)  # it may be what fills the disk; a new start looks again

    def restore_latest(self, abstract: TrainState, config: ConfigDict) -> Restored | None:
        """The newest running checkpoint that is whole, or None when the run has none at all.

        Raises:
          UserError: the checkpoint holds a model of another shape, or there are checkpoints and none can be read.
        """
        broken: list[tuple[Path, str]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self._workdir / "checkpoints" / str(step)
            restored, problem = self._try(path, abstract, config)
            if jax.process_count() > 1:
                fine = multihost_utils.process_allgather(np.array(not problem))
                problem = problem or ("" if fine.all() else "another process could not read it")
            if not problem:
                self._set_aside(broken)
                return restored
            broken.append((path, problem))
        if broken:
            told = "; ".join(f"{path}: {problem}" for path, problem in broken)
            raise UserError(
                f"{self._workdir}: no checkpoint can be read ({told}); repair one, or move the folder checkpoints/ "
                f"away to train from the start"
            )
        return None

    def _try(self, path: Path, abstract: TrainState, config: ConfigDict) -> tuple[Restored | None, str]:
        """The checkpoint, or why it cannot be used."""
        try:
            meta = read_meta(path)
        except UserError as error:
            return None, str(error)
        check_same_model(meta["config"]["model"], config.model.to_dict(), path)
        try:
            state = TrainState(**_restore(path, abstract._asdict()))
        # Whatever a damaged file makes Orbax, tensorstore or the decompressor raise, it is told and the run goes on
        # from an older checkpoint, or ends.
        except Exception as error:  # noqa: BLE001
            return None, f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        wrong = _differences(meta.get("fingerprint", {}), fingerprint(state))
        return Restored(state, meta, path), f"damaged: other values than were saved in {wrong}" if wrong else ""

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
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("set_aside")
            self._manager.reload()

    def close(self) -> None:
        """Waits for the saves under way and closes the writers."""
        self._guarded("checkpoints", self._manager.wait_until_finished)
        self._guarded("stages", self._stages.wait_until_finished)
        self._manager.close()
        self._stages.close()


def _is_disk_error(error: Exception) -> bool:
    text = str(error)
    return any(word in text for word in ("No space left", "File too large", "quota", "RESOURCE_EXHAUSTED", "OS error"))


def _differences(saved: dict[str, int], found: dict[str, int]) -> str:
    names = [name for name in found if name in saved and saved[name] != found[name]]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _item_handlers() -> dict[str, ocp.CheckpointHandler]:
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_WRITE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }


def _save_args(state: TrainState, meta: dict[str, Any]) -> ocp.args.Composite:
    return ocp.args.Composite(state=ocp.args.PyTreeSave(state._asdict()), meta=ocp.args.JsonSave(meta))


def _restore(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Restores the named parts of a state straight into the shardings of `abstract`."""
    args = ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(state=args)).state


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
    """The JSON item of a checkpoint folder."""
    try:
        return json.loads((Path(path) / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:  # not JSON, or not text
        raise UserError(f"{path}: not a readable checkpoint ({error}); use another one of the run") from error


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
