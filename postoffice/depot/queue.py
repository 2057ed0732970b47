"""One queue's data: lanes, the deferred, quarantine and histories."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain

from BTrees.Length import Length
from BTrees.LOBTree import LOBTree
from persistent import Persistent
from ZODB.POSException import ConflictError, POSKeyError

from postoffice.depot.deferred import DeferredLane
from postoffice.depot.entry import QUARANTINED, Body, Entry
from postoffice.depot.history import DUPLICATE_WIDTH, Arrivals, HistoryLog, Throttles
from postoffice.depot.ids import new_id, producer_number
from postoffice.depot.lane import LANES, SENTINEL, Claim, Lane, Place, claim_of
from postoffice.depot.policy import Policy
from postoffice.exceptions import QueueRemoved

__all__ = ["QueueRecord"]

# One consumer claims no more than this part of what waits.
_SHARE = 8
# Bytes of bodies; they go into the client's cache, which others need too.
_MOST_PREFETCHED = 1 << 20


class QueueRecord(Persistent):
    """What the depot keeps of one queue.

    :ivar name: the queue's name.
    :ivar lanes: a tuple of :class:`postoffice.depot.lane.Lane`, for producers to add to.
    :ivar deferred: the lane of those that wait for a time; ``None`` in a queue that was made before
        there was such a lane, until it needs one.
    :ivar moved: positions by id, of entries whose position is no longer their id; the ids by those
        positions are in `moved_ids`.
    :ivar quarantine: entries by id.
    :ivar quarantined: the number of entries in quarantine.
    :ivar duplicates: history of digests; :ivar arrivals: of senders; :ivar throttles: those now.
    :ivar removed: set when the queue is removed; adding reads it as current.
    """

    removed = False
    deferred: DeferredLane | None = None
    _policy: tuple[float, ...] | None = None

    def __init__(self, name: str) -> None:
        """Make an empty queue."""
        self.name = name
        self.lanes = tuple(Lane() for _ in range(LANES))
        self.deferred = DeferredLane()
        self.moved = LOBTree({SENTINEL: 0})
        self.moved_ids = LOBTree({SENTINEL: 0})
        self.quarantine = LOBTree({SENTINEL: None})
        self.quarantined = Length()
        self.duplicates = HistoryLog(DUPLICATE_WIDTH, slot_seconds=3600, limit=500_000)
        self.arrivals = Arrivals()
        self.throttles = Throttles()

    @property
    def lane_number(self) -> int:
        """The lane that this process adds to."""
        return producer_number() % len(self.lanes)

    def append(self, entry: Entry) -> Place:
        """Put an entry with an id behind the tail; it may have been in the queue before.

        :raises QueueRemoved: the queue was removed; a removal at the same time is a conflict.
        """
        self._stay()
        number = self.lane_number
        position = entry.__dict__.get("position")
        if position is None:
            position = entry.id
        else:
            position = new_id()
            self.moved[entry.id] = position
            self.moved_ids[position] = entry.id
        entry.position = position
        return Place(number, self.lanes[number].add(position, entry), position)

    def _stay(self) -> None:
        """Make a removal of the queue at the same time a conflict.

        :raises QueueRemoved: it is removed already.
        """
        if self.removed:
            raise QueueRemoved(self.name)
        if self._p_jar is not None and self._p_oid is not None:
            self._p_jar.readCurrent(self)

    @property
    def policy(self) -> Policy:
        """How failing messages and claims are treated."""
        return Policy() if self._policy is None else Policy._make(self._policy)

    def set_policy(self, policy: Policy) -> bool:
        """Treat failing messages and claims otherwise from now on; return whether it is otherwise.

        Meets whoever adds at the same time as a conflict, so it is not for every transaction.
        """
        if policy == self.policy:
            return False
        self._policy = tuple(policy)
        return True

    @property
    def all_lanes(self) -> tuple[Lane, ...]:
        """The lanes, with that of the deferred; a place's lane is an index into these."""
        return self.lanes if self.deferred is None else (*self.lanes, self.deferred)

    def get(self, place: Place) -> Entry | None:
        """Return the entry at a place, whether it waits there or has gone; or ``None``."""
        lanes = self.all_lanes
        # One that was deferred since this transaction began has a place that it does not know.
        return lanes[place.lane].get(place) if place.lane < len(lanes) else None

    def live(self, place: Place) -> Entry | None:
        """Return the entry that waits at a place, or ``None``."""
        entry = self.get(place)
        return entry if Lane.live(entry, place.position) else None

    def prefetch(self, places: Iterable[Place]) -> None:
        """Have the storage send the entries at these places, and their bodies, all at once."""
        entries = [entry for place in places if (entry := self.get(place)) is not None]
        self._p_jar.prefetch(entries)
        bodies = []
        room = _MOST_PREFETCHED
        # One that is lost is reported where it is taken.
        with suppress(POSKeyError):
            for entry in entries:
                room -= entry.size
                if room < 0:
                    break
                if isinstance(entry.body, Body):
                    bodies.append(entry.body)
        self._p_jar.prefetch(bodies)

    def defer(self, place: Place, due: int) -> Place | None:
        """Let the entry at a place wait until a time, in nanoseconds; return its new place.

        Ends the claim on it.  ``None`` when it does not wait at this place.
        """
        entry = self.live(place)
        if entry is None:
            return None
        if self.deferred is None:
            self.deferred = DeferredLane()
        number = len(self.lanes)
        if place.lane == number:
            self.deferred.claims.pop(place.position, None)
        else:
            self.lanes[place.lane].sweep(place)
        self.deferred.defer(entry, due)
        return Place(number, SENTINEL, place.position)

    def give_back(self, place: Place, now: int) -> bool:
        """Let nobody hold a place, and what is deferred be due now; return whether it was so.

        :param now: nanoseconds since the epoch.
        """
        lane = self.all_lanes[place.lane]
        entry = lane.get(place)
        row = lane.claims.get(place.position)
        held = row is not None and bool(row[1]) and row[3] > now
        if row is not None:
            lapses = claim_of(row).lapses
            lane.claims[place.position] = tuple(Claim(place.segment, "", 0, 0, lapses))
        late = place.lane == len(self.lanes) and entry is not None and entry.not_before > now
        if late and self.deferred is not None and entry is not None:
            self.deferred.defer(entry, now)
        return held or late

    def walk(self, after: int = SENTINEL) -> Iterator[tuple[Place, Entry]]:
        """Iterate over all places in order, those of entries that have gone included."""
        return self._merged(self.all_lanes, after)

    def ready(self, now: int, after: int = SENTINEL) -> Iterator[tuple[Place, Entry]]:
        """Iterate over the places to take from: those that are due again, then all others in order.

        Those of entries that have gone are among them.

        :param now: nanoseconds since the epoch.
        :param after: begin behind this position, but for those that are due again.
        """
        if self.deferred is not None:
            for position, entry in self.deferred.ready(now):
                yield Place(len(self.lanes), SENTINEL, position), entry
        yield from self._merged(self.lanes, after)

    @staticmethod
    def _merged(lanes: tuple[Lane, ...], after: int) -> Iterator[tuple[Place, Entry]]:
        def row(number: int, lane: Lane) -> Iterator[tuple[int, int, int, Entry]]:
            for key, position, entry in lane.walk(after):
                yield position, number, key, entry

        rows = [row(number, lane) for number, lane in enumerate(lanes)]
        for position, number, key, entry in heapq.merge(*rows, key=lambda item: item[:2]):
            yield Place(number, key, position), entry

    def find(self, id: int) -> tuple[Place, Entry] | None:
        """Return where the entry with this id waits, and the entry; or ``None``."""
        position = self.moved.get(id, id)
        if not SENTINEL < position < 1 << 63:
            return None
        lanes = list(enumerate(self.all_lanes))
        # Looking where it is to be expected costs the same however long the queue is.
        keys = chain(
            ((number, lane.expect(position)) for number, lane in lanes),
            ((number, lane.find(position)) for number, lane in lanes),
        )
        for number, key in keys:
            if key is not None:
                place = Place(number, key, position)
                entry = self.live(place)
                if entry is not None:
                    return place, entry
        return None

    def sweep(self, place: Place) -> None:
        """Take out an entry that has gone, and what is left of it."""
        self.all_lanes[place.lane].sweep(place)
        id = self.moved_ids.pop(place.position, None)
        if id is not None and self.moved.get(id) == place.position:
            del self.moved[id]

    def put_quarantine(self, entry: Entry) -> None:
        """Keep an entry in quarantine."""
        self._stay()
        if not self.quarantine.insert(entry.id, entry):
            raise ConflictError(f"id {entry.id} is in quarantine already")
        self.quarantined.change(1)

    def get_quarantine(self, id: int) -> Entry | None:
        """Return an entry from quarantine, or ``None``."""
        if not SENTINEL < id < 1 << 63:
            return None
        entry: Entry | None = self.quarantine.get(id)
        return entry if entry is not None and entry.state == QUARANTINED else None

    def pop_quarantine(self, entry: Entry) -> None:
        """Take an entry out of quarantine."""
        del self.quarantine[entry.id]
        self.quarantined.change(-1)

    def quarantine_after(self, id: int = SENTINEL) -> Iterator[Entry]:
        """Iterate over the quarantine in order of ids, behind this one."""
        yield from self.quarantine.values(max(id, SENTINEL) + 1)

    def share(self, most: int) -> int:
        """Return how many messages one consumer had best claim at once, of at most so many.

        When few are left, others shall find some too.
        """
        count = sum(int(lane.length()) for lane in self.all_lanes)
        return min(most, 1 + count // _SHARE)

    def waiting(self) -> int:
        """Return how many entries wait in the queue, the deferred included."""
        return sum(int(lane.length()) - lane.gone() for lane in self.all_lanes)

    def later(self, now: int) -> list[Place]:
        """Return the places of what is due later than `now`, in nanoseconds."""
        if self.deferred is None:
            return []
        number = len(self.lanes)
        return [Place(number, SENTINEL, position) for position in self.deferred.due.values(now + 1)]

    def count_deferred(self, now: int) -> int:
        """Return how many entries wait for a time that is to come; `now` is in nanoseconds."""
        return 0 if self.deferred is None else self.deferred.count_later(now)

    def close(self) -> None:
        """Make every addition that does not know of it yet a conflict; the last that is done."""
        self.removed = True
        for lane in self.all_lanes:
            lane.close()
        self.quarantine.clear()
