"""The exception for mistakes that a person can fix at the terminal."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, what to do. Commands print it and exit with 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" with the valid name closest to `name`, or a list of the valid names if none is close."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (valid: {', '.join(sorted(valid))})"
