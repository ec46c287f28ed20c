"""Restores a run from its newest intact checkpoint; damaged ones are moved to `damaged/`."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from omnihuman_jax.checkpoints import folders
from omnihuman_jax.checkpoints.fingerprint import fingerprint, listed
from omnihuman_jax.checkpoints.read import check_conditions, check_same_model, read_meta, restore
from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding.processes import agreed_problem, agreed_steps, broadcast_from_main, is_main
from omnihuman_jax.sharding.rules import path_name
from omnihuman_jax.stores import AnyPath

RETRY_SECONDS = (0.5, 2.0, 8.0)  # pauses between attempts to read a state


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored train state, the JSON item saved with it, and its folder."""

    state: Any
    meta: dict[str, Any]
    path: AnyPath


def same_network(saved: Mapping[str, Any], config: ConfigDict, path: AnyPath) -> None:
    """Raises UserError if the saved config has another network shape or other conditions."""
    if "model" not in saved:
        raise UserError(f"{path}: not a checkpoint of experiments.train; use another --workdir")
    check_conditions(saved, path)
    check_same_model(saved["model"], config.model.to_dict(), path)


def restore_newest(
    workdir: AnyPath,
    stages: list[AnyPath],
    abstract: Any,
    config: ConfigDict,
    log: Callable[[str], None],
    check: Callable[[Mapping[str, Any], ConfigDict, AnyPath], None] = same_network,
) -> Restored | None:
    """The newest intact running checkpoint, or else stage checkpoint; None for a run without running checkpoints.

    All processes decide together: they skip a checkpoint that any of them cannot read.

    Args:
      stages: folders of the stages' checkpoints, newest first.
      abstract: NamedTuple of shapes, dtypes and shardings of the state.
      log: called with a line for every damaged checkpoint.
      check: raises UserError if a saved config (plain) describes another model than `config`.

    Raises:
      UserError: the checkpoint holds a model of another shape, or there are checkpoints and none can be read.
    """
    folder = workdir / "checkpoints"
    steps = agreed_steps([int(p.name) for p in folder.glob("*") if p.name.isdigit()])
    if not steps:
        return None
    broken: list[tuple[AnyPath, str]] = []
    for path in [*(folder / str(step) for step in reversed(steps)), *stages]:
        restored, problem = _try(path, abstract, config, check)
        if restored:
            _set_aside(workdir, broken, log)
            return restored
        if broadcast_from_main(path.is_dir()):
            broken.append((path, problem))
    problems = "; ".join(f"{path}: {problem}" for path, problem in broken)
    raise UserError(
        f"{workdir}: no checkpoint can be read ({problems}); repair one, or move the folder checkpoints/ "
        f"away to train from the start"
    )


def _try(path: AnyPath, abstract: Any, config: ConfigDict, check: Callable[..., None]) -> tuple[Restored | None, str]:
    """The checkpoint, or why it cannot be used; the same in all processes."""
    meta, problem = None, ""
    try:
        meta = read_meta(path)
        if path.name.isdigit() and meta["step"] != int(path.name):
            problem = f"damaged: its metadata is of step {meta['step']}"
    except UserError as error:
        problem = str(error)
    if problem := agreed_problem(problem):
        return None, problem
    check(meta["config"], config, path)
    # Restored as it was saved and cast afterwards: a config may change the moments' dtypes.
    dtypes = meta.get("dtypes", {})
    saved = jax.tree_util.tree_map_with_path(
        lambda at, x: jax.ShapeDtypeStruct(x.shape, dtypes.get(path_name(at), x.dtype), sharding=x.sharding), abstract
    )
    state, problem = _read_state(path, saved)
    if problem:
        differ = _optimizer_differences(meta["config"], config)
        problem += f"; the config differs from the checkpoint's in {differ}" if differ else ""
    if problem := agreed_problem(problem):
        return None, problem
    found, saved = fingerprint(state), meta.get("fingerprint", {})
    if found.not_finite:
        return None, f"damaged: NaN or infinity in {found.not_finite}"
    if wrong := listed([name for name, total in found.sums.items() if saved.get(name, total) != total]):
        return None, f"damaged: the values of {wrong} do not match their checksums"
    return Restored(jax.tree.map(_cast, state, abstract), meta, path), ""


def _cast(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    if x.dtype == wanted.dtype:
        return x
    return jax.jit(lambda x: x.astype(wanted.dtype), out_shardings=wanted.sharding)(x)


def _set_aside(workdir: AnyPath, broken: list[tuple[AnyPath, str]], log: Callable[[str], None]) -> None:
    for path, problem in broken:
        if is_main():
            folders.move(path, workdir / "damaged" / path.name)
        log(f"checkpoint {path} is skipped and moved to damaged/: {problem}")
    if broken:
        agreed_problem("")  # all processes wait until they are moved


def _read_state(path: AnyPath, abstract: Any) -> tuple[Any, str]:
    """This process's shards, or why they cannot be read; does not wait for other processes."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return type(abstract)(**restore(path, abstract._asdict())), ""
        # Damaged files make Orbax, tensorstore and the decompressor raise anything; an older checkpoint may be intact.
        except Exception as error:  # noqa: BLE001
            if pause is None:
                return None, f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            time.sleep(pause)  # the file system may have failed only for a moment
    raise AssertionError


def _optimizer_differences(saved: Mapping[str, Any], config: ConfigDict) -> str:
    there, here = saved.get("optimizer", {}), config.optimizer.to_dict()
    return "; ".join(
        f"optimizer.{key}={there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]
    )
