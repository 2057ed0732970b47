"""One queue's data: lanes, quarantine and histories."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from BTrees.Length import Length
from BTrees.LOBTree import LOBTree
from persistent import Persistent
from ZODB.POSException import ConflictError

from postoffice.depot.entry import QUARANTINED, Entry
from postoffice.depot.history import DUPLICATE_WIDTH, Arrivals, HistoryLog, Throttles
from postoffice.depot.ids import new_id, producer_number
from postoffice.depot.lane import LANES, Lane, Place
from postoffice.exceptions import QueueRemoved

__all__ = ["QueueRecord"]

_SENTINEL = 0
_FIRST = 1


class QueueRecord(Persistent):
    """What the depot keeps of one queue.

    :ivar name: the queue's name.
    :ivar lanes: a tuple of :class:`postoffice.depot.lane.Lane`.
    :ivar moved: positions by id, of entries whose position is no longer their id; the ids by those
        positions are in `moved_ids`.
    :ivar quarantine: entries by id.
    :ivar quarantined: the number of entries in quarantine.
    :ivar duplicates: history of digests; :ivar arrivals: of senders; :ivar throttles: those now.
    :ivar removed: set when the queue is removed; adding reads it as current.
    """

    removed = False

    def __init__(self, name: str) -> None:
        """Make an empty queue."""
        self.name = name
        self.lanes = tuple(Lane() for _ in range(LANES))
        self.moved = LOBTree({_SENTINEL: 0})
        self.moved_ids = LOBTree({_SENTINEL: 0})
        self.quarantine = LOBTree({_SENTINEL: None})
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

    def walk(self, after: int = _SENTINEL) -> Iterator[tuple[Place, Entry]]:
        """Iterate over all places in order, those of entries that have gone included."""

        def row(number: int, lane: Lane) -> Iterator[tuple[int, int, int, Entry]]:
            for key, position, entry in lane.walk(after):
                yield position, number, key, entry

        rows = [row(number, lane) for number, lane in enumerate(self.lanes)]
        for position, number, key, entry in heapq.merge(*rows, key=lambda item: item[:2]):
            yield Place(number, key, position), entry

    def find(self, id: int) -> tuple[Place, Entry] | None:
        """Return where the entry with this id waits, and the entry; or ``None``."""
        position = self.moved.get(id, id)
        if not _SENTINEL < position < 1 << 63:
            return None
        for number, lane in enumerate(self.lanes):
            key = lane.find(position)
            if key is not None:
                place = Place(number, key, position)
                entry = lane.get(place)
                if entry is not None and lane.live(entry, position):
                    return place, entry
        return None

    def sweep(self, place: Place) -> None:
        """Take out an entry that has gone, and what is left of it."""
        self.lanes[place.lane].sweep(place)
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
        if not _SENTINEL < id < 1 << 63:
            return None
        entry: Entry | None = self.quarantine.get(id)
        return entry if entry is not None and entry.state == QUARANTINED else None

    def pop_quarantine(self, entry: Entry) -> None:
        """Take an entry out of quarantine."""
        del self.quarantine[entry.id]
        self.quarantined.change(-1)

    def quarantine_after(self, id: int = _SENTINEL) -> Iterator[Entry]:
        """Iterate over the quarantine in order of ids, behind this one."""
        yield from self.quarantine.values(max(id, _SENTINEL) + 1)

    def waiting(self) -> int:
        """Return how many entries wait in the queue."""
        return sum(int(lane.length()) - lane.gone() for lane in self.lanes)

    def close(self) -> None:
        """Make every addition that does not know of it yet a conflict; the last that is done."""
        self.removed = True
        for lane in self.lanes:
            lane.close()
        self.quarantine.clear()
