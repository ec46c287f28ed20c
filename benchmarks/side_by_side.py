"""Shared parts of the benchmarks: sizes as flags, the comparison of two sides, the JSON file of results."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from absl import flags

from omnihuman_jax.errors import UserError

SizesT = TypeVar("SizesT")


def define_flags(sizes: type, *, repeats: int, timed: str) -> None:
    """Defines --repeats (default `repeats`, help `timed`), --output, and a flag for each integer field of `sizes`."""
    for field in dataclasses.fields(sizes):
        flags.DEFINE_integer(field.name, field.default, f"Size: {field.name}.", lower_bound=1)
    flags.DEFINE_integer("repeats", repeats, timed, lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file for the results.")


def read_sizes(sizes: type[SizesT]) -> SizesT:
    """Reads the sizes from the flags; UserError if the directory of --output does not exist."""
    output = flags.FLAGS.output
    if output and not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output={output}: its directory does not exist; create it first")
    return sizes(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(sizes)})


def comparison(dtype: str, sizes: Any, seconds: dict[str, float], results: dict[str, np.ndarray]) -> dict[str, Any]:
    """The report of "ours" and "theirs"; `agreement` is the relative difference of their results."""
    ours, theirs = results["ours"], results["theirs"]
    return {
        "dtype": dtype,
        **dataclasses.asdict(sizes),
        "ours_seconds": seconds["ours"],
        "theirs_seconds": seconds["theirs"],
        "ratio": seconds["theirs"] / seconds["ours"],
        "agreement": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
    }


def write_results(results: list[dict[str, Any]]) -> None:
    """Writes the results to --output, if given."""
    if flags.FLAGS.output:
        Path(flags.FLAGS.output).write_text(json.dumps(results, indent=2) + "\n")
