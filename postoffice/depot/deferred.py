"""The deferred: messages that were given back, and are not to be taken before a time."""

from __future__ import annotations

from collections.abc import Iterator

from BTrees.Length import Length
from BTrees.LLBTree import LLBTree

from postoffice.depot.entry import Entry
from postoffice.depot.lane import FIRST, SENTINEL, Lane, Place, new_tree

__all__ = ["DeferredLane"]


class DeferredLane(Lane):
    """A lane whose entries stand by the time when they are due, and by their position.

    An entry keeps the position that it had in its lane, and leaves that lane, so that many that
    wait do not stand in the way of those that can be taken.  It is claimed and swept here as in any
    lane; the key of its "segment" is always 0.

    :ivar waiting: entries by position.
    :ivar due: positions by the time when each is due, in nanoseconds since the epoch; where two
        are due at once, one is a nanosecond later.
    :ivar times: those times by position.
    :ivar claims: see :class:`postoffice.depot.lane.Lane`; likewise `length`.
    """

    def __init__(self) -> None:
        """Make an empty lane."""
        self.waiting = new_tree()
        self.due = LLBTree({SENTINEL: SENTINEL})
        self.times = LLBTree({SENTINEL: SENTINEL})
        self.claims = new_tree()
        self.length = Length()

    def defer(self, entry: Entry, due: int) -> None:
        """Put an entry here until it is due, in nanoseconds since the epoch.

        One that is here already is due then instead.
        """
        position = entry.position
        if self.waiting.insert(position, entry):
            self.length.change(1)
        else:
            self.due.pop(self.times[position], None)
        while not self.due.insert(due, position):
            due += 1
        self.times[position] = entry.not_before = due

    def ready(self, now: int) -> Iterator[tuple[int, Entry]]:
        """Iterate over the positions and entries that are due, those first that were due first."""
        for position in self.due.values(FIRST, now):
            entry = self.waiting.get(position)
            if entry is not None:
                yield position, entry

    def count_later(self, now: int) -> int:
        """Return how many are due later than `now`, in nanoseconds, and still wait."""
        # Those that are due, or have gone, are few.
        due = sum(self.live(entry, position) for position, entry in self.ready(now))
        return int(self.length()) - self.gone() - due

    def get(self, place: Place) -> Entry | None:
        """See :meth:`Lane.get`."""
        found: Entry | None = self.waiting.get(place.position)
        return found

    def expect(self, position: int) -> int | None:
        """See :meth:`Lane.expect`."""
        return SENTINEL if position > SENTINEL and position in self.waiting else None

    def find(self, position: int) -> int | None:
        """See :meth:`Lane.find`; there is one place only."""
        return None

    def walk(self, after: int = SENTINEL) -> Iterator[tuple[int, int, Entry]]:
        """See :meth:`Lane.walk`; those that are not due are among them."""
        for position, entry in self.waiting.items(after + 1):
            yield SENTINEL, position, entry

    def remove(self, place: Place) -> bool:
        """See :meth:`Lane.remove`."""
        if self.waiting.pop(place.position, None) is None:
            return False
        self.due.pop(self.times.pop(place.position), None)
        self.length.change(-1)
        return True

    def drop_drained(self, key: int) -> None:
        """See :meth:`Lane.drop_drained`; there are no segments."""

    def drop_drained_head(self) -> None:
        """See :meth:`Lane.drop_drained_head`; there are no segments."""

    def close(self) -> None:
        """See :meth:`Lane.close`."""
        self.waiting.clear()
        self.due.clear()
        self.times.clear()
        self.claims.clear()
