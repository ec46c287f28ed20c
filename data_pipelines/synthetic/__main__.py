"""python -m data_pipelines.synthetic --output=DIR --clips=N --seed=S: renders a data set of people with exact truth.

What it writes is described in data_pipelines/synthetic/dataset.py.
"""

import os

from absl import flags

from data_pipelines.synthetic import dataset
from omnihuman_jax.command import run_main
from omnihuman_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("output", None, "Directory to write; it must not exist, be empty, or hold the same data set.")
    flags.DEFINE_integer("clips", None, "Number of clips.")
    flags.DEFINE_integer("seed", 0, "Clip i is a function of this number and i alone.")
    flags.DEFINE_integer("workers", min(os.cpu_count() or 1, 16), "Processes.")
    flags.DEFINE_integer("frames", 49, "Frames a clip at 25 per second; 1 + 4n.")
    flags.DEFINE_string("size", "mix", "mix (96x96, 128x80 and 80x112) or HEIGHTxWIDTH in pixels.")
    flags.DEFINE_string("cache", None, "Directory for fetched packages; default $OMNIHUMAN_CACHE or cache/.")


def main() -> None:
    """Entry point."""
    if FLAGS.output is None:
        raise UserError("--output is not given; name the directory to write")
    dataset.generate(FLAGS.output, FLAGS.clips, FLAGS.seed, FLAGS.workers, FLAGS.frames, FLAGS.size, FLAGS.cache)


if __name__ == "__main__":
    define_flags()
    run_main(main)
