"""The one exception for mistakes a person can mend at the terminal."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message is one line saying what was wrong, where, and what to do.

    Command-line entry points print it without a traceback and exit with status 2.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the valid name closest to `name`, or the list when none is close."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (valid: {', '.join(sorted(valid))})"
