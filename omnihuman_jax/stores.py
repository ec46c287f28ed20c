"""Paths in object stores, gs://BUCKET/… and s3://BUCKET/…, beside those of file systems.

`etils.epath`, which Orbax uses too, gives such paths the methods of pathlib, by way of fsspec, gcsfs and s3fs. An
object appears whole or not at all, but cannot be appended to or renamed, and folders exist only in the names of
objects. The functions here do what is done with files by appending and renaming.

Errors of the stores' libraries are raised as OSError with the reason in `strerror`.
"""

import contextlib
import errno
import fnmatch
import logging
import os
import pathlib
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import fsspec
from etils import epath

from omnihuman_jax.errors import UserError

SCHEMES = ("gs", "s3")
# Orbax writes it last: a checkpoint in a store is complete if it has this object.
COMMIT_FILE = "commit_success.txt"
_CHECK_FILE = ".write_check"
_LIBRARIES = ("gcsfs", "s3fs", "fsspec", "aiohttp", "aiobotocore", "botocore", "google", "requests")

# What s3fs sets as `errno`, whatever happened; with another one an error is of a file of this machine.
_OF_STORES = (errno.EIO, errno.ENOENT, errno.EACCES, errno.EPERM)
_REFUSED = re.compile(r"\b40[13]\b|Forbidden|Access ?Denied")

AnyPath = pathlib.Path | epath.Path

# Folders of zonal and hierarchical buckets are found out by gRPC, which emulators and some networks lack; nothing here
# needs it. Read when gcsfs is imported, which fsspec does at the first use of gs://.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
for _scheme in SCHEMES:
    # Other processes write into the same folders, so no listing may be remembered.
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)
# Seconds of one request, of at most 50 MB. gcsfs would wait for ever; botocore has limits of its own.
fsspec.config.conf["gs"].setdefault("requests_timeout", 120)
for _name in ("gcsfs", "s3fs"):
    # They log what they raise, with a traceback; what is raised is reported here in one line.
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def scheme_of(path: str | os.PathLike[str]) -> str:
    """ "gs" for "gs://BUCKET/x"; "" for a path of a file system."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", os.fspath(path))
    return found[1] if found else ""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether the path is in an object store."""
    return bool(scheme_of(path))


def get_path(path: str | os.PathLike[str]) -> AnyPath:
    """A path with the methods of pathlib, of a file system or of an object store; UserError for an unknown scheme."""
    scheme = scheme_of(path)
    if scheme not in ("", *SCHEMES):
        raise UserError(f"{os.fspath(path)}: unknown scheme {scheme}://; give a local path, {_known()}")
    return epath.Path(path) if scheme else pathlib.Path(path)


def absolute(path: str | os.PathLike[str]) -> AnyPath:
    """`get_path`, made absolute."""
    path = get_path(path)
    return path if is_remote(path) else path.absolute()


def _known() -> str:
    return " or ".join(f"{scheme}://BUCKET/DIR" for scheme in SCHEMES)


def check_schemes(values: Mapping[str, Any], allowed: Collection[str] = ()) -> None:
    """Raises UserError for a value with a scheme, unless it is a store's and its name may have one.

    Args:
      values: flags and config keys by name, as --NAME; text and lists of text are looked at.
      allowed: names, or patterns of names, that may be in an object store.
    """
    for name, value in values.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if not (isinstance(text, str) and (scheme := scheme_of(text))):
                continue
            may = any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed)
            if may and scheme in SCHEMES:
                continue
            if scheme in SCHEMES:
                raise UserError(f"--{name}={text}: must be a local path, it is not read or written in an object store")
            raise UserError(
                f"--{name}={text}: unknown scheme {scheme}://; give a local path{' or ' + _known() if may else ''}"
            )


def file_system(path: str | os.PathLike[str]) -> fsspec.AbstractFileSystem:
    """The fsspec file system of a path in a store."""
    return fsspec.filesystem(scheme_of(path))


@contextlib.contextmanager
def as_os_error(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises errors of the stores' libraries inside the block as OSError; those of files stay as they are."""
    try:
        yield
    except Exception as error:
        of_files = isinstance(error, OSError) and error.errno not in (None, *_OF_STORES)
        if of_files or not is_remote(path) or (why := reason(error)) is None:
            raise
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO
        raise OSError(number, why, str(path)) from error


def reason(error: BaseException) -> str | None:
    """An error of a store in one line; None if it does not come from a store."""
    library = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and library not in _LIBRARIES:
        return None
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:300] or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"no such bucket or object ({text})"
    if isinstance(error, PermissionError) or _REFUSED.search(f"{getattr(error, 'code', '')} {text}"):
        return f"no permission ({text})"
    if library == "google" or "credentials" in text.lower():
        return f"no credentials ({text})"
    return text


def check_writable(flag: str, path: AnyPath) -> None:
    """Raises UserError unless objects can be written and deleted below a path in a store."""
    probe = path / _CHECK_FILE
    try:
        with as_os_error(path):
            file_system(path).pipe_file(str(probe), b"")
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(flag, path, error, "write to") from error


def read_object(flag: str, path: AnyPath) -> bytes:
    """The bytes of an object; UserError with the flag that names it if it cannot be read."""
    try:
        with as_os_error(path):
            return file_system(path).cat_file(str(path))
    except OSError as error:
        raise _unusable(flag, path, error, "read") from error


def _unusable(flag: str, path: AnyPath, error: OSError, verb: str) -> UserError:
    bucket = "/".join(str(path).split("/")[:3])
    return UserError(
        f"{flag}={path}: {error.strerror}; name a bucket that exists and that these credentials can {verb}: {bucket}"
    )


def write_whole(path: AnyPath, data: bytes) -> None:
    """Writes a file or an object, which appears whole or not at all."""
    if is_remote(path):
        with as_os_error(path):
            file_system(path).pipe_file(str(path), data)
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def append(path: AnyPath, data: bytes) -> None:
    """Appends to an object, which is at all times what it was or the longer one.

    After an error the bytes may or may not be there.
    """
    files, name = file_system(path), str(path)
    with as_os_error(path):
        if not files.exists(name):
            files.pipe_file(name, data)
        elif scheme_of(path) == "gs":
            # Not named after the object: TensorBoard reads everything with "tfevents" in its name.
            part = str(path.with_name(f".part-{zlib.crc32(path.name.encode()):08x}"))
            files.pipe_file(part, data)
            files.merge(name, [name, part])  # in the store, in one operation
            files.rm_file(part)
        else:
            with files.open(name, "ab") as file:
                file.write(data)


def read_tail(path: AnyPath, size: int) -> bytes:
    """The last bytes of an object, at most `size`; none if there is no object."""
    files, name = file_system(path), str(path)
    with as_os_error(path):
        try:
            total = files.info(name)["size"]
        except FileNotFoundError:
            return b""
        return files.cat_file(name, start=max(0, total - size), end=total) if total else b""


def upload(source: pathlib.Path, target: AnyPath) -> None:
    """Copies a local file, or the files in a local directory, into a store."""
    with as_os_error(target):
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if file.is_file():
                name = target / file.relative_to(source) if file != source else target
                file_system(target).put_file(str(file), str(name))


def remove_tree(path: AnyPath) -> None:
    """Removes a folder of a store, the mark of a complete checkpoint first; nothing if there is none."""
    with as_os_error(path):
        (path / COMMIT_FILE).unlink(missing_ok=True)
        path.rmtree(missing_ok=True)


def copy_tree(source: AnyPath, target: AnyPath) -> None:
    """Copies a folder within a store over what is there, the mark of a complete checkpoint last."""
    remove_tree(target)
    files, scheme = file_system(source), scheme_of(source)
    with as_os_error(target):
        names = [f"{scheme}://{name}" for name in files.find(str(source))]
        last = f"{source}/{COMMIT_FILE}"
        for group in ([name for name in names if name != last], [name for name in names if name == last]):
            if group:
                files.copy(group, [str(target) + name.removeprefix(str(source)) for name in group])


def move_tree(source: AnyPath, target: AnyPath) -> None:
    """Moves a folder within a store; interrupted, it leaves the source complete, or nothing that is marked so."""
    copy_tree(source, target)
    remove_tree(source)
