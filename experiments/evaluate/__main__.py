"""Evaluates a checkpoint on held-out rendered clips and writes the numbers as JSON.

    python -m experiments.evaluate --checkpoint=DIR --data=DIR --output=FILE.json [--metrics=mouth,pose] [--clips=6]

--data is a data set of `data_pipelines.prepare` with rendered people. The JSON is the "evaluation" of report.json.
"""

import json
from pathlib import Path

from absl import flags

from data_pipelines.schema import Dataset
from experiments.common import cli, files
from experiments.evaluate import checkpoint as checkpoint_lib
from experiments.evaluate.checkpoint import Options, evaluate_checkpoint, setup_devices
from experiments.evaluate.rendered import heldout_indices
from omnihuman_jax.errors import UserError


def run(checkpoint: str | None, data: str | None, output: str | None, options: Options, *, setup: bool = True) -> Path:
    """Evaluates a checkpoint; returns the JSON file.

    Args:
      checkpoint, data, output, options: the values of the flags.
      setup: set up devices and the compilation cache; False in a process that has used JAX.

    Raises:
      UserError: a flag is wrong; nothing is written.
    """
    cli.check_given(checkpoint=checkpoint, data=data, output=output)
    path, dataset = files.check_output(output), Dataset.open(data)
    if len(heldout_indices(dataset, options.frames)) < 2:
        raise UserError(
            f"--data={data}: has fewer than 2 held-out rendered clips of at least {options.frames} frames; make some "
            f"with `python -m data_pipelines.synthetic` and prepare them, or set fewer --frames"
        )
    if setup:
        setup_devices(checkpoint)
    result = evaluate_checkpoint(checkpoint, dataset, options).result
    for name, measure in result["measures"].items():
        means = ", ".join(f"{row} {found['mean']:.3f}" for row, found in measure["rows"].items() if found["n"])
        print(f"{name}: {means} ({measure['better']} is better)")
    for note in result["notes"]:
        print(f"not measured: {note}")
    files.write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"wrote {path}")
    return path


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    flags.DEFINE_string(
        "checkpoint", None, "Workdir, checkpoints/STEP or stages/NAME of a run, or what experiments.export wrote."
    )
    flags.DEFINE_string("data", None, "Prepared data with held-out rendered clips.")
    flags.DEFINE_string("output", None, "The JSON file to write.")
    Options.define_flags()
    flags.adopt_module_key_flags(checkpoint_lib)  # so that --help lists them


def main(_: list[str]) -> None:
    """Entry point."""
    run(flags.FLAGS.checkpoint, flags.FLAGS.data, flags.FLAGS.output, Options.from_flags())


if __name__ == "__main__":
    define_flags()
    cli.run_main(main, in_stores=("checkpoint", "data"))
