"""Results on disk, by digest of what they were made from, so that nothing is decoded twice.

DIR/cache/AB/KEY.json holds a result; KEY.npz the arrays and KEY.jpg the thumbnail of a clip. Files appear atomically.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.raw.fetch import sha256_of
from omnihuman_jax.errors import UserError

DIGESTS = "digests.json"


def key_of(*parts: Any) -> str:
    """Hex sha256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Store:
    """The results in a directory; several processes may write the same."""

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)

    def path(self, key: str, suffix: str) -> pathlib.Path:
        """Where a result is or will be."""
        return self.directory / "cache" / key[:2] / f"{key}{suffix}"

    def read(self, key: str) -> dict[str, Any] | None:
        """A result; None if there is none, or it is damaged."""
        try:
            return json.loads(self.path(key, ".json").read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, key: str, result: Mapping[str, Any], arrays: Mapping[str, np.ndarray], image: bytes = b"") -> None:
        """Writes a result, its .json last, so that whoever finds that finds all. UserError if it cannot be written."""
        if arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)
            self._put(self.path(key, ".npz"), buffer.getvalue())
        if image:
            self._put(self.path(key, ".jpg"), image)
        self._put(self.path(key, ".json"), (json.dumps(result) + "\n").encode())

    def _put(self, path: pathlib.Path, data: bytes) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another") from error

    def digests(self, paths: list[pathlib.Path]) -> dict[pathlib.Path, str]:
        """sha256 of files; those whose size and time of change are as last time are not read again.

        A file that cannot be read has the digest "".
        """
        known = self._known_digests()
        found = {}
        for path in paths:
            try:
                stat = path.stat()
                mark = [stat.st_size, stat.st_mtime_ns]
                entry = known.get(str(path.absolute()))
                found[path] = entry[2] if entry and entry[:2] == mark else sha256_of(path)
            except OSError:
                found[path] = ""
                continue
            known[str(path.absolute())] = [*mark, found[path]]
        self._put(self.directory / DIGESTS, (json.dumps(known, indent=0, sort_keys=True) + "\n").encode())
        return found

    def _known_digests(self) -> dict[str, list]:
        try:
            known = json.loads((self.directory / DIGESTS).read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
