"""Files of a data set in an object store, downloaded once to the local disk."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c

from data_pipelines.raw.fetch import cache_dir
from omnihuman_jax import stores
from omnihuman_jax.errors import UserError
from omnihuman_jax.stores import AnyPath

_CHUNK_BYTES = 1 << 20


class CachedFiles:
    """The files below a folder of a store, as local files of the same content.

    A file lies in `records/` of the cache directory (`fetch.cache_dir`), under a name that holds a digest of its place
    and of the version of the object, so that a changed object is another file. It appears there whole: what arrives
    under another name is renamed once its size and, where the store tells it (gs://), its CRC-32C are right. Of the
    processes of a machine that want a file at one time, only the first downloads it.

    Args:
      folder: of the store; it is listed once.
      flag: that names the folder, for messages.

    Raises:
      UserError: the folder cannot be listed.
    """

    def __init__(self, folder: AnyPath, flag: str):
        self._folder = folder
        try:
            with stores.as_os_error(folder):
                found = stores.file_system(folder).find(str(folder), detail=True)
        except OSError as error:
            raise UserError(f"{flag}={folder}: {error.strerror}; name data that these credentials can read") from error
        start = len(str(folder).partition("://")[2]) + 1
        # Only what is needed of each: the object is pickled for other processes, and there may be many files.
        self._objects = {name[start:]: _Version.of(info) for name, info in found.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._objects

    def local(self, name: str) -> pathlib.Path:
        """The local file of a file of the folder, downloaded if it is not there; a path only if the folder lacks it.

        Raises:
          OSError: it cannot be downloaded or written, or does not arrive as it is in the store.
        """
        path, version = self._path(name), self._objects.get(name)
        if version is None or version.is_in(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            if not version.is_in(path):
                self._download(name, path, version)
        return path

    def _path(self, name: str) -> pathlib.Path:
        version = self._objects.get(name)
        place = hashlib.sha256(f"{self._folder}/{name} {version.tag if version else ''}".encode()).hexdigest()[:24]
        return cache_dir() / "records" / f"{place}{pathlib.PurePosixPath(name).suffix}"

    def drop(self, name: str) -> None:
        """Removes the local file, which is then downloaded again: for one that turned out to be damaged."""
        self._path(name).unlink(missing_ok=True)

    def _download(self, name: str, path: pathlib.Path, version: _Version) -> None:
        source = self._folder / name
        partial = path.with_name(f".{path.name}.partial")  # also of a process that was killed: written over
        try:
            with stores.as_os_error(source):
                stores.file_system(source).get_file(str(source), str(partial))
            if problem := version.difference(partial):
                raise OSError(errno.EIO, problem, str(source))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Version:
    """What a store tells of an object: bytes, a tag that changes with the content, and "" or CRC-32C in base64."""

    size: int
    tag: str
    crc32c: str

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> _Version:
        tag = info.get("md5Hash") or info.get("crc32c") or info.get("ETag") or info.get("etag") or ""
        return cls(int(info["size"]), str(tag), info.get("crc32c", ""))

    def is_in(self, file: pathlib.Path) -> bool:
        """Whether a file, which was checked when it arrived, is there and has this object's size."""
        return file.is_file() and file.stat().st_size == self.size

    def difference(self, file: pathlib.Path) -> str:
        """In what a file is not this object; "" where it is."""
        if (size := file.stat().st_size) != self.size:
            return f"{size} bytes arrived of {self.size}"
        if not self.crc32c:
            return ""
        found = google_crc32c.Checksum()
        with open(file, "rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                found.update(chunk)
        return "" if base64.b64encode(found.digest()).decode() == self.crc32c else "arrived damaged (CRC-32C)"


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock file; the system releases it if the process is killed."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
