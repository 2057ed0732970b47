"""Taking: what one queue object holds, takes and gives back, transaction by transaction.

Claims are made in batches that grow while the consumer is quick, so that their cost is shared; an
abort, a transaction that took nothing and the closing of the connection give them back at once.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from persistent import Persistent

from postoffice.claims import Claims, holder_is_gone
from postoffice.depot.entry import DONE, Entry
from postoffice.depot.lane import Lane, Place, claim_of
from postoffice.depot.queue import QueueRecord
from postoffice.message import Message

__all__ = ["Taking", "Work"]

log = logging.getLogger("postoffice")

_MOST_AT_ONCE = 50
_HOLD_SECONDS = 1.0


class Work:
    """What a queue has done in one transaction.

    :ivar added: places and entries that were added and may still be taken.
    :ivar taken: entries that were taken, by place, in order.
    :ivar acknowledged: claims and entries of claimed messages that were acknowledged or put into
        quarantine, by place.
    :ivar passed: claims on what turned out to have gone.
    :ivar claimed_to: the position up to which it has claimed what it could, or 0.
    :ivar dry: whether there was nothing more to claim.
    :ivar stored: the new records, to be let go of after the commit.
    :ivar at_end: is called when the transaction has ended, with whether it was committed.
    """

    def __init__(self) -> None:
        """Begin with nothing done."""
        self.added: list[tuple[Place, Entry]] = []
        self.taken: dict[Place, Entry] = {}
        self.acknowledged: dict[Place, tuple[Claims, Entry]] = {}
        self.passed: list[Place] = []
        self.claimed_to = 0
        self.dry = False
        self.stored: list[Persistent] = []
        self.at_end: list[Callable[[bool], None]] = []
        self._messages: list[tuple[weakref.ref[Message], Entry]] = []
        self._last_words: list[tuple[weakref.ref[Message], Entry]] = []
        self.ended = False

    def forget(self) -> None:
        """Let go of everything: who asks which transaction it was keeps this object."""
        self.added, self.taken, self.acknowledged, self.passed = [], {}, {}, []
        self.stored, self.at_end = [], []
        self._messages, self._last_words = [], []

    def give(self, message: Message, entry: Entry) -> None:
        """Take note that the application has this message of an entry that it took."""
        self._messages.append((weakref.ref(message), entry))

    def keep_last_words(self) -> None:
        """Keep what is known of the messages taken: others may sweep the entries out from now."""
        for reference, entry in self._messages:
            if reference() is not None and entry.state == DONE:
                self._last_words.append((reference, entry.copy()))

    def hand_out_last_words(self) -> None:
        """Give each message that the application still has the entry as it was."""
        for reference, entry in self._last_words:
            message = reference()
            if message is not None:
                message.entry = entry


class Taking:
    """One queue object's part in the transactions of its connection."""

    def __init__(self, record: QueueRecord) -> None:
        """Take from this queue, in its record's connection."""
        self.record = record
        #: For what is taken within transactions, and given back when these are aborted.
        self.claims: Claims | None = None
        #: For what the application claimed itself, whatever becomes of its transactions.
        self.lent: Claims | None = None
        #: The records of the last transaction that was committed.
        self.stored: list[Persistent] = []
        self._connection = record._p_jar
        self._ready: list[Place] = []
        self._claimed_at = 0.0
        self._claimed = 1
        self._watches_close = False
        self._batch = 1

    def transaction(self) -> Any:
        """Return the connection's current transaction."""
        return self._connection.transaction_manager.get()

    def work(self) -> Work:
        """Return what is done in the current transaction."""
        current = self.transaction()
        try:
            found: Work = current.data(self)
        except KeyError:
            found = Work()
            current.set_data(self, found)
            current.addBeforeCommitHook(self._before_commit, (found,))
            current.addAfterCommitHook(self._ended, (found,))
            current.addAfterAbortHook(self._ended, (False, found))
        return found

    def _ended(self, committed: bool, work: Work) -> None:
        if work.ended:
            return
        work.ended = True
        self.stored = work.stored if committed else []
        for tell in work.at_end:
            tell(committed)
        if committed:
            work.hand_out_last_words()
            for place, (claims, _) in work.acknowledged.items():
                claims.finish([place])
        if self.claims is not None:
            self._settle_claims(self.claims, committed, work)
        work.forget()

    def _settle_claims(self, claims: Claims, committed: bool, work: Work) -> None:
        if committed:
            claims.finish(work.taken)
            claims.finish(work.passed)
        if not committed or not work.taken:
            self.release()
        elif not self._ready:
            # A slow consumer holds little that idle ones could take meanwhile.
            seconds = (time.monotonic() - self._claimed_at) / self._claimed
            wanted = int(_HOLD_SECONDS / seconds) if seconds > 0 else _MOST_AT_ONCE
            self._batch = max(1, min(wanted, self._batch * 4, _MOST_AT_ONCE))

    def _before_commit(self, work: Work) -> None:
        self._settle(work)
        work.keep_last_words()

    def _settle(self, work: Work) -> None:
        """Take note of what a rollback to a savepoint has put back."""
        for place in [one for one in work.acknowledged if self.record.live(one) is not None]:
            del work.acknowledged[place]
        back = [place for place in work.passed if self.record.live(place) is not None]
        if back:
            work.passed = [place for place in work.passed if place not in back]
        undone = []
        for place, entry in reversed(work.taken.items()):
            if Lane.live(entry, place.position):
                undone.append((place, entry))
            elif entry._p_jar is not None:
                break
        for place, entry in undone:
            del work.taken[place]
            if self.claims is not None and place in self.claims.held:
                back.append(place)
            else:
                work.added.insert(0, (place, entry))
        if back:
            self._ready = sorted([*back, *self._ready], key=lambda place: place.position)

    def _closed(self) -> None:
        self._watches_close = False
        self.release()
        self.release_lent()

    def _watch_close(self) -> None:
        if not self._watches_close:
            self._connection.onCloseCallback(self._closed)
            self._watches_close = True

    def release(self) -> None:
        """Give back at once what this object holds for messages to come.

        Called by itself when the connection is closed, and after a transaction that was aborted or
        took nothing.
        """
        self._ready.clear()
        self._batch = 1
        if self.claims is not None and not self._give_back(self.claims):
            self.claims = None

    def release_lent(self) -> None:
        """Give back at once what the application claimed itself."""
        if self.lent is not None and not self._give_back(self.lent):
            self.lent = None

    def _give_back(self, claims: Claims) -> bool:
        try:
            claims.release()
        except Exception as error:
            # The abort or close that this follows must go on, in a database that is being
            # closed, or lost, too.
            claims.abandon()
            log.warning("queue %r: claims stay until they expire: %r", self.record.name, error)
            return False
        return True

    def lend(self) -> Claims:
        """Return the claims for what the application claims itself."""
        if self.lent is None:
            self.lent = Claims(self._connection, self.record._p_oid)
            self._watch_close()
        return self.lent

    def surrender(self) -> Claims | None:
        """Have no part any more in what the application claimed itself; return it."""
        claims, self.lent = self.lent, None
        return claims

    def adopt(self, claims: Claims) -> None:
        """Have those be the claims for what the application claims itself."""
        self.lent = claims
        self._watch_close()

    def lapses(self, place: Place) -> int:
        """Return how many holders have been lost with the message at a place in hand."""
        for claims in (self.claims, self.lent):
            if claims is not None and place in claims.held:
                return claims.held[place].lapses
        row = self.record.all_lanes[place.lane].claims.get(place.position)
        return 0 if row is None else claim_of(row).lapses

    def take(self) -> tuple[Entry, Work] | None:
        """Take the first entry that there is to take; ``None`` when there is none now."""
        work = self.work()
        head = self._head(work)
        if head is None:
            return None
        place, entry = head
        if self._ready and self._ready[0] == place:
            del self._ready[0]
        else:
            # Added in this transaction: nobody has a claim on it, so nobody would sweep it out.
            work.added.remove((place, entry))
            self.record.sweep(place)
        work.taken[place] = entry
        return entry, work

    def has_one(self) -> bool:
        """Tell whether there is an entry to take; it is held until the transaction ends."""
        return self._head(self.work()) is not None

    def uncounted(self) -> int:
        """Return how many entries this transaction took that the record still counts."""
        count = 0
        work = self.work()
        acknowledged = ((place, entry) for place, (_, entry) in work.acknowledged.items())
        for place, entry in chain(work.taken.items(), acknowledged):
            lane = self.record.all_lanes[place.lane]
            if (
                not lane.live(entry, place.position)
                and place.position not in lane.claims
                and lane.get(place) is not None
            ):
                count += 1
        return count

    def _head(self, work: Work) -> tuple[Place, Entry] | None:
        """Return what is to be taken next: what is claimed, or else what was added just now."""
        self._settle(work)
        while self._ready or self._claim(work):
            place = self._ready[0]
            entry = self.record.live(place)
            if entry is not None:
                return place, entry
            # An abort may bring it back, so it is swept after the commit.
            work.passed.append(self._ready.pop(0))
        for place, entry in work.added:
            if self.record.live(place) is not None:
                return place, entry
        return None

    def _claim(self, work: Work) -> bool:
        if work.dry:
            # What comes later is not in this transaction's snapshot.
            return False
        if self.record._p_serial == b"\0" * 8:
            # Made in this very transaction; nobody else can know of it.
            return False
        if self.claims is None:
            self.claims = Claims(self._connection, self.record._p_oid)
        self._watch_close()
        self._claimed_at = time.monotonic()
        if work.claimed_to:
            # A transaction that takes many, which are all held until it ends.
            self._batch = min(self._batch * 2, _MOST_AT_ONCE)
        record = self.record
        self._ready = self.claims.take(
            record.share(self._batch),
            lambda place: record.get(place) is not None,
            after=work.claimed_to,
        )
        if self._ready:
            self._claimed = len(self._ready)
            record.prefetch(self._ready)
            deferred = len(record.lanes)
            work.claimed_to = max(
                (place.position for place in self._ready if place.lane != deferred),
                default=work.claimed_to,
            )
        else:
            work.dry = True
        return bool(self._ready)

    def free(self) -> Iterator[Entry]:
        """Iterate over what this queue could take, as far as its snapshot knows."""
        now = time.time_ns()
        mine = self.claims.holder if self.claims is not None else None
        lanes = self.record.all_lanes
        for place, entry in self.record.ready(now):
            row = lanes[place.lane].claims.get(place.position)
            if row is not None:
                holder, until = row[1], row[3]
                if holder and holder != mine and until > now and not holder_is_gone(holder):
                    continue
            if Lane.live(entry, place.position):
                yield entry
