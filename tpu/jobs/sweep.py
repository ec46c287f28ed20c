"""Sweeps: one job for each row of a grid, and one table of what their runs reached."""

import csv
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnihuman_jax import stores
from omnihuman_jax.errors import UserError

Row = dict[str, Any]  # config key, "config.seed" -> value

METRICS = ("loss", "step_seconds", "tokens_per_second", "mfu")
AVERAGED = 10  # logged steps at the end of a run that a metric is the mean of


def read_grid(path: Path) -> list[Row]:
    """The rows of a grid: {"config.KEY": [values], …} is every combination, [{"config.KEY": value, …}, …] as it is.

    Raises UserError if it cannot be read or is neither.
    """
    try:
        grid = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--sweep={path}: cannot be read ({error})") from error
    if isinstance(grid, dict):
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"--sweep={path}: {key}: give a list of values, as [1, 2]")
        rows = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    else:
        rows = grid
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and row for row in rows):
        raise UserError(f'--sweep={path}: give {{"config.KEY": [values]}} or a list of {{"config.KEY": value}}')
    for i, row in enumerate(rows):
        for key, value in row.items():
            if not key.startswith("config."):
                raise UserError(f"--sweep={path}: row {i}: {key!r} must begin with 'config.'")
            if value is None or isinstance(value, dict):
                raise UserError(f"--sweep={path}: row {i}: {key}={json.dumps(value)} is no value of a config")
        if row in rows[:i]:
            raise UserError(f"--sweep={path}: row {i} is row {rows.index(row)} again; they would be the same run")
    return rows


def row_flags(row: Row) -> list[str]:
    """The flags of a row."""
    return [f"--{key}={tuple(value) if isinstance(value, list) else value}" for key, value in row.items()]


def row_name(name: str, index: int) -> str:
    """The name of a row's job and of its run directory."""
    return f"{name}-{index}"


def collect(workdir: str, name: str, rows: Sequence[Row]) -> list[Row]:
    """One line for each row: its name and config keys, its last step, and metrics as means of the last logged steps.

    The directory of the runs may be in an object store; UserError if a log cannot be read.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = []
    for i, row in enumerate(rows):
        steps = read_metrics(f"{workdir.rstrip('/')}/{row_name(name, i)}/metrics.jsonl")
        last = steps[-1] if steps else {"step": 0, "stage": "not started"}
        line = {"name": row_name(name, i), **{key: row.get(key, "") for key in keys}}
        line |= {"step": last["step"], "stage": last.get("stage", "")}
        for metric in METRICS:
            values = [step[metric] for step in steps[-AVERAGED:] if isinstance(step.get(metric), int | float)]
            line[metric] = f"{sum(values) / len(values):.5g}" if values else ""
        table.append(line)
    return table


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in the order of their steps; [] where there is none yet.

    Steps that were run again after a restart are there twice and count once. The last line of a run that goes on may be
    half written, and is left out. Raises UserError if the file cannot be read.
    """
    try:
        with stores.as_os_error(path):
            file = stores.get_path(path)
            lines = file.read_text().splitlines() if file.exists() else []
    except OSError as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read ({words}); copy the runs here and give --workdir=DIR") from error
    steps = {}
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
            steps[int(step["step"])] = step
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is no line of a metrics.jsonl") from error
    return [steps[step] for step in sorted(steps)]


def to_csv(table: Sequence[Row]) -> str:
    """The table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def to_markdown(table: Sequence[Row]) -> str:
    """The table as Markdown."""
    rows = [list(table[0]), ["---"] * len(table[0]), *([str(value) for value in row.values()] for row in table)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
