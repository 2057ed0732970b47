"""A message in Postfix's own queue: what the queue tells of it, and its headers on demand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from postoffice.postfix.errors import PostfixError
from postoffice.postfix.headers import MailHeaders
from postoffice.postfix.program import failure, run
from postoffice.postfix.settings import PostfixSettings

__all__ = ["Mail", "Recipient", "is_queue_id"]

# Wider than what any Postfix makes, and nothing that a command could take for an option or a path.
_QUEUE_ID = re.compile(r"[A-Za-z0-9]{1,64}", re.ASCII)


def is_queue_id(text: str) -> bool:
    """Return whether a command of Postfix may be given this text as the id of a message."""
    return _QUEUE_ID.fullmatch(text) is not None and text != "ALL"


class Recipient(str):
    """A recipient's address, which is what it is as a string, and what became of it up to now.

    :ivar reason: why the last attempt to deliver to it failed; empty where none has.
    :ivar state: ``deferred`` where an attempt has failed, otherwise ``pending``.
    """

    __slots__ = ("reason", "state")

    reason: str
    state: str

    def __new__(cls, address: str, reason: str = "") -> Recipient:
        """Make one of its address and the reason of its delay."""
        self = super().__new__(cls, address)
        self.reason = reason
        self.state = "deferred" if reason else "pending"
        return self


class Mail:
    """One message in Postfix's own queue.

    The header fields become attributes too, once the message was parsed: ``mail.From`` is
    ``mail.head.From``.

    :ivar qid: its id in the queue.
    :ivar size: bytes, as the queue counts them.
    :ivar date: when it arrived, in local time and naive, to the second; ``None`` if unknown.
    :ivar sender: the envelope's sender; the null sender is the empty string.
    :ivar recipients: the :class:`Recipient` values to whom it has still to be delivered.
    :ivar errors: the recipients' reasons, each once, in the order of the queue's listing.
    :ivar status: ``active``, ``deferred`` or ``hold``; ``incoming``, ``maildrop`` or ``corrupt``
        where the source tells.
    :ivar forced_expire: whether it is returned at the next attempt, by ``postsuper -e``.
    :ivar head: its header fields, empty until it was parsed.
    :ivar parsed: whether its header fields were read.
    :ivar parse_error: why they could not be read; empty otherwise.
    :ivar settings: how its Postfix is reached.
    """

    qid: str
    size: int
    date: datetime | None
    sender: str
    recipients: list[Recipient]
    errors: list[str]
    status: str
    forced_expire: bool
    head: MailHeaders
    parsed: bool
    parse_error: str
    settings: PostfixSettings

    def __init__(
        self,
        mail_id: str,
        size: int = 0,
        date: datetime | None = None,
        sender: str = "",
        *,
        status: str = "",
        recipients: Iterable[Recipient] = (),
        forced_expire: bool = False,
        settings: PostfixSettings | None = None,
    ) -> None:
        """Hold what the queue tells of a message.

        :param mail_id: its id in the queue.
        :param size: bytes.
        :param date: when it arrived, in local time and naive.
        :param sender: the envelope's sender, empty for the null sender.
        """
        self.qid = mail_id
        self.size = size
        self.date = date
        self.sender = sender
        self.status = status
        self.recipients = list(recipients)
        self.errors = list(dict.fromkeys(one.reason for one in self.recipients if one.reason))
        self.forced_expire = forced_expire
        self.head = MailHeaders()
        self.parsed = False
        self.parse_error = ""
        self.settings = PostfixSettings() if settings is None else settings

    @property
    def postcat_cmd(self) -> list[str]:
        """The command, with its arguments, that shows this message's header."""
        return self.settings.command("cat_message", "-qh", self.qid)

    def parse(self) -> None:
        """Read the header fields, by the command in :attr:`postcat_cmd`.

        Raises nothing: what went wrong is in :attr:`parse_error`.  For many messages
        :meth:`PostqueueStore.load` with ``parse=True`` needs far fewer processes.
        """
        if not is_queue_id(self.qid):
            self.parse_error = f"{self.qid!r} is no id of a message in Postfix's queue"
            return
        try:
            words = self.postcat_cmd
            output = run(words, self.settings.timeout)
            if output.status:
                raise failure(words, output.status, output.said)
        except PostfixError as error:
            self.parse_error = str(error)
            return
        self.read_headers(output.stdout)

    def read_headers(self, block: bytes) -> None:
        """Take the header fields from a message's header block; then it is parsed."""
        self.head = MailHeaders.from_bytes(block)
        self.parsed = True
        self.parse_error = ""
