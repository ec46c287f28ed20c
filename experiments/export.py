"""Exports a checkpoint for serving: safetensors, config and VAE in one directory.

python -m experiments.export --checkpoint=DIR --output=DIR [--format=safetensors] [--noema] [--naming=motif]
"""

from absl import flags

from experiments import cli
from experiments.exporting import export_checkpoint
from omnihuman_jax.inference.export import FORMATS
from omnihuman_jax.weights.formats import FORMATS as NAMINGS

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir, checkpoints/STEP or stages/NAME of a training run.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make; must not exist, or be empty.")
_FORMAT = flags.DEFINE_list("format", ["safetensors"], f"What to write, comma-separated: {', '.join(FORMATS)}.")
_NAMING = flags.DEFINE_string(
    "naming", "", f"Whose names the base part of the network has: {', '.join(NAMINGS)}; empty = our own."
)
_EMA = flags.DEFINE_bool("ema", True, "Export the EMA of the parameters; --noema exports the raw ones.")


def main(_: list[str]) -> None:
    """Entry point."""
    export_checkpoint(_CHECKPOINT.value, _OUTPUT.value, _FORMAT.value, ema=_EMA.value, naming=_NAMING.value)


if __name__ == "__main__":
    cli.run_main(main)
