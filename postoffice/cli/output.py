"""What the commands print: tables, JSON, times and sizes, and the line that ends a failure.

Nothing that a message holds reaches a terminal as it is: text passes
:func:`postoffice.display.printable`, and nothing in it is taken for markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import click

from postoffice.display import printable

__all__ = [
    "Column",
    "Failure",
    "age",
    "complain",
    "count",
    "iso_time",
    "local_time",
    "print_json",
    "print_table",
    "say",
    "size",
    "time_span",
]

_KILO = 1024
_WIDEST = 40


class Failure(Exception):
    """A command cannot go on.

    :ivar status: the exit status that it ends with.
    """

    def __init__(self, line: str, status: int) -> None:
        """Fail with this line and this exit status."""
        super().__init__(line)
        self.status = status


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    :ivar heading: the text above it.
    :ivar right: whether it is aligned to the right.
    :ivar share: how large a part of the terminal's width that is left it takes; 0 for what its
        longest cell needs.
    """

    heading: str
    right: bool = False
    share: int = 0


def say(text: str) -> None:
    """Print one line of our own text, in which a message's text may be."""
    click.echo(printable(text))


def complain(first: str, *more: str) -> None:
    """Print a line on standard error, and what belongs to it in lines below."""
    click.echo(f"postoffice: {printable(first)}", err=True)
    for line in more:
        click.echo(printable(line), err=True)


def print_json(value: object) -> None:
    """Print a value as JSON, of printable ASCII characters and line breaks alone."""
    click.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: on a terminal within its width, else with every cell in full."""
    shown = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_fitted(columns, shown)
    else:
        _print_plain(columns, shown)


def _print_fitted(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=any(one.share for one in columns))
    for column in columns:
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            ratio=column.share or None,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in rows:
        # As plain text, a cell is not searched for markup.
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False, markup=False, emoji=False).print(table)


def _print_plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich.cells import cell_len

    lines = [[column.heading for column in columns], *rows]
    widths = [max(cell_len(line[index]) for line in lines) for index in range(len(columns))]
    # One long subject shall not push a column away from all others.
    widths = [
        min(width, _WIDEST) if column.share else width
        for column, width in zip(columns, widths, strict=True)
    ]
    for line in lines:
        cells = []
        for column, cell, width in zip(columns, line, widths, strict=True):
            padding = " " * (width - cell_len(cell))
            cells.append(padding + cell if column.right else cell + padding)
        click.echo("  ".join(cells).rstrip())


def _moment(nanoseconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    except (OverflowError, ValueError, OSError):
        # A file's time may be set to what no calendar has.
        return None


def iso_time(nanoseconds: int) -> str | None:
    """Return a time as ISO 8601 has it, in UTC; ``None`` for one beyond the calendar."""
    moment = _moment(nanoseconds)
    return None if moment is None else moment.isoformat(timespec="milliseconds")


def local_time(nanoseconds: int) -> str:
    """Return a time as a clock here shows it."""
    moment = _moment(nanoseconds)
    if moment is None:
        return f"@{nanoseconds // 1_000_000_000}"
    try:
        return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return moment.strftime("%Y-%m-%d %H:%M:%SZ")


def age(nanoseconds: int, now: int) -> str:
    """Return how long ago a time was, in one unit."""
    return time_span(timedelta(microseconds=(now - nanoseconds) // 1000))


def time_span(span: timedelta) -> str:
    """Return a length of time, in one unit; one that is negative is none."""
    seconds = max(0, int(span.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def size(number: int) -> str:
    """Return a number of bytes for a person; a KB is 1,024 as it is in the configuration."""
    if number < _KILO:
        return f"{number} B"
    if number < _KILO**2:
        return f"{number / _KILO:.1f} KB"
    if number < _KILO**3:
        return f"{number / _KILO**2:.1f} MB"
    return f"{number / _KILO**3:.1f} GB"


def count(number: int, singular: str) -> str:
    """Return a number with its noun: ``1 message``, ``2 messages``."""
    return f"{number} {singular}" if number == 1 else f"{number} {singular}s"
