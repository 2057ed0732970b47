"""An application in a process of its own, which notes when it took which message.

Called as ``python -m tests.application URI QUEUE NAME SECONDS``.  It processes the messages of the
queue until SIGTERM, each in so many seconds, and notes in the same transaction, in a tree of its
own in the database, at which times it took a message of this subject.  It never gives up.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transaction
from BTrees.OOBTree import OOBTree

from postoffice.consumer import consume
from postoffice.database import open_database
from postoffice.exceptions import DepotUnavailable
from postoffice.message import Message

__all__ = ["Application", "lay_out", "taken"]

_TREES = "applications"
_ROOT = Path(__file__).resolve().parent.parent


def lay_out(uri: str, names: Iterable[str]) -> None:
    """Make the trees of some applications, before they run."""
    database = open_database(uri)
    try:
        with database.transaction() as connection:
            connection.root()[_TREES] = OOBTree({name: OOBTree() for name in names})
    finally:
        database.close()


def taken(uri: str) -> dict[str, list[float]]:
    """Return at which times each message was taken, in seconds since the epoch, by its subject."""
    database = open_database(uri)
    try:
        with database.transaction() as connection:
            found: dict[str, list[float]] = {}
            for tree in connection.root()[_TREES].values():
                for subject, times in tree.items():
                    found.setdefault(subject, []).extend(times)
            return found
    finally:
        database.close()


class Application:
    """A running application."""

    def __init__(
        self,
        uri: str,
        queue: str,
        name: str,
        said: Path,
        seconds: float = 0.0,
        python: Sequence[str] = (sys.executable,),
        **process: Any,
    ) -> None:
        """Start it.

        :param name: of its tree.
        :param said: the file to which its standard error is appended.
        :param seconds: how long a message takes it.
        :param python: the words of the command that runs Python.
        :param process: how :class:`subprocess.Popen` starts it: ``user`` and the like.
        """
        words = ["-m", "tests.application", uri, queue, name, str(seconds)]
        with open(said, "ab") as output:
            self.process = subprocess.Popen(
                [*python, *words], stdout=output, stderr=output, cwd=_ROOT, **process
            )

    def stop(self) -> int:
        """Stop it, and return its status."""
        self.process.terminate()
        return self.process.wait(60)

    def __enter__(self) -> Application:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Kill it, if it still runs."""
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Be an application."""
    uri, queue, name, seconds = sys.argv[1:]
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    def handle(message: Message, connection: Any) -> None:
        tree = connection.root()[_TREES][name]
        subject = str(message["Subject"])
        tree[subject] = [*tree.get(subject, []), time.time()]
        time.sleep(float(seconds))

    signal.signal(signal.SIGTERM, stop)
    while not stopping:
        try:
            consume(uri, queue, handle, stop=lambda: stopping, max_attempts=1000, retry_delay=0.1)
        except DepotUnavailable as error:
            transaction.abort()
            sys.stderr.write(f"{error}\n")
            time.sleep(0.1)


if __name__ == "__main__":
    main()
