"""Checkpoints as safetensors + config, the durable format for serving; `checkpoints.load` reads them.

A directory of:

    model.safetensors        parameters by dotted name, one tensor per block (`dual.blocks.3.img_q.kernel`),
                             or model-00001-of-00004.safetensors … with model.safetensors.index.json
    vae.safetensors          the VAE, unchanged, if the config names one
    config.json              the resolved config, conditions, step, stage and what the parameters are

Kernels are (in, out). In memory, blocks of one kind are stacked along a leading layer axis for the scan; files hold
them separately, as other tools expect.

With a naming of `weights.formats`, these replace model.safetensors:

    transformer/             the base part under the original's names, with diffusers' config.json where it has one
    conditions.safetensors   what OmniHuman adds to the base (audio, pose, null text), by dotted name
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from ml_collections import ConfigDict

from omnihuman_jax import conditions
from omnihuman_jax.checkpoints.load import BASE_FOLDER, CONDITIONS_FILE, CONFIG_FILE, HEAD, KIND, VAE_FILE, VERSION
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.models.vae.vae import encoder_sha256
from omnihuman_jax.weights import formats
from omnihuman_jax.weights.names import STACKED, is_condition, leaf_names
from omnihuman_jax.weights.write import Renamed, save_tensors, write_files

FORMATS = ("safetensors",)
MAX_SHARD_BYTES = 5 * 10**9


def to_tensors(params: Any) -> dict[str, np.ndarray]:
    """Nested dict of arrays -> dotted name -> array, with the stacked blocks separated and values unchanged."""
    tensors = {}
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        value = np.asarray(value)
        tensors |= zip(leaf_names(path, value.shape), value if path[0].key in STACKED else [value])
    return tensors


def _write_renamed(folder: Path, config: ConfigDict, tensors: Mapping[str, np.ndarray], naming: str, size: int) -> int:
    """The base part in another naming, and the condition modules in a file next to it."""
    network = make_network(config)
    base = folder / BASE_FOLDER
    base.mkdir()
    entries = formats.base_entries(naming, network.config, network.abstract_params)
    described = formats.FORMATS[naming].class_config(network.config)
    stem = "diffusion_pytorch_model" if described else "model"
    count = write_files(base, Renamed(tensors, entries), stem, max_bytes=size, metadata={"format": "pt"})
    if described:
        _write_json(base / CONFIG_FILE, described)
    ours = {name: tensors[name] for name in tensors if is_condition(name)}
    stem = CONDITIONS_FILE.removesuffix(".safetensors")
    return count + write_files(folder, ours, stem, metadata={"format": KIND})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _head(config: ConfigDict, info: Mapping[str, Any], *, ema: bool, count: int) -> dict[str, Any]:
    """What an export says of itself: its kind, what it was exported from, and the resolved config."""
    head = {
        "kind": KIND,
        "version": VERSION,
        "step": info["step"],
        "stage": info["stage"],
        "ema": ema,
        "conditions": list(conditions.names()),
        "parameters": count,
    }
    if config.vae.checkpoint:
        head["vae_sha256"] = encoder_sha256(config.vae.checkpoint)
    return head | {"config": json.loads(json.dumps(config.to_dict()))}


def save_file(
    output: str | Path, config: ConfigDict, params: Any, info: Mapping[str, Any], *, ema: bool, dtype: str
) -> Path:
    """Writes one safetensors file with parameters in `dtype`; the config is in its header, the VAE stays where it is.

    Args:
      output: file to write, ending in .safetensors.
      config, params, info, ema: as in `save`.
      dtype: "bfloat16" or "float32".

    Raises:
      UserError: the file exists or cannot be written, or the VAE file is missing.
    """
    output = check_output(output)
    if config.vae.checkpoint and not Path(config.vae.checkpoint).is_file():
        raise UserError(f"vae.checkpoint={config.vae.checkpoint}: no such file; run the export where the training ran")
    tensors = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in to_tensors(params).items()}
    head = _head(config, info, ema=ema, count=sum(value.size for value in tensors.values()))
    try:
        save_tensors(output, tensors, {"format": KIND, HEAD: json.dumps(head)})
    except (OSError, safetensors.SafetensorError) as error:
        Path(f"{output}.partial").unlink(missing_ok=True)
        raise UserError(f"--output={output}: cannot be written ({error}); name another file") from error
    return output


def check_format(name: str) -> None:
    """Raises UserError for an unknown export format."""
    if name not in FORMATS:
        raise UserError(f"--format={name}: unknown export format; there is {', '.join(FORMATS)}")


def check_output(output: str | Path) -> Path:
    """The absolute path; UserError if its parent is missing, or it is a file or a directory that is not empty."""
    output = Path(output).absolute()
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: the directory {output.parent} does not exist; make it first")
    if output.exists() and output.suffix == ".safetensors":
        raise UserError(f"--output={output}: exists; name a new file")
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
    naming: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes an exported directory; it appears complete or not at all.

    Args:
      output: new or empty directory; its parent must exist.
      config: resolved config of the checkpoint; the file `vae.checkpoint`, if set, is copied.
      params: nested dict of parameters, or a lazy mapping from dotted names to arrays.
      info: `step` and `stage` of the checkpoint.
      naming: one of `weights.formats.FORMATS` for the base part; "" = our own names.

    Raises:
      UserError: the directory is not empty or cannot be written, or the VAE file is missing.
    """
    output = check_output(output)
    vae = Path(config.vae.checkpoint) if config.vae.checkpoint else None
    if vae and not vae.is_file():
        raise UserError(f"vae.checkpoint={vae}: no such file; run the export where the training ran")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as made:
            folder = Path(made) / output.name
            folder.mkdir()
            tensors = to_tensors(params) if isinstance(params, dict) else params
            if naming:
                count = _write_renamed(folder, config, tensors, naming, max_shard_bytes)
            else:
                count = write_files(folder, tensors, "model", max_bytes=max_shard_bytes, metadata={"format": KIND})
            head = _head(config, info, ema=ema, count=count)
            if vae:
                shutil.copyfile(vae, folder / VAE_FILE)
                head["config"]["vae"] |= {"checkpoint": VAE_FILE}
            if naming:
                head["naming"] = naming
            _write_json(folder / CONFIG_FILE, head)
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another directory") from error
    return output
