"""What comparisons side by side share: sizes as flags, the number of runs, the JSON file of the numbers."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from absl import flags

from omnihuman_jax.errors import UserError

SizesT = TypeVar("SizesT")


def define_flags(sizes: type, *, repeats: int, timed: str) -> None:
    """Defines a flag for every field of the dataclass `sizes`, --repeats and --output.

    Args:
      sizes: dataclass of integers with defaults.
      repeats: default of --repeats.
      timed: help of --repeats.
    """
    for field in dataclasses.fields(sizes):
        flags.DEFINE_integer(field.name, field.default, f"Size: {field.name}.", lower_bound=1)
    flags.DEFINE_integer("repeats", repeats, timed, lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file for the numbers.")


def read_sizes(sizes: type[SizesT]) -> SizesT:
    """The sizes that the flags give.

    Raises:
      UserError: --output cannot be written, which is better known before the runs than after.
    """
    output = flags.FLAGS.output
    if output and not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output={output}: its directory does not exist; make it first")
    return sizes(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(sizes)})


def write_results(results: list[dict[str, Any]]) -> None:
    """Writes the numbers to --output, if there is one."""
    if flags.FLAGS.output:
        Path(flags.FLAGS.output).write_text(json.dumps(results, indent=2) + "\n")
