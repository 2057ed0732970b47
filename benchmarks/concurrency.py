"""How several consumers share one queue, beside a plain BTree and zc.queue.

1, 2 and 4 processes take messages of 3 KB, one a transaction, with no work and with 5 ms of it (a
sleep) within the transaction.  All kinds of queue run in turn, in the same database, by the same
processes, on as many messages; a run ends when its queue is empty or its time is over.  What was
taken is compared with what was put in: each message once, or the run fails.

    python benchmarks/concurrency.py                        # ZEO and PostgreSQL, 3 minutes
    python benchmarks/concurrency.py --storage zeo --rounds 3 --consumers 4
    python benchmarks/concurrency.py --messages 20000 --seconds 60

Two rows are no queues: "work alone" does the work and opens no database; "one record" does the work
and changes a record of 3 KB that is the consumer's own, in a transaction for each message, which is
the least that a queue can do in this storage.

The columns: messages a second; the ratio of that to the rows that are named; of a thousand
messages, how many transactions of the application had to be run again, and how many of the queue's
own short ones; for each message, the records loaded, the transactions that wrote something, and the
processor time of consumers and server.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple

import transaction
from BTrees.LOBTree import LOBTree
from persistent import Persistent
from servers import serve, server_seconds
from transaction.interfaces import TransientError
from zc.queue import CompositeQueue
from ZODB.Connection import Connection
from ZODB.DB import DB

from postoffice import QueueEmpty, find_queue
from postoffice.consumer import consume
from postoffice.database import open_database
from postoffice.depot.folder import find_folder, make_folder

STORAGES = ("zeo", "postgresql")
CONSUMERS = (1, 2, 4)
WORKS = (0.0, 0.005)
OURS = ("pop_next", "consume")
KINDS = (*OURS, "BTree", "zc.queue")
ALONE = "work alone"
COMMIT = "one record"
BASES = (ALONE, COMMIT, "BTree", "zc.queue")

_IDLE = 0.001


class Task(NamedTuple):
    """What a consumer is to do next.

    :ivar kind: one of :data:`KINDS`, or :data:`ALONE`, or :data:`COMMIT`.
    :ivar name: the queue's name in the database.
    :ivar work: seconds that each message takes to process.
    :ivar total: messages that there are for all consumers.
    :ivar seconds: the longest that this may take.
    """

    kind: str
    uri: str
    name: str
    work: float
    total: int
    seconds: float


class Share(NamedTuple):
    """What one consumer did.

    :ivar taken: the numbers of the messages that it took and committed.
    :ivar ended: when it committed the last of them, by the monotonic clock.
    :ivar repeated: why transactions of the application had to be run again.
    :ivar conflicts: all transactions that met another one; those of the queue itself included.
    :ivar loads: records that were loaded from the storage.
    :ivar commits: transactions that have written something, those that failed included.
    :ivar cpu: seconds of processor time.
    """

    taken: list[int]
    ended: float
    repeated: list[str]
    conflicts: int
    loads: int
    commits: int
    cpu: float


class Record(Persistent):  # type: ignore[misc]  # it has no types
    """A message as an application without postoffice would keep it."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw


class Metered(Connection):  # type: ignore[misc]  # ZODB has no types
    """A connection that counts what it does, and all others of this process with it."""

    conflicts = 0
    commits = 0
    loads = 0

    def commit(self, transaction: Any) -> None:
        """Count a conflict of records that were read."""
        with _counted():
            super().commit(transaction)

    def tpc_vote(self, transaction: Any) -> None:
        """Count a commit, and a conflict of records that were written."""
        if self._store_count > self.__dict__.get("stored", 0):
            Metered.commits += 1
        self.stored = self._store_count
        with _counted():
            super().tpc_vote(transaction)

    def tpc_finish(self, transaction: Any) -> None:
        """Count a conflict that a storage tells of last."""
        with _counted():
            super().tpc_finish(transaction)

    def setstate(self, obj: Any) -> None:
        """Count a record that is loaded."""
        Metered.loads += 1
        super().setstate(obj)


class _counted:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TransientError):
            Metered.conflicts += 1


def raw(number: int) -> bytes:
    """Return a message of 3 KB."""
    return b"From: a@example.net\nTo: b@example.com\nSubject: %d\n\n" % number + b"text " * 600


def number_of(found: bytes) -> int:
    """Return the number of a message."""
    return int(found.partition(b"Subject: ")[2].partition(b"\n")[0])


# -- one consumer ----------------------------------------------------------------------------------


class Run:
    """One consumer's run of one task.

    :ivar taken: the numbers of the messages that it took and committed.
    """

    def __init__(self, task: Task, done: Synchronized[int]) -> None:
        self.task = task
        self.taken: list[int] = []
        self.ended = 0.0
        self.repeated: list[str] = []
        self.deadline = 0.0
        self._done = done

    def work(self) -> None:
        """Process a message."""
        if self.task.work:
            time.sleep(self.task.work)

    def commit(self, number: int) -> None:
        """Take note that a message's transaction was committed."""
        self.ended = time.monotonic()
        self.taken.append(number)
        with self._done.get_lock():
            self._done.value += 1

    def over(self) -> bool:
        """Tell whether all is done, or the time over."""
        return self._done.value >= self.task.total or time.monotonic() >= self.deadline

    def alone(self) -> None:
        """Do the work and nothing else."""
        number = 0
        while not self.over():
            self.work()
            self.commit(number)
            number += 1

    def loop(self, manager: Any, take: Callable[[], bytes | None]) -> None:
        """Take messages, one a transaction, as an application does; retry on a conflict."""
        while not self.over():
            manager.begin()
            try:
                found = take()
                if found is None:
                    manager.abort()
                    time.sleep(_IDLE)
                    continue
                self.work()
                manager.commit()
            except TransientError as error:
                self.repeated.append(type(error).__name__)
                manager.abort()
            else:
                self.commit(number_of(found))

    def consume(self, database: DB) -> None:
        """Let postoffice's own loop do it."""
        seen: list[int] = []

        def handler(message: Any, connection: Any) -> None:
            seen.append(message.id)
            number = number_of(message.raw)
            self.work()

            def ended(committed: bool) -> None:
                if committed:
                    self.commit(number)

            connection.transaction_manager.get().addAfterCommitHook(ended)

        manager = transaction.TransactionManager()
        consume(database, self.task.name, handler, transaction_manager=manager, stop=self.over)
        self.repeated = ["unknown"] * (len(seen) - len(self.taken))


def queue_of(kind: str, root: Any, name: str, index: int) -> Callable[[], bytes | None]:
    """Return what takes one message from a queue, or says that there is none.

    :param index: which of the consumers it is for.
    """
    if kind == COMMIT:
        own = root[name][index]
        numbers = itertools.count()

        def change() -> bytes:
            own.raw = raw(next(numbers))
            return bytes(own.raw)

        return change
    if kind == "pop_next":
        queue = find_queue(root, name)

        def pop() -> bytes | None:
            try:
                return bytes(queue.pop_next().raw)
            except QueueEmpty:
                return None

        return pop
    if kind == "BTree":
        tree = root[name]

        def first() -> bytes | None:
            return tree.pop(tree.minKey()).raw if tree else None

        return first
    composite = root[name]

    def pull() -> bytes | None:
        try:
            return bytes(composite.pull().raw)
        except IndexError:
            return None

    return pull


def consumer(pipe: Pipe, done: Synchronized[int], index: int) -> None:
    """Do one task after the other, each when told; the body of a process."""
    DB.klass = Metered
    while (task := pipe.recv()) is not None:
        run = Run(task, done)
        if task.kind == ALONE:
            started = _wait(pipe, run)
            run.alone()
            pipe.send(_share(run, started))
            continue
        database = open_database(task.uri)
        manager = transaction.TransactionManager(explicit=True)
        connection = database.open(manager)
        manager.begin()
        take = None
        if task.kind != "consume":
            take = queue_of(task.kind, connection.root(), task.name, index)
        manager.abort()
        Metered.conflicts = Metered.loads = Metered.commits = 0
        started = _wait(pipe, run)
        if take is None:
            run.consume(database)
        else:
            run.loop(manager, take)
        connection.close()
        pipe.send(_share(run, started))
        database.close()


def _wait(pipe: Pipe, run: Run) -> float:
    pipe.send("ready")
    start: float = pipe.recv()
    run.deadline = start + run.task.seconds
    time.sleep(max(0.0, start - time.monotonic()))
    return time.process_time()


def _share(run: Run, started: float) -> Share:
    return Share(
        run.taken,
        run.ended,
        run.repeated,
        Metered.conflicts,
        Metered.loads,
        Metered.commits,
        time.process_time() - started,
    )


# -- all of them -----------------------------------------------------------------------------------


def fill(kind: str, uri: str, name: str, count: int) -> None:
    """Make a queue with so many messages."""
    database = open_database(uri)
    with database.transaction() as connection:
        root = connection.root()
        if kind in OURS:
            make_folder(root, "postoffice").make(name)
        else:
            root[name] = CompositeQueue() if kind == "zc.queue" else LOBTree()
            if kind == COMMIT:
                root[name].update({index: Record(b"") for index in range(max(CONSUMERS))})
                count = 0
    for first in range(0, count, 500):
        with database.transaction() as connection:
            root = connection.root()
            numbers = range(first, min(first + 500, count))
            if kind in OURS:
                queue = find_queue(root, name)
                for number in numbers:
                    queue.add(raw(number))
            elif kind == "BTree":
                root[name].update({number: Record(raw(number)) for number in numbers})
            else:
                for number in numbers:
                    root[name].put(Record(raw(number)))
    database.close()


def left(kind: str, uri: str, name: str) -> list[int]:
    """Return the numbers of the messages that are still in a queue."""
    database = open_database(uri)
    try:
        with database.transaction() as connection:
            root = connection.root()
            if kind in OURS:
                rows: Iterator[bytes] = (message.raw for message in find_queue(root, name))
                assert find_folder(root, "postoffice").get(name).waiting() == len(list(rows))
                rows = (message.raw for message in find_queue(root, name))
            else:
                tree = root[name]
                found = tree.values() if kind == "BTree" else tree
                rows = (record.raw for record in found)
            return [number_of(row) for row in rows]
    finally:
        database.close()


class Result(NamedTuple):
    """What all consumers did in one run: messages a second, and the rest for each message."""

    rate: float
    repeated: float
    claims: float
    loads: float
    commits: float
    cpu: float
    server_cpu: float
    why: Counter[str]


class Crew:
    """The consumers: processes that stay for all runs, so that starting them costs none of it."""

    def __init__(self, size: int) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._done = spawning.Value("q", 0)
        self._pipes: list[Pipe] = []
        self._processes: list[SpawnProcess] = []
        for index in range(size):
            here, there = spawning.Pipe()
            process = spawning.Process(
                target=consumer, args=(there, self._done, index), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self._crew = {process.pid for process in self._processes}

    def run(self, task: Task, consumers: int) -> Result:
        """Have so many of them do a task, starting together."""
        pipes = self._pipes[:consumers]
        self._done.value = 0
        for pipe in pipes:
            pipe.send(task)
        for pipe in pipes:
            pipe.recv()
        os.sync()
        used = server_seconds(self._crew)
        start = time.monotonic() + 0.05
        for pipe in pipes:
            pipe.send(start)
        shares: list[Share] = [pipe.recv() for pipe in pipes]
        server = server_seconds(self._crew) - used
        taken = [number for share in shares for number in share.taken]
        if task.kind not in (ALONE, COMMIT):
            _check(task, taken)
        count = len(taken)
        repeated = [name for share in shares for name in share.repeated]
        conflicts = sum(share.conflicts for share in shares) - len(repeated)
        return Result(
            count / (max(share.ended for share in shares) - start),
            len(repeated) / count,
            conflicts / count,
            sum(share.loads for share in shares) / count,
            sum(share.commits for share in shares) / count,
            sum(share.cpu for share in shares) / count,
            server / count,
            Counter(repeated),
        )

    def close(self) -> None:
        """Send them home."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def _check(task: Task, taken: list[int]) -> None:
    """Compare what was taken, and what is left, with what was put in."""
    found = sorted(taken + left(task.kind, task.uri, task.name))
    if found != list(range(task.total)):
        raise AssertionError(
            f"{task.kind}: {task.total} messages were put in; {len(taken)} were taken, "
            f"{len(taken) - len(set(taken))} of them twice, and {len(found)} are accounted for"
        )


def measure(storage: str, folder: Path, options: argparse.Namespace) -> None:
    """Run everything on one storage and print what came out."""
    found: Found = {}
    with serve(storage, folder) as uri:
        crew = Crew(max(options.consumers))
        for round in range(options.rounds):
            for consumers in options.consumers:
                for work in options.works:
                    kinds = [ALONE] * (work > 0) + [COMMIT, *options.kinds]
                    for kind in kinds:
                        name = f"{kind}-{round}-{consumers}-{work}"
                        if kind != ALONE:
                            fill(kind, uri, name, options.messages)
                        task = Task(kind, uri, name, work, options.messages, options.seconds)
                        result = crew.run(task, consumers)
                        found.setdefault((consumers, work, kind), []).append(result)
        crew.close()
    report(storage, found)


Found = dict[tuple[int, float, str], list[Result]]


def ratio(found: Found, row: tuple[int, float, str], base: tuple[int, float, str]) -> float | None:
    """Return the median of the rounds' ratios of one row's rate to another's, if both were run."""
    if row == base or row not in found or base not in found:
        return None
    pairs = zip(found[row], found[base], strict=True)
    return statistics.median(one.rate / other.rate for one, other in pairs)


def report(storage: str, found: Found) -> None:
    """Print the medians of all rounds."""
    heads = ("", "per s", *BASES, "again", "claims", "loads", "commits", "ms CPU", "server")
    for consumers, work in dict.fromkeys(key[:2] for key in found):
        print(f"\n{storage}, {consumers} consumers, {work * 1000:.0f} ms of work a message")
        print(f"{'':22}{'ratio to':>10}{'':30}{'of 1,000':>9}{'':>8}{'a message':>11}")
        print("  {:12}{:>8}{:>12}{:>12}{:>8}{:>10}{:>7}{:>8}{:>8}{:>8}{:>8}{:>8}".format(*heads))
        for key, results in found.items():
            if key[:2] != (consumers, work):
                continue
            columns = zip(*(one[:-1] for one in results), strict=True)
            rate, again, claims, loads, commits, cpu, server = map(statistics.median, columns)
            line = f"  {key[2]:12}{rate:8.0f}"
            for base, width in zip(BASES, (12, 12, 8, 10), strict=True):
                value = ratio(found, key, (consumers, work, base))
                line += f"{'' if value is None else f'{value:.2f}':>{width}}"
            if key[2] != ALONE:
                line += f"{again * 1000:7.0f}{claims * 1000:8.0f}{loads:8.1f}{commits:8.2f}"
                line += f"{cpu * 1000:8.2f}{server * 1000:8.2f}"
            why = sum((one.why for one in results), Counter[str]())
            if key[2] in OURS and why:
                line += f"   again for {dict(why)}"
            print(line)
    summary(storage, found)


def summary(storage: str, found: Found) -> None:
    """Print what matters of each of our kinds in a line."""
    print(f"\n{storage}, in short")
    counts = sorted({key[0] for key in found})
    for work in dict.fromkeys(key[1] for key in found):
        for kind in (kind for kind in OURS if (counts[-1], work, kind) in found):
            most = (counts[-1], work, kind)
            facts = []
            for base in BASES:
                value = ratio(found, most, (counts[-1], work, base))
                facts += [] if value is None else [f"{value:.2f} of {base}"]
            for fewer, more in itertools.pairwise(counts):
                value = ratio(found, (more, work, kind), (fewer, work, kind))
                facts.append(f"{value:.2f} from {fewer} to {more}")
            again = sum(one.why.total() for count in counts for one in found[count, work, kind])
            facts.append(f"{again} of the application's transactions run again")
            print(f"  {kind}, {work * 1000:.0f} ms, {counts[-1]} consumers: " + ", ".join(facts))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", action="append", choices=STORAGES, default=None)
    parser.add_argument("--messages", type=int, default=1500, help="in each queue")
    parser.add_argument("--seconds", type=float, default=1.5, help="the longest that a run takes")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--consumers", type=int, action="append", default=None)
    parser.add_argument("--work", type=float, action="append", dest="works", help="ms a message")
    parser.add_argument("--kind", action="append", dest="kinds", choices=KINDS)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; on a real disk")
    options = parser.parse_args()
    options.consumers = options.consumers or list(CONSUMERS)
    options.works = [ms / 1000 for ms in options.works] if options.works else list(WORKS)
    options.kinds = options.kinds or list(KINDS)
    # Deleting between rounds would slow the next ones down; all goes at the end.
    scratch = Path(tempfile.mkdtemp(prefix="postoffice-benchmark-", dir=options.folder))
    try:
        for storage in options.storage or STORAGES:
            folder = scratch / storage
            folder.mkdir()
            measure(storage, folder, options)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
