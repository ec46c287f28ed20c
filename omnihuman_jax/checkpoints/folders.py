"""Checkpoint folders, removed, copied and moved so that a part of one is never taken for a whole one.

On a disk a folder appears, and goes, by being renamed. In an object store it is whole while it has the object that
Orbax writes last, `stores.COMMIT_FILE`.
"""

import contextlib
import shutil

from omnihuman_jax import stores
from omnihuman_jax.stores import AnyPath

_HALF_WRITTEN = ".orbax-checkpoint-tmp"  # in the names of what Orbax is writing on a disk
_DELETED = ".deleted"


def is_complete(path: AnyPath) -> bool:
    """Whether a checkpoint folder is whole."""
    return (path / stores.COMMIT_FILE).exists() if stores.is_remote(path) else (path / "meta").is_dir()


def half_written(workdir: AnyPath) -> list[AnyPath]:
    """Folders of a run that Orbax is writing or has left unfinished."""
    rooms = [workdir / name for name in ("checkpoints", "stages")]
    if stores.is_remote(workdir):
        return sorted(path for room in rooms for path in room.glob("*") if not is_complete(path))
    return sorted(path for room in rooms for path in room.glob(f"*{_HALF_WRITTEN}*"))


def leftovers(workdir: AnyPath) -> list[AnyPath]:
    """What is half-written, or half-deleted."""
    return [*half_written(workdir), *workdir.glob(f"checkpoints/*{_DELETED}")]


def unmark(path: AnyPath) -> AnyPath:
    """Makes a checkpoint one that is not taken for whole, before it is deleted; returns where it is. Raises OSError."""
    if not stores.is_remote(path):
        return path.rename(path.with_suffix(_DELETED))
    with stores.as_os_error(path):
        (path / stores.COMMIT_FILE).unlink(missing_ok=True)
    return path


def remove(path: AnyPath) -> None:
    """Removes a folder as far as possible; the rest is left over."""
    if not stores.is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        stores.remove_tree(path)


def copy(source: AnyPath, target: AnyPath) -> None:
    """Copies a checkpoint over what is there; it appears whole or not at all. Raises OSError."""
    if stores.is_remote(target):
        stores.copy_tree(source, target)
        return
    half = target.with_name(f"{target.name}{_HALF_WRITTEN}-copy")
    try:
        shutil.copytree(source, half)
        shutil.rmtree(target, ignore_errors=True)
        half.rename(target)
    except OSError:
        shutil.rmtree(half, ignore_errors=True)
        raise


def move(source: AnyPath, target: AnyPath) -> None:
    """Moves a checkpoint over what is there. Raises OSError."""
    if stores.is_remote(source):
        stores.move_tree(source, target)
        return
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
