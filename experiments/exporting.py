"""Export of a checkpoint: what `experiments.export` does with its flags."""

from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.inference import export
from omnihuman_jax.weights.formats import check_format


def export_checkpoint(
    checkpoint: str, output: str, formats: Sequence[str] = ("safetensors",), *, ema: bool = True, naming: str = ""
) -> None:
    """Writes an exported directory and says what is in it.

    Args:
      checkpoint: workdir, checkpoints/STEP or stages/NAME.
      output: directory to make.
      formats: names out of `export.FORMATS`.
      ema: the EMA of the parameters, or the raw ones.
      naming: whose names the base part has, out of `weights.formats.FORMATS`; "" = our own.

    Raises:
      UserError: an argument is missing or wrong; nothing is written then.
    """
    for name, value in (("checkpoint", checkpoint), ("output", output)):
        if not value:
            raise UserError(f"--{name} is missing; see --help")
    for name in formats or [""]:
        export.check_format(name)
    if naming:
        check_format(naming, "--naming")
    folder = export.check_output(output)
    if export.is_exported(checkpoint):
        raise UserError(f"--checkpoint={checkpoint}: is an exported directory already; give a training checkpoint")
    config = export.load_config(checkpoint)
    config.simulated_devices = min(config.simulated_devices, 1)  # the devices of the training are not needed
    cli.setup_platform(config)
    config, params, info = export.load(checkpoint, use_ema=ema)
    print(f"{info['path']}: step {info['step']} ({info['stage']}), {'EMA' if ema else 'raw'} parameters")
    export.save(folder, config, params, info, ema=ema, naming=naming)
    list_files(folder)


def list_files(folder: Path) -> None:
    """Prints the files of a directory with their sizes."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")
