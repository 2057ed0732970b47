"""Claims: one consumer's hold on the messages that it is about to take.

A claim is made, and given back, in a short transaction of a second connection, and so is seen by
other consumers at once, whatever becomes of the application's own transaction.  It is advice that
keeps consumers apart; the write of the entry, in the application's transaction, is the truth.
"""

from __future__ import annotations

import os
import random
import socket
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from transaction import TransactionManager
from ZODB.POSException import ConflictError

from postoffice.depot.lane import FIRST, Claim, Place, claim_of
from postoffice.depot.queue import QueueRecord

__all__ = ["Claims", "Holder", "holder_is_gone", "living_claims"]

if TYPE_CHECKING:
    from postoffice.depot.entry import Entry, ErrorText

_ATTEMPTS = 30
_LONGEST_PAUSE = 0.25
# Entries that are due at the same time are due some nanoseconds one after the other.
_SAME_TIME = 1_000_000

_T = TypeVar("_T")


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(4096).strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process started, in ticks since the boot; "" where it cannot be known."""
    # The name of the command, in parentheses, may hold spaces and parentheses.
    return (_read(f"/proc/{pid}/stat").rpartition(")")[2].split() or [""] * 20)[19:20].pop()


def _machine() -> str:
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    boot = _read("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot or uuid.getnode()}/{space}"


_MACHINE = _machine()
_living: weakref.WeakValueDictionary[str, Claims] = weakref.WeakValueDictionary()


class Holder(NamedTuple):
    """Who holds a claim.

    Its text is ``MACHINE:PID:START:NONCE``, where the machine is ``HOST/BOOT/NAMESPACE``, with the
    name space of its process ids.

    :ivar machine: see above.
    :ivar pid: number of the process.
    :ivar start: when the process started, in ticks since the boot; ``""`` where that is not known.
    """

    machine: str
    pid: int
    start: str

    @classmethod
    def parse(cls, text: str) -> Holder:
        """Take the text apart."""
        machine, pid, start, _ = text.rsplit(":", 3)
        return cls(machine, int(pid), start)

    @property
    def host(self) -> str:
        """The machine's name."""
        return self.machine.rsplit("/", 2)[0]


def holder_is_gone(text: str) -> bool:
    """Tell whether a holder is known to be dead; one on another machine never is."""
    holder = Holder.parse(text)
    if holder.machine != _MACHINE:
        host, boot, _ = holder.machine.rsplit("/", 2)
        mine = _MACHINE.rsplit("/", 2)
        return host == mine[0] and boot != mine[1]
    if holder.pid == os.getpid():
        return text not in _living
    if holder.start and _started(holder.pid) != holder.start:
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def living_claims(record: QueueRecord, now: int) -> Iterator[tuple[Place, Claim]]:
    """Iterate over the claims that keep a message from others.

    :param now: nanoseconds since the epoch.
    """
    dead: dict[str, bool] = {}
    for number, lane in enumerate(record.all_lanes):
        for position, row in lane.claims.items(FIRST):
            claim = claim_of(row)
            place = Place(number, claim.segment, position)
            if (
                claim.holder
                and claim.until > now
                and record.live(place) is not None
                and not _is_dead(claim.holder, dead)
            ):
                yield place, claim


def _is_dead(holder: str, known: dict[str, bool]) -> bool:
    if holder not in known:
        known[holder] = holder_is_gone(holder)
    return known[holder]


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1_000_000_000)


def _free(record: QueueRecord, place: Place, lapses: int) -> None:
    """Let nobody hold a place; how many holders it has cost is kept."""
    claims = record.all_lanes[place.lane].claims
    if lapses:
        claims[place.position] = tuple(Claim(place.segment, "", 0, 0, lapses))
    else:
        claims.pop(place.position, None)


def _lapse(record: QueueRecord, holder: str, ended: int | None) -> list[Place]:
    """Free what a holder held that is dead, or whose time has run out.

    The first that it had not finished is what it had in hand; only that one is held against it.

    :param ended: the time now, in nanoseconds: what has run out by then; ``None``: all.
    :return: the places whose entries have gone, to be swept.
    """
    gone: list[Place] = []
    unfinished: list[tuple[int, int, Place, Claim]] = []
    for number, lane in enumerate(record.all_lanes):
        for position, row in lane.claims.items(FIRST):
            claim = claim_of(row)
            if claim.holder != holder or (ended is not None and claim.until > ended):
                continue
            place = Place(number, claim.segment, position)
            if record.live(place) is None:
                gone.append(place)
            else:
                unfinished.append((claim.since, claim.turn, place, claim))
    unfinished.sort()
    for index, (_, _, place, claim) in enumerate(unfinished):
        _free(record, place, claim.lapses + (index == 0))
    return gone


class Claims:
    """The claims of one consumer on one queue.

    Belongs to one thread.  All that it does, it does at once, in transactions of its own.

    :ivar holder: who it is, for other processes and for administrators.
    :ivar held: the places that it holds, with the claims on them.
    :ivar finished: places whose messages this consumer has taken and committed; they are swept out
        when it claims more, or gives back what it holds.
    """

    def __init__(self, connection: Any, oid: bytes) -> None:
        """Claim from the queue whose record has this oid in the connection's database."""
        pid = os.getpid()
        self.holder = f"{_MACHINE}:{pid}:{_started(pid)}:{uuid.uuid4().hex[:12]}"
        self.held: dict[Place, Claim] = {}
        self.finished: set[Place] = set()
        self._db = connection.db()
        self._oid = oid
        _living[self.holder] = self

    def take(
        self,
        limit: int,
        visible: Callable[[Place], bool] = lambda place: True,
        after: int = 0,
        lease: float | None = None,
    ) -> list[Place]:
        """Claim up to `limit` of the first messages that nobody holds.

        What has gone from the queue and nobody looks after any more is swept out on the way.

        :param visible: says whether the consumer's own transaction knows of the message at a place;
            one that it does not know of yet is left to others.
        :param after: begin behind this position, but for messages that are due again.
        :param lease: seconds that the claims hold; ``None``: what the queue's policy says.
        """
        mine = self.holder.rsplit(":", 1)[0]

        def work(record: QueueRecord) -> dict[Place, Claim]:
            now = time.time_ns()
            lanes = record.all_lanes
            found: dict[Place, Claim] = {}
            swept = set(self.finished)
            dead: dict[str, bool] = {}

            def lapses_if_free(place: Place, entry: Entry) -> int | None:
                """Return how many holders it has cost if it is to be had; ``None`` if it is not."""
                lane = lanes[place.lane]
                row = lane.claims.get(place.position)
                if row is None:
                    return 0
                claim = claim_of(row)
                holder = claim.holder
                if holder and (claim.until <= now or _is_dead(holder, dead)):
                    swept.update(_lapse(record, holder, None if _is_dead(holder, dead) else now))
                    if place in swept:
                        return None
                    row = lane.claims.get(place.position)
                    return 0 if row is None else claim_of(row).lapses
                # What this consumer does not know that it holds, a commit in doubt has given it.
                if holder and (holder != self.holder or place in self.held):
                    if holder.startswith(mine) and not lane.live(entry, place.position):
                        swept.add(place)
                    return None
                if lane.live(entry, place.position):
                    return claim.lapses
                swept.add(place)
                return None

            for place, entry in record.ready(now, after):
                if place in swept:
                    continue
                lapses = lapses_if_free(place, entry)
                if lapses is None or not visible(place):
                    continue
                found[place] = Claim(place.segment, self.holder, now, 0, lapses, len(found))
                if len(found) == limit:
                    break
            for place in swept:
                record.sweep(place)
            for lane in lanes:
                lane.drop_drained_head()
            until = now + _nanoseconds(record.policy.lease if lease is None else lease)
            for place, claim in found.items():
                found[place] = claim = claim._replace(until=until)
                lanes[place.lane].claims[place.position] = tuple(claim)
            return found

        while True:
            found = self._run(work)
            self.finished.clear()
            # Since the view that the claims were made from, somebody may have claimed an entry,
            # taken it and swept it out, claim and all: there was nothing left to conflict with.
            gone = self._swept(found) if found else []
            # What is claimed and yet not noted as held, as after a failure, is taken by the next.
            self.held.update(found)
            self.finish(gone)
            if len(gone) < len(found) or not found:
                return [place for place in found if place in self.held]

    def _swept(self, places: Iterable[Place]) -> list[Place]:
        return self._run(lambda record: [place for place in places if record.get(place) is None])

    def finish(self, places: Iterable[Place]) -> None:
        """Hold these no more: what became of their messages is committed."""
        for place in places:
            self.held.pop(place, None)
            self.finished.add(place)

    def forget(self, places: Iterable[Place]) -> None:
        """Hold these no more, without a word to the database; the next :meth:`take` has them."""
        for place in places:
            self.held.pop(place, None)

    def release(self, places: Iterable[Place] | None = None) -> None:
        """Give claims back, so that others can have the messages at once.

        :param places: which; ``None``: all that it holds.
        """
        returned = (
            list(self.held) if places is None else [one for one in places if one in self.held]
        )
        for place in returned:
            del self.held[place]
        if not returned and not self.finished:
            return

        def work(record: QueueRecord) -> None:
            for place in self.finished:
                record.sweep(place)
            for place in returned:
                claim = self._own(record, place)
                if claim is None:
                    continue
                if record.live(place) is None:
                    record.sweep(place)
                else:
                    _free(record, place, claim.lapses)

        self._run(work)
        self.finished.clear()

    def renew(self, place: Place, lease: float | None = None) -> bool:
        """Let a claim hold for its time from now; return whether it is still this consumer's.

        :param lease: in seconds; ``None``: what the queue's policy says.
        """

        def work(record: QueueRecord) -> Claim | None:
            claim = self._own(record, place)
            if claim is None or record.live(place) is None:
                return None
            seconds = record.policy.lease if lease is None else lease
            claim = claim._replace(until=time.time_ns() + _nanoseconds(seconds))
            record.all_lanes[place.lane].claims[place.position] = tuple(claim)
            return claim

        claim = self._run(work)
        if claim is None:
            self.held.pop(place, None)
            return False
        self.held[place] = claim
        return True

    def defer(self, place: Place, due: int, error: ErrorText | None = None) -> bool:
        """Give a message back, to be taken at a time; return whether it was still to be had.

        :param due: in nanoseconds since the epoch.
        :param error: why an attempt has failed; without one it does not count as an attempt.
        """
        attempts = 0

        def work(record: QueueRecord) -> bool:
            nonlocal attempts
            attempts += 1
            claim = self._own(record, place)
            if claim is None:
                # An attempt whose commit seemed to fail may have done it.
                times = record.deferred.times if record.deferred is not None else {}
                return attempts > 1 and 0 <= times.get(place.position, 0) - due < _SAME_TIME
            entry = record.live(place)
            if entry is None:
                record.sweep(place)
                return False
            if error is not None:
                entry.fail(error, 1 + claim.lapses)
            moved = record.defer(place, due)
            if moved is not None and error is None and claim.lapses:
                _free(record, moved, claim.lapses)
            return True

        deferred = self._run(work)
        self.held.pop(place, None)
        return deferred

    def go_on_through(self, connection: Any) -> None:
        """Go on by another connection to the same queue, after the database was opened anew."""
        self._db = connection.db()

    def read(self, work: Callable[[QueueRecord], _T]) -> _T:
        """Look at the queue as it is now, apart from any transaction of the caller's."""
        return self._run(work)

    def abandon(self) -> None:
        """Hold nothing any more, without a word to the database; this process knows at once."""
        self.held.clear()
        self.finished.clear()
        _living.pop(self.holder, None)

    def _own(self, record: QueueRecord, place: Place) -> Claim | None:
        """Return the claim on a place, if it is this consumer's still."""
        lanes = record.all_lanes
        row = lanes[place.lane].claims.get(place.position) if place.lane < len(lanes) else None
        if row is None or row[1] != self.holder:
            return None
        return claim_of(row)

    def _run(self, work: Callable[[QueueRecord], _T]) -> _T:
        attempt = 0
        while True:
            attempt += 1
            manager = TransactionManager(explicit=True)
            connection = self._db.open(manager)
            try:
                with manager:
                    return work(connection.get(self._oid))
            except ConflictError:
                # Whatever else passes is an outage, which is for the caller to wait for.
                if attempt == _ATTEMPTS:
                    raise
            finally:
                connection.close()
            # As long as others take to commit, which on some storages is long.
            most = min(0.002 * 2**attempt, _LONGEST_PAUSE)
            time.sleep(random.uniform(0, most))  # noqa: S311  # spreads, hides nothing
