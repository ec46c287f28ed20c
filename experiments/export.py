"""Exports a checkpoint for serving: safetensors, config and VAE in one directory.

python -m experiments.export --checkpoint=DIR --output=DIR [--format=safetensors] [--noema]
"""

from pathlib import Path

from absl import flags

from experiments import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.inference import export

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir, checkpoints/STEP or stages/NAME of a training run.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make; must not exist, or be empty.")
_FORMAT = flags.DEFINE_list("format", ["safetensors"], f"What to write, comma-separated: {', '.join(export.FORMATS)}.")
_EMA = flags.DEFINE_bool("ema", True, "Export the EMA of the parameters; --noema exports the raw ones.")


def main(_: list[str]) -> None:
    """Entry point."""
    for name, value in (("checkpoint", _CHECKPOINT.value), ("output", _OUTPUT.value)):
        if not value:
            raise UserError(f"--{name} is missing; see --help")
    for name in _FORMAT.value or [""]:
        export.check_format(name)
    output = export.check_output(_OUTPUT.value)
    if export.is_exported(_CHECKPOINT.value):
        raise UserError(
            f"--checkpoint={_CHECKPOINT.value}: is an exported directory already; give a training checkpoint"
        )
    config = export.load_config(_CHECKPOINT.value)
    config.simulated_devices = min(config.simulated_devices, 1)  # the devices of the training are not needed
    cli.setup_platform(config)
    config, params, info = export.load(_CHECKPOINT.value, use_ema=_EMA.value)
    kind = "EMA" if _EMA.value else "raw"
    print(f"{info['path']}: step {info['step']} ({info['stage']}), {kind} parameters")
    export.save(output, config, params, info, ema=_EMA.value)
    for file in sorted(Path(output).iterdir()):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    cli.run_main(main)
