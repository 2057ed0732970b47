"""Queues as applications see them.

::

    from postoffice import open_queue
    import transaction

    with open_queue("zeo:///srv/depot/zeo.sock", "myapp") as queue:
        while queue:
            message = queue.pop_next()
            handle(message)
            transaction.commit()
"""

from __future__ import annotations

import email.message
import logging
import os
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from types import TracebackType
from typing import Any

from ZODB.blob import Blob
from ZODB.interfaces import IBlobStorage
from zope.interface import implementer

from postoffice.bounces import compose_bounce, compose_quarantine_notice
from postoffice.claims import Claims, holder_is_gone
from postoffice.database import open_database
from postoffice.depot.durability import BlobDurability
from postoffice.depot.entry import DISCARDED, DONE, QUARANTINED, QUEUED, Body, Entry, ErrorText
from postoffice.depot.folder import find_folder
from postoffice.depot.history import ArrivalIndex, DuplicateIndex, duplicate_record
from postoffice.depot.ids import new_id
from postoffice.depot.lane import LANES, Place
from postoffice.depot.queue import QueueRecord
from postoffice.exceptions import MessageMissing, MessageTaken, QueueEmpty
from postoffice.fingerprints import duplicate_digest, raw_digest, sender_digest, values_digest
from postoffice.headers import mailboxes
from postoffice.interfaces import IEventSink, IQueue, Send
from postoffice.loops import MAX_SENDER, average_frequency, instantaneous_frequency
from postoffice.message import Envelope, Message
from postoffice.outbound import hand_over

__all__ = ["BLOB_SIZE", "ClosingPair", "Queue", "QueueEmpty", "find_queue", "open_queue"]

log = logging.getLogger("postoffice")

#: Bodies of this many bytes and more are blobs; see docs/concepts for what was measured.
BLOB_SIZE = 256 * 1024

_MOST_AT_ONCE = 50
_HOLD_SECONDS = 1.0
_HEADER_LENGTH = 200
_ERROR_LENGTH = 64 * 1024
_DAY = 24 * 60 * 60


class ClosingPair(tuple[Any, Any]):
    """What :func:`open_queue` returns: ``(queue, close)``, and a context manager of the queue.

    Leaving the ``with`` block aborts what is not committed, and closes.
    """

    __slots__ = ()

    def __enter__(self) -> Queue:
        """Return the queue."""
        queue: Queue = self[0]
        return queue

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Abort and close."""
        self[1]()


def open_queue(db_or_uri: Any, queue_name: str, path: str = "postoffice") -> ClosingPair:
    """Open a queue, and whatever has to be opened for it.

    Either ``queue, close = open_queue(...)`` or ``with open_queue(...) as queue:``.

    :param db_or_uri: an open ``ZODB.DB``, which stays open, or a zodburi URI.
    :param queue_name: the queue's name.
    :param path: path of the depot in the database.
    :return: the pair of the queue and a function that aborts what is not committed and closes what
        was opened; calling it again does nothing.
    :raises postoffice.exceptions.DepotUnavailable: the database cannot be opened now.
    :raises postoffice.exceptions.FolderMissing: there is no depot at this path.
    :raises postoffice.exceptions.QueueMissing: there is no such queue; the text names those there
        are.

    Whatever is raised, nothing stays open.  The queue joins the transactions of the thread's
    transaction manager.
    """
    opened = open_database(db_or_uri) if isinstance(db_or_uri, str) else None
    connection = None
    try:
        connection = (opened or db_or_uri).open()
        close = _Closer(connection, opened)
        return ClosingPair((find_queue(connection.root(), queue_name, path), close))
    except BaseException:
        if connection is not None:
            connection.transaction_manager.abort()
            connection.close()
        if opened is not None:
            opened.close()
        raise


class _Closer:
    """Closes what :func:`open_queue` opened, once."""

    def __init__(self, connection: Any, opened: Any) -> None:
        self._connection = connection
        self._opened = opened

    def __call__(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            connection.transaction_manager.abort()
            connection.close()
        finally:
            if self._opened is not None:
                self._opened.close()


def find_queue(dbroot: Any, queue_name: str, path: str = "postoffice") -> Queue:
    """Find a queue, for an application that opens and closes its own connection.

    :param dbroot: the root object of the connection.
    :param queue_name: the queue's name.
    :param path: path of the depot in the database.
    :raises postoffice.exceptions.FolderMissing: there is no depot at this path.
    :raises postoffice.exceptions.QueueMissing: there is no such queue.
    """
    record = find_folder(dbroot, path).get(queue_name)
    if record._p_jar is None:
        # Made in this very transaction.
        dbroot._p_jar.add(record)
    return Queue(record)


class _Work:
    """What a queue has done in one transaction."""

    def __init__(self) -> None:
        # What may still be taken of what was added; what was taken; claims on what has gone.
        self.added: list[tuple[Place, Entry]] = []
        self.taken: dict[Place, Entry] = {}
        self.passed: list[Place] = []
        self.messages: list[tuple[weakref.ref[Message], Entry]] = []
        self.last_words: list[tuple[weakref.ref[Message], Entry]] = []
        self.stored: list[Entry | Body] = []
        self.durability: BlobDurability | None = None
        self.indexed: set[str] = set()
        self.added_unindexed = False
        self.index_is_ahead = False
        self.ended = False


@implementer(IQueue)
class Queue:
    """One application's first-in-first-out queue; see :class:`postoffice.interfaces.IQueue`.

    :ivar name: the queue's name.
    :ivar record: the persistent data behind it.
    :ivar event_sink: is told of each change of state, in the same transaction; ``None`` for nobody.
    """

    def __init__(self, record: QueueRecord) -> None:
        """Give a face to this record, in the record's connection."""
        self.record = record
        self.name: str = record.name
        self.event_sink: IEventSink | None = None
        self._connection = record._p_jar
        self._claims: Claims | None = None
        self._ready: list[Place] = []
        self._finished: list[Place] = []
        self._claimed_at = 0.0
        self._watches_close = False
        self._added: list[Entry | Body] = []
        self._batch = 1
        self._duplicates: DuplicateIndex | None = None
        self._looks_for_duplicates = False
        self._arrivals: ArrivalIndex | None = None

    # -- the transaction ---------------------------------------------------------------------------

    def _transaction(self) -> Any:
        return self._connection.transaction_manager.get()

    def _work(self) -> _Work:
        current = self._transaction()
        try:
            found: _Work = current.data(self)
        except KeyError:
            found = _Work()
            current.set_data(self, found)
            current.addBeforeCommitHook(self._before_commit, (found,))
            current.addAfterCommitHook(self._ended, (found,))
            current.addAfterAbortHook(self._ended, (False, found))
        return found

    def _ended(self, committed: bool, work: _Work) -> None:
        if work.ended:
            return
        work.ended = True
        if work.index_is_ahead:
            self._duplicates = None
        if committed:
            for reference, entry in work.last_words:
                message = reference()
                if message is not None:
                    message.entry = entry
            self._added = work.stored
        if self._claims is None:
            return
        if committed:
            self._claims.held.difference_update(work.taken, work.passed)
            self._finished.extend(work.taken)
            self._finished.extend(work.passed)
        if not committed or not work.taken:
            self.release()
        elif not self._ready:
            # A slow consumer holds little that idle ones could take meanwhile.
            fast = time.monotonic() - self._claimed_at < _HOLD_SECONDS
            self._batch = min(self._batch * 2, _MOST_AT_ONCE) if fast else 1

    def _before_commit(self, work: _Work) -> None:
        self._settle(work)
        for reference, entry in work.messages:
            if reference() is not None and entry.state == DONE:
                # Others may read and sweep the entry itself from now on.
                values = {name: value for name, value in vars(entry).items() if name != "body"}
                work.last_words.append((reference, Entry(values)))

    def _settle(self, work: _Work) -> None:
        """Take note of what a rollback to a savepoint has put back."""
        back = [place for place in work.passed if self._live(place) is not None]
        if back:
            work.passed = [place for place in work.passed if place not in back]
        undone = []
        for place, entry in reversed(work.taken.items()):
            if self.record.lanes[place.lane].live(entry, place.position):
                undone.append((place, entry))
            elif entry._p_jar is not None:
                break
        for place, entry in undone:
            del work.taken[place]
            if self._claims is not None and place in self._claims.held:
                back.append(place)
            else:
                work.added.insert(0, (place, entry))
        if back:
            self._ready = sorted([*back, *self._ready], key=lambda place: place.position)

    def _live(self, place: Place) -> Entry | None:
        lane = self.record.lanes[place.lane]
        entry = lane.get(place)
        return entry if lane.live(entry, place.position) else None

    def _closed(self) -> None:
        self._watches_close = False
        self.release()

    def release(self) -> None:
        """Give back at once what this object holds for messages to come.

        Called by itself when the connection is closed, and after a transaction that was aborted or
        took nothing.
        """
        self._ready.clear()
        self._batch = 1
        if self._claims is not None and self._claims.held:
            finished, self._finished = self._finished, []
            try:
                self._claims.release(finished)
            except Exception as error:
                # The abort or close that this follows must go on, in a database that is being
                # closed, or lost, too.  For this process the holder is gone; others wait.
                self._claims = None
                log.warning("queue %r: claims stay until they expire: %r", self.name, error)

    # -- taking ------------------------------------------------------------------------------------

    def pop_next(self) -> Message:
        """See :meth:`postoffice.interfaces.IQueue.pop_next`."""
        work = self._work()
        head = self._head(work)
        if head is None:
            raise QueueEmpty(f"no message to take from queue {self.name!r} now")
        place, entry = head
        message = self.message(entry)
        entry.change(DONE, "taken", "taken", time.time_ns(), self.event_sink)
        if self._ready and self._ready[0] == place:
            del self._ready[0]
        else:
            # Added in this transaction: nobody has a claim on it, so nobody would sweep it out.
            work.added.remove((place, entry))
            self.record.sweep(place)
        work.taken[place] = entry
        work.messages.append((weakref.ref(message), entry))
        return message

    def _head(self, work: _Work) -> tuple[Place, Entry] | None:
        """Return what is to be taken next: what is claimed, or else what was added just now."""
        self._settle(work)
        while self._ready or self._claim(work):
            place = self._ready[0]
            entry = self._live(place)
            if entry is not None:
                return place, entry
            # An abort may bring it back, so it is swept after the commit.
            work.passed.append(self._ready.pop(0))
        for place, entry in work.added:
            if self._live(place) is not None:
                return place, entry
        return None

    def _claim(self, work: _Work) -> bool:
        if self.record._p_serial == b"\0" * 8:
            # Made in this very transaction; nobody else can know of it.
            return False
        if self._claims is None:
            self._claims = Claims(self._connection, self.record._p_oid)
        if not self._watches_close:
            self._connection.onCloseCallback(self._closed)
            self._watches_close = True
        finished, self._finished = self._finished, []
        self._claimed_at = time.monotonic()
        lanes = self.record.lanes
        self._ready.extend(
            self._claims.take(
                self._batch, finished, lambda place: lanes[place.lane].get(place) is not None
            )
        )
        return bool(self._ready)

    def peek(self) -> Message:
        """See :meth:`postoffice.interfaces.IQueue.peek`."""
        for entry in self._free():
            return self.message(entry)
        raise QueueEmpty(f"no message to take from queue {self.name!r} now")

    def _free(self) -> Iterator[Entry]:
        """Iterate over what this queue could take, as far as its snapshot knows."""
        now = time.time_ns()
        mine = self._claims.holder if self._claims is not None else None
        for place, entry in self.record.walk():
            lane = self.record.lanes[place.lane]
            claim = lane.claims.get(place.position)
            if (
                claim is None or claim[3] <= now or claim[1] == mine or holder_is_gone(claim[1])
            ) and lane.live(entry, place.position):
                yield entry

    def __bool__(self) -> bool:
        """See :meth:`postoffice.interfaces.IQueue.__bool__`."""
        return self._head(self._work()) is not None

    def __len__(self) -> int:
        """See :meth:`postoffice.interfaces.IQueue.__len__`."""
        work = self._work()
        waiting = self.record.waiting()
        for place, entry in work.taken.items():
            lane = self.record.lanes[place.lane]
            if (
                not lane.live(entry, place.position)
                and place.position not in lane.claims
                and lane.get(place) is not None
            ):
                waiting -= 1
        return waiting

    def __iter__(self) -> Iterator[Message]:
        """See :meth:`postoffice.interfaces.IQueue.__iter__`."""
        for entry in self.entries():
            yield self.message(entry)

    def entries(
        self, after_id: int | None = None, limit: int | None = None, state: str = QUEUED
    ) -> Iterator[Entry]:
        """See :meth:`postoffice.interfaces.IQueue.entries`.

        :param after_id: where the page before ended; ``None`` for the first page.
        :param limit: the most to return; ``None`` for all.
        :param state: ``queued`` or ``quarantined``.
        """
        if state == QUARANTINED:
            rows: Iterator[Entry] = self.record.quarantine_after(after_id or 0)
        else:
            after = self.record.moved.get(after_id, after_id) if after_id else 0
            rows = (
                entry
                for place, entry in self.record.walk(after)
                if self.record.lanes[place.lane].live(entry, place.position)
            )
        yield from islice(rows, limit)

    def find(self, id: int | str) -> Entry:
        """Return the entry of a message that waits here or is in quarantine, by its id.

        :raises MessageMissing: there is none.
        """
        number = _number(id)
        found = self.record.find(number)
        entry = found[1] if found is not None else self.record.get_quarantine(number)
        if entry is None:
            raise MessageMissing(f"no message {id} in queue {self.name!r} or its quarantine")
        return entry

    def message(self, entry: Entry) -> Message:
        """Return the message of an entry; it stays readable when the connection is closed."""
        envelope = Envelope(entry.sender, entry.recipients, entry.arrived, entry.mta_queue_id)
        own = [
            ("X-Postoffice-Id", str(entry.id)),
            ("X-Postoffice-Date", str(entry.arrived // 1_000_000_000)),
            *(("X-Postoffice-Rejected", mark) for mark in entry.marks),
        ]
        if isinstance(entry.body, Blob):
            message = Message.from_loader(_LargeBody(entry.open_raw()), own, envelope)
        else:
            message = Message.from_bytes(entry.read_raw(), own, envelope)
        message.id = entry.id
        message.queue_name = self.name
        message.oversize = entry.oversize
        message.entry = entry
        return message

    # -- adding ------------------------------------------------------------------------------------

    def add(self, message: email.message.Message | bytes) -> int:
        """See :meth:`postoffice.interfaces.IQueue.add`."""
        own = _as_message(message)
        now = time.time_ns()
        self._remember_duplicate(duplicate_digest(own), now // 1_000_000_000)
        return self.add_entry(describe(own, now, way="application"), own.raw)

    def add_entry(self, values: dict[str, Any], raw: bytes | Callable[[Blob], None]) -> int:
        """Put a message behind the tail whose entry has these values; return its id.

        :param raw: the bytes, or a function that fills a blob with them.
        """
        work = self._work()
        entry = Entry(values)
        entry.id = new_id()
        entry.body = self._body(work, raw)
        if self.event_sink is not None:
            entry.change(QUEUED, "added", entry.reason, time.time_ns(), self.event_sink)
        work.added.append((self.record.append(entry), entry))
        work.stored.append(entry)
        if isinstance(entry.body, Body):
            work.stored.append(entry.body)
        return entry.id

    def forget_bodies(self) -> None:
        """Let go of the memory of messages that were added and are committed by now."""
        for one in self._added:
            one._p_deactivate()
        self._added = []

    def _body(self, work: _Work, raw: bytes | Callable[[Blob], None]) -> Body | Blob:
        if isinstance(raw, bytes) and (len(raw) < BLOB_SIZE or not self._has_blobs()):
            return Body(raw)
        blob = Blob()
        # Being in the connection already, it makes its file beside those of the database.
        self._connection.add(blob)
        if isinstance(raw, bytes):
            with blob.open("w") as file:
                file.write(raw)
        else:
            raw(blob)
        if work.durability is None:
            work.durability = BlobDurability(self._connection)
            self._transaction().join(work.durability)
        work.durability.watch(blob)
        return blob

    def _has_blobs(self) -> bool:
        return bool(IBlobStorage.providedBy(self._connection.db().storage))

    # -- duplicates and rates ----------------------------------------------------------------------

    def _duplicate_index(self) -> DuplicateIndex:
        work = self._work()
        index = self._duplicates
        if index is None:
            index = self._duplicates = DuplicateIndex(self.record.duplicates, LANES)
            self._looks_for_duplicates = True
            work.index_is_ahead = work.added_unindexed
        if "duplicates" not in work.indexed:
            work.indexed.add("duplicates")
            index.begin()
        return index

    def _arrival_index(self) -> ArrivalIndex:
        index = self._arrivals
        if index is None:
            index = self._arrivals = ArrivalIndex(self.record.arrivals, LANES)
        work = self._work()
        if "arrivals" not in work.indexed:
            work.indexed.add("arrivals")
            index.begin()
        return index

    def is_duplicate(self, message: email.message.Message) -> bool:
        """See :meth:`postoffice.interfaces.IQueue.is_duplicate`."""
        return self.seen(duplicate_digest(_as_message(message)), int(time.time()))

    def seen(self, digest: bytes, seconds: int) -> bool:
        """Tell whether a message with this duplicate digest came within 24 hours."""
        return self._duplicate_index().seen(digest, seconds)

    def remember(self, digest: bytes, seconds: int) -> None:
        """Remember a duplicate digest at this time, in seconds since the epoch."""
        self._remember_duplicate(digest, seconds)

    def _remember_duplicate(self, digest: bytes, seconds: int) -> None:
        if self._looks_for_duplicates:
            self._duplicate_index().add(digest, seconds, self.record.lane_number)
        else:
            # Who only adds need not read a day's history first.
            self._work().added_unindexed = True
            self.record.duplicates.append(
                duplicate_record(digest, seconds), seconds, self.record.lane_number, _DAY
            )

    def collect_frequency_data(
        self, message: email.message.Message, headers: Sequence[str] | None = None
    ) -> None:
        """See :meth:`postoffice.interfaces.IQueue.collect_frequency_data`."""
        own = _as_message(message)
        arrived = own.envelope.arrived if own.envelope is not None else time.time_ns()
        values = values_digest([(name, own.get(name) or "") for name in headers or ()])
        sender = sender_digest(_sender(own.get("From") or ""))
        self.arrived(sender, values, arrived, int(time.time()), keep=_DAY)

    def arrived(self, sender: bytes, values: bytes, arrived: int, seconds: int, keep: int) -> None:
        """Remember an arrival; see :meth:`postoffice.depot.history.ArrivalIndex.add`."""
        self._arrival_index().add(sender, values, arrived, seconds, self.record.lane_number, keep)

    def arrivals(self, sender: bytes, values: bytes | None) -> list[int]:
        """Return when messages of a sender arrived, in nanoseconds since the epoch."""
        return self._arrival_index().times(sender, values)

    def get_instantaneous_frequency(
        self, user: str, now: datetime, headers: Mapping[str, str] | None = None
    ) -> float:
        """See :meth:`postoffice.interfaces.IQueue.get_instantaneous_frequency`."""
        return instantaneous_frequency(self._times(user, headers), _nanoseconds(now))

    def get_average_frequency(
        self,
        user: str,
        now: datetime,
        interval: timedelta,
        headers: Mapping[str, str] | None = None,
    ) -> float:
        """See :meth:`postoffice.interfaces.IQueue.get_average_frequency`."""
        length = int(interval.total_seconds() * 1_000_000_000)
        return average_frequency(self._times(user, headers), _nanoseconds(now), length)

    def _times(self, user: str, headers: Mapping[str, str] | None) -> list[int]:
        values = values_digest(list(headers.items())) if headers else None
        return self.arrivals(sender_digest(_sender(user)), values)

    def throttle(
        self, user: str, until: datetime, headers: Mapping[str, str] | None = None
    ) -> None:
        """See :meth:`postoffice.interfaces.IQueue.throttle`."""
        self.throttle_until(_throttle_key(user, headers), _nanoseconds(until), time.time_ns())

    def throttle_until(self, key: bytes, until: int, now: int) -> None:
        """Throttle what this key stands for; times are nanoseconds since the epoch."""
        self.record.throttles.put(key, until, now)

    def throttled_until(self, key: bytes) -> int:
        """Return until when what this key stands for is throttled, or 0."""
        return self.record.throttles.until(key)

    def is_throttled(
        self, user: str, now: datetime, headers: Mapping[str, str] | None = None
    ) -> bool:
        """See :meth:`postoffice.interfaces.IQueue.is_throttled`."""
        return self.throttled_until(_throttle_key(user, headers)) >= _nanoseconds(now)

    # -- notices and quarantine --------------------------------------------------------------------

    def bounce(
        self,
        message: email.message.Message,
        send: Send,
        bounce_from_addr: str,
        bounce_reason: str | None = None,
        bounce_message: email.message.Message | None = None,
    ) -> bool:
        """See :meth:`postoffice.interfaces.IQueue.bounce`."""
        own = _as_message(message)
        notice = compose_bounce(
            own, bounce_from_addr, datetime.now(UTC), bounce_reason, bounce_message
        )
        if notice is None:
            log.info("no bounce is sent for message %s of queue %r", own.id, self.name)
            return False
        hand_over(notice, send, self._transaction())
        return True

    def quarantine(
        self,
        message: email.message.Message,
        error: Any,
        send: Send | None = None,
        notice_from: str | None = None,
    ) -> int:
        """See :meth:`postoffice.interfaces.IQueue.quarantine`."""
        if send is not None and notice_from is None:
            raise ValueError("give notice_from, the address that the notice comes from")
        own = _as_message(message)
        notice = None
        if send is not None and notice_from is not None:
            notice = compose_quarantine_notice(own, notice_from, datetime.now(UTC))
        work = self._work()
        entry = self._entry_to_quarantine(own, work)
        entry.fail(_error_text(error))
        entry.change(
            QUARANTINED, "quarantined", "application-error", time.time_ns(), self.event_sink
        )
        self.record.put_quarantine(entry)
        own.id = message.id = entry.id  # type: ignore[attr-defined]  # any message may carry it
        own.queue_name = self.name
        own.entry = entry
        if send is not None and notice is not None:
            hand_over(notice, send, self._transaction())
        return entry.id

    def _entry_to_quarantine(self, message: Message, work: _Work) -> Entry:
        """Find the message's entry, out of the queue, or make one."""
        if message.queue_name == self.name and message.id is not None:
            for entry in work.taken.values():
                if entry.id == message.id and entry.state == DONE:
                    return entry
            found = self.record.find(message.id)
            if found is not None:
                place, entry = found
                lane = self.record.lanes[place.lane]
                if place.position not in lane.claims:
                    self.record.sweep(place)
                return entry
            if self.record.get_quarantine(message.id) is not None:
                raise MessageTaken(f"message {message.id} is in quarantine already")
            if message.entry is not None and message.entry._p_jar is not None:
                raise MessageTaken(f"another consumer took message {message.id} meanwhile")
        entry = Entry(describe(message, time.time_ns(), way="application"))
        entry.id = entry.position = message.id if message.id is not None else new_id()
        if message.id is not None and isinstance(message.entry, Entry):
            # Its taking is committed, and this is what was known of it then.
            entry = Entry(vars(message.entry))
        entry.body = self._body(work, message.raw)
        return entry

    def get_quarantined_messages(self) -> Iterator[tuple[Message, ErrorText]]:
        """See :meth:`postoffice.interfaces.IQueue.get_quarantined_messages`."""
        for entry in self.record.quarantine_after():
            yield self.message(entry), ErrorText(*(entry.last_error or ("", "", "")))

    def get_quarantined_message(self, id: int | str) -> Message:
        """See :meth:`postoffice.interfaces.IQueue.get_quarantined_message`."""
        return self.message(self._quarantined(id))

    def count_quarantined_messages(self) -> int:
        """See :meth:`postoffice.interfaces.IQueue.count_quarantined_messages`."""
        return int(self.record.quarantined())

    def remove_from_quarantine(self, message: email.message.Message) -> None:
        """See :meth:`postoffice.interfaces.IQueue.remove_from_quarantine`."""
        entry = self._quarantined(_id_of(message))
        self.record.pop_quarantine(entry)
        entry.change(DISCARDED, "discarded", "removed", time.time_ns(), self.event_sink)

    def requeue(self, id: int | str) -> None:
        """Put one message from quarantine behind the tail; duplicates and throttles do not matter.

        :raises MessageMissing: it is not in quarantine.
        """
        self._requeue(self._quarantined(id), self._work())

    def requeue_quarantined_messages(self) -> int:
        """See :meth:`postoffice.interfaces.IQueue.requeue_quarantined_messages`."""
        work = self._work()
        entries = sorted(
            self.record.quarantine_after(), key=lambda found: (found.arrived, found.id)
        )
        for entry in entries:
            self._requeue(entry, work)
        return len(entries)

    def _requeue(self, entry: Entry, work: _Work) -> None:
        self.record.pop_quarantine(entry)
        entry.change(QUEUED, "requeued", "requeued", time.time_ns(), self.event_sink)
        work.added.append((self.record.append(entry), entry))

    def _quarantined(self, id: int | str | None) -> Entry:
        entry = None if id is None else self.record.get_quarantine(_number(id))
        if entry is None:
            raise MessageMissing(f"message {id} is not in the quarantine of queue {self.name!r}")
        return entry


def describe(
    message: Message, arrived: int, way: str, *, reason: str = "added-by-application"
) -> dict[str, Any]:
    """Return the values of the entry that a message gets.

    :param arrived: nanoseconds since the epoch, where the envelope does not say.
    :param way: the way in.
    """
    envelope = message.envelope
    raw = message.raw
    values: dict[str, Any] = {
        "arrived": arrived,
        "way": way,
        "size": len(raw),
        "digest": raw_digest(raw),
        "reason": reason,
        **header_values(message),
    }
    if envelope is not None:
        values.update(
            arrived=envelope.arrived, sender=envelope.sender, recipients=envelope.recipients
        )
        if envelope.mta_queue_id:
            values["mta_queue_id"] = envelope.mta_queue_id
    return values


def header_values(message: Message) -> dict[str, str]:
    """Return the headers that an entry shows, cut to 200 characters."""
    topmost = message.topmost
    return {
        "header_from": (topmost("From") or "")[:_HEADER_LENGTH],
        "header_to": (topmost("To") or "")[:_HEADER_LENGTH],
        "subject": (topmost("Subject") or "")[:_HEADER_LENGTH],
        "message_id": message.message_id[:_HEADER_LENGTH],
    }


class _LargeBody:
    """Reads a large body when asked, through a descriptor that outlives the connection."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        # A message that is never read is the ordinary case, not a leak.
        weakref.finalize(self, self._file.close)

    def __call__(self) -> bytes:
        self._file.seek(0)
        raw = self._file.readall()
        self._file.close()
        return raw


def _as_message(message: email.message.Message | bytes) -> Message:
    if isinstance(message, Message):
        return message
    if isinstance(message, bytes):
        return Message.from_bytes(message)
    return Message.from_bytes(message.as_bytes())


def _number(id: int | str) -> int:
    with suppress(ValueError):
        return int(id)
    raise MessageMissing(f"{id!r} is not a message's id, which is a number")


def _id_of(message: email.message.Message) -> int | str | None:
    id: int | str | None = getattr(message, "id", None)
    return id if id is not None else message.get("X-Postoffice-Id")


def _nanoseconds(when: datetime) -> int:
    # A datetime without a zone is local time, as everywhere in the standard library.
    return int(when.timestamp() * 1_000_000) * 1000


def _throttle_key(user: str, headers: Mapping[str, str] | None) -> bytes:
    return sender_digest(_sender(user)) + values_digest(list((headers or {}).items()))


def _sender(user: str) -> str:
    """Return who a From header's value stands for, as the intake counts senders."""
    addresses = mailboxes(user).addresses
    return (addresses[0] if addresses else user.strip())[:MAX_SENDER].lower()


def _error_text(error: Any) -> ErrorText:
    kind, value, trace = "", "", ""
    if isinstance(error, BaseException):
        error = (type(error), error, error.__traceback__)
    if isinstance(error, tuple) and len(error) == 3:
        kind = getattr(error[0], "__qualname__", None) or str(error[0] or "")
        value = _text_of(error[1])
        if isinstance(error[1], BaseException) and isinstance(error[2], TracebackType):
            trace = "".join(traceback.format_exception(error[0], error[1], error[2]))
    else:
        value = _text_of(error)
    return ErrorText(kind[:_HEADER_LENGTH], value[:_ERROR_LENGTH], trace[-_ERROR_LENGTH:])


def _text_of(value: Any) -> str:
    if value is None:
        return ""
    try:
        return str(value)
    except Exception as error:  # an application's __str__ may raise anything
        return f"(unprintable: {type(error).__name__})"
