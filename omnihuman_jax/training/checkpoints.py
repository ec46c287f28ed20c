"""Orbax checkpoints: `checkpoints/STEP/` while running, `stages/NAME/` at each stage's end, kept for good.

Each holds the whole train state and a JSON item with the step, the stage, the resolved config and the loop's counters.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.config import ModelConfig
from omnihuman_jax.training.state import TrainState, make_network

# Model keys that change how the network is computed, not what its parameters are.
_COMPUTE_KEYS = (
    *("attention", "remat", "dtype", "scan_blocks", "reference_time_slot", "norm_eps", "rope_theta"),
    *("guidance_default", "pooled_required"),
)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored train state with the JSON item saved beside it."""

    state: TrainState
    meta: dict[str, Any]


class Checkpoints:
    """Writer and reader of one run's checkpoints.

    Args:
      workdir: run directory.
      every: save every that many steps.
      keep: number of running checkpoints kept; stage checkpoints are always kept.
    """

    def __init__(self, workdir: str | Path, *, every: int, keep: int):
        self._workdir = Path(workdir).absolute()
        self._every = every
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(
            self._workdir / "checkpoints", item_names=("state", "meta"), options=options
        )

    def due(self, step: int) -> bool:
        """Whether a running checkpoint is wanted after this step."""
        return step % self._every == 0

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves asynchronously; the arrays are copied off the device before this returns."""
        if step in self._manager.all_steps():  # steps run again after a restart
            return
        self._manager.save(step, args=_save_args(state, meta), force=True)

    def save_stage(self, name: str, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves the stage's end to `stages/NAME/`, waiting until it is whole on disk."""
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(self._workdir / "stages" / name, args=_save_args(state, meta), force=True)

    def restore_latest(self, abstract: TrainState, config: ConfigDict) -> Restored | None:
        """The newest running checkpoint, or None when the run has none.

        Raises:
          UserError: the checkpoint holds a model of another shape.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        path = self._workdir / "checkpoints" / str(step)
        meta = read_meta(path)
        check_same_model(meta["config"]["model"], config.model.to_dict(), path)
        return Restored(TrainState(**_restore(path, abstract._asdict())), meta)

    def close(self) -> None:
        """Waits for the saves under way and closes the writer."""
        self._manager.wait_until_finished()
        self._manager.close()


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
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error}); use another one of the run") from error


def load_for_inference(path: str | Path, *, use_ema: bool = True) -> tuple[ConfigDict, Any, dict[str, Any]]:
    """Loads only the parameters (or their EMA) of a checkpoint onto one device.

    Args:
      path: workdir, `checkpoints/STEP` or `stages/NAME`.
      use_ema: the EMA instead of the raw parameters.

    Returns:
      (resolved config, nested dict of parameters, info with `step`, `stage` and `path`).
    """
    path = find_checkpoint(path)
    meta = read_meta(path)
    config = ConfigDict(meta["config"])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), make_network(config).abstract_params
    )
    part = "ema" if use_ema else "params"
    params = _restore(path, {part: abstract})[part]
    return config, params, {"step": meta["step"], "stage": meta["stage"], "path": str(path)}
