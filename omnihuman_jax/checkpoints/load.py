"""Configs and parameters of training checkpoints and of exported directories and files."""

import json
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from ml_collections import ConfigDict

from omnihuman_jax import stores
from omnihuman_jax.checkpoints.read import check_conditions, find_checkpoint, load_for_inference, network_config
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.weights import formats
from omnihuman_jax.weights import load as weights_load
from omnihuman_jax.weights.load import Source
from omnihuman_jax.weights.names import account, is_condition, our_shapes, same_names
from omnihuman_jax.weights.read import open_files, read_json

# An exported directory; `checkpoints.export` describes it.
CONFIG_FILE, WEIGHTS_FILE, VAE_FILE = "config.json", "model.safetensors", "vae.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
BASE_FOLDER, CONDITIONS_FILE = "transformer", "conditions.safetensors"
KIND, VERSION = "omnihuman_jax.model", 1
HEAD = "head"  # of a single exported file, in its header: what an exported directory has in CONFIG_FILE


def is_exported(path: str | Path) -> bool:
    """Whether `path` is a directory that `export.save` wrote, or a file, as `export.save_file` writes it.

    Those are local; UserError for such a file in an object store.
    """
    remote = stores.is_remote(path)
    if remote and not str(path).endswith(".safetensors"):
        return False
    if remote:
        raise UserError(f"{path}: exported parameters are read from local disks; copy the file first")
    path = Path(path)
    if path.is_file():
        return path.suffix == ".safetensors"
    weights = (WEIGHTS_FILE, INDEX_FILE, CONDITIONS_FILE)
    return (path / CONFIG_FILE).is_file() and any((path / name).is_file() for name in weights)


def read_config(path: str | Path) -> tuple[ConfigDict, dict[str, Any]]:
    """The resolved config and the head (`step`, `stage`, `ema`, …) of an exported directory or file, without weights.

    Raises UserError for another kind or version, or other conditions than this program's.
    """
    path = Path(path).absolute()
    where = path if path.is_file() else path / CONFIG_FILE
    head = read_json(where) if path.is_dir() else _head_in_file(path)
    found = (head.get("kind"), head.get("version")) if isinstance(head, dict) else (None, None)
    if found != (KIND, VERSION):
        raise UserError(f"{where}: kind and version are {found}, this program reads {(KIND, VERSION)}")
    check_conditions(head, path)
    config = ConfigDict(head.pop("config"))
    if config.vae.checkpoint and path.is_dir():
        config.vae.checkpoint = str(path / VAE_FILE)
    return config, head


def _head_in_file(path: Path) -> Any:
    """What the header of a file of `export.save_file` says; None if it says nothing."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get(HEAD, "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); export it again") from error


def load_config(path: str | Path) -> ConfigDict:
    """The resolved config of a training checkpoint or of what was exported; UserError if it cannot be read."""
    return read_config(path)[0] if is_exported(path) else network_config(find_checkpoint(path))[0]


def open_tensors(path: str | Path, config: ConfigDict, naming: str = "") -> Mapping[str, np.ndarray]:
    """The parameters of an exported directory or file by dotted name, read lazily.

    Raises UserError if a file is damaged, or a tensor is missing, left over, or of another shape.
    """
    path, network = Path(path), make_network(config)
    shapes = our_shapes(network.abstract_params)
    if not naming:
        index = path / INDEX_FILE
        file = path if path.is_file() else path / WEIGHTS_FILE
        return _open_same(index if index.is_file() else file, shapes)
    files = open_files(path / BASE_FOLDER)
    entries = formats.base_entries(naming, network.config, network.abstract_params)
    formats.check_files(naming, files, entries, network.config, network.abstract_params)
    ours = {name: shape for name, shape in shapes.items() if is_condition(name)}
    return ChainMap(Source(files, entries), _open_same(path / CONDITIONS_FILE, ours))


def _open_same(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Source:
    """Tensors under our own names, from a file or the files of an index."""
    files, entries = open_files(path), same_names(shapes)
    account(entries, files.shapes, path, f"it does not fit {CONFIG_FILE}; export it again")
    return Source(files, entries)


def load_parameters(
    path: str | Path, *, use_ema: bool | None = None, shardings: Any = None
) -> tuple[ConfigDict, Any, dict[str, Any]]:
    """Loads the parameters of a training checkpoint or of an exported directory or file.

    Args:
      path: workdir, `checkpoints/STEP`, `stages/NAME`, or an exported directory or file.
      use_ema: EMA or raw parameters; None means EMA for a checkpoint, and what it holds for an export.
      shardings: nested dict of shardings to load into; None = one device.

    Returns:
      (resolved config, nested dict of parameters, info with `step`, `stage`, `path` and `ema`).

    Raises:
      UserError: nothing there, it cannot be read, or it does not hold the requested kind of parameters.
    """
    if not is_exported(path):
        use_ema = use_ema is not False
        config, params, info = load_for_inference(path, use_ema=use_ema, shardings=shardings)
        return config, params, info | {"ema": use_ema}
    config, head = read_config(path)
    if use_ema is not None and head["ema"] != use_ema:
        kinds = ("raw", "EMA")
        raise UserError(
            f"{path}: holds the {kinds[head['ema']]} parameters, but the {kinds[use_ema]} ones were requested; "
            f"use --{'' if head['ema'] else 'no'}ema, or export the checkpoint the other way"
        )
    tensors, abstract = open_tensors(path, config, head.get("naming", "")), make_network(config).abstract_params
    params = weights_load.load(tensors, abstract, shardings, dtypes="model" if shardings else "file")
    return config, params, {name: head[name] for name in ("step", "stage", "ema")} | {"path": str(path)}
