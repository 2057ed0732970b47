"""How fast an application takes messages out, as a ratio to what ZODB itself can do.

One message a transaction: ``pop_next`` and commit, against removing one record of the same size
from a BTree, reading it, and commit.  Both sides run in turn, on databases of their own; the
median of the rounds counts.

    python benchmarks/consume.py                    # 5,000 messages
    python benchmarks/consume.py --waiting 200000   # the first 5,000 of so many
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import transaction
from BTrees.LOBTree import LOBTree
from persistent import Persistent
from ZODB.blob import BlobStorage
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from postoffice import find_queue
from postoffice.depot.folder import make_folder


class Record(Persistent):
    """A record as an application without postoffice would keep."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw


def raw(number: int) -> bytes:
    """Return a message of 3 KB."""
    return b"From: a@example.net\nTo: b@example.com\nSubject: %d\n\n" % number + b"text " * 600


def open_database(folder: Path) -> DB:
    """Open a new database with blobs."""
    folder.mkdir()
    return DB(BlobStorage(str(folder / "blobs"), FileStorage(str(folder / "data.fs"))))


def baseline(folder: Path, waiting: int, taken: int) -> float:
    """Return the records a second that ZODB removes and reads, one a transaction."""
    database = open_database(folder)
    with database.transaction() as connection:
        connection.root()["tree"] = LOBTree()
    for first in range(0, waiting, 1000):
        with database.transaction() as connection:
            tree = connection.root()["tree"]
            for number in range(first, min(first + 1000, waiting)):
                tree[number] = Record(raw(number))
    connection = database.open()
    connection.cacheMinimize()
    tree = connection.root()["tree"]
    started = time.perf_counter()
    for _ in range(taken):
        assert tree.pop(tree.minKey()).raw
        transaction.commit()
    seconds = time.perf_counter() - started
    connection.close()
    database.close()
    return taken / seconds


def consumed(folder: Path, waiting: int, taken: int) -> float:
    """Return the messages a second that pop_next takes, one a transaction."""
    database = open_database(folder)
    with database.transaction() as connection:
        make_folder(connection.root(), "postoffice").make("app")
    for first in range(0, waiting, 1000):
        with database.transaction() as connection:
            queue = find_queue(connection.root(), "app")
            for number in range(first, min(first + 1000, waiting)):
                queue.add(raw(number))
    connection = database.open()
    connection.cacheMinimize()
    queue = find_queue(connection.root(), "app")
    started = time.perf_counter()
    for _ in range(taken):
        assert queue.pop_next().raw
        transaction.commit()
    seconds = time.perf_counter() - started
    connection.close()
    database.close()
    return taken / seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--waiting", type=int, default=5000)
    parser.add_argument("--taken", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; on a real disk")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="postoffice-benchmark-", dir=options.folder))
    ratios, ours, bases = [], [], []
    try:
        for number in range(options.rounds):
            bases.append(baseline(scratch / f"base{number}", options.waiting, options.taken))
            ours.append(consumed(scratch / f"ours{number}", options.waiting, options.taken))
            ratios.append(ours[-1] / bases[-1])
            print(
                f"round {number + 1}: ZODB {bases[-1]:.0f}/s, pop_next {ours[-1]:.0f}/s, "
                f"ratio {ratios[-1]:.2f}"
            )
    finally:
        shutil.rmtree(scratch)
    print(
        f"median with {options.waiting} waiting: ZODB {statistics.median(bases):.0f}/s, "
        f"pop_next {statistics.median(ours):.0f}/s, ratio {statistics.median(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
