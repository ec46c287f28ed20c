"""Reads open checkpoints in safetensors and fits them to our parameters, every tensor accounted for.

A checkpoint is a .safetensors file, an index (*.safetensors.index.json) beside its shards, or a directory with one of
the two. Tensors are read one at a time from a memory map. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from flax import nnx

from omnihuman_jax.errors import UserError

_FLOATS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
_LISTED = 20  # of each kind of misfit; the rest is counted


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its file, dtype name, shape, and first and last byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint:
    """The tensors of a checkpoint by name, read on demand.

    Attributes:
      path: the file or directory as given.
      directory: where the file lies.
      names: every tensor's name, sorted.
      config: the config.json beside it, or {}.
    """

    def __init__(self, path: str | Path):
        """Raises UserError: no such file, a pickle, not safetensors, truncated, or an index naming a missing file."""
        self.path = Path(path)
        self._places: dict[str, _Place] = {}
        self._maps: dict[Path, np.memmap] = {}
        main = _main_file(self.path)
        for file, expected in _files(main).items():
            found = _header(file)
            missing = sorted(set(expected) - set(found))
            if missing:
                raise UserError(f"{main}: names tensor {missing[0]} in {file.name}, which lacks it; fetch both again")
            self._places |= found
        self.names = sorted(self._places)
        self.directory = main.parent
        config = main.parent / "config.json"
        self.config = _json(config) if config.is_file() else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._places[name].shape

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype, as a view of the memory map.

        Raises:
          UserError: not a floating-point tensor, or with a value that is not finite.
        """
        place = self._places[name]
        if place.dtype not in _FLOATS:
            raise UserError(
                f"{place.file}: tensor {name} has dtype {place.dtype}; floating point is needed "
                f"({', '.join(_FLOATS)}): a quantised checkpoint cannot be imported"
            )
        if place.file not in self._maps:
            self._maps[place.file] = np.memmap(place.file, np.uint8, "r")
        raw = self._maps[place.file][place.begin : place.end]
        value = np.frombuffer(raw, _FLOATS[place.dtype]).reshape(place.shape)
        if not np.isfinite(value.astype(np.float32) if place.dtype == "BF16" else value).all():
            raise UserError(f"{place.file}: tensor {name} holds NaN or infinity; fetch the file again")
        return value


def _main_file(path: Path) -> Path:
    """The .safetensors file or index that `path` means."""
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{path}: holds {', '.join(p.name for p in found)}; name one of them")
        pickles = [p for p in sorted(path.iterdir()) if p.suffix in _PICKLES]
        if not pickles:
            raise UserError(f"{path}: holds no .safetensors file; name the directory of a checkpoint")
        path = pickles[0]
    if path.suffix in _PICKLES:
        raise UserError(
            f"{path}: a pickle, which can run code, is not read; convert it with PyTorch: "
            f"""python -c "import torch, safetensors.torch as s; d = torch.load('{path}', map_location='cpu', """
            f"""weights_only=True); s.save_file({{k: v.clone() for k, v in d.items()}}, """
            f"""'{path.with_suffix(".safetensors")}')\""""
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .safetensors file, its index, or their directory")
    return path


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch it again") from error


def _files(main: Path) -> dict[Path, list[str]]:
    """The safetensors files and, for an index, the tensors it says each has."""
    if main.suffix != ".json":
        return {main: []}
    weight_map = _json(main).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{main}: has no weight_map; it is not the index of a sharded checkpoint")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        place = main.parent / Path(file).name  # a name must not lead out of the directory
        if not place.is_file():
            raise UserError(f"{main}: tensor {name} is in {file}, which is missing; fetch it beside the index")
        files.setdefault(place, []).append(name)
    return files


def _header(file: Path) -> dict[str, _Place]:
    """Where each tensor of one file lies, checked against the file's size."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0] if size >= 8 else size
        if 8 + length > size:
            raise UserError(f"{file}: not a safetensors file, or truncated in its header; fetch it again")
        try:
            header = json.loads(opened.read(length))
            places = {
                name: _Place(file, e["dtype"], tuple(e["shape"]), *(8 + length + o for o in e["data_offsets"]))
                for name, e in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: not a safetensors file ({error!r} in its header); fetch it again") from error
    for name, place in places.items():
        if place.end > size:
            raise UserError(
                f"{file}: truncated: tensor {name} ends at byte {place.end} of a file of {size}; fetch it again"
            )
        itemsize = _FLOATS[place.dtype].itemsize if place.dtype in _FLOATS else None
        if itemsize and place.end - place.begin != itemsize * math.prod(place.shape):
            raise UserError(f"{file}: tensor {name}: {place.end - place.begin} bytes do not make {place.shape}")
    return places


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor in both namings.

    Attributes:
      ours: dotted path of our parameter.
      theirs: name in the checkpoint.
      shape: shape in the checkpoint.
      load: their layout -> ours.
      store: our layout -> theirs.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    load: Callable[[np.ndarray], np.ndarray]
    store: Callable[[np.ndarray], np.ndarray]


def reordered(
    ours: str, theirs: str, our_shape: Sequence[int], axes: Sequence[int], squeezed: Iterable[int] = ()
) -> Rule:
    """A rule that permutes axes: their axis i is our axis axes[i], without their axes `squeezed` of length 1."""
    kept = [i for i in range(len(axes)) if i not in set(squeezed)]
    shape = tuple(our_shape[axes[i]] for i in kept)
    full = tuple(our_shape[a] for a in axes)
    back = np.argsort(axes)
    return Rule(
        ours, theirs, shape, lambda x: x.reshape(full).transpose(back), lambda x: x.transpose(axes).reshape(shape)
    )


def _some(lines: list[str]) -> str:
    more = f" and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return ", ".join(lines[:_LISTED]) + more


def fit(checkpoint: Checkpoint, rules: Sequence[Rule], *, unused: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Our float32 parameters by dotted path.

    Args:
      checkpoint: what was opened.
      rules: one a parameter of ours.
      unused: regular expressions (whole names) of tensors that the checkpoint may have and we have no use for.

    Raises:
      UserError: tensors missing, left over, or of another shape; all of them, in both namings.
    """
    names, known = set(checkpoint.names), {rule.theirs: rule for rule in rules}
    skipped = re.compile("|".join(unused) or r"(?!)")
    extra = sorted(name for name in names - set(known) if not skipped.fullmatch(name))
    missing = [rule for rule in rules if rule.theirs not in names]
    wrong = [rule for rule in rules if rule.theirs in names and checkpoint.shape(rule.theirs) != rule.shape]
    problems = []
    if missing:
        problems.append("missing: " + _some([f"{rule.theirs} (ours: {rule.ours})" for rule in missing]))
    if extra:
        problems.append("not ours: " + _some([f"{name} (ours: none)" for name in extra]))
    if wrong:
        lines = [f"{r.theirs} (ours: {r.ours}) {checkpoint.shape(r.theirs)} instead of {r.shape}" for r in wrong]
        problems.append("of another shape: " + _some(lines))
    if problems:
        raise UserError(f"{checkpoint.path}: the tensors do not fit the model; {'; '.join(problems)}")
    return {r.ours: np.ascontiguousarray(r.load(checkpoint.read(r.theirs)), np.float32) for r in rules}


def parameter_shapes(build: Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's parameters by dotted path, without making it."""
    state = nnx.state(nnx.eval_shape(build), nnx.Param)
    return {".".join(map(str, keys)): tuple(leaf.shape) for keys, leaf in nnx.to_flat_state(state)}


def build_with(build: Callable[[], nnx.Module], tensors: Mapping[str, np.ndarray]) -> Any:
    """The module with these parameters (by dotted path, all of them)."""
    graph, state = nnx.split(nnx.eval_shape(build))
    for keys, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.array(tensors[".".join(map(str, keys))]))  # a copy: the source may be a map of the file
    return nnx.merge(graph, state)


def parameters(module: nnx.Module) -> dict[str, np.ndarray]:
    """A module's parameters by dotted path."""
    state = nnx.state(module, nnx.Param)
    return {".".join(map(str, keys)): np.asarray(leaf[...]) for keys, leaf in nnx.to_flat_state(state)}


def write(
    path: str | Path, tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], metadata: Mapping[str, str]
) -> None:
    """Writes our parameters (by dotted path) in their naming and layout; beside itself first, then renamed."""
    path = Path(path)
    theirs = {rule.theirs: np.ascontiguousarray(rule.store(tensors[rule.ours])) for rule in rules}
    partial = path.with_name(path.name + ".partial")
    safetensors.numpy.save_file(theirs, partial, metadata=dict(metadata))
    os.replace(partial, path)
