"""The intake transaction: messages that were decided on, committed to their queues.

Reading and deciding come first (:func:`prepare`, which touches no database), so that the
transaction is short and may be run again.  What needs memory, whether a message is a duplicate and
whether its sender is throttled, is decided in the transaction (:class:`Intake`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from postoffice.depot.entry import Body, trail_text
from postoffice.description import header_values
from postoffice.fingerprints import Digests, sender_digest, values_digest
from postoffice.loops import LoopRule, is_bcc, loop_headers, sender_of, triggers
from postoffice.message import Message
from postoffice.queue import Queue
from postoffice.routing import (
    Decision,
    Routing,
    Verdict,
    as_duplicate,
    as_throttled,
    route,
)

if TYPE_CHECKING:
    from ZODB.blob import Blob

    from postoffice.depot.folder import QueuesFolder
    from postoffice.interfaces import IEventSink

__all__ = ["Intake", "Prepared", "Result", "memory_of_loops", "oversize_message", "prepare"]

log = logging.getLogger("postoffice")

_SHORTEST_MEMORY = 600

_OVERSIZE_NOTICE = (
    "This message was larger than the limit of %d bytes.\n"
    "It had %d bytes; its body was left out here, and the original is in the archive.\n"
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One message that was read and decided on.

    :ivar source: what it is called where it came from.
    :ivar decision: where it goes, as far as the message alone decides.
    :ivar values: the values of its entry, and of its line in the log.
    :ivar raw: the bytes to store; ``None`` when they are taken from the file, or not stored.
    :ivar duplicate: the digest by which duplicates are known; ``b""`` when it is not queued.
    :ivar sender: the digest of the sender for loop detection; ``b""`` where that does not apply.
    :ivar loop_values: the digest of the header values that have to agree.
    """

    source: str
    decision: Decision
    values: dict[str, Any]
    raw: bytes | None
    duplicate: bytes = b""
    sender: bytes = b""
    loop_values: bytes = b""

    def to_wire(self) -> tuple[object, ...]:
        """Return it as plain values, for another process; the decision loses its trail."""
        decision = self.decision
        return (
            self.source,
            decision.verdict.value,
            decision.reason,
            decision.queue,
            decision.detail,
            decision.marks,
            self.values,
            self.raw,
            self.duplicate,
            self.sender,
            self.loop_values,
        )

    @classmethod
    def from_wire(cls, wire: Sequence[Any]) -> Prepared:
        """Make it again of what :meth:`to_wire` returned."""
        source, verdict, reason, queue, detail, marks, values, raw, *digests = wire
        decision = Decision(Verdict(verdict), reason, queue, detail, (), marks)
        return cls(source, decision, values, raw, *digests)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one message.

    :ivar prepared: what was delivered.
    :ivar decision: the decision in the end.
    :ivar id: its id in the depot, or ``None`` when it is not queued.
    """

    prepared: Prepared
    decision: Decision
    id: int | None


def oversize_message(header: bytes, size: int, limit: int) -> bytes:
    """Return what is queued of an oversize message: its header, and a notice for a body."""
    linesep = b"\r\n" if header.endswith(b"\r\n") else b"\n"
    lines = [line for line in header.rstrip(b"\r\n").split(b"\n") if line.strip()]
    kept = []
    skipping = False
    for line in lines:
        if not line.startswith((b" ", b"\t")):
            # The notice is plain text, whatever the body was.
            skipping = line.lower().startswith((b"content-", b"mime-version"))
        if not skipping:
            kept.append(line.rstrip(b"\r"))
    notice = (_OVERSIZE_NOTICE % (limit, size)).encode("ascii").replace(b"\n", linesep)
    return linesep.join(kept) + linesep * 2 + notice


def prepare(
    routing: Routing,
    loop: LoopRule | None,
    message: Message,
    source: str,
    way: str,
    size: int,
    digests: Digests | None = None,
) -> Prepared:
    """Decide on a message and gather what the intake transaction needs to know about it.

    Pure: the same message gives the same answer.

    :param message: with its envelope, and with ``X-Postoffice-Date`` among its own headers.
    :param source: what the message is called where it came from.
    :param way: the way in.
    :param size: bytes of the message as it arrived.
    :param digests: of the message, where they are wanted again, or it is oversize; asked only when
        it is to be queued.
    :raises postoffice.exceptions.LimitExceeded: a filter gave up on the message.
    """
    decision = route(routing, message)
    envelope = message.envelope
    if envelope is None:
        raise ValueError("the message has no envelope")
    values: dict[str, Any] = {"way": way, "source": source, "size": size, **header_values(message)}
    values["arrived"] = envelope.arrived
    if envelope.sender is not None:
        values["sender"] = envelope.sender
    if envelope.recipients:
        values["recipients"] = envelope.recipients
    if envelope.mta_queue_id:
        values["mta_queue_id"] = envelope.mta_queue_id
    if decision.verdict is not Verdict.QUEUE:
        return Prepared(source, decision, values, None)
    digests = digests or Digests(message)
    buffer = message.buffer
    values["digest"] = digests.raw()
    if message.oversize:
        values["oversize"] = True
    values["reason"] = decision.reason
    values["trail"] = trail_text(
        (step.rule, step.filter, step.answer) for step in decision.trail if step.filter
    )
    sender = values_of_loop = b""
    if loop is not None and not is_bcc(message):
        sender = sender_digest(sender_of(message))
        values_of_loop = values_digest(loop_headers(message, loop.headers))
    raw = buffer if isinstance(buffer, bytes) else None
    return Prepared(source, decision, values, raw, digests.duplicate(), sender, values_of_loop)


def memory_of_loops(loop: LoopRule | None) -> int:
    """Return for how many seconds an arrival matters to a rule that throttles senders."""
    return _SHORTEST_MEMORY if loop is None else max(_SHORTEST_MEMORY, loop.interval // 10**9 + 1)


class Intake:
    """Commits prepared messages to the queues of one depot, in the connection's transaction.

    Each message is stored or not by itself: one that is discarded changes nothing for the others.
    May be called again with the same messages after a transient error.
    """

    def __init__(
        self, folder: QueuesFolder, loop: LoopRule | None, event_sink: IEventSink | None = None
    ) -> None:
        """Deliver into this depot."""
        self._folder = folder
        self._loop = loop
        self._event_sink = event_sink
        self._queues: dict[str, Queue] = {}

    def queue(self, name: str) -> Queue:
        """Return a queue of the depot.

        :raises postoffice.exceptions.QueueMissing: it is gone.
        """
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = Queue(self._folder.get(name))
            queue.event_sink = self._event_sink
        return queue

    def forget_queues(self) -> None:
        """Look queues up anew, after a transaction that failed."""
        self._queues.clear()

    def forget_bodies(self) -> None:
        """Let go of the memory of what was committed."""
        for queue in self._queues.values():
            queue.forget_bodies()

    def deliver(
        self,
        messages: Sequence[Prepared],
        now: int,
        archive: Callable[[Prepared], str],
        fill: Callable[[Prepared, Blob], None],
    ) -> list[Result]:
        """Store the messages that are to be queued; return what became of each.

        Those of the same bytes, such as one message for several recipients, share a body.

        :param now: nanoseconds since the epoch.
        :param archive: names the place in the archive that a message's original goes to.
        :param fill: fills a blob with the bytes of a message that has none in memory.
        """
        bodies: dict[bytes, Body | Blob] = {}
        return [self._deliver(message, now, archive, fill, bodies) for message in messages]

    def _deliver(
        self,
        message: Prepared,
        now: int,
        archive: Callable[[Prepared], str],
        fill: Callable[[Prepared, Blob], None],
        bodies: dict[bytes, Body | Blob],
    ) -> Result:
        decision = message.decision
        if decision.queue is None:
            return Result(message, decision, None)
        queue = self.queue(decision.queue)
        seconds = now // 1_000_000_000
        if queue.histories.seen(message.duplicate, seconds):
            return Result(message, as_duplicate(decision), None)
        if self._loop is not None and message.sender:
            if self._throttled(queue, self._loop, message):
                decision = as_throttled(decision)
            keep = memory_of_loops(self._loop)
            arrived = message.values["arrived"]
            queue.histories.arrived(message.sender, message.loop_values, arrived, seconds, keep)
        values = dict(message.values)
        if decision.marks:
            values["marks"] = decision.marks
        place = archive(message)
        if place:
            values["archive"] = place
        queue.histories.remember(message.duplicate, seconds)
        body = bodies.get(values["digest"])
        if body is not None:
            entry = queue.add_entry(values, body)
        elif message.raw is not None:
            entry = queue.add_entry(values, message.raw)
        else:
            entry = queue.add_entry(values, lambda blob: fill(message, blob))
        bodies[values["digest"]] = entry.body
        return Result(message, decision, entry.id)

    @staticmethod
    def _throttled(queue: Queue, loop: LoopRule, message: Prepared) -> bool:
        key = message.sender + message.loop_values
        arrived = message.values["arrived"]
        if queue.histories.throttled_until(key) >= arrived:
            return True
        times = queue.histories.arrivals(
            message.sender, message.loop_values if loop.headers else None
        )
        if not triggers(loop, times, arrived):
            return False
        until = arrived + int(loop.period * 1_000_000_000)
        queue.histories.throttle(key, until, arrived)
        return True
