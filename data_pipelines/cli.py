"""The shared shell of this folder's commands: absl flags, one-line errors with exit status 2."""

import sys
from collections.abc import Callable

from absl import app, flags

from omnihuman_jax.errors import UserError, nearest


def run_main(main: Callable[[], None]) -> None:
    """Runs `main` after parsing flags; a UserError or a wrong flag becomes one line on stderr and exit status 2."""

    def guarded(argv: list[str]) -> int:
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; every option is a flag, as --name=value (see --help)")
            main()
        except UserError as error:
            return _fail(error)
        return 0

    try:
        app.run(guarded, flags_parser=_parse)
    except UserError as error:
        sys.exit(_fail(error))


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        modules = flags.FLAGS.flags_by_module_dict()
        own = [flag.name for module, group in modules.items() if not module.startswith("absl") for flag in group]
        raise UserError(f"unknown flag --{error.flagname}{nearest(error.flagname, [*own, 'help'])}") from error
    except flags.Error as error:
        raise UserError(str(error)) from error


def _fail(error: UserError) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
