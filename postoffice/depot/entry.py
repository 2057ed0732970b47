"""The entry: what the depot knows of one message for one queue, apart from its body."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from persistent import Persistent
from ZODB.blob import Blob

from postoffice.interfaces import Event, IEventSink

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["DISCARDED", "DONE", "QUARANTINED", "QUEUED", "Body", "Entry", "ErrorText", "trail_text"]

QUEUED = "queued"
QUARANTINED = "quarantined"
DONE = "done"
DISCARDED = "discarded"


class ErrorText(NamedTuple):
    """What is kept of an application's error: text, never frames.

    A tuple like the one of ``sys.exc_info()``, with the texts in the places of the objects.
    """

    type: str
    message: str
    traceback: str


class Body(Persistent):
    """The raw bytes of one message that is small enough for a record of its own."""

    def __init__(self, raw: bytes) -> None:
        """Keep `raw`, the bytes as they arrived."""
        self.raw = raw


# The order in which an entry's values are stored: part of the format.
_STORED = (
    *("id", "position", "arrived", "way", "source", "sender", "recipients"),
    *("size", "digest", "header_from", "header_to", "subject", "message_id"),
    *("reason", "trail", "archive", "body"),
)


def trail_text(steps: Iterable[tuple[str, str, str | None]]) -> str:
    """Return the text that an entry keeps of rules, filters and answers.

    One string costs a fraction of what a tuple of tuples does in a database record.
    """
    return "\n".join(
        "\t".join(" ".join(text.split()) if text else "" for text in step) for step in steps
    )


class Entry(Persistent):
    """One message in one queue: a small record; listings read entries and never bodies.

    Attributes that still have the value given here are not stored.

    :ivar id: the message's id for life, unique in the depot.
    :ivar position: the place in the queue; a requeued message gets a new one.  An entry that is
        found at another position than this is a leftover of an earlier place.
    :ivar arrived: arrival, in nanoseconds since the epoch.
    :ivar way: the way in: ``maildir``, ``application``...
    :ivar source: the Maildir file's name, or what names the message where it came from.
    :ivar sender: envelope sender; ``""`` is the null reverse-path, ``None`` unknown.
    :ivar recipients: envelope recipients; empty when unknown.
    :ivar mta_queue_id: the id in the MTA's own queue, or ``""``.
    :ivar size: bytes of the message as it arrived.
    :ivar digest: sha256 of the raw bytes that are stored.
    :ivar header_from: the From header, cut to 200 characters; likewise the next three.
    :ivar reason: the stable name of the reason why it is in this queue.
    :ivar trail: the filters asked and what they answered, see :meth:`steps`.
    :ivar marks: values of ``X-Postoffice-Rejected``.
    :ivar state: :data:`QUEUED`, :data:`QUARANTINED`, :data:`DONE` or :data:`DISCARDED`.
    :ivar changed: when the state last changed, in nanoseconds since the epoch.
    :ivar not_before: when a message that was deferred is due, in nanoseconds since the epoch; 0
        for one that never was, or was requeued since.
    :ivar attempts: how often an application took it and failed.
    :ivar forgiven: how many of these attempts a requeue has forgiven.
    :ivar last_error: the texts of the last error, or ``None``.
    :ivar archive: where the original is, relative to the archive's folder, or ``""``.
    :ivar extra: whatever a later release keeps here, or ``None``.
    :ivar body: the :class:`Body`, or a ``ZODB.blob.Blob`` for a large message.
    """

    id: int
    position: int
    arrived: int
    way = ""
    source = ""
    sender: str | None = None
    recipients: tuple[str, ...] = ()
    mta_queue_id = ""
    size: int
    digest: bytes
    header_from = ""
    header_to = ""
    subject = ""
    message_id = ""
    reason = ""
    trail = ""
    marks: tuple[str, ...] = ()
    state = QUEUED
    changed = 0
    not_before = 0
    attempts = 0
    forgiven = 0
    last_error: tuple[str, ...] | None = None
    archive = ""
    oversize = False
    extra: dict[str, Any] | None = None
    body: Body | Blob

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Make a queued entry of these attributes."""
        self.__dict__.update(values)

    def __getstate__(self) -> tuple[Any, ...]:
        """Return what is stored: the values that most entries have, and a dict of the others.

        A dict of all, names and all, would take twice the time and half as much again of space.
        """
        others = dict(self.__dict__)
        return *[others.pop(name, None) for name in _STORED], others or None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take up what was stored."""
        *values, others = state
        found = zip(_STORED, values, strict=True)
        self.__dict__.update((name, value) for name, value in found if value is not None)
        self.__dict__.update(others or {})

    def copy(self) -> Entry:
        """Return one of the same values that is in no database and has no body."""
        return Entry({name: value for name, value in self.values().items() if name != "body"})

    def values(self) -> dict[str, Any]:
        """Return the values that differ from those of every entry, by their names."""
        self._p_activate()
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def change(
        self, state: str, kind: str, reason: str, now_ns: int, sink: IEventSink | None
    ) -> None:
        """Move to another state; every change of state in the depot goes through here.

        :param kind: the event's kind, one of :data:`postoffice.interfaces.EVENT_KINDS`.
        :param sink: is handed the event, in the same transaction.
        """
        self.state = state
        self.changed = now_ns
        if sink is not None:
            sink.record(Event(self.id, now_ns, kind, reason))

    def steps(self) -> list[tuple[str, str, str | None]]:
        """Return rule, filter and answer of each filter that was asked, in order.

        The answer is ``None`` where the filter did not match.
        """
        return [
            (rule, filter, answer or None)
            for rule, filter, answer in (line.split("\t") for line in self.trail.splitlines())
        ]

    def fail(self, error: ErrorText, attempts: int = 1) -> None:
        """Count failed attempts and keep the error of the last."""
        self.attempts += attempts
        self.last_error = tuple(error)

    def forgive(self) -> None:
        """Let the attempts so far not count against it any more."""
        self.forgiven = self.attempts
        self.not_before = 0

    def read_raw(self) -> bytes:
        """Return the bytes that are stored.

        :raises ZODB.POSException.POSKeyError: the body is not in the database.
        """
        body = self.body
        if isinstance(body, Blob):
            with body.open("r") as file:
                return bytes(file.read())
        raw = body.raw
        # The bytes are with the caller now; kept here too they would fill the cache.
        body._p_deactivate()
        return raw

    def open_raw(self) -> int:
        """Return a file descriptor of a large body, to be closed by the caller.

        It goes on reading when the connection is closed and even when the database is packed.
        """
        blob: Any = self.body
        with blob.open("r") as file:
            return os.dup(file.fileno())
