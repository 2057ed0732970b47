"""What a message costs when 1,000 and when 1,000,000 wait in its queue.

Each number of waiting messages has a depot of its own, which is built once and kept in a folder.
Each round measures all of them in turn, each in a process of its own, and then takes the depot back
to where it was.  What counts is the median of the rounds' ratios to the smallest depot.

    python benchmarks/growth.py                                    # 1,000 to 100,000; FileStorage
    python benchmarks/growth.py --size 1000 --size 1000000 --folder /srv/growth
    python benchmarks/growth.py --storage zeo

In the table are microseconds by the clock, for each message (for ``len``, each call; for a page,
each page of 50), with the ratio, and the ratio of processor time, in which other processes'
writing does not show.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transaction
from corpus import fill
from shelves import SHELVES, Shelf

from postoffice.api import PostOffice
from postoffice.database import open_database
from postoffice.depot.folder import make_folder
from postoffice.queue import Queue, find_queue

SIZES = (1_000, 10_000, 100_000)
MAILS = 1_000
QUEUE = "app"

CONFIGURATION = """\
[post office]
zodb_uri = {uri}
maildir = {maildir}
archive = none

[queue:app]
filters =
    to_hostname: .example.com lists.example.net customer.example.org nowhere.example
"""

_BATCH = 1_000
_IMPORTS = 8
_WARM, _TIMES, _PAGES, _PLACES = 50, 250, 40, 5
_PAGE = 50


# -- a depot -------------------------------------------------------------------------------------


def add(queue: Queue, number: int) -> int:
    """Add a small message as the import would describe it; return its id."""
    raw = b"From: a@example.net\nTo: b@app.example.com\nSubject: number %d\n\nhello\n" % number
    values = {
        "arrived": time.time_ns(),
        "way": "benchmark",
        "source": f"17{number:08}.M{number % 1_000_000}P4711.mx",
        "sender": "a@example.net",
        "recipients": ("b@app.example.com",),
        "size": len(raw),
        "digest": number.to_bytes(32, "big"),
        "header_from": "a@example.net",
        "header_to": "b@app.example.com",
        "subject": f"number {number}",
        "message_id": f"<{number}@example.net>",
    }
    return queue.add_entry(values, raw).id


def build(uri: str, size: int) -> list[int]:
    """Put so many messages into a new depot; return some ids from all over it.

    Imports come and go, and each process adds to a lane that chance gives it.
    """
    ids: list[int] = []
    bounds = [size * part // _IMPORTS for part in range(_IMPORTS + 1)]
    for first, last in itertools.pairwise(bounds):
        words = [sys.executable, __file__, "--fill", uri, str(first), str(last)]
        run = subprocess.run(words, check=True, stdout=subprocess.PIPE)
        ids.extend(json.loads(run.stdout))
    return ids[:: max(1, size // 1000)]


def put_in(uri: str, start: int, stop: int) -> list[int]:
    """Put messages of these numbers into a depot, made if need be; return their ids."""
    ids: list[int] = []
    database = open_database(uri)
    manager = transaction.TransactionManager(explicit=True)
    connection = database.open(manager)
    manager.begin()
    if not start:
        make_folder(connection.root(), "postoffice").make(QUEUE)
    manager.commit()
    queue = None
    for first in range(start, stop, _BATCH):
        manager.begin()
        if queue is None:
            queue = find_queue(connection.root(), QUEUE)
        ids.extend(add(queue, number) for number in range(first, min(first + _BATCH, stop)))
        manager.commit()
        queue.forget_bodies()
    connection.close()
    database.close()
    return ids


# -- one round, in a process of its own ------------------------------------------------------------


class Meter:
    """Times by the clock and of the processor, and bytes written, by what was done."""

    def __init__(self, size: Callable[[], int]) -> None:
        """Measure; `size` tells how large the database is."""
        self.found: dict[str, list[float]] = {}
        self._size = size

    @contextlib.contextmanager
    def measure(self, what: str, times: int) -> Iterator[None]:
        """Measure what is done so many times."""
        before = self._size()
        clock, processor = time.perf_counter(), time.process_time()
        yield
        seconds, busy = time.perf_counter() - clock, time.process_time() - processor
        values = (seconds * 1e6 / times, busy * 1e6 / times, (self._size() - before) / times)
        self.found[what] = list(values)


def memory() -> float:
    """Return the megabytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def one_round(uri: str, ids: list[int], ini: Path, file: Path | None) -> dict[str, Any]:
    """Do everything to one depot; return what was measured."""
    meter = Meter(_sizer(file))
    with meter.measure("open", 1):
        database = open_database(uri)
    opened = memory()
    manager = transaction.TransactionManager(explicit=True)
    connection = database.open(manager)
    manager.begin()
    queue = find_queue(connection.root(), QUEUE)
    manager.abort()

    def added(times: int) -> None:
        for number in range(times):
            manager.begin()
            add(queue, number)
            manager.commit()
            queue.forget_bodies()

    def popped(times: int) -> None:
        for _ in range(times):
            manager.begin()
            assert queue.pop_next().raw
            manager.commit()

    def acknowledged(times: int) -> None:
        while times > 0:
            for held in queue.claim(_PAGE):
                manager.begin()
                assert held.message.raw
                held.ack()
                manager.commit()
                times -= 1
        queue.release_claims()

    # A few places, looked at again and again: what no cache has yet would cost by chance.
    middle = random.Random(len(ids)).sample(ids[len(ids) // 4 : -len(ids) // 4], _PLACES)
    # The ids of a producer that there is not.
    missing = [id ^ 1 << 12 for id in middle]
    turns = itertools.count()

    def one_of(places: list[int]) -> int:
        return places[next(turns) % _PLACES]

    record = queue.record
    looks: dict[str, Callable[[], Any]] = {
        "len": lambda: len(queue),
        "first page": lambda: list(queue.entries(limit=_PAGE)),
        "a page": lambda: list(queue.entries(one_of(middle), _PAGE)),
        "find": lambda: queue.find(one_of(middle)),
        "find nothing": lambda: record.find(one_of(missing)),
    }
    for what, look in looks.items():
        values = []
        for turn in range(_PLACES + _PAGES):
            manager.begin()
            # A look is an administrator's: the next comes from another process.
            connection.cacheMinimize()
            part = Meter(lambda: 0)
            with part.measure(what, 1):
                look()
            if turn >= _PLACES:
                values.append(part.found[what])
            manager.abort()
        meter.found[what] = [statistics.median(column) for column in zip(*values, strict=True)]
    for what, work in (("add", added), ("pop_next", popped), ("claim, ack", acknowledged)):
        work(_WARM)
        with meter.measure(what, _TIMES):
            work(_TIMES)
    used = memory()
    connection.close()
    database.close()
    with PostOffice(ini) as office:
        office.reconcile_queues()
        with meter.measure("import", MAILS):
            outcome = office.import_messages()
    assert outcome.counts["queued"] == MAILS, outcome.counts
    return {"found": meter.found, "opened": opened, "used": used}


def _sizer(file: Path | None) -> Callable[[], int]:
    return (lambda: 0) if file is None else (lambda: file.stat().st_size)


# -- all rounds ----------------------------------------------------------------------------------


def in_process(shelf: Shelf, scratch: Path, mails: Path) -> dict[str, Any]:
    """Measure one depot once, in a process of its own, with the disk at rest."""
    maildir = scratch / "Maildir"
    shutil.copytree(mails, maildir, copy_function=os.link)
    with shelf.depot() as uri:
        ini = scratch / "postoffice.ini"
        ini.write_text(CONFIGURATION.format(uri=uri, maildir=maildir))
        os.sync()
        words = [sys.executable, __file__, "--child", uri, str(shelf.notes), str(ini)]
        run = subprocess.run(
            [*words, str(shelf.file or "")], check=True, stdout=subprocess.PIPE, text=True
        )
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", choices=SHELVES, default="file")
    parser.add_argument("--size", type=int, action="append", dest="sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where depots are, and stay")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--fill", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        uri, notes, ini, file = options.child
        ids = json.loads(Path(notes).read_text())
        print(json.dumps(one_round(uri, ids, Path(ini), Path(file) if file else None)))
        return
    if options.fill:
        uri, first, last = options.fill
        print(json.dumps(put_in(uri, int(first), int(last))))
        return
    sizes = sorted(options.sizes or SIZES)
    # Deleting between rounds would slow the next ones down; all goes at the end.
    scratch = Path(tempfile.mkdtemp(prefix="postoffice-benchmark-", dir=options.folder))
    try:
        with SHELVES[options.storage](options.storage, options.folder or scratch) as shelf_of:
            for size in sizes:
                shelf = shelf_of(size)
                if not shelf.notes.exists():
                    started = time.monotonic()
                    with shelf.new() as uri:
                        shelf.notes.write_text(json.dumps(build(uri, size)))
                    shelf.keep()
                    print(f"{size} messages put in: {time.monotonic() - started:.0f} s", flush=True)
            results: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
            for round in range(options.rounds):
                mails = scratch / f"mails-{round}"
                fill(mails, MAILS, round)
                for size in sizes:
                    place = scratch / f"{round}-{size}"
                    place.mkdir()
                    results[size].append(in_process(shelf_of(size), place, mails))
        report(options.storage, results)
    finally:
        shutil.rmtree(scratch)


def report(storage: str, results: dict[int, list[dict[str, Any]]]) -> None:
    """Print the medians, and of the ratios to the smallest."""
    smallest = min(results)
    print(f"\n{storage}, microseconds by the clock; ratios to {smallest} by clock and processor")
    print(f"  {'waiting':12}" + "".join(f"{size:>24}" for size in results))
    for what in results[smallest][0]["found"]:
        line = f"  {what:12}"
        for rounds in results.values():
            clock = statistics.median(one["found"][what][0] for one in rounds)
            ratios = [
                statistics.median(
                    one["found"][what][kind] / first["found"][what][kind]
                    for one, first in zip(rounds, results[smallest], strict=True)
                )
                for kind in (0, 1)
            ]
            line += f"{clock:10.0f}{ratios[0]:7.2f}{ratios[1]:7.2f}"
        print(line)
    for what in ("add", "pop_next", "claim, ack", "import"):
        line = f"  {'bytes, ' + what:18}"
        for rounds in results.values():
            line += f"{statistics.median(one['found'][what][2] for one in rounds):18.0f}      "
        print(line)
    for what, text in (("opened", "MB, opened"), ("used", "MB, then")):
        line = f"  {text:18}"
        for rounds in results.values():
            line += f"{statistics.median(one[what] for one in rounds):18.1f}      "
        print(line)


if __name__ == "__main__":
    main()
