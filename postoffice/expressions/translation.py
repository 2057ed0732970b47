"""From the tree of Python's parser to RE2's syntax, where that is exact.

RE2 never sees the source of an expression.  Every set of characters is found by asking ``re`` which
ones it takes.
"""

from __future__ import annotations

import array
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from postoffice.expressions import parsing
from postoffice.expressions.parsing import Node

__all__ = ["ASCII_LINES", "UNICODE_LINES", "VARIANTS", "Variant", "translated"]

_LAST_CODE_POINT: Final = 0x10FFFF
_NOTHING: Final = r"[^\x{0}-\x{10ffff}]"
_TYPE_FLAGS: Final = int(re.ASCII | re.LOCALE | re.UNICODE)
_CHARACTER_FLAGS: Final = int(re.ASCII | re.UNICODE | re.IGNORECASE | re.DOTALL)

_Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """A kind of text: what is exact for one kind may not be for another.

    In *lines* each text is without a line feed, and several may be joined by line feeds: there no
    set of characters takes one, and the anchors are those of lines.
    """

    ascii: bool
    lines: bool


# By whether the text is ASCII, and by whether it is without a line feed.
VARIANTS: Final = (
    (Variant(False, False), Variant(False, True)),
    (Variant(True, False), Variant(True, True)),
)
UNICODE_LINES: Final = VARIANTS[False][True]
ASCII_LINES: Final = VARIANTS[True][True]


class _Untranslatable(Exception):
    """RE2 cannot be shown to answer as ``re`` does."""


def translated(tree: Any, variant: Variant) -> str | None:
    """Return what RE2 must be given for texts of this *variant*; ``None``: it cannot answer."""
    try:
        return _translated(tree, int(tree.state.flags), variant, tail=True)
    except (_Untranslatable, RecursionError):
        return None
    except (AttributeError, TypeError):
        # A later CPython may build its tree otherwise: then RE2 is not asked.
        return None


def _translated(nodes: Iterable[Node], flags: int, variant: Variant, *, tail: bool) -> str:
    """Translate *nodes* of Python's tree into RE2's syntax.

    :param tail: nothing follows them in the whole expression.
    :raises _Untranslatable: there is no exact translation.
    """
    sequence = list(nodes)
    last = len(sequence) - 1
    return "".join(
        _translated_node(node, flags, variant, tail and place == last)
        for place, node in enumerate(sequence)
    )


def _translated_node(node: Node, flags: int, variant: Variant, tail: bool) -> str:
    operator, argument = node
    match operator.name:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
            return _set(_taken(node, flags & _CHARACTER_FLAGS, variant.ascii), variant)
        case "SUBPATTERN":
            _, added, removed, nodes = argument
            if added & _TYPE_FLAGS:
                # re's own search and match differ: it seeks the first character by the outer flag.
                raise _Untranslatable("a group with its own kind of classes")
            inner = _translated(nodes, (flags | added) & ~removed, variant, tail=tail)
            return f"(?:{inner})"
        case "BRANCH":
            choices = (_translated(one, flags, variant, tail=tail) for one in argument[1])
            return f"(?:{'|'.join(choices)})"
        case "MAX_REPEAT" | "MIN_REPEAT":
            return _translated_repeat(argument, flags, variant)
        case "AT":
            return _translated_place(argument.name, flags, variant, tail)
    raise _Untranslatable(operator.name)


def _translated_repeat(argument: Any, flags: int, variant: Variant) -> str:
    least, most, nodes = argument
    if nodes.getwidth()[0] == 0 and most > 1:
        # re leaves a repeat after an empty round, which the tree does not show to be the same.
        raise _Untranslatable("a repeat of what can be empty")
    body = f"(?:{_translated(nodes, flags, variant, tail=False)})"
    if most == parsing.parser.MAXREPEAT:
        return f"{body}{{{int(least)},}}"
    return f"{body}{{{int(least)},{int(most)}}}"


def _translated_place(place: str, flags: int, variant: Variant, tail: bool) -> str:
    by_line = variant.lines or flags & re.MULTILINE
    match place:
        case "AT_BEGINNING":
            return "(?m:^)" if by_line else r"\A"
        case "AT_BEGINNING_STRING":
            return "(?m:^)" if variant.lines else r"\A"
        case "AT_END_STRING":
            return "(?m:$)" if variant.lines else r"\z"
        case "AT_END" if by_line:
            return "(?m:$)"
        case "AT_END" if tail:
            return r"(?:\n?\z)"
        case "AT_BOUNDARY" if variant.ascii or flags & re.ASCII:
            return r"\b"
    raise _Untranslatable(place)


def _set(ranges: _Ranges, variant: Variant) -> str:
    if variant.lines:
        ranges = tuple(_without_line_feed(ranges))
    if not ranges:
        return _NOTHING
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        character = chr(ranges[0][0])
        if character.isascii() and character.isalnum():
            return character
        return rf"\x{{{ranges[0][0]:x}}}"
    return "[" + "".join(rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in ranges) + "]"


def _without_line_feed(ranges: _Ranges) -> Iterator[tuple[int, int]]:
    for low, high in ranges:
        if low <= 10 <= high:
            if low < 10:
                yield low, 9
            if high > 10:
                yield 11, high
        else:
            yield low, high


_taken_by: dict[tuple[str, int, bool], _Ranges] = {}


def _taken(node: Node, flags: int, ascii_only: bool) -> _Ranges:
    """Return the ranges of code points that ``re`` takes for a *node* of one character."""
    operator, argument = node
    if operator.name == "LITERAL" and not flags & re.IGNORECASE:
        return () if ascii_only and argument > 127 else ((argument, argument),)
    key = (repr(node), flags, ascii_only)
    try:
        return _taken_by[key]
    except KeyError:
        tree = parsing.parser.SubPattern(parsing.parser.State(), [node])
        runs = parsing.parser.SubPattern(
            parsing.parser.State(),
            [(parsing.parser.MAX_REPEAT, (1, parsing.parser.MAXREPEAT, tree))],
        )
        pattern = parsing.compiler.compile(runs, flags)
        if len(_taken_by) >= 1000:
            _taken_by.clear()
        ranges = tuple(
            (run.start(), run.end() - 1) for run in pattern.finditer(_characters(ascii_only))
        )
        _taken_by[key] = ranges
        return ranges


@functools.cache
def _characters(ascii_only: bool) -> str:
    """Return a string in which each character stands at its code point."""
    if ascii_only:
        return bytes(range(128)).decode("ascii")
    points = array.array("I", range(_LAST_CODE_POINT + 1)).tobytes()
    order = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
    return points.decode(order, "surrogatepass")
