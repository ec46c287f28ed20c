"""Imports the Wan2.1 VAE, or exports one of our VAEs for diffusers.

python -m experiments.import_vae --input=Wan2.1_VAE.safetensors --output=vae.safetensors
python -m experiments.import_vae --input=vae.safetensors --output=DIR --to_diffusers

The input is a safetensors file in Wan's own naming, or one from diffusers' AutoencoderKLWan (with its config.json next
to it). The output is for `vae.checkpoint` of the other commands.
"""

from pathlib import Path

from absl import flags

from experiments.common import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae.vae import load_vae, save_vae
from omnihuman_jax.weights import wan_vae


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    flags.DEFINE_string("input", None, "The VAE: a .safetensors file, an index, or a directory with one.")
    flags.DEFINE_string("output", None, "The .safetensors file to write; with --to_diffusers the directory.")
    flags.DEFINE_bool("to_diffusers", False, "Export one of our VAE files for diffusers' AutoencoderKLWan.")


def check_output(output: Path, to_diffusers: bool) -> None:
    """Raises UserError unless `output` can be written."""
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output={output}: the directory {output.absolute().parent} does not exist; make it first")
    if to_diffusers and output.is_file():
        raise UserError(f"--output={output}: is a file; name a directory")
    if not to_diffusers and (output.suffix != ".safetensors" or output.is_dir()):
        raise UserError(f"--output={output}: the name must end in .safetensors")


def main(_: list[str]) -> None:
    """Entry point."""
    options = flags.FLAGS
    cli.check_given(input=options.input, output=options.output)
    output = Path(options.output)
    check_output(output, options.to_diffusers)
    if options.to_diffusers:
        wan_vae.save(output, load_vae(options.input))
    else:
        save_vae(output, wan_vae.load(options.input), notes={"imported_from": Path(options.input).name})
    print(f"wrote {output}")


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
