"""Importers, consumers and a server, killed again and again while mail comes: nothing is lost.

Run as a program for the long form::

    python -m tests.torture --storage postgresql --messages 20000 --seed 7

Two machines have a Maildir each, into which mail is delivered all the time, and run
``postoffice import`` again and again, as cron would, at times twice at once.  Consumers work on the
queue meanwhile (tests/processes.py).  A plan that is drawn from the seed says after how many
messages who is killed, and how the server is stopped and for how long.  In the end each message
that was delivered has left the queue once, is in quarantine, or is still in the queue.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transaction
from BTrees.OOBTree import OOBTree

from postoffice.api import PostOffice
from postoffice.database import open_database
from postoffice.queue import BLOB_SIZE, Queue, find_queue
from tests.machines import Machine, Run
from tests.processes import KINDS, TAKEN
from tests.servers import SERVERS, Server

__all__ = ["Blow", "Outcome", "Torture", "everything", "plan"]

QUEUE = "app"
MACHINES = ("one", "two")
CONSUMERS = 4

_QUEUES = f"[queue:{QUEUE}]\nfilters =\n    header_regexp: ^Subject:\n"
_STEP_SECONDS = 0.02
_KILL_STEP_SECONDS = 0.001
_CRON_SECONDS = 0.1
_MOST_WAITING = 300
_SHORT = 1000
_STALL_SECONDS = 90
_END_SECONDS = 60
_LINGER_SECONDS = 10
_TEMPFAIL = 75
_IMPORTED_AGAIN = re.compile(r".* duplicate: .*")
_STORED = re.compile(r"to queue ")
_SURE = (0, _TEMPFAIL, -signal.SIGKILL)


@dataclass(frozen=True, slots=True, order=True)
class Blow:
    """One thing that goes wrong.

    :ivar at: when so many messages have left the queue.
    :ivar victim: the name of a consumer, of a machine, whose importer is killed, or ``server``.
    :ivar how: how the server is stopped.  The others get SIGKILL, an importer some time after its
        ``start``, or after it has said of a first message that it is ``stored``.
    :ivar seconds: how long after that the importer is killed; how long the server is away.
    """

    at: int
    victim: str
    how: str
    seconds: float


def consumer_names() -> list[str]:
    """Return the consumers' names: ``KIND-NUMBER``, each kind in its turn."""
    kinds = list(KINDS)
    return [f"{kinds[number % len(kinds)]}-{number}" for number in range(CONSUMERS)]


def plan(
    seed: int, messages: int, kills: int, restarts: int, how: Sequence[str]
) -> tuple[Blow, ...]:
    """Draw the blows: the same seed makes the same plan.

    :param kills: how often consumers are killed, and how often importers.
    :param restarts: how often the server is stopped and started, in each of its ways in turn.
    """
    chance = random.Random(seed)
    names = consumer_names()
    # In a short run most of the time would be waiting.
    away = (0.1, 0.5, 1.0, 4.0) if messages > _SHORT else (0.1, 0.5)

    def at() -> int:
        return chance.randint(messages // 20, messages * 9 // 10)

    blows = [Blow(at(), chance.choice(names), "", 0.0) for _ in range(kills)]
    for number in range(kills):
        machine = MACHINES[number % 2]
        if number % 3:
            blows.append(Blow(at(), machine, "stored", chance.choice((0, 0, 0.005))))
        else:
            blows.append(Blow(at(), machine, "start", chance.uniform(0.3, 0.8)))
    blows += [
        Blow(at(), "server", how[number % len(how)], chance.choice(away))
        for number in range(restarts)
    ]
    return tuple(sorted(blows))


@dataclass(slots=True)
class Outcome:
    """What a run has shown.

    :ivar finds: what should not have happened, each with how often it did.
    :ivar kills: how often whom was killed or stopped.
    :ivar imports: how many importers ended with which status.
    :ivar seconds: how long it took.
    """

    finds: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    imports: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0


class _Post:
    """A machine in a run, and the importers that run there now."""

    def __init__(self, name: str, machine: Machine) -> None:
        self.name = name
        self.machine = machine
        self.importers: list[Run] = []
        self.next_at = 0.0
        #: How importers are to be killed.
        self.doomed: deque[Blow] = deque()


class Torture:
    """A run: the server, two machines and their consumers, while the plan is carried out.

    :ivar outcome: what the run has shown so far.
    """

    def __init__(
        self,
        folder: Path,
        server: Server,
        seed: int,
        messages: int,
        blows: Sequence[Blow],
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Prepare a run in an empty folder.

        :param server: not started yet.
        :param messages: how many are delivered, half of them to each machine.
        :param tell: is given a line about the progress every second.
        """
        self.outcome = Outcome()
        self._folder = folder
        self._server = server
        self._seed = seed
        self._messages = messages
        self._blows = deque(blows)
        self._tell = tell
        self._chance = random.Random(seed)
        self._logs = folder / "logs"
        self._logs.mkdir(parents=True)
        self._numbers = 0
        self._groups: set[int] = set()
        self._consumers: dict[str, Run] = {}
        self._delivered: list[str] = []
        self._gone = 0
        self._left = 0
        self._moved_at = time.monotonic()
        self._counted_at = self._told_at = 0.0
        self._back_at: float | None = None
        self._away_until = 0.0
        self._database: Any = None

    def run(self) -> Outcome:
        """Carry the plan out, and compare what came in with what there is.

        :raises AssertionError: a message is lost or doubled, or nothing goes on; its text has the
            seed.
        """
        started = time.monotonic()
        self._server.start()
        self._posts = [
            _Post(name, Machine(self._folder / name, self._server.uri(name), _QUEUES))
            for name in MACHINES
        ]
        try:
            self._lay_out()
            while self._gone < self._messages or self._blows or self._back_at is not None:
                self._step()
                waits_to_kill = any(post.doomed for post in self._posts)
                time.sleep(_KILL_STEP_SECONDS if waits_to_kill else _STEP_SECONDS)
            self._end()
            self._verify()
        finally:
            self._kill_all()
            self._close_database()
        self.outcome.seconds = time.monotonic() - started
        return self.outcome

    def _fail(self, text: str) -> None:
        raise AssertionError(f"seed {self._seed}: {text}\nsee {self._folder}\n{self.outcome}")

    def _lay_out(self) -> None:
        with PostOffice(self._posts[0].machine.ini) as office:
            office.reconcile_queues()
        root = self._open().root()
        trees = root[TAKEN] = OOBTree()
        for name in consumer_names():
            trees[name] = OOBTree()
        transaction.commit()

    # -- one step ----------------------------------------------------------------------------------

    def _step(self) -> None:
        now = time.monotonic()
        if self._back_at is not None and now >= self._back_at:
            self._server.start()
            self._back_at = None
            self._away_until = self._moved_at = time.monotonic()
        for post in self._posts:
            self._feed(post)
            self._import(post, now)
        for name in consumer_names():
            self._consume(name)
        if self._back_at is None:
            if now - self._counted_at >= 0.1 + self._messages / 40_000:
                self._count()
            while self._back_at is None and self._blows and self._blows[0].at <= self._gone:
                self._strike(self._blows.popleft())
            if now - self._moved_at > (_STALL_SECONDS if self._has_work() else _LINGER_SECONDS):
                self._stalled()
        if now - self._told_at >= 1:
            self._told_at = now
            self._tell(
                f"{len(self._delivered)} delivered, {self._gone} gone, {self._left} queued, "
                f"{self.outcome.kills.total()} blows, {len(self._blows)} to come"
            )

    def _feed(self, post: _Post) -> None:
        """Deliver some mail: none, a few messages, or many."""
        count = self._chance.choice((0, 0, 1, 2, 5, 10 + self._messages // 400))
        backlog = len(self._delivered) - self._gone
        if backlog > max(60, self._messages // 10) or post.machine.waiting() > _MOST_WAITING:
            return
        for _ in range(min(count, self._messages - len(self._delivered))):
            number = len(self._delivered)
            name = f"{post.name}-{number}"
            size = BLOB_SIZE if self._chance.random() < 0.01 else 1000
            body = f"{self._chance.random():.12f}\n" * (size // 15 + 1)
            head = (
                f"From: ann{number % 7}@example.org\nTo: bob@example.com\n"
                f"Subject: {name}\nMessage-ID: <{name}@example.org>\n\n"
            )
            post.machine.deliver(f"{time.time_ns()}.M{number}.{post.name}", (head + body).encode())
            self._delivered.append(name)

    def _import(self, post: _Post, now: float) -> None:
        for run in list(post.importers):
            status = run.process.poll()
            if status is not None:
                post.importers.remove(run)
                self._imported(post, run, status)
        if now >= post.next_at and not post.importers:
            # At times two at once, of which one finds the Maildir locked.
            for _ in range(self._chance.choice((1, 1, 1, 2))):
                log = self._log(f"import-{post.name}")
                post.importers.append(self._watched(post.machine.start_wordy_import(log)))
            post.next_at = now + self._chance.uniform(0.5, 1.5) * _CRON_SECONDS
        for run in post.importers:
            if post.doomed and _is_due(post.doomed[0], run):
                time.sleep(post.doomed[0].seconds if post.doomed[0].how == "stored" else 0)
                self._kill(run, f"importer {post.doomed.popleft().how}")

    def _imported(self, post: _Post, run: Run, status: int) -> None:
        self.outcome.imports[status] += 1
        reasons = post.machine.set_aside()
        if reasons:
            self._fail(f"{run.log}: {len(reasons)} messages are set aside, one for: {reasons[0]}")
        # A server's restart is over for those that were started after it.
        excused = self._back_at is not None or run.started < self._away_until
        if status not in _SURE or (status == _TEMPFAIL and not excused):
            self._find(f"an importer ended with {status}: {run.last_line()}")
        elif "postoffice: unexpected " in run.said:
            self._find(f"an importer met a defect: {run.last_line()}")
        if again := _IMPORTED_AGAIN.search(run.said):
            # Kept out by the history of Message-IDs, which must not be what is relied on.
            self._find(f"a message was imported again: {again[0]}")

    def _consume(self, name: str) -> None:
        kind, _, number = name.partition("-")
        run = self._consumers.get(name)
        if run is not None:
            status = run.process.poll()
            if status is None:
                return
            if status not in _SURE:
                self._find(f"consumer {kind}: {run.last_line()}")
        uri = self._server.uri(MACHINES[int(number) % 2])
        seed = str(self._chance.randrange(1 << 30))
        self._consumers[name] = self._watched(
            Run(self._log(name), "tests.processes", kind, uri, QUEUE, name, seed)
        )

    def _strike(self, blow: Blow) -> None:
        if blow.victim == "server":
            self._close_database()
            self._server.stop(blow.how)
            self._back_at = time.monotonic() + blow.seconds
            self.outcome.kills[f"server {blow.how}"] += 1
        elif blow.victim in MACHINES:
            self._posts[MACHINES.index(blow.victim)].doomed.append(blow)
        else:
            self._kill(self._consumers[blow.victim], "consumer")

    def _kill(self, run: Run, what: str) -> None:
        if run.kill():
            self.outcome.kills[what] += 1

    def _log(self, name: str) -> Path:
        self._numbers += 1
        return self._logs / f"{self._numbers:05}-{name}"

    def _watched(self, run: Run) -> Run:
        self._groups.add(run.process.pid)
        return run

    def _runs(self) -> list[Run]:
        """Return all that runs now."""
        return [*self._consumers.values(), *(run for post in self._posts for run in post.importers)]

    def _find(self, what: str) -> None:
        self.outcome.finds[what] += 1

    # -- looking into the database -----------------------------------------------------------------

    def _open(self) -> Any:
        if self._database is None:
            self._database = open_database(self._server.uri("watcher"))
        connection = self._database.open()
        transaction.begin()
        return connection

    def _close_database(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def _count(self) -> None:
        """Count what has left the queue."""
        connection = self._open()
        try:
            root = connection.root()
            queue = find_queue(root, QUEUE)
            gone = sum(len(tree) for tree in root[TAKEN].values())
            gone += queue.count_quarantined_messages()
            self._left = len(queue)
        finally:
            transaction.abort()
            connection.close()
        self._counted_at = time.monotonic()
        if gone != self._gone:
            self._gone = gone
            self._moved_at = self._counted_at

    def _has_work(self) -> bool:
        """Tell whether there are messages that have not left the queue, as far as is to be seen."""
        in_spools = sum(post.machine.waiting() for post in self._posts)
        return bool(len(self._delivered) < self._messages or self._left or in_spools)

    def _stalled(self) -> None:
        if not self._has_work():
            self._end()
            self._verify()
        for run in self._consumers.values():
            run.process.send_signal(signal.SIGUSR1)
        for post in self._posts:
            for run in post.importers:
                run.process.send_signal(signal.SIGABRT)
        time.sleep(1)
        states = "\n\n".join(f"{run.log.name}: {run.said[-3000:]}" for run in self._runs())
        self._fail(
            f"nothing has moved for {_STALL_SECONDS} s: {len(self._delivered)} delivered, "
            f"{self._gone} gone, {self._left} in the queue, "
            f"{[post.machine.waiting() for post in self._posts]} in the spools\n{states}"
        )

    # -- the end -----------------------------------------------------------------------------------

    def _end(self) -> None:
        """Import what is left, and end all that runs."""
        for post in self._posts:
            for run in post.importers:
                self._imported(post, run, run.process.wait(_END_SECONDS))
            post.importers.clear()
            last = self._watched(post.machine.start_import(self._log(f"last-{post.name}")))
            if last.process.wait(_END_SECONDS) or last.said:
                self._find(f"the last import was not silent: {last.last_line()}")
        for run in self._consumers.values():
            run.process.terminate()
        for name, run in self._consumers.items():
            if run.process.wait(_END_SECONDS) not in (0, _TEMPFAIL, -signal.SIGTERM):
                self._find(f"consumer {name} at its end: {run.last_line()}")
        deadline = time.monotonic() + _LINGER_SECONDS
        while alive := _alive(self._groups):
            if time.monotonic() > deadline:
                self._find(f"processes stay behind: {alive}")
                break
            time.sleep(0.05)

    def _verify(self) -> None:
        connection = self._open()
        try:
            root = connection.root()
            queue = find_queue(root, QUEUE)
            found = everything(root[TAKEN].values(), queue)
            left, seen = len(queue), sum(1 for _ in queue)
        finally:
            transaction.abort()
            connection.close()
        wanted = Counter(self._delivered)
        lost, doubled = wanted - found, found - wanted
        if lost or doubled:
            self._fail(f"lost {sorted(lost.elements())}, doubled {sorted(doubled.elements())}")
        if left != seen:
            self._fail(f"the queue counts {left}, and has {seen}")
        for post in self._posts:
            archived = len(post.machine.archived())
            mine = sum(name.startswith(f"{post.name}-") for name in self._delivered)
            if post.machine.waiting() or archived != mine:
                self._fail(
                    f"machine {post.name}: of {mine} delivered, {post.machine.waiting()} are in "
                    f"the spool and {archived} in the archive"
                )

    def _kill_all(self) -> None:
        for run in self._runs():
            run.kill()


def _is_due(blow: Blow, run: Run) -> bool:
    """Tell whether it is time for an importer to be killed."""
    if blow.how == "stored":
        return _STORED.search(run.said) is not None
    return time.monotonic() - run.started >= blow.seconds


def everything(trees: Iterable[Any], queue: Queue) -> Counter[str]:
    """Count the subjects that consumers took, that wait in the queue, and that are in quarantine.

    :param trees: the consumers' trees.
    """
    found: Counter[str] = Counter()
    for tree in trees:
        found.update(dict(tree.items()))
    found.update(str(message["Subject"]) for message in queue)
    found.update(str(message["Subject"]) for message, _ in queue.get_quarantined_messages())
    return found


def _alive(groups: set[int]) -> list[str]:
    """Return the processes of these groups that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name of the command, in parentheses, may hold anything.
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
            if int(group) in groups and state != "Z":
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
    return found


def main() -> None:
    """Run the long form as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--storage", choices=tuple(SERVERS), default="zeo")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, help="of consumers, and as many of importers")
    parser.add_argument("--restarts", type=int, help="of the server")
    parser.add_argument("--folder", type=Path, help="stays; by default a temporary one, which goes")
    given = parser.parse_args()
    kills = given.messages // 400 if given.kills is None else given.kills
    restarts = given.messages // 1000 if given.restarts is None else given.restarts

    def tell(line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    with contextlib.ExitStack() as stack:
        folder = given.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torture")))
        server = stack.enter_context(SERVERS[given.storage](folder / "server"))
        blows = plan(given.seed, given.messages, kills, restarts, server.how)
        outcome = Torture(folder, server, given.seed, given.messages, blows, tell).run()
    print(f"\n{given.messages} messages, seed {given.seed}: each is somewhere, and once; {outcome}")
    sys.exit(bool(outcome.finds))


if __name__ == "__main__":
    main()
