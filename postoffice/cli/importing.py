"""``postoffice import``: the Maildir into the queues."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import Failure, complain, count, say
from postoffice.exceptions import EX_TEMPFAIL

if TYPE_CHECKING:
    from postoffice.intake.maildir import Outcome

__all__ = ["import_command"]

_REDRAWN_EVERY = 0.1


@click.command("import", short_help="Import what waits in the Maildir.")
@click.option("--failed", is_flag=True, help="Try again whatever was set aside, too.")
@shared_options
@pass_invocation
def import_command(invocation: Invocation, failed: bool) -> None:
    """Import what waits in the Maildir: each message to the queue that the rules give it.

    Queues that are new in the configuration are made first.  Silent when all is well; with -v, a
    line for each message and a summary.
    """
    from postoffice.intake.maildir import MaildirBusy

    with invocation.post_office() as post_office:
        # Lines that scroll by show the progress too.
        shows_bar = sys.stderr.isatty() and not invocation.verbose
        started = time.monotonic()
        try:
            with _bar() if shows_bar else _nothing() as progress:
                outcome = post_office.import_messages(
                    progress, (lambda failure: True) if failed else None
                )
        except MaildirBusy as error:
            complain(f"{error}; nothing is left to do here")
            return
        if invocation.verbose:
            _summarize(outcome, time.monotonic() - started)
        if outcome.set_aside:
            they = "it is" if outcome.set_aside == 1 else "they are"
            raise Failure(
                f"{count(outcome.set_aside, 'message')} could not be processed; {they} set aside "
                f"in {post_office.archive().failed}, the reason beside each; "
                "`postoffice import --failed` tries again",
                EX_TEMPFAIL,
            )


def _summarize(outcome: Outcome, seconds: float) -> None:
    parts = [f"{number} {verdict}" for verdict, number in sorted(outcome.counts.items())]
    if outcome.set_aside:
        parts.append(f"{outcome.set_aside} set aside")
    if outcome.dropped:
        parts.append(f"{outcome.dropped} archived that an earlier run had imported")
    say(
        f"{count(outcome.total, 'message')} in {seconds:.1f} s"
        + (f": {', '.join(parts)}" if parts else "")
    )


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    # Redrawn by hand: a thread of its own would not survive a fork in the import.
    bar = Progress(
        TextColumn("importing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )
    task = bar.add_task("", total=None)
    drawn = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal drawn
        bar.update(task, completed=done, total=total)
        if done == total or time.monotonic() - drawn >= _REDRAWN_EVERY:
            bar.refresh()
            drawn = time.monotonic()

    with bar:
        yield progress
