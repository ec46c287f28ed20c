"""Writing safetensors: our parameters in another naming, in files of bounded size with an index."""

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy

from omnihuman_jax.errors import UserError
from omnihuman_jax.weights.names import Entry, OnAccess
from omnihuman_jax.weights.read import INDEX


class Renamed(OnAccess):
    """Our tensors under another format's names and in its layout, converted on access."""

    def __init__(self, tensors: Mapping[str, np.ndarray], entries: Sequence[Entry]):
        super().__init__({entry.theirs: entry for entry in entries})
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        parts = [entry.layout.to_theirs(self._tensors[ours], entry.patch) for ours in entry.ours]
        return np.concatenate(parts, entry.axis)


def assign(sizes: Mapping[str, int], max_bytes: float) -> list[list[str]]:
    """Splits tensors, in order, into files of at most `max_bytes`; a larger tensor gets its own file."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if files[-1] and used + size > max_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def save_tensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes contiguous arrays and metadata to a temporary file in the same directory, then renames it to `path`.

    Raises UserError if a tensor holds NaN or infinity; nothing is written then.
    """
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: tensor {name} holds NaN or infinity and is not written; use other weights")
    partial = Path(f"{path}.partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = stat.S_IMODE(partial.stat().st_mode)  # of any new file; safetensors' own are readable to their owner only
    safetensors.numpy.save_file(dict(tensors), partial, metadata=dict(metadata))
    partial.chmod(mode)
    os.replace(partial, path)


def write_files(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    stem: str,
    *,
    max_bytes: float = math.inf,
    metadata: Mapping[str, str],
) -> int:
    """Writes STEM.safetensors, or STEM-00001-of-0000N.safetensors … with an index, in an existing directory.

    Each tensor is read twice, and memory holds one file of at most `max_bytes` at a time. Returns the number of values.
    """
    sizes, count = {}, 0
    for name in tensors:
        value = tensors[name]
        sizes[name], count = value.nbytes, count + value.size
    files = assign(sizes, max_bytes)
    where = {}
    for i, names in enumerate(files, 1):
        file = f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else f"{stem}.safetensors"
        save_tensors(folder / file, {name: np.ascontiguousarray(tensors[name]) for name in names}, metadata)
        where |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")
    return count
