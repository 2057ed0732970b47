"""What a queue remembers of its senders and messages, as one connection sees it."""

from __future__ import annotations

import time

from postoffice.depot.history import (
    DUPLICATE_SECONDS,
    ArrivalIndex,
    DuplicateIndex,
    duplicate_record,
)
from postoffice.depot.lane import LANES
from postoffice.depot.queue import QueueRecord
from postoffice.taking import Taking, Work

__all__ = ["Histories"]


class Histories:
    """Duplicates, arrivals and throttles of one queue; all that changes joins the transaction.

    Messages, senders and header values are known by digests, see
    :mod:`postoffice.fingerprints`.
    """

    def __init__(self, record: QueueRecord, taking: Taking) -> None:
        """Look into the record's histories; `taking` knows its transactions."""
        self._record = record
        self._taking = taking
        self._duplicates: DuplicateIndex | None = None
        self._arrivals: ArrivalIndex | None = None
        self._looks_for_duplicates = False
        # The transactions that the indexes were last brought up to date for.
        self._seen_in: Work | None = None
        self._counted_in: Work | None = None
        self._unindexed_in: Work | None = None

    def _duplicate_index(self) -> DuplicateIndex:
        work = self._taking.work()
        index = self._duplicates
        if index is None:
            index = self._duplicates = DuplicateIndex(self._record.duplicates, LANES)
            self._looks_for_duplicates = True
            if self._unindexed_in is work:
                # It is about to read what this transaction added, and may yet abort.
                work.at_end.append(self._forget_index)
        if self._seen_in is not work:
            self._seen_in = work
            index.begin()
        return index

    def _forget_index(self, committed: bool) -> None:
        self._duplicates = None

    def _arrival_index(self) -> ArrivalIndex:
        work = self._taking.work()
        index = self._arrivals
        if index is None:
            index = self._arrivals = ArrivalIndex(self._record.arrivals, LANES)
        if self._counted_in is not work:
            self._counted_in = work
            index.begin()
        return index

    def seen(self, digest: bytes, seconds: int) -> bool:
        """Tell whether a message with this duplicate digest came within the 24 hours before.

        :param seconds: the time now, in seconds since the epoch.
        """
        return self._duplicate_index().seen(digest, seconds)

    def remember(self, digest: bytes, seconds: int) -> None:
        """Remember a duplicate digest at this time, in seconds since the epoch."""
        lane = self._record.lane_number
        if self._looks_for_duplicates:
            self._duplicate_index().add(digest, seconds, lane)
        else:
            # Who only adds need not read a day's history first.
            self._unindexed_in = self._taking.work()
            record = duplicate_record(digest, seconds)
            self._record.duplicates.append(record, seconds, lane, DUPLICATE_SECONDS)

    def arrived(self, sender: bytes, values: bytes, arrived: int, seconds: int, keep: int) -> None:
        """Remember an arrival; see :meth:`postoffice.depot.history.ArrivalIndex.add`."""
        self._arrival_index().add(sender, values, arrived, seconds, self._record.lane_number, keep)

    def arrivals(self, sender: bytes, values: bytes | None) -> list[int]:
        """Return when messages of a sender arrived, in nanoseconds since the epoch.

        :param values: the digest of the header values that have to agree; ``None`` for any.
        """
        return self._arrival_index().times(sender, values)

    def throttle(self, key: bytes, until: int, now: int | None = None) -> None:
        """Throttle what this key stands for; times are nanoseconds since the epoch."""
        self._record.throttles.put(key, until, time.time_ns() if now is None else now)

    def throttled_until(self, key: bytes) -> int:
        """Return until when what this key stands for is throttled, or 0."""
        return self._record.throttles.until(key)
