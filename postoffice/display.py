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
    return printable(" ".join(str(error).split())) or type(error).__name__
