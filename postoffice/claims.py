"""Claims: one consumer's hold on the messages that it is about to take.

A claim is made, and given back, in a short transaction of a second connection, and so is seen by
other consumers at once, whatever becomes of the application's own transaction.  It is advice that
keeps consumers apart; the write of the entry, in the application's transaction, is the truth.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
import uuid
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from transaction import TransactionManager
from transaction.interfaces import TransientError

from postoffice.depot.lane import Claim, Place
from postoffice.depot.queue import QueueRecord

__all__ = ["LEASE_SECONDS", "Claims", "holder_is_gone"]

log = logging.getLogger("postoffice")

LEASE_SECONDS = 300
_ATTEMPTS = 30

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


def holder_is_gone(holder: str) -> bool:
    """Tell whether a holder is known to be dead; one on another machine never is.

    A holder is ``MACHINE:PID:START:NONCE``, where the machine includes its boot and the name
    space of its process ids.
    """
    machine, pid, start, _ = holder.rsplit(":", 3)
    if machine != _MACHINE:
        host, boot, _ = machine.split("/", 2)
        mine = _MACHINE.split("/", 2)
        return host == mine[0] and boot != mine[1]
    if int(pid) == os.getpid():
        return holder not in _living
    if start and _started(int(pid)) != start:
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


class Claims:
    """The claims of one consumer on one queue.

    :ivar holder: who it is, for other processes and for administrators.
    :ivar held: the places that it holds.
    """

    def __init__(self, connection: Any, oid: bytes) -> None:
        """Claim from the queue whose record has this oid in the connection's database."""
        pid = os.getpid()
        self.holder = f"{_MACHINE}:{pid}:{_started(pid)}:{uuid.uuid4().hex[:12]}"
        self.held: set[Place] = set()
        self._db = connection.db()
        self._oid = oid
        _living[self.holder] = self

    def take(
        self,
        limit: int,
        finished: Iterable[Place] = (),
        visible: Callable[[Place], bool] = lambda place: True,
        after: int = 0,
    ) -> list[Place]:
        """Claim up to `limit` of the first messages that nobody holds.

        What has gone from the queue and nobody looks after any more is swept out on the way.

        :param finished: places whose messages this consumer has taken, and committed.
        :param visible: says whether the consumer's own transaction knows of the message at a place;
            one that it does not know of yet is left to others.
        :param after: begin behind this position.
        """
        mine = self.holder.rsplit(":", 1)[0]
        done = set(finished)

        def work(record: QueueRecord) -> list[Place]:
            now = time.time_ns()
            found: list[Place] = []
            swept = list(done)
            gone: dict[str, bool] = {}
            for place, entry in record.walk(after):
                if place in done:
                    continue
                lane = record.lanes[place.lane]
                claim = lane.claims.get(place.position)
                if claim is not None:
                    holder = claim[1]
                    if holder not in gone:
                        gone[holder] = holder_is_gone(holder)
                    free = gone[holder] or claim[3] <= now
                    if not free and not holder.startswith(mine):
                        continue
                    if not lane.live(entry, place.position):
                        swept.append(place)
                        continue
                    if not free:
                        continue
                if not visible(place):
                    continue
                found.append(place)
                if len(found) >= limit:
                    break
            for place in swept:
                record.sweep(place)
            for lane in record.lanes:
                lane.drop_drained_head()
            until = now + LEASE_SECONDS * 1_000_000_000
            for place in found:
                claim = Claim(place.segment, self.holder, now, until)
                record.lanes[place.lane].claims[place.position] = tuple(claim)
            return found

        found = self._run(work)
        self.held.update(found)
        return found

    def release(self, finished: Iterable[Place] = ()) -> None:
        """Give all claims back, so that others can have the messages at once."""
        returned, self.held = self.held, set()
        if not returned:
            return
        swept = list(finished)

        def work(record: QueueRecord) -> None:
            for place in swept:
                record.sweep(place)
            for place in returned:
                lane = record.lanes[place.lane]
                claim = lane.claims.get(place.position)
                if claim is None or claim[1] != self.holder:
                    continue
                if lane.live(lane.get(place), place.position):
                    del lane.claims[place.position]
                else:
                    record.sweep(place)

        self._run(work)

    def abandon(self) -> None:
        """Hold nothing any more, without a word to the database; this process knows at once."""
        self.held.clear()
        _living.pop(self.holder, None)

    def _run(self, work: Callable[[QueueRecord], _T]) -> _T:
        attempt = 0
        while True:
            attempt += 1
            manager = TransactionManager(explicit=True)
            connection = self._db.open(manager)
            try:
                with manager:
                    return work(connection.get(self._oid))
            except TransientError:
                if attempt == _ATTEMPTS:
                    raise
            finally:
                connection.close()
            time.sleep(random.uniform(0, 0.002 * attempt))  # noqa: S311  # spreads, hides nothing
