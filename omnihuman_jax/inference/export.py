"""Checkpoints as safetensors + config, the durable format for serving, and back.

A directory of:

    model.safetensors        parameters by dotted name, one tensor per block (`dual.blocks.3.img_q.kernel`),
                             or model-00001-of-00004.safetensors … with model.safetensors.index.json
    vae.safetensors          the VAE, as it is
    config.json              the resolved config, conditions, step, stage and what the parameters are

Kernels are (in, out). In memory the blocks of one kind are stacked along a leading layer axis, because
they run under one scan; files hold them apart, because that is what other tools expect.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from ml_collections import ConfigDict

from omnihuman_jax.conditions import CONDITIONS
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.checkpoints import find_checkpoint, load_for_inference, read_meta
from omnihuman_jax.training.state import make_network

FORMATS = ("safetensors",)
CONFIG_FILE, WEIGHTS_FILE, VAE_FILE = "config.json", "model.safetensors", "vae.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
KIND, VERSION = "omnihuman_jax.model", 1
MAX_SHARD_BYTES = 5 * 10**9

# Groups whose parameters carry a leading layer axis in memory.
STACKED = ("dual", "single")
_BLOCK = re.compile(rf"^({'|'.join(STACKED)})\.blocks\.(\d+)\.(.+)$")


def to_tensors(params: Any) -> dict[str, np.ndarray]:
    """Nested parameters as a flat dict of dotted names, the stacked blocks apart.

    Args:
      params: nested dict of arrays.

    Returns:
      name -> array; bit for bit the values of `params`.
    """
    tensors = {}
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        group, *rest = (str(key.key) for key in path)
        value = np.asarray(value)
        if group not in STACKED:
            tensors[".".join((group, *rest))] = value
            continue
        for i, block in enumerate(value):
            tensors[".".join((group, "blocks", str(i), *rest))] = block
    return tensors


def from_tensors(tensors: Mapping[str, np.ndarray], abstract: Any, where: str | Path = "") -> Any:
    """The inverse of `to_tensors`, on the default device.

    Args:
      tensors: name -> array.
      abstract: nested dict of `jax.ShapeDtypeStruct`: the parameters the model has.
      where: file or directory named in errors.

    Raises:
      UserError: a tensor is missing, left over, or of another shape.
    """
    left = set(tensors)

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{where}: tensor {name} is missing; it does not fit {CONFIG_FILE}; export it again")
        if tensors[name].shape != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tensors[name].shape}, the model of {CONFIG_FILE} needs {shape}; "
                f"export it again"
            )
        left.discard(name)
        return tensors[name]

    def one(path, leaf):
        group, *rest = (str(key.key) for key in path)
        if group not in STACKED:
            return jnp.asarray(take(".".join((group, *rest)), leaf.shape))
        names = [".".join((group, "blocks", str(i), *rest)) for i in range(leaf.shape[0])]
        return jnp.asarray(np.stack([take(name, leaf.shape[1:]) for name in names]))

    params = jax.tree_util.tree_map_with_path(one, abstract)
    if left:
        raise UserError(f"{where}: tensor {min(left)} is not part of the model of {CONFIG_FILE}; export it again")
    return params


def shard(tensors: Mapping[str, np.ndarray], max_bytes: int) -> list[dict[str, np.ndarray]]:
    """Cuts tensors, in order, into files of at most `max_bytes` (a larger tensor has its own)."""
    shards: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for name, value in tensors.items():
        if shards[-1] and used + value.nbytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = value
        used += value.nbytes
    return shards


def _write_weights(folder: Path, tensors: Mapping[str, np.ndarray], max_bytes: int) -> None:
    shards = shard(tensors, max_bytes)
    metadata = {"format": KIND}
    if len(shards) == 1:
        safetensors.numpy.save_file(_contiguous(shards[0]), folder / WEIGHTS_FILE, metadata=metadata)
        return
    where = {}
    for i, part in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(_contiguous(part), folder / file, metadata=metadata)
        where |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in tensors.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


def _contiguous(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    index = folder / INDEX_FILE
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS_FILE]
    tensors = {}
    for file in files:
        # The names come from a file, which must not lead out of the directory.
        path = folder / Path(file).name
        try:
            tensors |= safetensors.numpy.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); export the checkpoint again") from error
    return tensors


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export the checkpoint again") from error


def is_exported(path: str | Path) -> bool:
    """Whether `path` is a directory that `save` wrote."""
    path = Path(path)
    return (path / CONFIG_FILE).is_file() and ((path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file())


def check_format(name: str) -> None:
    """Raises UserError for a format that cannot be written, naming those that can."""
    if name not in FORMATS:
        raise UserError(f"--format={name}: unknown export format; there is {', '.join(FORMATS)}")


def check_output(output: str | Path) -> Path:
    """Raises UserError unless the directory `output` can be made: its parent exists and nothing is in the way."""
    output = Path(output).absolute()
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: the directory {output.parent} does not exist; make it first")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output}: exists and is not an empty directory; name a new one")
    return output


def save(
    output: str | Path,
    config: ConfigDict,
    params: Any,
    info: Mapping[str, Any],
    *,
    ema: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes an exported directory; it appears complete or not at all.

    Args:
      output: directory to make; its parent must exist.
      config: resolved config of the checkpoint; `vae.checkpoint` is copied into the directory.
      params: nested dict of parameters.
      info: `step` and `stage` of the checkpoint.
      ema: whether `params` are the EMA (recorded).
      max_shard_bytes: largest weight file.

    Returns:
      The directory.

    Raises:
      UserError: the place is taken or cannot be written, or the VAE file is missing.
    """
    output = check_output(output)
    vae = Path(config.vae.checkpoint)
    if not vae.is_file():
        raise UserError(f"vae.checkpoint={vae}: no such file; run the export where the training ran")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as made:
            folder = Path(made) / output.name
            folder.mkdir()
            tensors = to_tensors(params)
            _write_weights(folder, tensors, max_shard_bytes)
            shutil.copyfile(vae, folder / VAE_FILE)
            plain = json.loads(json.dumps(config.to_dict()))
            plain["vae"] |= {"checkpoint": VAE_FILE}
            head = {
                "kind": KIND,
                "version": VERSION,
                "step": info["step"],
                "stage": info["stage"],
                "ema": ema,
                "conditions": list(CONDITIONS),
                "parameters": int(sum(value.size for value in tensors.values())),
                "vae_sha256": hashlib.sha256(vae.read_bytes()).hexdigest(),
            }
            _write_json(folder / CONFIG_FILE, head | {"config": plain})
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another directory") from error
    return output


def read_config(path: str | Path) -> tuple[ConfigDict, dict[str, Any]]:
    """The resolved config and the head (`step`, `stage`, `ema`, …) of an exported directory, without its weights.

    Raises:
      UserError: another kind or version, or conditions in another order than this program's.
    """
    path = Path(path).absolute()
    head = _read_json(path / CONFIG_FILE)
    found = (head.get("kind"), head.get("version")) if isinstance(head, dict) else (None, None)
    if found != (KIND, VERSION):
        raise UserError(f"{path / CONFIG_FILE}: kind and version are {found}, this program reads {(KIND, VERSION)}")
    if tuple(head["conditions"]) != CONDITIONS:
        raise UserError(
            f"{path / CONFIG_FILE}: conditions are {head['conditions']}, this program has {list(CONDITIONS)}"
        )
    config = ConfigDict(head.pop("config"))
    config.vae.checkpoint = str(path / VAE_FILE)
    return config, head


def load_config(path: str | Path) -> ConfigDict:
    """The resolved config of a training checkpoint or an exported directory, without its weights.

    Raises:
      UserError: nothing there, or it cannot be read.
    """
    if is_exported(path):
        return read_config(path)[0]
    return ConfigDict(read_meta(find_checkpoint(path))["config"])


def load(path: str | Path, *, use_ema: bool | None = None) -> tuple[ConfigDict, Any, dict[str, Any]]:
    """Loads the parameters of a training checkpoint or of an exported directory.

    Args:
      path: workdir, `checkpoints/STEP`, `stages/NAME`, or an exported directory.
      use_ema: the EMA or the raw parameters; None means the EMA of a checkpoint, and of an exported directory
        whichever kind it holds.

    Returns:
      (resolved config, nested dict of parameters, info with `step`, `stage`, `path` and `ema`).

    Raises:
      UserError: nothing there, it cannot be read, or the kind of parameters asked for is not in it.
    """
    if not is_exported(path):
        use_ema = use_ema is not False
        config, params, info = load_for_inference(path, use_ema=use_ema)
        return config, params, info | {"ema": use_ema}
    config, head = read_config(path)
    if use_ema is not None and head["ema"] != use_ema:
        kinds = ("raw", "EMA")
        raise UserError(
            f"{path}: holds the {kinds[head['ema']]} parameters, the {kinds[use_ema]} ones were asked for; "
            f"use --{'' if head['ema'] else 'no'}ema, or export the checkpoint the other way"
        )
    params = from_tensors(_read_weights(Path(path)), make_network(config).abstract_params, path)
    return config, params, {name: head[name] for name in ("step", "stage", "ema")} | {"path": str(path)}
