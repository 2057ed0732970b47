"""Lanes and segments: where a queue keeps its entries, in order, without anybody waiting.

A queue has :data:`LANES` lanes.  A producer (a process) keeps to one, so producers seldom meet.  A
lane is a row of segments; a segment is a LOBTree of at most :data:`SEGMENT_SIZE` entries by their
position.  Positions grow, so the first position of all lanes is the head of the queue.

A consumer does not take an entry out of its segment: it *claims* some positions for a while, in a
short transaction of its own, and the application's transaction then writes nothing but the entries
themselves.  So consumers' transactions conflict with nobody's.  A claim is advice; the write of
the entry decides.  Entries that have gone are swept out of their segments by later claims.

Every tree has a permanent sentinel under the key 0: it never runs empty, and its first key never
goes, so that BTrees can merge what several processes do to it at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from BTrees.Length import Length
from BTrees.LOBTree import LOBTree
from persistent import Persistent
from ZODB.POSException import ConflictError

from postoffice.depot.entry import QUEUED, Entry

__all__ = [
    "FIRST",
    "LANES",
    "SEGMENT_SIZE",
    "SENTINEL",
    "Claim",
    "Lane",
    "Place",
    "claim_of",
    "new_tree",
]

LANES = 4
SEGMENT_SIZE = 50

#: The key that every tree keeps, and the first of those that mean something.
SENTINEL = 0
FIRST = 1


class Place(NamedTuple):
    """Where an entry stands: number of the lane, key of the segment, position."""

    lane: int
    segment: int
    position: int


class Claim(NamedTuple):
    """Who may work on a position, and for how long.

    :ivar segment: key of the segment that the position is in.
    :ivar holder: see :mod:`postoffice.claims`; ``""`` when nobody holds it any more, and only
        `lapses` is left to tell.
    :ivar since: nanoseconds since the epoch; likewise `until`.
    :ivar lapses: how many holders have died, or let their time run out, with this message in hand.
    :ivar turn: the place among those that were claimed at once, which is the order of the work.
    """

    segment: int
    holder: str
    since: int
    until: int
    lapses: int = 0
    turn: int = 0


def claim_of(row: tuple[Any, ...]) -> Claim:
    """Return the claim that a row of a lane's claims stands for; early ones have four values."""
    return Claim._make((*row, 0, 0)[:6])


def new_tree() -> LOBTree:
    """Return a tree with the sentinel alone."""
    return LOBTree({SENTINEL: None})


class Lane(Persistent):
    """One producer's row of segments.

    :ivar segments: segments by the first position that each was made for.
    :ivar claims: claims by position, as plain tuples.
    :ivar length: how many entries are in the segments, those included that have gone and are not
        swept out yet; each of those has a claim.
    """

    def __init__(self) -> None:
        """Make an empty lane."""
        self.segments = new_tree()
        self.claims = new_tree()
        self.length = Length()

    def add(self, position: int, entry: Entry) -> int:
        """Put an entry at a position; return the key of its segment."""
        segments = self.segments
        key = int(segments.maxKey())
        segment: LOBTree | None = segments[key]
        if segment is None or len(segment) > SEGMENT_SIZE:
            segment = new_tree()
            segments[position] = segment
            key = position
        if not segment.insert(position, entry):
            # Another process had the same idea of an id; tried again, there is a new one.
            raise ConflictError(f"position {position} is taken")
        self.length.change(1)
        return key

    def get(self, place: Place) -> Entry | None:
        """Return the entry at a place, or ``None``."""
        segment = self.segments.get(place.segment)
        found: Entry | None = None if segment is None else segment.get(place.position)
        return found

    def expect(self, position: int) -> int | None:
        """Return the key of the segment that holds a position, if it is the likeliest one."""
        segments = self.segments
        # There is not even the sentinel in a lane that was closed.
        key = segments.maxKey(position) if position > SENTINEL and segments else SENTINEL
        return int(key) if key and position in segments[key] else None

    def find(self, position: int) -> int | None:
        """Return the key of the segment that holds a position, or ``None``.

        A producer that did not see a newer segment yet adds to an older one, so the segment that
        begins last before the position is only the most likely one.  This reads all, and keeps
        none in memory.
        """
        for key in self.segments.keys(FIRST):
            segment = self.segments[key]
            known = segment._p_changed is not None
            found = position in segment
            if not known:
                segment._p_deactivate()
            if found:
                return int(key)
        return None

    def walk(self, after: int = SENTINEL) -> Iterator[tuple[int, int, Entry]]:
        """Iterate over segment, position and entry from the head, or behind a position."""
        segments = self.segments
        start = FIRST
        if after and segments:
            start = segments.maxKey(after) or FIRST
        for key, segment in segments.items(start):
            for position, entry in segment.items(after + 1):
                yield key, position, entry

    def remove(self, place: Place) -> bool:
        """Take an entry out of its segment; return whether it was there."""
        segment = self.segments.get(place.segment)
        if segment is None or segment.pop(place.position, None) is None:
            return False
        self.length.change(-1)
        return True

    def sweep(self, place: Place) -> None:
        """Take out an entry that has gone, with its claim, and its segment if that is drained."""
        self.remove(place)
        self.claims.pop(place.position, None)
        self.drop_drained(place.segment)

    def drop_drained(self, key: int) -> None:
        """Unlink a segment that is drained, unless it is the last, which producers add to.

        Its tree is cleared in the same transaction: a producer with an older snapshot that adds
        to it meets a conflict, where otherwise both would commit and the message be lost.
        """
        segment = self.segments.get(key)
        if segment is not None and key != self.segments.maxKey() and len(segment) == 1:
            segment.clear()
            del self.segments[key]

    def drop_drained_head(self) -> None:
        """Unlink drained segments at the head that were the last ones when they were drained."""
        segments = self.segments
        last = segments.maxKey() if segments else SENTINEL
        while last and (key := segments.minKey(FIRST)) != last and len(segments[key]) == 1:
            self.drop_drained(key)

    def gone(self) -> int:
        """Return how many entries are still in segments though they have left the queue."""
        count = 0
        for position, claim in self.claims.items(FIRST):
            entry = self.get(Place(0, claim[0], position))
            if entry is not None and not self.live(entry, position):
                count += 1
        return count

    @staticmethod
    def live(entry: Entry | None, position: int) -> bool:
        """Tell whether an entry found at this position is waiting there."""
        return entry is not None and entry.state == QUEUED and entry.position == position

    def close(self) -> None:
        """Empty the lane for good: an addition that does not know of it yet is a conflict."""
        for segment in self.segments.values(FIRST):
            segment.clear()
        self.segments.clear()
        self.claims.clear()
