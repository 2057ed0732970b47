"""The contracts: what each part promises, whoever implements it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.message import Message as AnyMessage
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from zope.interface import Attribute, Interface

if TYPE_CHECKING:
    from postoffice.depot.entry import Entry, ErrorText
    from postoffice.message import Message

__all__ = [
    "EVENT_KINDS",
    "ClaimStatus",
    "Event",
    "IClaimedMessage",
    "IEventSink",
    "IFilter",
    "IQueue",
    "Send",
]

#: The kinds of events, each with its meaning.
EVENT_KINDS = {
    "added": "a message was committed to a queue",
    "taken": "an application took the message out of its queue",
    "quarantined": "an application could not process the message",
    "requeued": "the message went from quarantine behind the tail of its queue",
    "discarded": "the message was removed from quarantine for good",
}


#: ``send(fromaddr, toaddrs, message)``, as repoze.sendmail's deliveries have it.
Send: TypeAlias = Callable[[str, list[str], Any], Any]


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one message's state.

    :ivar id: the message's id.
    :ivar time: nanoseconds since the epoch.
    :ivar kind: one of :data:`EVENT_KINDS`.
    :ivar reason: the stable name of the reason.
    """

    id: int
    time: int
    kind: str
    reason: str


class ClaimStatus(NamedTuple):
    """Who holds one message.

    :ivar id: the message's id.
    :ivar host: name of the holder's machine.
    :ivar pid: number of the holder's process there.
    :ivar since: since when, in nanoseconds since the epoch.
    :ivar until: until when others leave it alone, likewise.
    """

    id: int
    host: str
    pid: int
    since: int
    until: int


class IEventSink(Interface):
    """Is told of every change of state, in the transaction that makes the change.

    What a sink writes to the same database commits or aborts with the change itself; a
    sink with effects elsewhere has to wait for the commit.
    """

    def record(event: Event) -> None:
        """Take note of the event; an error raised here fails the transaction."""


class IFilter(Interface):
    """One condition on a message, as a line of ``filters`` in ``postoffice.ini`` gives it.

    A package offers a kind of filter as an entry point in the group ``postoffice.filters``: its
    name is the name used in the file; it loads a callable ``factory(value, folder)``, with the text
    after the colon and the path of the folder of the file, that returns an ``IFilter`` or raises
    :exc:`ValueError` with what is wrong.  A filter has no side effects, keeps no state between
    messages and takes a bounded time whatever the message.
    """

    description = Attribute("The filter as in the file, for logs: ``to_hostname: .example.com``.")

    def __call__(message: Any) -> str | None:
        """Return one line that says what matched, or ``None`` when the message does not match.

        `message` is a :class:`postoffice.message.Message`.

        :raises postoffice.exceptions.LimitExceeded: the message is set aside.
        """


class IQueue(Interface):
    """One application's persistent first-in-first-out queue.

    Every method that changes anything joins the transaction of the connection that the queue was
    found in: nothing is true before its commit, and an abort undoes it.  A queue object belongs to
    its connection and, like the connection, to one thread at a time.

    Of any number of consumers, in whatever processes, exactly one commits the taking of a given
    message.  One consumer alone gets the messages strictly in the order in which they came; several
    share them out in that order, so that each sees its share in order.
    """

    name = Attribute("The queue's name, as in ``[queue:NAME]``.")

    def add(message: AnyMessage | bytes) -> int:
        """Put a message behind the tail and return its id.

        `message` is a :class:`postoffice.message.Message`, any ``email.message.Message``, or bytes.
        """

    def pop_next() -> Message:
        """Take the first message out of the queue and return it.

        It sees what its own transaction has added.

        :raises postoffice.exceptions.QueueEmpty: there is none to take now.
        """

    def claim(limit: int = 1, lease: float | None = None) -> Sequence[IClaimedMessage]:
        """Claim up to `limit` of the first messages: for work that is long, or has other effects.

        Happens at once, in a short transaction apart from the caller's, and holds whatever the
        caller's transactions do.  Returned are those that there are, the first first, perhaps none.

        :param lease: seconds after which others may take them; ``None``: what the configuration
            says, five minutes by default.
        :raises ValueError: `limit` is less than 1, or `lease` not more than 0.
        """

    def claims() -> list[ClaimStatus]:
        """Return who holds messages of this queue, as the present transaction sees it."""

    def peek() -> Message:
        """Return the message that ``pop_next`` would take, and leave it there.

        :raises postoffice.exceptions.QueueEmpty: there is none to take now.
        """

    def __len__() -> int:
        """Return the number of messages in the queue, those claimed or deferred included."""

    def __bool__() -> bool:
        """Return whether there is a message to take now.

        If so, it is held for this queue object until the transaction ends.
        """

    def __iter__() -> Iterator[Message]:
        """Iterate over the messages in order, without removing any."""

    def entries(
        after_id: int | None = None, limit: int | None = None, state: str = "queued"
    ) -> Iterator[Entry]:
        """List entries in order: at most `limit` of those after `after_id` in this state.

        Reads no bodies.
        """

    def is_duplicate(message: AnyMessage) -> bool:
        """Tell whether the same message came to this queue within 24 hours.

        The same: Message-ID, original recipient and body agree.
        """

    def collect_frequency_data(message: AnyMessage, headers: Sequence[str] | None = None) -> None:
        """Remember the arrival of a message from its sender, with the values of `headers`."""

    def get_instantaneous_frequency(
        user: str, now: datetime, headers: Mapping[str, str] | None = None
    ) -> float:
        """Return messages a minute by the time since the sender's last message; 0.0 if none."""

    def get_average_frequency(
        user: str,
        now: datetime,
        interval: timedelta,
        headers: Mapping[str, str] | None = None,
    ) -> float:
        """Return messages a minute over `interval` (a ``timedelta``) until `now`.

        `headers` are to be those, all of them, with which the data was collected; the last 256
        arrivals count.
        """

    def throttle(user: str, until: datetime, headers: Mapping[str, str] | None = None) -> None:
        """Mark a sender as throttled until a ``datetime``."""

    def is_throttled(user: str, now: datetime, headers: Mapping[str, str] | None = None) -> bool:
        """Tell whether a sender is throttled at `now`."""

    def bounce(
        message: AnyMessage,
        send: Send,
        bounce_from_addr: str,
        bounce_reason: str | None = None,
        bounce_message: AnyMessage | None = None,
    ) -> bool:
        """Send a notice to the envelope sender, if RFC 3834 allows one; return whether it does.

        `send` is ``send(fromaddr, toaddrs, message)``.  One that provides repoze.sendmail's
        ``IMailDelivery`` is called at once, and joins the transaction; any other callable is
        called once, after the commit.

        :raises ValueError: both a reason and a message were given.
        """

    def quarantine(
        message: AnyMessage,
        error: Any,
        send: Send | None = None,
        notice_from: str | None = None,
    ) -> int:
        """Move a message to quarantine, with the text of its error, and return its id.

        `error` is ``sys.exc_info()``, an exception, or a string.  The message may have been taken
        in this transaction, in one that was aborted, or in an earlier one.

        :raises postoffice.exceptions.MessageTaken: another consumer took it meanwhile; a
            transient error, as is the conflict that the commit raises when both do so at once.
        :raises ValueError: `send` without `notice_from`.
        """

    def get_quarantined_messages() -> Iterator[tuple[Message, ErrorText]]:
        """Iterate over pairs of message and error, in the order of the messages' ids."""

    def get_quarantined_message(id: int | str) -> Message:
        """Return one message from quarantine.

        :raises postoffice.exceptions.MessageMissing: it is not there; also a :exc:`KeyError`.
        """

    def count_quarantined_messages() -> int:
        """Return the number of messages in quarantine."""

    def remove_from_quarantine(message: AnyMessage) -> None:
        """Discard a message from quarantine, for good.

        :raises postoffice.exceptions.MessageMissing: it is not there; also a :exc:`ValueError`.
        """

    def requeue_quarantined_messages() -> int:
        """Put all of quarantine behind the tail, in order of arrival, and return how many."""


class IClaimedMessage(Interface):
    """A message that is claimed: this consumer's alone until the lease ends, or it is done with.

    ``ack`` and ``quarantine`` join the application's transaction, and take effect when that
    commits; if it aborts, the message is still claimed.  ``release``, ``defer`` and ``renew`` act
    at once.  What belongs to somebody else by now is a
    :exc:`postoffice.exceptions.MessageTaken`; of two that hold the same message by a lease that
    ended, one commits and the other meets that error or a conflict.

    Closing the connection gives back what is claimed in it, as does the end of the process: on
    the same machine at once, for others when the lease ends.
    """

    id = Attribute("The message's id.")
    message = Attribute(
        "The message; readable at any time.  Raises ``POSKeyError`` or ``OSError`` where the "
        "database has lost its body."
    )
    attempts = Attribute("How many attempts have failed since it was added, or last requeued.")
    lapses = Attribute("How many of these nobody could tell of: whoever made them is gone.")
    last_error = Attribute("Type, message and traceback of the last failure, or ``None``.")
    since = Attribute("When it was claimed, in nanoseconds since the epoch.")
    until = Attribute("When the claim ends, likewise.")

    def check() -> None:
        """See in the application's transaction whether the message is still to be had.

        :raises postoffice.exceptions.MessageTaken: somebody else has it.
        """

    def ack() -> None:
        """Take the message out of the queue with the application's transaction.

        The transaction must have begun after the message was added: begin it after the claim.

        :raises postoffice.exceptions.MessageTaken: somebody else has it.
        """

    def quarantine(error: Any, attempts: int = 1) -> None:
        """Move the message to quarantine with the application's transaction.

        `error` as in :meth:`IQueue.quarantine`; `attempts` is how many failed attempts this is.

        :raises postoffice.exceptions.MessageTaken: somebody else has it.
        """

    def release() -> None:
        """Give the message back, to its place, for anybody to take at once.

        Does nothing if it is not claimed any more.
        """

    def defer(seconds: float, error: Any = None) -> None:
        """Give the message back, for anybody to take, but not before some seconds have passed.

        Then it comes before all that wait.  An `error`, as in :meth:`IQueue.quarantine`, counts
        as a failed attempt.

        :raises postoffice.exceptions.MessageTaken: somebody else has it.
        """

    def renew(lease: float | None = None) -> None:
        """Hold the message for so many seconds from now; ``None``: as the configuration says.

        :raises postoffice.exceptions.MessageTaken: somebody else has it.
        """
