"""What every command shares: absl flags, plug-ins, and user errors as one line on stderr with exit status 2."""

import errno
import importlib
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.stores import check_schemes

PLUGINS = "plugins"
flags.disclaim_key_flags()  # what is defined here belongs to the command, whose --help lists it


def run_main(
    main: Callable[[], int | None],
    check: Callable[[list[str]], None] | None = None,
    parsed: Callable[[], None] = lambda: check_schemes(own_flags()),
) -> None:
    """Imports the plug-ins, parses the flags and runs `main`; a UserError or a wrong flag ends with exit status 2.

    Args:
      main: the command; its return value is the exit status.
      check: called with the arguments (without the program's name) before the flags are parsed.
      parsed: called when they are; the default refuses flags with a scheme, such as gs://.
    """

    def parse(argv: list[str]) -> list[str]:
        _import_plugins(argv[1:])  # first, because flags and configs read what they register
        if check:
            check(argv[1:])
        return _parse(argv)

    def guarded(argv: list[str]) -> int | None:
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; options are flags, as --name=value (see --help)")
            parsed()
            return main()
        except UserError as error:
            return _fail(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return _fail(UserError(f"{error.filename or 'a file'}: {error.strerror}; free some space and restart"))

    flags.DEFINE_list(
        PLUGINS, [], "Modules to import first, comma-separated: they register conditions, model families or metrics."
    )
    logging.set_verbosity(logging.WARNING)
    try:
        app.run(guarded, flags_parser=parse)
    except UserError as error:
        sys.exit(_fail(error))


def check_given(**values: Any) -> None:
    """Raises UserError if a required flag is missing; `values` are flags by name."""
    if missing := [name for name, value in values.items() if not value]:
        raise UserError(f"--{missing[0]} is missing; see --help")


def check_key(config: ConfigDict, dotted: str) -> None:
    """Raises UserError with the nearest valid name unless the dotted key exists in the config."""
    node, prefix = config, ""
    for part in dotted.split("."):
        if not isinstance(node, ConfigDict):
            raise UserError(f"--config.{dotted}: unknown config key {part!r}; {prefix[:-1]} has no keys below it")
        if part not in node:
            known = nearest(prefix + part, [prefix + key for key in node])
            raise UserError(f"--config.{dotted}: unknown config key {part!r}{known}")
        node, prefix = node[part], f"{prefix}{part}."


def _import_plugins(arguments: list[str]) -> None:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if name == PLUGINS and argument.startswith("-"):
            modules = value if equals else "".join(arguments[i + 1 : i + 2])
            for module in filter(None, modules.split(",")):
                try:
                    importlib.import_module(module)
                except ImportError as error:
                    raise UserError(f"--{PLUGINS}={module}: cannot be imported ({error}); check the name") from error


def own_flags() -> dict[str, Any]:
    """The values of the flags that are not absl's, by name."""
    modules = flags.FLAGS.flags_by_module_dict()
    return {flag.name: flag.value for name, group in modules.items() if not name.startswith("absl") for flag in group}


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            raise UserError(f"--{error.flagname}: --config=PRESET.py must be given before its overrides") from error
        raise UserError(f"--{error.flagname}: unknown flag{nearest(error.flagname, [*own_flags(), 'help'])}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _fail(error: UserError) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
