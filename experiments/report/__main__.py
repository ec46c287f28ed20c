"""Evaluates the latest checkpoint of a run on held-out rendered clips and rewrites its report.

python -m experiments.report --workdir=runs/demo [--clips=6] [--frames=21] [--steps=8]
"""

import time

from absl import flags

from data_pipelines.schema import Dataset
from experiments.common import cli
from experiments.evaluate import checkpoint as checkpoint_lib
from experiments.evaluate.checkpoint import Options, evaluate_checkpoint, setup_devices
from experiments.report.write import write_report
from omnihuman_jax.errors import UserError


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    flags.DEFINE_string("workdir", None, "Run directory, as given to experiments.train.")
    flags.DEFINE_string("data", "", "Prepared data; empty = the run's data.dir.")
    Options.define_flags()
    flags.adopt_module_key_flags(checkpoint_lib)  # so that --help lists them


def main(_: list[str]) -> None:
    """Entry point."""
    workdir = flags.FLAGS.workdir
    if not workdir:
        raise UserError("--workdir is missing; give the run directory of experiments.train")
    config = setup_devices(workdir)
    dataset = Dataset.open(flags.FLAGS.data or config.data.dir)
    started = time.perf_counter()
    evaluation = evaluate_checkpoint(workdir, dataset, Options.from_flags())
    phases = {"evaluation": time.perf_counter() - started}
    print(f"wrote {write_report(workdir, dataset, evaluation=evaluation, phases=phases)}")


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
