"""Reading safetensors, a tensor or some of its rows at a time, from one file or from shards with or without an index.

This module parses the header itself, to name the first tensor lost in a damaged file and to read rows of a tensor.
Pickles are never opened. Every importer reads through this module.
"""

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from omnihuman_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
MISSING_LISTED = 12  # missing shards that an error names
MAX_HEADER_BYTES = 10**8  # the format's own limit


class Stored(NamedTuple):
    """Where a tensor is stored: row by row, from byte `start` of a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class Files:
    """The tensors of a checkpoint on disk.

    Attributes:
      path: the file or index that was opened, for errors.
      stored: name -> where it is stored.
      prefix: removed from the names in the file.
    """

    def __init__(self, path: Path, stored: Mapping[str, Stored], prefix: str = ""):
        self.path, self.stored, self.prefix = path, stored, prefix

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: stored.shape for name, stored in self.stored.items()}

    def settings(self, name: str = "config.json") -> dict[str, Any]:
        """The JSON object in a file next to the weights; {} if there is no such file, UserError if it is unreadable."""
        path = self.path.parent / name
        found = read_json(path) if path.is_file() else {}
        return found if isinstance(found, dict) else {}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a contiguous slice of its first axis, in its dtype.

        Raises UserError if the file ends inside the tensor, or a value is not finite.
        """
        file, dtype, shape, start = self.stored[name]
        if rows is not None:
            first, stop, _ = rows.indices(shape[0])
            start += first * math.prod(shape[1:]) * dtype.itemsize
            shape = (stop - first, *shape[1:])
        count = math.prod(shape)
        try:
            raw = np.fromfile(file, np.uint8, count * dtype.itemsize, offset=start)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}), at tensor {name}") from error
        if raw.size != count * dtype.itemsize:
            raise UserError(f"{file}: ends inside tensor {name}; get the file again")
        value = raw.view(dtype).reshape(shape)
        if not np.isfinite(value).all():
            raise UserError(f"{file}: tensor {name} holds NaN or infinity; get the file again, or another checkpoint")
        return value


def open_files(path: str | Path, unused: Sequence[str] = ()) -> Files:
    """Opens a safetensors file, an index of shards, or a directory with either; reads headers only.

    A shard (model-00001-of-00004.safetensors) stands for all of them. Tensors whose whole name matches one of the
    regular expressions `unused` are skipped.

    Raises:
      UserError: no such file, a pickle, a damaged file, a missing shard, an unsupported dtype.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_directory(path)
    _check_no_pickle(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a safetensors file, its index, or the directory with them")
    names = _weight_map(path) if path.name.endswith(".json") else {}
    stored: dict[str, Stored] = {}
    for file in sorted(set(names.values())) or _shards(path):
        for name, where in read_header(path.parent / file, unused).items():
            if name in stored:
                raise UserError(f"{path}: tensor {name} is in {stored[name].file.name} and in {file}; keep one of them")
            stored[name] = where
    for name, file in names.items():
        if not _matches(name, unused) and (name not in stored or stored[name].file.name != file):
            raise UserError(f"{path}: tensor {name} should be in {file}, but is not; get that file again")
    return Files(path, stored)


def _shards(path: Path) -> list[str]:
    """Names of all shards of the checkpoint that this file belongs to; UserError if some are missing."""
    match = SHARD.fullmatch(path.name)
    if not match:
        return [path.name]
    stem, number, count = match.groups()
    names = [f"{stem}-{i:0{len(number)}d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        more = f" and {len(missing) - MISSING_LISTED} more" if len(missing) > MISSING_LISTED else ""
        names = f"{', '.join(missing[:MISSING_LISTED])}{more}"
        raise UserError(f"{path}: is one of {int(count)} shards, without {names}; get all of them")
    return names


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _in_directory(folder: Path) -> Path:
    for pattern in (f"*{INDEX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        series = {match.group(1, 3) if (match := SHARD.fullmatch(file.name)) else file for file in found}
        if len(series) == 1:
            return found[0]
        if found:
            raise UserError(f"{folder}: holds {', '.join(file.name for file in found)}; name the file to read")
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            _check_no_pickle(file)
    raise UserError(f"{folder}: holds no .safetensors file; give the directory with the weights")


def _check_no_pickle(path: Path) -> None:
    """Refuses pickles by name and by their first bytes, because loading one runs arbitrary code."""
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(2)
    if path.suffix in PICKLES or start == b"PK" or (start[:1] == b"\x80" and start[1:] in (b"\x02", b"\x03", b"\x04")):
        command = (
            "python -c \"import torch, safetensors.torch; w = torch.load('IN', map_location='cpu', weights_only=True); "
            "w = w.get('module', w); safetensors.torch.save_file({k: v.clone().contiguous() for k, v in w.items()}, "
            "'OUT')\""
        )
        command = command.replace("IN", str(path)).replace("OUT", str(path.with_suffix(".safetensors")))
        raise UserError(f"{path}: is a pickle, which is unsafe to open; convert it with {command}")


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file of an index; UserError if a file is missing."""
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{path}: has no weight_map from tensors to files; give a safetensors index")
    for name, file in names.items():
        if Path(file).name != file:
            raise UserError(f"{path}: lists tensor {name} in {file}, outside its directory; give another index")
        if not (path.parent / file).is_file():
            raise UserError(f"{path}: lists tensor {name} in {file}, which is missing; get that file too")
    return names


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); get it again") from error


def read_header(path: Path, unused: Sequence[str] = ()) -> dict[str, Stored]:
    """Name -> place of every tensor in one safetensors file, except those that `unused` matches.

    Raises:
      UserError: no safetensors file, a truncated one (naming the first tensor lost), or an unsupported dtype.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{path}: cannot be read (no whole safetensors header in {size} bytes); get it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [(*entry["data_offsets"], name, entry["dtype"], entry["shape"]) for name, entry in header.items()]
            entries = [(int(a), int(b), str(n), str(d), tuple(map(int, shape))) for a, b, n, d, shape in entries]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read (a broken safetensors header: {error}); get it again") from error
    stored = {}
    for first, stop, name, dtype, shape in sorted(entries):
        if 8 + length + stop > size:
            end = 8 + length + stop
            raise UserError(f"{path}: is truncated: tensor {name} ends at byte {end} of {size}; get the file again")
        if _matches(name, unused):
            continue
        if dtype not in DTYPES:
            raise UserError(
                f"{path}: tensor {name} is {dtype}, not one of {', '.join(DTYPES)}; get the unquantised weights"
            )
        if first < 0 or stop - first != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UserError(f"{path}: tensor {name} has {stop - first} bytes, wrong for {dtype} {shape}; get it again")
        stored[name] = Stored(path, DTYPES[dtype], shape, 8 + length + first)
    return stored
