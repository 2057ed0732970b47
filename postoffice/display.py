"""Text for a terminal, a log or a page, whatever a message has put into it."""

from __future__ import annotations

__all__ = ["one_line", "printable"]


def printable(text: str) -> str:
    """Return the text with everything that is not printable written as an escape.

    Line breaks, terminal escapes and characters that turn the direction of writing are among it;
    what is printable is as it was.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def one_line(error: BaseException) -> str:
    """Return an error's text in one printable line; the error's class where it has no text."""
    return printable(" ".join(_text(error).split())) or type(error).__name__


def _text(error: BaseException) -> str:
    args = error.args
    # What ZEO has for an error of its server's: the name of the class, and the arguments.
    if type(error).__module__ == "ZEO.Exceptions" and len(args) == 2 and isinstance(args[1], tuple):
        return " ".join(str(arg) for arg in args[1] if not isinstance(arg, int)) or str(args[0])
    return str(error)
