"""Receipts: what came over a connection lately, to know it by when it comes again.

Who delivers a message and does not hear that we have it sends it again, for days.  A receipt for
each recipient, written by the transaction that stores the message, tells that it is here.
"""

from __future__ import annotations

import logging
import sys
from array import array
from bisect import bisect_left

from postoffice.depot.history import HistoryIndex, HistoryLog

__all__ = ["RECEIPT_SECONDS", "ReceiptIndex", "Receipts"]

RECEIPT_SECONDS = 7 * 24 * 60 * 60
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

    def add(self, digest: bytes, seconds: int, lane: int) -> None:
        """Write a receipt; undone when the transaction aborts.

        :param seconds: the time now, in seconds since the epoch.
        """
        self._remember(digest, self.history.append(digest, seconds, lane, RECEIPT_SECONDS))

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
