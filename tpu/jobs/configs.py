"""From a resolved config back to the flags that make it, and from flags to a config."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.common import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.training import config_ranges
from omnihuman_jax.training.run_config import flatten


def overrides(preset: str, config: ConfigDict) -> list[str]:
    """ "--config.KEY=VALUE" for every key in which a resolved config is not its preset (PRESET.py[:ARG])."""
    before, after = (flatten(c.to_dict()) for c in (cli.load_preset(preset), config))
    return [f"--config.{key}={value}" for key, value in after.items() if value != before.get(key)]


def resolve(preset: str, changes: Sequence[str]) -> ConfigDict:
    """The config of a preset with "--config.KEY=VALUE" flags; UserError for an unknown key or a wrong value."""
    config = cli.load_preset(preset)
    for change in changes:
        cli.check_key(config, change.partition("=")[0].removeprefix("--config."))
    holder, arguments = flags.FlagValues(), ["", f"--config={preset}", *changes]
    flag = config_flags.DEFINE_config_file("config", None, "", flag_values=holder, sys_argv=arguments)
    try:
        holder(arguments)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    config_ranges.check(flag.value)
    return flag.value


def preset_in_image(preset: str) -> str:
    """PRESET.py[:ARG] as it is called in the image, whose working directory is this repository; UserError outside."""
    file, colon, argument = preset.partition(":")
    root, path = Path.cwd().resolve(), Path(file).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"--config={preset}: not in the image, which holds {root}; put it into experiments/configs/")
    return f"{path.relative_to(root).as_posix()}{colon}{argument}"
