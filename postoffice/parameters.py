"""Parameters of header fields (RFC 2045, 5.1, and RFC 2231).

Any value can be read: nothing raises, and time and memory are linear in its length.
"""

from __future__ import annotations

import re
from email import utils

__all__ = ["MAX_PARAMETERS", "Parameter", "parameters"]

_PARAMETER_MARK = re.compile(r'(?<!\\)"|;')
MAX_PARAMETERS = 1_000
"""Parameters of one field that are looked at."""

Parameter = tuple[str, str | tuple[str | None, str | None, str]]


def _split_parameters(value: str) -> list[str]:
    """Split at the semicolons that are not within quotes."""
    pieces: list[str] = []
    begin = 0
    quoted = False
    for mark in _PARAMETER_MARK.finditer(value):
        if mark[0] == '"':
            quoted = not quoted
        elif not quoted:
            pieces.append(value[begin : mark.start()])
            begin = mark.end()
            if len(pieces) >= MAX_PARAMETERS:
                return pieces
    pieces.append(value[begin:])
    return pieces


def parameters(value: str) -> list[Parameter]:
    """Return the parameters of a field's value as :mod:`email` gives them, values quoted.

    The first pair is the value proper.  An RFC 2231 value is a tuple of charset, language and
    text.  What RFC 2231 cannot make sense of is left out.
    """
    pairs: list[tuple[str, str]] = []
    for piece in _split_parameters(value):
        name, equals, text = piece.partition("=")
        # As the standard library, which lowers only what has a value.
        pairs.append((name.strip().lower() if equals else name.strip(), text.strip()))
    try:
        return utils.decode_params(pairs)
    except (ValueError, TypeError, LookupError):
        # Continuations of mixed kind, or numbers without end.
        regular = [pair for pair in pairs[1:] if "*" not in pair[0]]
        return utils.decode_params([pairs[0], *regular])
