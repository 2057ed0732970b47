"""``postoffice debug``: a Python shell with the depot in it."""

from __future__ import annotations

import code
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options

if TYPE_CHECKING:
    from postoffice.depot.folder import QueuesFolder
    from postoffice.queue import Queue

__all__ = ["debug_command"]

_BANNER = """\
postoffice        {path}
queues            the queues by name: {names}
root              the depot itself, a QueuesFolder
connection        the ZODB connection
transaction       its transactions: transaction.commit(), transaction.abort()
Nothing is changed but by transaction.commit(); what a queue gives by pop_next() comes back without
it.  End the shell with Ctrl-D."""


class _Queues(Mapping[str, "Queue"]):
    """The queues of a depot, by name."""

    def __init__(self, folder: QueuesFolder) -> None:
        self._folder = folder
        self._made: dict[str, Queue] = {}

    def __getitem__(self, name: str) -> Queue:
        from postoffice.queue import Queue

        # The same object each time: it knows what its transaction has done.
        record = self._folder.get(name)
        if name not in self._made:
            self._made[name] = Queue(record)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._folder.names())

    def __len__(self) -> int:
        return len(self._folder.names())

    def __repr__(self) -> str:
        return f"<queues {', '.join(map(repr, self))}>"


@click.command("debug", short_help="Open a Python shell with the depot in it.")
@shared_options
@pass_invocation
def debug_command(invocation: Invocation) -> None:
    """Open a Python shell with the depot in it; nothing is committed unless you do."""
    from transaction import TransactionManager

    with invocation.existing_depot() as post_office:
        # Not an explicit one: in a shell, the next transaction begins by itself.
        manager = TransactionManager()
        connection = post_office.database.open(manager)
        try:
            folder = post_office.folder(connection)
            names: dict[str, Any] = {
                "postoffice": post_office,
                "queues": _Queues(folder),
                "root": folder,
                "connection": connection,
                "transaction": manager,
            }
            banner = _BANNER.format(
                path=post_office.settings.path, names=", ".join(map(repr, folder.names())) or "none"
            )
            _edit_lines(names)
            code.interact(banner, local=names, exitmsg="")
        finally:
            manager.abort()
            connection.close()


def _edit_lines(names: dict[str, Any]) -> None:
    """Let the shell edit lines and complete names, where Python was built with it."""
    if not sys.stdin.isatty():
        return
    try:
        readline = importlib.import_module("readline")
        rlcompleter = importlib.import_module("rlcompleter")
    except ImportError:
        return
    readline.set_completer(rlcompleter.Completer(names).complete)
    readline.parse_and_bind("tab: complete")
