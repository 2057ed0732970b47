"""Histories: what came to a queue lately, to know duplicates and loops by.

A history is a log of short records of one width, in slots of time.  A slot holds chunks of at most
:data:`CHUNK_BYTES`; each producer appends to chunks of its own, so that producers do not meet.  A
slot that is too old is dropped as a whole, unread.  Looking up is done in memory, by an index that
reads what was appended since it last looked: it costs the same however long the history is.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from typing import Any

from BTrees.Length import Length
from BTrees.LOBTree import LOBTree
from BTrees.OOBTree import OOBTree
from persistent import Persistent

__all__ = [
    "CHUNK_BYTES",
    "DUPLICATE_SECONDS",
    "ArrivalIndex",
    "Arrivals",
    "Chunk",
    "DuplicateIndex",
    "HistoryIndex",
    "HistoryLog",
    "Throttles",
    "duplicate_record",
]

log = logging.getLogger("postoffice")

# What a commit writes again of each history, at most.
CHUNK_BYTES = 4 * 1024
DUPLICATE_SECONDS = 24 * 60 * 60
_DUPLICATE = struct.Struct("!16sI")
DUPLICATE_WIDTH = _DUPLICATE.size
ARRIVAL_WIDTH = 16 + 8 + 8
MAX_TIMES = 256

_LANE_BITS = 40
_SENTINEL = 0
# Beyond any year that a datetime has, and room for as many throttles at one time as there can be.
_LATEST = (1 << 63) - (1 << 20)


class Chunk(Persistent):
    """Records of one producer in one slot, one behind the other."""

    def __init__(self) -> None:
        """Make an empty chunk."""
        self.data = b""


class HistoryLog(Persistent):
    """A log of records of one width that forgets by whole slots of time.

    :ivar width: bytes of a record.
    :ivar slot_seconds: length of a slot.
    :ivar limit: about the most records kept; beyond it the oldest slots go early.
    :cvar alarm: the level at which the log says so.
    """

    alarm = logging.WARNING

    def __init__(self, width: int, slot_seconds: int, limit: int) -> None:
        """Make an empty log."""
        self.width = width
        self.slot_seconds = slot_seconds
        self.limit = limit
        self.slots = LOBTree({_SENTINEL: None})

    def __len__(self) -> int:
        """Return how many records are kept; reads them all."""
        return sum(self._size(number) for number in self.numbers())

    def _size(self, number: int) -> int:
        return sum(len(chunk.data) for _, chunk in self.chunks(number)) // self.width

    def _is_full(self) -> bool:
        """Tell whether there are more than may be kept, by the number of chunks.

        A count of the records would be one more object in each commit.
        """
        chunks = sum(len(tree) - 1 for tree in self.slots.values(_SENTINEL + 1))
        return chunks * (CHUNK_BYTES // self.width) > self.limit

    def slot_at(self, seconds: int) -> int:
        """Return the number of the slot that this time falls in."""
        return max(1, seconds // self.slot_seconds)

    def append(self, record: bytes, seconds: int, lane: int, keep: int) -> tuple[int, int, int]:
        """Append a record; return its slot, the key of its chunk, and its place there.

        :param seconds: the time now, in seconds since the epoch; it chooses the slot.
        :param lane: the number of the producer's lane.
        :param keep: how long records matter, in seconds; slots older than that are dropped.
        """
        number = self.slot_at(seconds)
        chunks = self.slots.get(number)
        if chunks is None:
            self.expire(seconds - keep)
            chunks = self.slots[number] = LOBTree({_SENTINEL: None})
        first, last = lane + 1 << _LANE_BITS, (lane + 2 << _LANE_BITS) - 1
        try:
            key = chunks.maxKey(last)
        except ValueError:
            key = _SENTINEL
        chunk: Chunk | None = chunks[key] if key >= first else None
        if chunk is None or len(chunk.data) + self.width > CHUNK_BYTES:
            if self._is_full():
                self.expire(seconds - keep)
                # Its own slot may be among those that went.
                chunks = self.slots.setdefault(number, LOBTree({_SENTINEL: None}))
            key = key + 1 if key >= first else first
            chunk = chunks[key] = Chunk()
        offset = len(chunk.data)
        chunk.data += record
        return number, key, offset

    def at(self, number: int, key: int, offset: int) -> bytes:
        """Return the record at a place; ``b""`` when there is none."""
        chunk: Chunk | None = self.slots.get(number, {}).get(key)
        return b"" if chunk is None else chunk.data[offset : offset + self.width]

    def expire(self, before: int) -> None:
        """Drop the slots that ended before a time, in seconds since the epoch."""
        for number in self.numbers():
            ended = (number + 1) * self.slot_seconds <= before
            if not ended:
                if not self._is_full():
                    break
                log.log(
                    self.alarm,
                    "history: over %d records, %d of the oldest go early",
                    self.limit,
                    self._size(number),
                )
            del self.slots[number]

    def generations(self) -> dict[int, bytes | int]:
        """Return for each slot, oldest first, what tells it from one that went early."""
        slots = self.slots.items(_SENTINEL + 1)
        return {number: tree._p_oid or id(tree) for number, tree in slots}

    def numbers(self) -> list[int]:
        """Return the numbers of the slots that there are, oldest first."""
        return list(self.slots.keys(_SENTINEL + 1))

    def chunks(self, number: int) -> Iterator[tuple[int, Chunk]]:
        """Iterate over the keys and chunks of one slot."""
        tree = self.slots.get(number)
        if tree is not None:
            yield from tree.items(_SENTINEL + 1)

    def tails(self, number: int, lanes: int) -> Iterator[tuple[int, Chunk]]:
        """Iterate over the keys and chunks of one slot that can still grow: one a lane."""
        tree = self.slots.get(number)
        if tree is not None:
            for lane in range(lanes):
                try:
                    key = tree.maxKey((lane + 2 << _LANE_BITS) - 1)
                except ValueError:
                    continue
                if key >= lane + 1 << _LANE_BITS:
                    yield key, tree[key]


class HistoryIndex:
    """What a log holds, in memory: follows the log at each transaction's start.

    Belongs to the connection of the log.
    """

    def __init__(self, history: HistoryLog, lanes: int) -> None:
        self.history = history
        self.lanes = lanes
        self._read: dict[int, dict[int, int]] = {}
        self._generations: dict[int, bytes | int] = {}
        self._newest = 0
        self._pending: dict[bytes, list[tuple[int, int, int]]] = {}

    def begin(self) -> None:
        """Take in what was committed since the last call; forget what was not.

        To be called once at the start of each transaction that uses the index.
        """
        self._pending.clear()
        generations = self.history.generations()
        if generations != self._generations:
            for number, generation in self._generations.items():
                if generations.get(number) != generation:
                    self._read.pop(number, None)
                    self._forget(number)
            self._generations = generations
        # Others may have begun a slot since, and this one's last additions be in one before it.
        growing = self._newest - 1
        self._newest = next(reversed(generations), 0)
        for number in generations:
            read = self._read.get(number)
            if read is None:
                self._read[number] = read = {}
                grown: Iterator[tuple[int, Chunk]] = self.history.chunks(number)
            elif number >= growing:
                grown = self._grown(number, read)
            else:
                continue
            for key, chunk in grown:
                done = read.get(key, 0)
                data = chunk.data
                if len(data) > done:
                    self._take(number, data[done:] if done else data)
                    read[key] = len(data)
                if len(data) + self.history.width > CHUNK_BYTES:
                    chunk._p_deactivate()

    def _grown(self, number: int, read: dict[int, int]) -> Iterator[tuple[int, Chunk]]:
        full = CHUNK_BYTES - self.history.width
        for tail, _ in self.history.tails(number, self.lanes):
            key = tail
            while key not in read or (read[key] <= full and key == tail):
                chunk = self.history.slots[number].get(key)
                if chunk is None:
                    break
                yield key, chunk
                key -= 1
            if key != tail and key in read and read[key] <= full:
                yield key, self.history.slots[number][key]

    def _remember(self, key: bytes, place: tuple[int, int, int]) -> None:
        self._pending.setdefault(key, []).append(place)

    def _pended(self, key: bytes, record: slice) -> Iterator[bytes]:
        """Iterate over this transaction's records that no rollback to a savepoint has undone."""
        for place in self._pending.get(key, ()):
            data = self.history.at(*place)
            if data[: len(key)] == key:
                yield data[record]

    def _take(self, number: int, data: bytes) -> None:
        raise NotImplementedError  # abstract: each index reads records of its own

    def _forget(self, number: int) -> None:
        raise NotImplementedError  # abstract, like _take


def duplicate_record(digest: bytes, seconds: int) -> bytes:
    """Return the record of a digest of 16 bytes that came at this time."""
    return _DUPLICATE.pack(digest, seconds)


class DuplicateIndex(HistoryIndex):
    """Which messages, by a digest of 16 bytes, came within 24 hours."""

    def __init__(self, history: HistoryLog, lanes: int) -> None:
        """Index this log."""
        super().__init__(history, lanes)
        self._seen: dict[bytes, int] = {}

    def seen(self, digest: bytes, seconds: int) -> bool:
        """Tell whether this digest was added within the 24 hours before this time."""
        when = self._seen.get(digest)
        if when is not None and seconds - when < DUPLICATE_SECONDS:
            return True
        return next(self._pended(digest, slice(16, 20)), None) is not None

    def add(self, digest: bytes, seconds: int, lane: int) -> None:
        """Remember a digest; undone when the transaction aborts."""
        record = duplicate_record(digest, seconds)
        self._remember(digest, self.history.append(record, seconds, lane, DUPLICATE_SECONDS))

    def _take(self, number: int, data: bytes) -> None:
        first, last = data[16:20], data[-4:]
        if first == last:
            # One transaction's, as most are: one number serves them all.
            digests = [data[at : at + 16] for at in range(0, len(data), DUPLICATE_WIDTH)]
            self._seen.update(dict.fromkeys(digests, int.from_bytes(first, "big")))
        else:
            self._seen.update(_DUPLICATE.iter_unpack(data))

    def _forget(self, number: int) -> None:
        slot_at = self.history.slot_at
        self._seen = {
            digest: when for digest, when in self._seen.items() if slot_at(when) != number
        }


class ArrivalIndex(HistoryIndex):
    """When the last messages of each sender came."""

    def __init__(self, history: HistoryLog, lanes: int) -> None:
        """Index this log."""
        super().__init__(history, lanes)
        # Most senders have written once, and need no list.
        self._times: dict[bytes, int | list[int]] = {}

    def times(self, sender: bytes, values: bytes | None) -> list[int]:
        """Return the last arrivals of a sender, in nanoseconds since the epoch, oldest first.

        :param sender: digest of the sender, 16 bytes.
        :param values: digest of the header values that must agree, 8 bytes; ``None`` for any.
        """
        known = self._times.get(sender if values is None else sender + values, [])
        found = [known] if isinstance(known, int) else list(known)
        if values is None:
            pended = list(self._pended(sender, slice(24, 32)))
        else:
            pended = [
                data[8:] for data in self._pended(sender, slice(16, 32)) if data[:8] == values
            ]
        found += [int.from_bytes(data, "big") for data in pended]
        found.sort()
        return found

    def add(
        self, sender: bytes, values: bytes, arrived: int, seconds: int, lane: int, keep: int
    ) -> None:
        """Remember an arrival; undone when the transaction aborts.

        :param arrived: nanoseconds since the epoch.
        :param seconds: the time now, in seconds since the epoch.
        :param keep: how long arrivals matter, in seconds.
        """
        record = sender + values + arrived.to_bytes(8, "big")
        self._remember(sender, self.history.append(record, seconds, lane, keep))

    def _take(self, number: int, data: bytes) -> None:
        for start in range(0, len(data), ARRIVAL_WIDTH):
            arrived = int.from_bytes(data[start + 24 : start + 32], "big")
            for key in (data[start : start + 16], data[start : start + 24]):
                times = self._times.get(key)
                if times is None:
                    self._times[key] = arrived
                elif isinstance(times, int):
                    self._times[key] = [times, arrived]
                else:
                    times.append(arrived)
                    if len(times) > MAX_TIMES:
                        del times[: MAX_TIMES // 2]

    def _forget(self, number: int) -> None:
        # The slots that are left are few and bounded, so reading them again is cheap.
        self._times.clear()
        self._read.clear()


class Arrivals(HistoryLog):
    """The log of arrivals, for loop detection: the last ones are what matters."""

    alarm = logging.INFO

    def __init__(self) -> None:
        """Make an empty log."""
        super().__init__(ARRIVAL_WIDTH, slot_seconds=600, limit=50_000)


class Throttles(Persistent):
    """Which senders are throttled until when; at most :attr:`limit` of them."""

    limit = 10_000

    def __init__(self) -> None:
        """Make an empty table."""
        self._until = OOBTree()
        self._count = Length()
        self._expiry = LOBTree()

    def put(self, key: bytes, until: int, now: int) -> None:
        """Throttle until a time; times are nanoseconds since the epoch."""
        self.remove(key)
        until = min(max(until, 0), _LATEST)
        expiry = self._expiry
        while expiry and (expiry.minKey() <= now or self._count() >= self.limit):
            self.remove(expiry[expiry.minKey()])
        while until in expiry:
            until += 1
        self._until[key] = until
        expiry[until] = key
        self._count.change(1)

    def until(self, key: bytes) -> int:
        """Return the end of the sender's throttle, or 0."""
        return int(self._until.get(key, 0))

    def remove(self, key: bytes) -> None:
        """End a sender's throttle."""
        until: Any = self._until.pop(key, None)
        if until is not None:
            self._expiry.pop(until, None)
            self._count.change(-1)
