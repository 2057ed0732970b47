"""Queues as applications see them.

::

    from postoffice import open_queue
    import transaction

    with open_queue("zeo:///srv/depot/zeo.sock?blob_dir=/srv/depot/blobs", "myapp") as queue:
        while queue:
            message = queue.pop_next()
            handle(message)
            transaction.commit()
"""

from __future__ import annotations

import email.message
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from types import TracebackType
from typing import Any

from transaction.interfaces import NoTransaction, TransientError
from ZODB.blob import Blob
from ZODB.interfaces import IBlobStorage
from ZODB.POSException import POSKeyError
from zope.interface import implementer

from postoffice.addresses import mailboxes
from postoffice.bounces import compose_bounce, compose_quarantine_notice
from postoffice.claimed import ClaimedMessage
from postoffice.claims import Claims, Holder, living_claims
from postoffice.database import open_database
from postoffice.depot.durability import BlobDurability
from postoffice.depot.entry import DISCARDED, DONE, QUARANTINED, QUEUED, Body, Entry, ErrorText
from postoffice.depot.folder import find_folder
from postoffice.depot.ids import new_id
from postoffice.depot.lane import Lane
from postoffice.depot.queue import QueueRecord
from postoffice.description import as_message, describe, error_text, message_of, stored_bytes
from postoffice.display import one_line
from postoffice.exceptions import (
    DepotUnavailable,
    MessageMissing,
    MessageTaken,
    QueueEmpty,
    QueueRemoved,
)
from postoffice.fingerprints import duplicate_digest, sender_digest, values_digest
from postoffice.histories import Histories
from postoffice.interfaces import ClaimStatus, IEventSink, IQueue, Send
from postoffice.loops import MAX_SENDER, average_frequency, instantaneous_frequency
from postoffice.message import Message
from postoffice.outbound import hand_over
from postoffice.taking import Taking, Work

__all__ = ["BLOB_SIZE", "ClosingPair", "Queue", "QueueEmpty", "find_queue", "open_queue"]

log = logging.getLogger("postoffice")

#: Bodies of this many bytes and more are blobs; see docs/concepts for what was measured.
BLOB_SIZE = 256 * 1024

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


def open_queue(
    db_or_uri: Any,
    queue_name: str,
    path: str = "postoffice",
    transaction_manager: Any = None,
) -> ClosingPair:
    """Open a queue, and whatever has to be opened for it.

    Either ``queue, close = open_queue(...)`` or ``with open_queue(...) as queue:``.

    :param db_or_uri: an open ``ZODB.DB``, which stays open, or a zodburi URI.
    :param queue_name: the queue's name.
    :param path: path of the depot in the database.
    :param transaction_manager: whose transactions the queue joins, an explicit one or not;
        ``None``: those of the thread.
    :return: the pair of the queue and a function that aborts what is not committed and closes what
        was opened; calling it again does nothing.
    :raises postoffice.exceptions.DepotUnavailable: the database cannot be opened now.
    :raises postoffice.exceptions.FolderMissing: there is no depot at this path.
    :raises postoffice.exceptions.QueueMissing: there is no such queue; the text names those there
        are.

    Whatever is raised, nothing stays open.
    """
    opened = open_database(db_or_uri) if isinstance(db_or_uri, str) else None
    connection = None
    try:
        connection = (opened or db_or_uri).open(transaction_manager)
        with _transaction(connection.transaction_manager):
            queue = find_queue(connection.root(), queue_name, path)
        return ClosingPair((queue, _Closer(connection, opened)))
    except BaseException as error:
        if connection is not None:
            _close(connection)
        if opened is not None:
            opened.close()
        if isinstance(error, TransientError):
            # Its server went away between the opening and the first look.
            raise DepotUnavailable(f"the database went away: {one_line(error)}") from error
        raise


@contextmanager
def _transaction(manager: Any) -> Iterator[None]:
    """Be in a transaction: the present one, or where there is none, one that is aborted."""
    try:
        manager.get()
    except NoTransaction:
        # An explicit manager is between two.
        manager.begin()
        try:
            yield
        finally:
            manager.abort()
    else:
        yield


def _close(connection: Any) -> None:
    """Abort what is under way in a connection, and close it."""
    # An explicit manager may be between two transactions.
    with suppress(NoTransaction):
        connection.transaction_manager.abort()
    connection.close()


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
            _close(connection)
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
        #: What this object holds and takes; :class:`postoffice.claimed.ClaimedMessage` works on it.
        self.taking = Taking(record)
        #: What the queue remembers; the intake asks it directly.
        self.histories = Histories(record, self.taking)
        self._durability = BlobDurability(self._connection)
        self._durable_in: Work | None = None

    def release(self) -> None:
        """Give back at once what this object holds for messages to come.

        Happens by itself when the connection is closed, and after a transaction that was aborted
        or took nothing.
        """
        self.taking.release()

    def release_claims(self) -> None:
        """Give back at once what was claimed by :meth:`claim` and is not done with."""
        self.taking.release_lent()

    def abandon_claims(self) -> None:
        """Let go of what was claimed by :meth:`claim`, without a word to a database that is away.

        Others have it when this process has ended, or the lease.
        """
        if self.taking.lent is not None:
            self.taking.lent.abandon()

    def take_claims_over(self, claims: Claims) -> None:
        """Give back what another object for this queue has claimed, and claim in its name.

        For when a database had to be opened anew: of a claim whose commit is in doubt, only its own
        holder knows.
        """
        claims.go_on_through(self._connection)
        self.taking.adopt(claims)
        self.release_claims()

    # -- taking ------------------------------------------------------------------------------------

    def pop_next(self) -> Message:
        """See :meth:`postoffice.interfaces.IQueue.pop_next`."""
        taken = self.taking.take()
        if taken is None:
            raise QueueEmpty(f"no message to take from queue {self.name!r} now")
        entry, work = taken
        message = self.message(entry)
        entry.change(DONE, "taken", "taken", time.time_ns(), self.event_sink)
        work.give(message, entry)
        return message

    def claim(self, limit: int = 1, lease: float | None = None) -> list[ClaimedMessage]:
        """See :meth:`postoffice.interfaces.IQueue.claim`."""
        if limit < 1 or (lease is not None and lease <= 0):
            raise ValueError("limit is at least 1, and lease more than 0 seconds")
        claims = self.taking.lend()
        places = claims.take(limit, lease=lease)
        if not places:
            return []

        def read(record: QueueRecord) -> list[ClaimedMessage]:
            record.prefetch(places)
            return [
                ClaimedMessage(self, claims, place, *self._read(entry))
                for place in places
                if (entry := record.live(place)) is not None
            ]

        try:
            found = claims.read(read)
        except BaseException:
            # Nobody would work on them; claimed again, they are read again.
            claims.forget(places)
            raise
        claims.finish({*places} - {one.place for one in found})
        return found

    def _read(self, entry: Entry) -> tuple[Entry, Message | Exception]:
        """Return a copy of an entry, and the message or why it cannot be read."""
        copy = entry.copy()
        try:
            message = self.message(entry)
        except (POSKeyError, OSError) as error:
            # The others shall not wait for one whose body is lost.
            return copy, error
        message.entry = copy
        return copy, message

    def claims(self) -> list[ClaimStatus]:
        """See :meth:`postoffice.interfaces.IQueue.claims`."""
        found = []
        for place, claim in living_claims(self.record, time.time_ns()):
            entry = self.record.live(place)
            if entry is not None:
                holder = Holder.parse(claim.holder)
                status = ClaimStatus(entry.id, holder.host, holder.pid, claim.since, claim.until)
                found.append(status)
        return found

    def peek(self) -> Message:
        """See :meth:`postoffice.interfaces.IQueue.peek`."""
        for entry in self.taking.free():
            return self.message(entry)
        raise QueueEmpty(f"no message to take from queue {self.name!r} now")

    def __bool__(self) -> bool:
        """See :meth:`postoffice.interfaces.IQueue.__bool__`."""
        return self.taking.has_one()

    def __len__(self) -> int:
        """See :meth:`postoffice.interfaces.IQueue.__len__`."""
        return self.record.waiting() - self.taking.uncounted()

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
                if Lane.live(entry, place.position)
            )
        yield from islice(rows, limit)

    def find(self, id: int | str) -> Entry:
        """Return the entry of a message that waits here or is in quarantine, by its id.

        :raises MessageMissing: there is none.
        """
        number = _number(id)
        # A look into the quarantine costs little, and one for what is not there costs much.
        entry = self.record.get_quarantine(number)
        if entry is None:
            found = self.record.find(number)
            entry = None if found is None else found[1]
        if entry is None:
            raise MessageMissing(f"no message {id} in queue {self.name!r} or its quarantine")
        return entry

    def message(self, entry: Entry) -> Message:
        """Return the message of an entry; it stays readable when the connection is closed."""
        return message_of(entry, self.name)

    # -- adding ------------------------------------------------------------------------------------

    def add(self, message: email.message.Message | bytes) -> int:
        """See :meth:`postoffice.interfaces.IQueue.add`."""
        own = as_message(message)
        now = time.time_ns()
        raw = stored_bytes(own)
        self.histories.remember(duplicate_digest(own), now // 1_000_000_000)
        return self.add_entry(describe(own, raw, now), raw).id

    def add_entry(
        self, values: dict[str, Any], raw: bytes | Callable[[Blob], None] | Body | Blob
    ) -> Entry:
        """Put a message behind the tail whose entry has these values; return the entry.

        :param raw: the bytes; a function that fills a blob with them; or the body of an entry that
            was added in this transaction, which serves both.
        """
        work = self.taking.work()
        entry = Entry(values)
        entry.id = new_id()
        entry.body = raw if isinstance(raw, Body | Blob) else self._body(raw)
        if self.event_sink is not None:
            entry.change(QUEUED, "added", entry.reason, time.time_ns(), self.event_sink)
        work.added.append((self.record.append(entry), entry))
        work.stored.append(entry)
        if isinstance(entry.body, Body):
            work.stored.append(entry.body)
        return entry

    def forget_bodies(self) -> None:
        """Let go of the memory of messages that were added and are committed by now."""
        for one in self.taking.stored:
            one._p_deactivate()
        self.taking.stored = []

    def _body(self, raw: bytes | Callable[[Blob], None]) -> Body | Blob:
        if isinstance(raw, bytes) and (len(raw) < BLOB_SIZE or not self._has_blobs()):
            return Body(raw)
        blob = Blob()
        # Being in the connection already, it makes its file beside those of the database.
        self._connection.add(blob)
        if isinstance(raw, bytes):
            with blob.open("w") as file:
                # The file is unbuffered: on a nearly full disk it takes a part, without an error.
                rest = memoryview(raw)
                while rest:
                    rest = rest[file.write(rest) :]
        else:
            raw(blob)
        work = self.taking.work()
        if self._durable_in is not work:
            self._durable_in = work
            self._durability = BlobDurability(self._connection)
            self.taking.transaction().join(self._durability)
        self._durability.watch(blob)
        return blob

    def _has_blobs(self) -> bool:
        return bool(IBlobStorage.providedBy(self._connection.db().storage))

    # -- duplicates and rates ----------------------------------------------------------------------

    def is_duplicate(self, message: email.message.Message) -> bool:
        """See :meth:`postoffice.interfaces.IQueue.is_duplicate`."""
        return self.histories.seen(duplicate_digest(as_message(message)), int(time.time()))

    def collect_frequency_data(
        self, message: email.message.Message, headers: Sequence[str] | None = None
    ) -> None:
        """See :meth:`postoffice.interfaces.IQueue.collect_frequency_data`."""
        own = as_message(message)
        arrived = own.envelope.arrived if own.envelope is not None else time.time_ns()
        values = values_digest([(name, own.get(name) or "") for name in headers or ()])
        sender = sender_digest(_sender(own.get("From") or ""))
        self.histories.arrived(sender, values, arrived, int(time.time()), keep=_DAY)

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
        return self.histories.arrivals(sender_digest(_sender(user)), values)

    def throttle(
        self, user: str, until: datetime, headers: Mapping[str, str] | None = None
    ) -> None:
        """See :meth:`postoffice.interfaces.IQueue.throttle`."""
        self.histories.throttle(_throttle_key(user, headers), _nanoseconds(until))

    def is_throttled(
        self, user: str, now: datetime, headers: Mapping[str, str] | None = None
    ) -> bool:
        """See :meth:`postoffice.interfaces.IQueue.is_throttled`."""
        return self.histories.throttled_until(_throttle_key(user, headers)) >= _nanoseconds(now)

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
        own = as_message(message)
        notice = compose_bounce(
            own, bounce_from_addr, datetime.now(UTC), bounce_reason, bounce_message
        )
        if notice is None:
            log.info("no bounce is sent for message %s of queue %r", own.id, self.name)
            return False
        hand_over(notice, send, self.taking.transaction())
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
        own = as_message(message)
        notice = None
        if send is not None and notice_from is not None:
            notice = compose_quarantine_notice(own, notice_from, datetime.now(UTC))
        work = self.taking.work()
        entry, lapses = self._entry_to_quarantine(own, work)
        self.put_quarantine(entry, error, 1 + lapses)
        own.id = message.id = entry.id  # type: ignore[attr-defined]  # any message may carry it
        own.queue_name = self.name
        own.entry = entry
        if send is not None and notice is not None:
            hand_over(notice, send, self.taking.transaction())
        return entry.id

    def put_quarantine(self, entry: Entry, error: Any, attempts: int) -> None:
        """Put an entry into quarantine that is not there.

        :param error: see :meth:`quarantine`.
        :param attempts: how many failed attempts this is.
        """
        entry.fail(error_text(error), attempts)
        entry.change(
            QUARANTINED, "quarantined", "application-error", time.time_ns(), self.event_sink
        )
        self.record.put_quarantine(entry)

    def _entry_to_quarantine(self, message: Message, work: Work) -> tuple[Entry, int]:
        """Find the message's entry, out of the queue, or make one; with the lapses of its claim."""
        if self.record.removed:
            raise QueueRemoved(self.name)
        known = message.entry
        if message.queue_name == self.name and message.id is not None:
            taken = work.acknowledged.values()
            for place, entry in chain(work.taken.items(), ((None, entry) for _, entry in taken)):
                if entry.id == message.id and entry.state == DONE:
                    return entry, 0 if place is None else self.taking.lapses(place)
            if not _is_done(known):
                found = self.record.find(message.id)
                if found is not None:
                    place, entry = found
                    lapses = self.taking.lapses(place)
                    if place.position not in self.record.all_lanes[place.lane].claims:
                        self.record.sweep(place)
                    return entry, lapses
            if self.record.get_quarantine(message.id) is not None:
                raise MessageTaken(f"message {message.id} is in quarantine already")
            if known is not None and (known._p_jar is not None or known.state != DONE):
                raise MessageTaken(f"another consumer took message {message.id} meanwhile")
        raw = stored_bytes(message)
        entry = Entry(describe(message, raw, time.time_ns()))
        entry.id = entry.position = message.id if message.id is not None else new_id()
        if message.id is not None and known is not None:
            # Its taking is committed, and this is what was known of it then.
            entry = known.copy()
        entry.body = self._body(raw)
        return entry, 0

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

    def give_back(self, id: int | str) -> bool:
        """Let a message that is claimed, or deferred, be taken by anybody at once.

        For an administrator who knows that the holder is dead.  A holder that is alive loses the
        message: only one of it and the next that takes it can commit.

        :return: whether it was claimed or deferred.
        :raises MessageMissing: it does not wait here.
        """
        found = self.record.find(_number(id))
        if found is None:
            raise MessageMissing(f"no message {id} waits in queue {self.name!r}")
        return self.record.give_back(found[0], time.time_ns())

    def give_all_back(self) -> int:
        """Let whatever is claimed or deferred be taken by anybody at once; return how many were."""
        now = time.time_ns()
        places = [place for place, _ in living_claims(self.record, now)]
        places += self.record.later(now)
        return sum(self.record.give_back(place, now) for place in dict.fromkeys(places))

    def requeue(self, id: int | str) -> None:
        """Put one message from quarantine behind the tail; duplicates and throttles do not matter.

        :raises MessageMissing: it is not in quarantine.
        """
        self._requeue(self._quarantined(id), self.taking.work())

    def requeue_quarantined_messages(self) -> int:
        """See :meth:`postoffice.interfaces.IQueue.requeue_quarantined_messages`."""
        work = self.taking.work()
        entries = sorted(
            self.record.quarantine_after(), key=lambda found: (found.arrived, found.id)
        )
        for entry in entries:
            self._requeue(entry, work)
        return len(entries)

    def _requeue(self, entry: Entry, work: Work) -> None:
        self.record.pop_quarantine(entry)
        entry.forgive()
        entry.change(QUEUED, "requeued", "requeued", time.time_ns(), self.event_sink)
        work.added.append((self.record.append(entry), entry))

    def _quarantined(self, id: int | str | None) -> Entry:
        entry = None if id is None else self.record.get_quarantine(_number(id))
        if entry is None:
            raise MessageMissing(f"message {id} is not in the quarantine of queue {self.name!r}")
        return entry


def _is_done(entry: Entry | None) -> bool:
    """Tell whether it is certain that what this entry stands for does not wait any more."""
    try:
        return entry is not None and entry.state != QUEUED
    except POSKeyError:
        # It was taken, and the database packed.
        return True


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
