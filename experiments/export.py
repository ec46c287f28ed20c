"""Exports a checkpoint: safetensors, config and VAE in one directory.

python -m experiments.export --checkpoint=DIR --output=DIR [--format=safetensors] [--noema] [--naming=motif]
python -m experiments.export --checkpoint=DIR --output=FILE.safetensors [--dtype=bfloat16] [--noema]

An output ending in .safetensors is one file with the config in its header and without the VAE. The other commands take
either.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli
from omnihuman_jax.checkpoints import export
from omnihuman_jax.checkpoints.export import FORMATS
from omnihuman_jax.checkpoints.load import is_exported, load_config, load_parameters
from omnihuman_jax.errors import UserError
from omnihuman_jax.weights.formats import FORMATS as NAMINGS
from omnihuman_jax.weights.formats import check_format


def export_checkpoint(
    checkpoint: str,
    output: str,
    formats: Sequence[str] = ("safetensors",),
    *,
    ema: bool = True,
    naming: str = "",
    dtype: str = "float32",
) -> None:
    """Writes an exported directory or file and lists its files; the flags describe the arguments.

    Raises UserError if an argument is missing or wrong; nothing is written then.
    """
    cli.check_given(checkpoint=checkpoint, output=output)
    for name in formats or [""]:
        export.check_format(name)
    if naming:
        check_format(naming, "--naming")
    single = output.endswith(".safetensors")
    if single and naming:
        raise UserError(f"--naming={naming}: not for a single file; name a directory as --output")
    if not single and dtype != "float32":
        raise UserError(f"--dtype={dtype}: only for a single file; name a FILE.safetensors as --output")
    export.check_output(output)
    if is_exported(checkpoint):
        raise UserError(f"--checkpoint={checkpoint}: is exported already; give a training checkpoint")
    cli.setup_one_device(load_config(checkpoint))
    config, params, info = load_parameters(checkpoint, use_ema=ema)
    print(f"{info['path']}: step {info['step']} ({info['stage']}), {'EMA' if ema else 'raw'} parameters")
    if single:
        path = export.save_file(output, config, params, info, ema=ema, dtype=dtype)
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")
        return
    cli.list_files(export.save(output, config, params, info, ema=ema, naming=naming))


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    flags.DEFINE_string("checkpoint", None, "Workdir, checkpoints/STEP or stages/NAME of a training run.")
    flags.DEFINE_string("output", None, "Directory to make, missing or empty; or FILE.safetensors.")
    flags.DEFINE_list("format", ["safetensors"], f"What to write, comma-separated: {', '.join(FORMATS)}.")
    flags.DEFINE_string("naming", "", f"Naming of the base part of the network: {', '.join(NAMINGS)}; empty = our own.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the parameters in a single file.")
    flags.DEFINE_bool("ema", True, "Export the EMA of the parameters; --noema exports the raw ones.")


def main(_: list[str]) -> None:
    """Entry point."""
    f = flags.FLAGS
    export_checkpoint(f.checkpoint, f.output, f.format, ema=f.ema, naming=f.naming, dtype=f.dtype)


if __name__ == "__main__":
    define_flags()
    cli.run_main(main, in_stores=("checkpoint",))
