"""Reads checkpoints from disks and object stores: finds them, and loads their metadata and arrays."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from omnihuman_jax import conditions, stores
from omnihuman_jax.checkpoints import s3
from omnihuman_jax.checkpoints.fingerprint import fingerprint
from omnihuman_jax.checkpoints.folders import is_complete
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.sharding import rules
from omnihuman_jax.stores import AnyPath

# Model keys that change how the network is computed, not what its parameters are.
_COMPUTE_KEYS = (
    *("attention", "remat", "dtype", "scan_blocks", "reference_time_slot", "norm_eps", "rope_theta"),
    *("guidance_default", "pooled_required", "sequence_attention"),
)
_META_KEYS = ("step", "stage", "config")


def running_steps(workdir: AnyPath) -> list[int]:
    """Sorted steps of a run directory's complete checkpoints."""
    folder = stores.get_path(workdir) / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and is_complete(p))


def meta_or_none(path: AnyPath) -> dict[str, Any] | None:
    """`read_meta`, or None where it raises."""
    try:
        return read_meta(path)
    except UserError:
        return None


def restore(path: AnyPath, abstract: dict[str, Any]) -> dict[str, Any]:
    """Restores the parts of a state that `abstract` names, into its shardings; each process reads its own shards."""
    args = ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    if stores.scheme_of(path) == "s3":
        s3.enable()
    # Not Orbax's Checkpointer: it ends with a barrier that a process that cannot read never reaches.
    return ocp.PyTreeCheckpointHandler().restore(path / "state", args=args)


def check_conditions(config: Mapping[str, Any], path: str | AnyPath) -> None:
    """Raises UserError unless a config names this program's conditions in the same order."""
    there = tuple(config.get("conditions", conditions.names()))
    if there != conditions.names():
        raise UserError(
            f"{path}: trained with the conditions {', '.join(there)}, but this program has "
            f"{', '.join(conditions.names())}; name the modules that register the others with --plugins"
        )


def check_same_model(
    saved: dict[str, Any],
    wanted: dict[str, Any],
    path: str | AnyPath,
    advice: str = "use the config it was trained with or another --workdir",
) -> None:
    """Raises UserError naming the model keys in which a checkpoint differs from the config, and ending in `advice`."""
    # A key that the checkpoint lacks was introduced after it, with a default that means what was before.
    saved, wanted = (dataclasses.asdict(ModelConfig()) | dict(model) for model in (saved, wanted))
    differ = [
        f"model.{key}={_plain(saved.get(key))} there, {_plain(wanted.get(key))} here"
        for key in sorted(saved.keys() | wanted.keys())
        if key not in _COMPUTE_KEYS and _plain(saved.get(key)) != _plain(wanted.get(key))
    ]
    if differ:
        raise UserError(f"{path}: checkpoint of another model shape ({'; '.join(differ)}); {advice}")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def find_checkpoint(path: str | AnyPath) -> AnyPath:
    """The checkpoint folder for a workdir, `checkpoints/STEP`, `stages/NAME` or a folder of those.

    For a workdir, the newest running checkpoint, or else the last stage's. Raises UserError if nothing is there.
    """
    path = stores.absolute(path)
    try:
        with stores.as_os_error(path):
            there = path.is_dir()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a checkpoint that these credentials can read") from error
    if not there:
        raise UserError(
            f"{path}: no such checkpoint directory; give a run's --workdir, checkpoints/STEP or stages/NAME"
        )
    if (path / "state").is_dir() and is_complete(path):
        return path
    for folder in (path / "checkpoints", path):
        if steps := [p for p in folder.glob("*") if p.name.isdigit() and is_complete(p)]:
            return max(steps, key=lambda p: int(p.name))
    for folder in (path / "stages", path):
        if stages := [p for p in folder.glob("*") if is_complete(p)]:
            return max(stages, key=lambda p: read_meta(p)["step"])
    raise UserError(f"{path}: holds no checkpoint; expected checkpoints/STEP/ or stages/NAME/ in it")


def read_meta(path: AnyPath) -> dict[str, Any]:
    """The JSON item of a checkpoint folder; UserError if it is unreadable, damaged or not complete."""
    path = stores.get_path(path)
    try:
        with stores.as_os_error(path):
            if stores.is_remote(path) and not is_complete(path):
                raise UserError(f"{path}: not a complete checkpoint; use another one of the run")
            meta = json.loads((path / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:  # not JSON, or not text
        raise UserError(f"{path}: not a readable checkpoint ({error}); use another one of the run") from error
    missing = [key for key in _META_KEYS if not isinstance(meta, dict) or key not in meta]
    if missing or meta.get("sha256") not in (None, digest({k: v for k, v in meta.items() if k != "sha256"})):
        why = f"no {missing[0]}" if missing else "its sha256 does not match"
        raise UserError(f"{path}: damaged meta/metadata ({why}); use another one of the run")
    return meta


def network_config(path: AnyPath) -> tuple[ConfigDict, dict[str, Any]]:
    """The resolved config and the JSON item of a checkpoint folder.

    Raises:
      UserError: it cannot be read, belongs to another training (such as the VAE's), or has other conditions.
    """
    meta = read_meta(path)
    if "model" not in meta["config"]:
        raise UserError(f"{path}: not a checkpoint of experiments.train; give one of those, or an export")
    check_conditions(meta["config"], path)
    return ConfigDict(meta["config"]), meta


def load_for_inference(
    path: str | AnyPath, *, use_ema: bool = True, shardings: Any = None
) -> tuple[ConfigDict, Any, dict[str, Any]]:
    """`load.load_parameters` for training checkpoints only; UserError also for values that are not finite."""
    path = find_checkpoint(path)
    config, meta = network_config(path)
    shapes = make_network(config).abstract_params
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    abstract = rules.with_shardings(shapes, shardings)
    part = "ema" if use_ema else "params"
    params = restore(path, {part: abstract})[part]
    if bad := fingerprint(params).not_finite:
        raise UserError(f"{path}: NaN or infinity in {part}/{bad}; use another checkpoint of the run")
    return config, params, {"step": meta["step"], "stage": meta["stage"], "path": str(path)}


def digest(meta: Mapping[str, Any]) -> str:
    """sha256 of a checkpoint's JSON."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
