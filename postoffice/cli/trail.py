"""The trail of a decision in lines: which rule was asked, and what it answered."""

from __future__ import annotations

from collections.abc import Iterable

from postoffice.cli.output import say

__all__ = ["print_trail"]

_MOST = 60


def print_trail(steps: Iterable[tuple[str, str, str | None, str | None]]) -> None:
    """Print a line for each step: rule, filter (or ``""``), answer, and fault."""
    rows = []
    for rule, asked, answer, fault in steps:
        if fault is not None:
            said = f"gives up: {fault}"
        elif answer is not None:
            # A filter's answer begins with the filter, which stands beside it already.
            said = f"YES  {answer.removeprefix(asked).removeprefix(' matches').strip()}"
        else:
            said = "no"
        rows.append(
            (rule, asked or ("" if not rule.startswith("queue:") else "(no filters)"), said)
        )
    first = min(_MOST, max((len(row[0]) for row in rows), default=0))
    second = min(_MOST, max((len(row[1]) for row in rows), default=0))
    last = ""
    for rule, asked, said in rows:
        shown = rule if rule != last else ""
        last = rule
        say(f"  {shown:<{first}}  {asked:<{second}}  {said}")
