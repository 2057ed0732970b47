"""Regular expressions over text that an attacker may have written.

Python's ``re`` says what matches.  What it does not say is how long that may take, so each match
goes to the first of three engines that can both answer as ``re`` does and end in time:

1. ``re`` itself, in this process, when the expression and the length of the text bound its steps.
2. RE2, whose time is linear, when the expression is one that it can answer exactly.  RE2 never
   sees the source: the tree of Python's own parser is translated, and every set of characters is
   found by asking ``re`` which ones it takes, so that classes and folding of case are Python's.
3. A process of its own, which the kernel ends after :data:`MATCH_LIMIT` seconds of its processor
   time.  Nothing else stops ``re``: it answers neither signals nor threads while it runs.

Only whether there is a match is told, never where.

Any thread may use any of this.  The process of the third engine is one for all threads, which
wait for each other; a forked child starts its own, and it never outlives the one that started it
by more than a match's limit.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import importlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

# The public classes add 1.5 us a call, so the extension is used itself.
from re2 import _re2

from postoffice.exceptions import LimitExceeded, MatchTimeout, TemporaryError

__all__ = ["MATCH_LIMIT", "Expression", "ExpressionList"]

#: Seconds of processor time that one match may take.
MATCH_LIMIT: Final = 1.0

# A step of re takes 5 ns at most, often a tenth of that.  RE2 wins most searches, but few matches.
PREFERRED_MATCH_STEPS: Final = 40_000
PREFERRED_SEARCH_STEPS: Final = 4_000
AFFORDABLE_STEPS: Final = 2_000_000

# Where its DFA does not fit, RE2 takes up to 18 ns for each instruction and byte.
LINEAR_STEPS_PER_SECOND: Final = 40_000_000
PROGRAM_MEMORY: Final = 4 << 20
BLOCK_MEMORY: Final = 16 << 20
BLOCK_SIZE: Final = 256

WORKER_MEMORY: Final = 1 << 30
WORKER_GRACE: Final = 5.0
WORKER_START_LIMIT: Final = 20.0

_LAST_CODE_POINT: Final = 0x10FFFF
_NOTHING: Final = r"[^\x{0}-\x{10ffff}]"
_TYPE_FLAGS: Final = int(re.ASCII | re.LOCALE | re.UNICODE)
_CHARACTER_FLAGS: Final = int(re.ASCII | re.UNICODE | re.IGNORECASE | re.DOTALL)
_CHARACTER_NODES: Final = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN"})
_ANCHORED: Final = _re2.RE2.Anchor.ANCHOR_START
_UNANCHORED: Final = _re2.RE2.Anchor.UNANCHORED

# Private to CPython; without them there is no second engine, and the third has more to do.
_parser: Any
_compiler: Any
try:
    _parser = importlib.import_module("re._parser")
    _compiler = importlib.import_module("re._compiler")
except ImportError:
    _parser = _compiler = None

_Node = tuple[Any, Any]
_Ranges = tuple[tuple[int, int], ...]


class Expression:
    """One regular expression of Python's.

    Never changed once made.  Two with the same source and flags are equal.
    """

    __slots__ = (
        "__weakref__",
        "_longest_affordable",
        "_longest_matched",
        "_longest_searched",
        "_pattern_match",
        "_pattern_search",
        "_programs",
        "_tree",
        "flags",
        "limit",
        "source",
    )

    def __init__(self, source: str, flags: int = 0, limit: float = MATCH_LIMIT) -> None:
        """Compile *source*, without warnings.

        :param flags: of ``re``, such as ``re.MULTILINE``.
        :param limit: seconds of processor time that one match may take.
        :raises re.error: *source* is no expression, or one that ``re`` cannot compile.
        """
        pattern = _compiled(source, flags)
        self.source = source
        self.flags = int(flags)
        self.limit = limit
        self._pattern_match = pattern.match
        self._pattern_search = pattern.search
        self._tree: Any = None
        self._programs: dict[_Variant, _Program | None] = {}
        # Longest texts on which re is preferred, in characters; unknown until one is needed.
        self._longest_matched = -1
        self._longest_searched = -1
        self._longest_affordable: tuple[int, int] | None = None

    def match(self, text: str) -> bool:
        """Say whether the expression matches *text* from its start, as ``re.match`` does.

        :raises postoffice.exceptions.MatchTimeout: it takes longer than the limit.
        :raises postoffice.exceptions.LimitExceeded: it needs more memory than a match may have.
        :raises postoffice.exceptions.TemporaryError: no process can be started for it.
        """
        if len(text) <= self._longest_matched:
            return self._pattern_match(text) is not None
        return self._ask(text, _ANCHORED)

    def search(self, text: str) -> bool:
        """Say whether the expression matches anywhere in *text*, as ``re.search`` does.

        Raises what :meth:`match` does.
        """
        if len(text) <= self._longest_searched:
            return self._pattern_search(text) is not None
        return self._ask(text, _UNANCHORED)

    def __eq__(self, other: object) -> bool:
        """Compare source and flags."""
        if not isinstance(other, Expression):
            return NotImplemented
        return (self.source, self.flags) == (other.source, other.flags)

    def __hash__(self) -> int:
        """Hash source and flags."""
        return hash((self.source, self.flags))

    def __repr__(self) -> str:
        """Show source and flags."""
        return f"Expression({self.source!r}, {self.flags})"

    def _ask(self, text: str, anchor: Any) -> bool:
        length = len(text)
        affordable = self._longest_affordable or self._measure()
        anchored = anchor is _ANCHORED
        if length <= (self._longest_matched if anchored else self._longest_searched):
            return self._in_process(text, anchor)
        data: bytes | None
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = program = None
        else:
            program = self._program(_VARIANTS[text.isascii()]["\n" not in text])
        if program is not None and data is not None and len(data) <= program.longest:
            return program.found(anchor, data)
        if length <= affordable[0 if anchored else 1]:
            return self._in_process(text, anchor)
        place = "m" if anchored else "s"
        if program is not None and data is not None:
            return _worker.ask(self, place.upper(), program.source, data)
        return _worker.ask(
            self,
            place,
            self.source.encode("utf-8", "surrogatepass"),
            text.encode("utf-8", "surrogatepass"),
        )

    def _in_process(self, text: str, anchor: Any) -> bool:
        ask = self._pattern_match if anchor is _ANCHORED else self._pattern_search
        return ask(text) is not None

    def _measure(self) -> tuple[int, int]:
        tree = self._parsed()
        self._longest_matched, self._longest_searched = _longest(
            tree, PREFERRED_MATCH_STEPS, PREFERRED_SEARCH_STEPS
        )
        # Last, since another thread takes it for the sign that all are there.
        affordable = self._longest_affordable = _longest(tree, AFFORDABLE_STEPS, AFFORDABLE_STEPS)
        return affordable

    def _parsed(self) -> Any:
        """Return the tree of Python's parser, or ``None`` where it cannot be had."""
        if self._tree is None and _parser is not None:
            with _quiet(), contextlib.suppress(AttributeError):
                self._tree = _parser.parse(self.source, self.flags)
        return self._tree

    def _translation(self, variant: _Variant) -> str | None:
        """Return what RE2 must be given for texts of this *variant*; ``None``: it cannot answer."""
        tree = self._parsed()
        if tree is None:
            return None
        try:
            return _translated(tree, int(tree.state.flags), variant, tail=True)
        except (_Untranslatable, RecursionError):
            return None
        except (AttributeError, TypeError):
            # A later CPython may build its tree otherwise: then RE2 is not asked.
            return None

    def _program(self, variant: _Variant) -> _Program | None:
        try:
            return self._programs[variant]
        except KeyError:
            translation = self._translation(variant)
            program = None
            if translation is not None:
                program = _Program.compiled(translation, PROGRAM_MEMORY, self.limit)
            self._programs[variant] = program
            return program


class ExpressionList:
    """Several regular expressions, of which any may match, asked all at once where that is exact.

    Never changed once made.
    """

    __slots__ = ("_each", "_match_plans", "_search_plans", "sources")

    def __init__(self, sources: Iterable[str], flags: int = 0, limit: float = MATCH_LIMIT) -> None:
        """Compile all *sources*; each match of each may take *limit* seconds of processor time.

        :raises re.error: one is no expression; the error's ``pattern`` is its source.
        """
        self._each = tuple(Expression(source, flags, limit) for source in sources)
        self.sources = tuple(expression.source for expression in self._each)
        self._match_plans: dict[_Variant, _Plan] = {}
        self._search_plans: dict[_Variant, _Plan] = {}

    def __len__(self) -> int:
        """Count the expressions."""
        return len(self.sources)

    def match_any(self, texts: Sequence[str]) -> str | None:
        """Return the source of an expression that matches one of *texts* from its start.

        ``None``: there is none.  For the same texts the answer is always the same.  Those that RE2
        can answer are asked first; the first that exceeds its limit ends the call.

        Raises what :meth:`Expression.match` does.
        """
        if not texts:
            return None
        joined = "\n" + "\n".join(texts)
        if joined.count("\n") != len(texts):
            return self._match_each(texts)
        variant = _ASCII_LINES if joined.isascii() else _UNICODE_LINES
        plan = self._match_plans.get(variant)
        if plan is None:
            plan = self._match_plans[variant] = _Plan.made(self._each, variant, r"\n")
        if plan.block is not None:
            try:
                data = joined.encode()
            except UnicodeEncodeError:
                return self._match_each(texts)
            found = plan.block.find(data, Expression.match, texts)
            if found is not None:
                return found.source
        return _first(plan.others, Expression.match, texts) if plan.others else None

    def search_any(self, texts: Sequence[str]) -> str | None:
        """Return the source of an expression that matches anywhere in one of *texts*.

        Otherwise as :meth:`match_any`.
        """
        others: list[tuple[tuple[Expression, ...], str]] = []
        for text in texts:
            variant = _VARIANTS[text.isascii()]["\n" not in text]
            plan = self._search_plans.get(variant)
            if plan is None:
                plan = self._search_plans[variant] = _Plan.made(self._each, variant, "")
            try:
                data = text.encode()
            except UnicodeEncodeError:
                others.append((self._each, text))
                continue
            if plan.block is not None:
                found = plan.block.find(data, Expression.search, (text,))
                if found is not None:
                    return found.source
            if plan.others:
                others.append((plan.others, text))
        for expressions, text in others:
            source = _first(expressions, Expression.search, (text,))
            if source is not None:
                return source
        return None

    def _match_each(self, texts: Sequence[str]) -> str | None:
        return _first(self._each, Expression.match, texts)


def _first(
    expressions: Iterable[Expression],
    ask: Callable[[Expression, str], bool],
    texts: Sequence[str],
) -> str | None:
    for expression in expressions:
        if any(ask(expression, text) for text in texts):
            return expression.source
    return None


@dataclass(frozen=True, slots=True, eq=False)
class _Variant:
    """A kind of text: what is exact for one kind may not be for another.

    In *lines* each text is without a line feed, and several may be joined by line feeds: there no
    set of characters takes one, and the anchors are those of lines.
    """

    ascii: bool
    lines: bool


# By whether the text is ASCII, and by whether it is without a line feed.
_VARIANTS: Final = (
    (_Variant(False, False), _Variant(False, True)),
    (_Variant(True, False), _Variant(True, True)),
)
_UNICODE_LINES: Final = _VARIANTS[False][True]
_ASCII_LINES: Final = _VARIANTS[True][True]


@dataclass(frozen=True, slots=True)
class _Program:
    """What RE2 compiled, and the length in bytes of the longest text it answers in time here."""

    source: bytes
    run: Callable[[Any, bytes, int, int], list[tuple[int, int]]]
    longest: int

    @classmethod
    def compiled(cls, source: str, memory: int, limit: float) -> _Program | None:
        """Compile *source*, or return ``None`` if RE2 refuses it, as too large for one."""
        options = _re2.RE2.Options()
        options.log_errors = False
        options.max_mem = memory
        encoded = source.encode("ascii")
        program = _re2.RE2(encoded, options)
        if not program.ok():
            return None
        longest = int(limit * LINEAR_STEPS_PER_SECOND / max(1, program.ProgramSize()))
        return cls(encoded, program.Match, longest)

    def found(self, anchor: Any, data: bytes) -> bool:
        return self.run(anchor, data, 0, len(data))[0][0] >= 0


class _Block:
    """Expressions asked at once; its halves, when the answer is yes or cannot be had at once."""

    __slots__ = ("_expressions", "_halves", "_longest", "_prefix", "_program", "_variant")

    def __init__(self, expressions: tuple[Expression, ...], variant: _Variant, prefix: str) -> None:
        self._expressions = expressions
        self._variant = variant
        self._prefix = prefix
        self._halves: tuple[_Block, ...] = ()
        self._program = self._compiled() if len(expressions) <= BLOCK_SIZE else None
        self._longest = -1 if self._program is None else self._program.longest

    def find(
        self,
        data: bytes,
        ask: Callable[[Expression, str], bool],
        texts: Sequence[str],
    ) -> Expression | None:
        """Return the first expression found in *data*, which is *texts* for RE2 to read."""
        if self._program is not None and len(data) <= self._longest:
            if self._program.run(_UNANCHORED, data, 0, len(data))[0][0] < 0:
                return None
            if len(self._expressions) == 1:
                return self._expressions[0]
        elif len(self._expressions) == 1:
            one = self._expressions[0]
            return one if any(ask(one, text) for text in texts) else None
        if not self._halves:
            middle = len(self._expressions) // 2
            self._halves = (
                _Block(self._expressions[:middle], self._variant, self._prefix),
                _Block(self._expressions[middle:], self._variant, self._prefix),
            )
        for half in self._halves:
            found = half.find(data, ask, texts)
            if found is not None:
                return found
        return None

    def _compiled(self) -> _Program | None:
        # Only expressions that have a translation are put into a block.
        translations = [f"(?:{one._translation(self._variant)})" for one in self._expressions]
        source = f"{self._prefix}(?:{'|'.join(translations)})"
        return _Program.compiled(source, BLOCK_MEMORY, self._expressions[0].limit)


@dataclass(frozen=True, slots=True)
class _Plan:
    """For one kind of text: the expressions that RE2 can answer, and the others."""

    block: _Block | None
    others: tuple[Expression, ...]

    @classmethod
    def made(cls, expressions: tuple[Expression, ...], variant: _Variant, prefix: str) -> _Plan:
        linear: list[Expression] = []
        others: list[Expression] = []
        for expression in expressions:
            able = expression._translation(variant) is not None
            (linear if able else others).append(expression)
        block = _Block(tuple(linear), variant, prefix) if linear else None
        return cls(block, tuple(others))


_quiet_lock = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the warnings of Python's parser: what it warns of is valid all the same."""
    # The filters belong to the process: two threads that set them at once would restore them wrong.
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _compiled(source: str, flags: int) -> re.Pattern[str]:
    try:
        with _quiet():
            return re.compile(source, flags)
    except RecursionError:
        raise re.error("nested too deeply", source) from None
    except (OverflowError, ValueError) as error:
        raise re.error(str(error), source) from None


class _Untranslatable(Exception):
    """RE2 cannot be shown to answer as ``re`` does."""


def _translated(nodes: Iterable[_Node], flags: int, variant: _Variant, *, tail: bool) -> str:
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


def _translated_node(node: _Node, flags: int, variant: _Variant, tail: bool) -> str:
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


def _translated_repeat(argument: Any, flags: int, variant: _Variant) -> str:
    least, most, nodes = argument
    if nodes.getwidth()[0] == 0 and most > 1:
        # re leaves a repeat after an empty round, which the tree does not show to be the same.
        raise _Untranslatable("a repeat of what can be empty")
    body = f"(?:{_translated(nodes, flags, variant, tail=False)})"
    if most == _parser.MAXREPEAT:
        return f"{body}{{{int(least)},}}"
    return f"{body}{{{int(least)},{int(most)}}}"


def _translated_place(place: str, flags: int, variant: _Variant, tail: bool) -> str:
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


def _set(ranges: _Ranges, variant: _Variant) -> str:
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


def _taken(node: _Node, flags: int, ascii_only: bool) -> _Ranges:
    """Return the ranges of code points that ``re`` takes for a *node* of one character."""
    operator, argument = node
    if operator.name == "LITERAL" and not flags & re.IGNORECASE:
        return () if ascii_only and argument > 127 else ((argument, argument),)
    key = (repr(node), flags, ascii_only)
    try:
        return _taken_by[key]
    except KeyError:
        tree = _parser.SubPattern(_parser.State(), [node])
        runs = _parser.SubPattern(
            _parser.State(), [(_parser.MAX_REPEAT, (1, _parser.MAXREPEAT, tree))]
        )
        pattern = _compiler.compile(runs, flags)
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


def _longest(tree: Any, match_budget: int, search_budget: int) -> tuple[int, int]:
    """Return how long a text may be for ``re`` to match it, and to search it, within its budget.

    The budgets are steps.  -1 is the answer where even an empty text may need more.
    """
    matched = searched = -1
    if tree is None:
        return matched, searched
    # Each step that may be taken back saves the groups.
    weight = 1 + tree.state.groups / 8
    length = 0
    while length <= 1 << 22:
        try:
            steps = _effort(tree, length)[1] * weight
        except RecursionError:
            break
        if steps > match_budget:
            break
        matched = length
        if steps * (length + 1) <= search_budget:
            searched = length
        length = length + 16 if length < 256 else length * 3 // 2
    return matched, searched


def _effort(nodes: Iterable[_Node], length: int) -> tuple[float, float]:
    """Return in how many ways *nodes* can match from one place, and the steps to try them all.

    Both are upper bounds for any text of *length* characters.
    """
    ways = steps = 1.0
    for operator, argument in nodes:
        node_ways, node_steps = _node_effort(operator.name, argument, length)
        steps += ways * node_steps
        ways *= node_ways
    return ways, steps


def _node_effort(operator: str, argument: Any, length: int) -> tuple[float, float]:
    match operator:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "AT":
            return 1.0, 1.0
        case "IN":
            return 1.0, 1.0 + len(argument)
        case "SUBPATTERN":
            ways, steps = _effort(argument[3], length)
            return ways, steps + 2 * ways
        case "BRANCH":
            efforts = [_effort(choice, length) for choice in argument[1]]
            return sum(ways for ways, _ in efforts), sum(steps + 1 for _, steps in efforts)
        case "MAX_REPEAT" | "MIN_REPEAT":
            return _repeat_effort(argument, length)
        case "POSSESSIVE_REPEAT":
            return 1.0, _repeat_effort(argument, length)[1]
        case "ATOMIC_GROUP":
            return 1.0, _effort(argument, length)[1] + 1
        case "ASSERT" | "ASSERT_NOT":
            return 1.0, _effort(argument[1], length)[1] + 1
        case "GROUPREF":
            return 1.0, length + 1.0
        case "GROUPREF_EXISTS":
            efforts = [_effort(choice, length) for choice in argument[1:] if choice is not None]
            return sum(ways for ways, _ in efforts) + 1, sum(steps + 1 for _, steps in efforts)
    return float("inf"), float("inf")


def _repeat_effort(argument: Any, length: int) -> tuple[float, float]:
    least, most, nodes = argument
    width = nodes.getwidth()[0]
    rounds = min(int(most), length // width if width else int(least) + length + 1)
    ways, steps = _effort(nodes, length)
    if len(nodes) == 1 and nodes[0][0].name in _CHARACTER_NODES:
        return max(1.0, rounds - least + 1.0), (rounds + 1) * steps
    steps += 4
    if ways == 1:
        return rounds + 1.0, (rounds + 1) * steps
    if ways > 1e9 or rounds > 30:
        return float("inf"), float("inf")
    total = sum(ways**count for count in range(rounds + 1))
    return total, total * steps


# The request: what is asked, flags, limit, and the lengths of the expression and the text.
_HEADER: Final = struct.Struct("=cIdQQ")

_WORKER_SOURCE: Final = r"""
import os, re, resource, signal, struct, sys

resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
header = struct.Struct(sys.argv[2])
read = open(0, "rb", closefd=False).read

def asked_of_re(place, source, flags, limit, data):
    pattern = re.compile(source.decode("utf-8", "surrogatepass"), flags)
    text = data.decode("utf-8", "surrogatepass")
    signal.setitimer(signal.ITIMER_PROF, limit)
    return (pattern.match if place == b"m" else pattern.search)(text) is not None

def asked_of_re2(place, source, limit, data):
    if sys.argv[3] not in sys.path:
        sys.path.append(sys.argv[3])
    from re2 import _re2
    anchor = _re2.RE2.Anchor
    options = _re2.RE2.Options()
    options.log_errors = False
    options.max_mem = int(sys.argv[4])
    program = _re2.RE2(source, options)
    signal.setitimer(signal.ITIMER_PROF, limit)
    place = anchor.ANCHOR_START if place == b"M" else anchor.UNANCHORED
    return program.Match(place, data, 0, len(data))[0][0] >= 0

os.write(0, b"+")
while len(head := read(header.size)) == header.size:
    place, flags, limit, source_size, size = header.unpack(head)
    source = read(source_size)
    try:
        data = read(size)
        if place in b"ms":
            found = asked_of_re(place, source, flags, limit, data)
        else:
            found = asked_of_re2(place, source, limit, data)
        answer = b"1" if found else b"0"
    except MemoryError:
        # What was not read of the request is lost: this was the last one.
        os.write(0, b"m")
        break
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    del data
    os.write(0, answer)
"""


class _WorkerLost(Exception):
    """The process ended without an answer, but not for want of time."""


class _Worker:
    """The process that may be ended at any time: started when needed, and kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def ask(self, expression: Expression, place: str, source: bytes, data: bytes) -> bool:
        """Say what *source* answers on *data*.

        :param place: ``m`` to match with ``re``, ``s`` to search; upper case with RE2.
        """
        limit = expression.limit
        header = _HEADER.pack(
            place.encode("ascii"), expression.flags, limit, len(source), len(data)
        )
        shown = f"{expression.source[:100]!r} on a text of {len(data)} bytes"
        with self._lock:
            # Once more, since it may have been ended by someone else, and since long.
            for _ in range(2):
                try:
                    return self._answer((header, source, data), limit)
                except _WorkerLost:
                    continue
                except MemoryError:
                    raise LimitExceeded(
                        f"expression {shown}: more memory than it may have"
                    ) from None
                except TimeoutError:
                    raise MatchTimeout(f"expression {shown}: longer than {limit:g} s") from None
                except OSError as error:
                    raise TemporaryError(
                        f"expression {shown}: no process for it: {error}"
                    ) from error
            raise LimitExceeded(f"expression {shown}: its process died twice")

    def stop(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """In a forked child, leave the process to the parent."""
        self._lock = threading.Lock()
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            # It is no child of this process: nothing to wait for, nothing to warn of.
            self._process.returncode = 0
        self._channel = self._process = None

    def _answer(self, request: tuple[bytes, ...], limit: float) -> bool:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        channel = self._channel or self._start()
        try:
            channel.settimeout(limit + WORKER_GRACE)
            for part in request:
                channel.sendall(part)
            answer = channel.recv(1)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        except BaseException:
            # What it still sends would be taken for the next answer.
            self._stop()
            raise
        if answer == b"m":
            self._stop()
            raise MemoryError
        if answer == b"":
            if self._stop() == -signal.SIGPROF:
                raise TimeoutError
            raise _WorkerLost
        return answer == b"1"

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-I", "-S", "-W", "ignore", "-c", _WORKER_SOURCE),
                        *(str(WORKER_MEMORY), _HEADER.format),
                        *(_FOLDER_OF_RE2, str(BLOCK_MEMORY)),
                    ],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                )
            self._channel = ours
            ours.settimeout(WORKER_START_LIMIT)
            if ours.recv(1) != b"+":
                raise OSError("it ended while it started")
        except BaseException as error:
            ours.close()
            self._stop()
            if isinstance(error, TimeoutError):
                raise OSError(f"it did not start within {WORKER_START_LIMIT:g} s") from None
            raise
        return ours

    def _stop(self) -> int:
        """End the process and return its exit status; a negative one is a signal's number."""
        if self._channel is not None:
            self._channel.close()
        status = 0
        if self._process is not None:
            self._process.kill()
            status = self._process.wait()
        self._channel = self._process = None
        return status


_worker = _Worker()
_FOLDER_OF_RE2: Final = os.path.dirname(os.path.dirname(os.path.abspath(_re2.__file__)))

atexit.register(_worker.stop)
os.register_at_fork(after_in_child=_worker.forget)
os.register_at_fork(
    before=_quiet_lock.acquire,
    after_in_parent=_quiet_lock.release,
    after_in_child=_quiet_lock.release,
)
