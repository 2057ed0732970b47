"""Receipts: what came over a connection lately, to know it by when it comes again.

Who delivers a message and does not hear that we have it sends it again, for days.  A receipt for
each recipient, written by the transaction that stores the message, tells that it is here.

The same message may come by two processes at a time: a mail server that is started again does not
wait for the command that it had run.  Neither sees the other's receipt, so all receipts are written
to the same chunk: of two transactions that overlap, one meets a conflict, and on being run again it
finds the receipt of the other.
"""

from __future__ import annotations

import logging
import sys
from array import array
from bisect import bisect_left

from postoffice.depot.history import Chunk, HistoryIndex, HistoryLog

__all__ = ["RECEIPT_SECONDS", "ReceiptIndex", "Receipts"]

RECEIPT_SECONDS = 7 * 24 * 60 * 60
# Of all producers: see above.
_LANE = 0
_WIDTH = 16
_KEY = 8
_MOST_LOOSE = 4096
# So many at a time are no single commit of ours, but what was there before, or of others.
_FEW = 200


class Receipts(HistoryLog):
    """The log of receipts, kept for seven days; a million at most."""

    alarm = logging.WARNING

    def __init__(self) -> None:
        """Make an empty log."""
        super().__init__(_WIDTH, slot_seconds=24 * 60 * 60, limit=1_000_000)

    def append(self, record: bytes, seconds: int, lane: int, keep: int) -> tuple[int, int, int]:
        """See :meth:`postoffice.depot.history.HistoryLog.append`."""
        if self.slot_at(seconds) + 1 in self.slots:
            # Whose clock is behind writes to where the others do.
            seconds += self.slot_seconds
        number, key, offset = place = super().append(record, seconds, lane, keep)
        if not offset:
            # Others may write to the chunk before, or begin another one behind it, as at midnight:
            # they shall meet a conflict too.
            before = self._before(number, key)
            if before is not None:
                before._p_changed = True
        return place

    def _before(self, number: int, key: int) -> Chunk | None:
        """Return the chunk before the one with this key in this slot, for the same lane."""
        chunk: Chunk | None = self.slots[number].get(key - 1)
        if chunk is None:
            for earlier in [one for one in self.numbers() if one < number][-1:]:
                for _, chunk in self.tails(earlier, _LANE + 1):
                    return chunk
        return chunk


class ReceiptIndex(HistoryIndex):
    """Which deliveries, by digests of 16 bytes, were received.

    Half of each digest is kept in memory, 8 bytes for a receipt.  That two deliveries have the same
    is less likely than that the disk lies; who makes two such only has his own second one dropped.
    """

    def __init__(self, history: Receipts, lanes: int) -> None:
        """Index this log."""
        super().__init__(history, lanes)
        # By the number of the slot.
        self._sorted: dict[int, array[int]] = {}
        self._loose: dict[int, set[int]] = {}
        self._unsorted: dict[int, array[int]] = {}

    def begin(self) -> None:
        """See :meth:`postoffice.depot.history.HistoryIndex.begin`."""
        super().begin()
        for number, keys in self._unsorted.items():
            # A sorted array takes an eighth of a set's memory.
            known, loose = self._sorted.get(number, ()), self._loose.pop(number, ())
            self._sorted[number] = array("Q", sorted([*known, *loose, *keys]))
        self._unsorted.clear()

    def seen(self, digest: bytes, seconds: int) -> bool:
        """Tell whether there is a receipt of this digest.

        :param seconds: the time now, in seconds since the epoch: a receipt that is a day older than
            it need be is none, though nothing has come since to drop it.
        """
        key = int.from_bytes(digest[:_KEY], sys.byteorder)
        oldest = self.history.slot_at(seconds - RECEIPT_SECONDS)
        if any(key in loose for number, loose in self._loose.items() if number >= oldest):
            return True
        for number, known in self._sorted.items():
            place = bisect_left(known, key)
            if number >= oldest and place < len(known) and known[place] == key:
                return True
        return next(self._pended(digest, slice(0, _WIDTH)), None) is not None

    def add(self, digest: bytes, seconds: int) -> None:
        """Write a receipt; undone when the transaction aborts.

        Whoever does so at the same time, for whatever message, meets a conflict, or this does.

        :param seconds: the time now, in seconds since the epoch.
        """
        self._remember(digest, self.history.append(digest, seconds, _LANE, RECEIPT_SECONDS))

    def _take(self, number: int, data: bytes) -> None:
        keys = array("Q", data)[:: _WIDTH // _KEY]
        loose = self._loose.setdefault(number, set())
        if len(loose) + len(keys) > _MOST_LOOSE or len(keys) > _FEW:
            # To sort once whatever was appended is much faster than after each chunk of it.
            self._unsorted.setdefault(number, array("Q")).extend(keys)
        else:
            loose.update(keys)

    def _forget(self, number: int) -> None:
        self._sorted.pop(number, None)
        self._loose.pop(number, None)
        self._unsorted.pop(number, None)
