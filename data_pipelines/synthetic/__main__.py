"""python -m data_pipelines.synthetic --output=DIR --clips=N --seed=S: renders people with exact ground truth.

data_pipelines/synthetic/dataset.py describes the output.
"""

import os

# Must precede NumPy, also in the worker processes, which inherit it: the products are too small for threads, and the
# threads of several workers would wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import flags

from data_pipelines.synthetic import dataset
from omnihuman_jax.command import run_main
from omnihuman_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("output", None, "Directory to write: missing, empty, or with the same data set.")
    flags.DEFINE_integer("clips", None, "Number of clips.")
    flags.DEFINE_integer("seed", 0, "Random seed; clip i depends only on it and on i.")
    flags.DEFINE_integer("workers", min(os.cpu_count() or 1, 16), "Number of processes.")
    flags.DEFINE_integer("frames", 49, "Frames per clip at 25 fps; 1 + 4n.")
    flags.DEFINE_string("size", "mix", "mix (96x96, 128x80 and 80x112) or HEIGHTxWIDTH in pixels.")
    flags.DEFINE_string("cache", None, "Cache of fetched packages; default $OMNIHUMAN_CACHE or cache/.")


def main() -> None:
    """Entry point."""
    if FLAGS.output is None:
        raise UserError("--output is missing; give the directory to write")
    dataset.generate(FLAGS.output, FLAGS.clips, FLAGS.seed, FLAGS.workers, FLAGS.frames, FLAGS.size, FLAGS.cache)


if __name__ == "__main__":
    define_flags()
    run_main(main)
