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

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from postoffice.exceptions import MatchTimeout
from postoffice.expressions import parsing, worker
from postoffice.expressions.cost import (
    AFFORDABLE_STEPS,
    PREFERRED_MATCH_STEPS,
    PREFERRED_SEARCH_STEPS,
    longest,
)
from postoffice.expressions.programs import (
    ANCHORED,
    BLOCK_MEMORY,
    PROGRAM_MEMORY,
    UNANCHORED,
    Program,
)
from postoffice.expressions.translation import (
    ASCII_LINES,
    UNICODE_LINES,
    VARIANTS,
    Variant,
    translated,
)

__all__ = ["LIST_LIMIT", "MATCH_LIMIT", "Expression", "ExpressionList"]

#: Seconds of processor time that one match may take.
MATCH_LIMIT: Final = 1.0

#: Seconds after which several expressions that all take long are given up on together.
LIST_LIMIT: Final = 5.0

BLOCK_SIZE: Final = 256


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
        pattern = parsing.compiled(source, flags)
        self.source = source
        self.flags = int(flags)
        self.limit = limit
        self._pattern_match = pattern.match
        self._pattern_search = pattern.search
        self._tree: Any = None
        self._programs: dict[Variant, Program | None] = {}
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
        return self._ask(text, ANCHORED)

    def search(self, text: str) -> bool:
        """Say whether the expression matches anywhere in *text*, as ``re.search`` does.

        Raises what :meth:`match` does.
        """
        if len(text) <= self._longest_searched:
            return self._pattern_search(text) is not None
        return self._ask(text, UNANCHORED)

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
        anchored = anchor is ANCHORED
        if length <= (self._longest_matched if anchored else self._longest_searched):
            return self._in_process(text, anchor)
        data: bytes | None
        try:
            data = text.encode()
        except UnicodeEncodeError:
            data = program = None
        else:
            program = self._program(VARIANTS[text.isascii()]["\n" not in text])
        if program is not None and data is not None and len(data) <= program.longest:
            return program.found(anchor, data)
        if length <= affordable[0 if anchored else 1]:
            return self._in_process(text, anchor)
        place = "m" if anchored else "s"
        if program is not None and data is not None:
            return worker.shared.ask(self, place.upper(), program.source, data)
        return worker.shared.ask(
            self,
            place,
            self.source.encode("utf-8", "surrogatepass"),
            text.encode("utf-8", "surrogatepass"),
        )

    def _in_process(self, text: str, anchor: Any) -> bool:
        ask = self._pattern_match if anchor is ANCHORED else self._pattern_search
        return ask(text) is not None

    def _measure(self) -> tuple[int, int]:
        tree = self._parsed()
        self._longest_matched, self._longest_searched = longest(
            tree, PREFERRED_MATCH_STEPS, PREFERRED_SEARCH_STEPS
        )
        # Last, since another thread takes it for the sign that all are there.
        affordable = self._longest_affordable = longest(tree, AFFORDABLE_STEPS, AFFORDABLE_STEPS)
        return affordable

    def _parsed(self) -> Any:
        """Return the tree of Python's parser, or ``None`` where it cannot be had."""
        if self._tree is None:
            self._tree = parsing.parsed(self.source, self.flags)
        return self._tree

    def _translation(self, variant: Variant) -> str | None:
        """Return what RE2 must be given for texts of this *variant*; ``None``: it cannot answer."""
        tree = self._parsed()
        return None if tree is None else translated(tree, variant)

    def _program(self, variant: Variant) -> Program | None:
        try:
            return self._programs[variant]
        except KeyError:
            translation = self._translation(variant)
            program = None
            if translation is not None:
                program = Program.compiled(translation, PROGRAM_MEMORY, self.limit)
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
        self._match_plans: dict[Variant, _Plan] = {}
        self._search_plans: dict[Variant, _Plan] = {}

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
        variant = ASCII_LINES if joined.isascii() else UNICODE_LINES
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
            variant = VARIANTS[text.isascii()]["\n" not in text]
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
    deadline = time.monotonic() + LIST_LIMIT
    for expression in expressions:
        if any(ask(expression, text) for text in texts):
            return expression.source
        if time.monotonic() > deadline:
            raise MatchTimeout(f"the expressions take more than {LIST_LIMIT:g} s on one message")
    return None


class _Block:
    """Expressions asked at once; its halves, when the answer is yes or cannot be had at once."""

    __slots__ = ("_expressions", "_halves", "_longest", "_prefix", "_program", "_variant")

    def __init__(self, expressions: tuple[Expression, ...], variant: Variant, prefix: str) -> None:
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
            if self._program.run(UNANCHORED, data, 0, len(data))[0][0] < 0:
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

    def _compiled(self) -> Program | None:
        # Only expressions that have a translation are put into a block.
        translations = [f"(?:{one._translation(self._variant)})" for one in self._expressions]
        source = f"{self._prefix}(?:{'|'.join(translations)})"
        return Program.compiled(source, BLOCK_MEMORY, self._expressions[0].limit)


@dataclass(frozen=True, slots=True)
class _Plan:
    """For one kind of text: the expressions that RE2 can answer, and the others."""

    block: _Block | None
    others: tuple[Expression, ...]

    @classmethod
    def made(cls, expressions: tuple[Expression, ...], variant: Variant, prefix: str) -> _Plan:
        linear: list[Expression] = []
        others: list[Expression] = []
        for expression in expressions:
            able = expression._translation(variant) is not None
            (linear if able else others).append(expression)
        block = _Block(tuple(linear), variant, prefix) if linear else None
        return cls(block, tuple(others))
