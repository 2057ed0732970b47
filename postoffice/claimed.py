"""A message that an application has claimed: its own for a while, whatever its transactions do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from postoffice.depot.entry import DONE, Entry
from postoffice.depot.lane import Place
from postoffice.description import error_text
from postoffice.exceptions import MessageTaken
from postoffice.interfaces import IClaimedMessage
from postoffice.message import Message

if TYPE_CHECKING:
    from postoffice.claims import Claims
    from postoffice.queue import Queue

__all__ = ["ClaimedMessage"]


@implementer(IClaimedMessage)
class ClaimedMessage:
    """See :class:`postoffice.interfaces.IClaimedMessage`."""

    def __init__(
        self, queue: Queue, claims: Claims, place: Place, entry: Entry, read: Message | Exception
    ) -> None:
        """Stand for the claim on a place.

        :param entry: what was known of the message when it was claimed; not in the database.
        :param read: the message, or why it could not be read.
        """
        self.id = entry.id
        self._queue = queue
        self._claims = claims
        self.place = place
        self._entry = entry
        self.read = read
        claim = claims.held[place]
        self.since = claim.since
        self.until = claim.until
        self.lapses = claim.lapses
        self.attempts = entry.attempts - entry.forgiven + claim.lapses

    @property
    def message(self) -> Message:
        """See :attr:`postoffice.interfaces.IClaimedMessage.message`."""
        if isinstance(self.read, Exception):
            raise self.read
        return self.read

    @property
    def last_error(self) -> tuple[str, ...] | None:
        """See :attr:`postoffice.interfaces.IClaimedMessage.last_error`."""
        return self._entry.last_error

    def check(self) -> None:
        """See :meth:`postoffice.interfaces.IClaimedMessage.check`."""
        self._waiting()

    def ack(self) -> None:
        """See :meth:`postoffice.interfaces.IClaimedMessage.ack`."""
        entry = self._waiting()
        work = self._queue.taking.work()
        entry.change(DONE, "taken", "taken", time.time_ns(), self._queue.event_sink)
        work.acknowledged[self.place] = (self._claims, entry)
        if isinstance(self.read, Message):
            work.give(self.read, entry)

    def quarantine(self, error: Any, attempts: int = 1) -> None:
        """See :meth:`postoffice.interfaces.IClaimedMessage.quarantine`."""
        entry = self._waiting()
        work = self._queue.taking.work()
        self._queue.put_quarantine(entry, error, self.lapses + attempts)
        work.acknowledged[self.place] = (self._claims, entry)

    def release(self) -> None:
        """See :meth:`postoffice.interfaces.IClaimedMessage.release`."""
        self._claims.release([self.place])

    def defer(self, seconds: float, error: Any = None) -> None:
        """See :meth:`postoffice.interfaces.IClaimedMessage.defer`."""
        due = time.time_ns() + int(float(seconds) * 1_000_000_000)
        text = None if error is None else error_text(error)
        if not self._claims.defer(self.place, due, text):
            raise self._lost()

    def renew(self, lease: float | None = None) -> None:
        """See :meth:`postoffice.interfaces.IClaimedMessage.renew`."""
        if not self._claims.renew(self.place, lease):
            raise self._lost()
        self.until = self._claims.held[self.place].until

    def _waiting(self) -> Entry:
        entry = self._queue.record.live(self.place)
        if entry is None or self.place not in self._claims.held:
            raise self._lost()
        return entry

    def _lost(self) -> MessageTaken:
        return MessageTaken(f"message {self.id} is not held by this claim any more")
