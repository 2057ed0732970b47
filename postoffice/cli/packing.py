"""``postoffice pack``: space back from the database."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import say, size

if TYPE_CHECKING:
    from postoffice.packing import Packing

__all__ = ["pack_command"]

_DAY = 24 * 60 * 60
_LOOKED_AT_EVERY = 0.2


@click.command("pack", short_help="Give back the space of what is no longer current.")
@click.option(
    "--days",
    metavar="N",
    type=click.IntRange(0, 36500),
    default=1,
    help="Keep what was current within the last N days; 1 without this option.",
)
@shared_options
@pass_invocation
def pack_command(invocation: Invocation, days: int) -> None:
    """Pack the database: give back the space of messages that were taken, and of older states.

    Nothing needs it but the disk.  Others may use the database meanwhile, if its storage serves
    several processes.
    """
    from postoffice.packing import Packing

    with invocation.existing_depot() as post_office:
        packing = Packing(post_office.database)
        was = packing.size()
        started = time.monotonic()
        with _display(packing, was) if sys.stderr.isatty() else _nothing():
            packing.run(time.time() - days * _DAY)
        kept = "; the database keeps what is free now for what comes" if packing.keeps_size else ""
        seconds = time.monotonic() - started
        say(f"packed in {seconds:.1f} s: {size(packing.size())}, was {size(was)}{kept}")
        if packing.at_server:
            say("the server keeps the state before in depot.fs.old and blobs.old")
        for path in packing.leftovers():
            say(f"{path} has the state before; the next packing replaces it")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _display(packing: Packing, was: int) -> Iterator[None]:
    """Show what can be known: the growing copy of a file, or else the time alone."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    bar = Progress(
        TextColumn("packing"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(size(was), total=None)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOKED_AT_EVERY):
            copied = packing.copied()
            if copied is not None:
                bar.update(
                    task,
                    description=f"{size(copied)} of at most {size(was)}",
                    completed=copied,
                    total=was,
                )

    watcher = threading.Thread(target=look, daemon=True)
    with bar:
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
