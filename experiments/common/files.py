"""Output files of commands: checked before the work, written atomically."""

import os
from pathlib import Path

from omnihuman_jax import stores
from omnihuman_jax.errors import UserError


def check_output(output: str) -> Path:
    """The absolute path of an output file; UserError if its directory does not exist or it cannot be written."""
    path = Path(output).absolute()
    if not path.parent.is_dir():
        raise UserError(f"--output={path}: the directory {path.parent} does not exist; make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output={path}: cannot be written; name another file")
    return path


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    stores.write_whole(path, text.encode())
