"""Text that people wrote, in the encodings of their editors."""

from __future__ import annotations

import codecs
import pathlib

from omnihuman_jax.errors import UserError

# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read(path: pathlib.Path) -> str:
    """The text without its byte-order mark and outer white space: in the encoding of the mark, else in UTF-8.

    Raises UserError if the file cannot be read or decoded.
    """
    try:
        data = path.read_bytes()
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
        text = data.decode(encoding)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not text in {error.encoding}; save it as UTF-8") from error
    if "\0" in text:  # UTF-16 without a mark
        raise UserError(f"cannot read {path}: it has zero bytes; save it as UTF-8")
    return text.strip()
