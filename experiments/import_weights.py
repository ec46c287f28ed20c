"""Imports an open text-to-video base, as a directory that training starts from (--config.stages.stage1.init_from=DIR).

python -m experiments.import_weights --config=experiments/configs/motif_2b.py --input=DIR --format=motif --output=DIR
"""

from absl import flags

from experiments import cli
from experiments.importing import import_base
from omnihuman_jax.errors import UserError
from omnihuman_jax.weights.formats import FORMATS


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    cli.define_config_flag()
    flags.DEFINE_string("input", None, "A safetensors file, the index of several, or the directory with them.")
    flags.DEFINE_string("format", None, f"Whose names its tensors have: {', '.join(FORMATS)}.")
    flags.DEFINE_string("output", None, "Directory to make; must not exist, or be empty.")


def main(_: list[str]) -> None:
    """Entry point."""
    values = flags.FLAGS
    if values.config is None:
        raise UserError("--config is missing; give the base's preset, as --config=experiments/configs/motif_2b.py")
    values.config.simulated_devices = 1  # files are converted on the host
    cli.setup_platform(values.config)
    values.config.simulated_devices = 0
    import_base(values.config, values.input, values.format, values.output)


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
