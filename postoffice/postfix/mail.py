"""A message in Postfix's own queue: what the queue tells of it, and its headers on demand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from postoffice.display import printable
from postoffice.postfix.errors import PostfixError
from postoffice.postfix.headers import MailHeaders
from postoffice.postfix.ids import is_queue_id
from postoffice.postfix.program import Program, failure, run
from postoffice.postfix.settings import PostfixSettings

__all__ = ["Mail", "Recipient", "distinct_reasons", "is_queue_id"]

_DEFAULT = PostfixSettings()
_UNREAD = MailHeaders()
# Postfix's line_length_limit, unless it is changed.
_LONGEST_RECORD = 2048

# A break and what indents the line below it (RFC 5322 section 2.2.3).
_FOLD = re.compile(r"\n[ \t]*")


class Recipient(str):
    """A recipient's address, which is what it is as a string, and what became of it up to now.

    :ivar reason: why the last attempt to deliver to it failed; empty where none has.
    """

    __slots__ = ("reason",)

    reason: str

    def __new__(cls, address: str, reason: str = "") -> Recipient:
        """Make one of its address and the reason of its delay."""
        self = str.__new__(cls, address)
        self.reason = reason
        return self

    @property
    def state(self) -> str:
        """``deferred`` where an attempt to deliver to it has failed, otherwise ``pending``."""
        return "deferred" if self.reason else "pending"


def distinct_reasons(recipients: Iterable[Recipient]) -> list[str]:
    """Return the reasons of these recipients, each once, in their order."""
    reasons = {one.reason: None for one in recipients}
    reasons.pop("", None)
    return list(reasons)


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
    # Of most messages these are never asked, and a queue may have a million.
    head: MailHeaders = _UNREAD
    parsed: bool = False
    parse_error: str = ""
    settings: PostfixSettings = _DEFAULT

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
        self.errors = distinct_reasons(self.recipients)
        self.forced_expire = forced_expire
        if settings is not None:
            self.settings = settings

    def __getattr__(self, name: str) -> list[str]:
        # Only for names that are nothing of ours.
        values: list[str] = getattr(self.head, name)
        return values

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.qid} {self.status} from {self.sender!r}>"

    @property
    def postcat_cmd(self) -> list[str]:
        """The command, with its arguments, that shows this message's header."""
        return self.settings.command("cat_message", "-qh", self.qid)

    def parse(self) -> None:
        """Read the header fields, by the command in :attr:`postcat_cmd`.

        Raises nothing: what went wrong is in ``parse_error``.  For many messages
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
            block = output.stdout
            if len(block.rstrip(b"\n").rpartition(b"\n")[2]) >= _LONGEST_RECORD:
                block = self._whole_header()
        except PostfixError as error:
            self.parse_error = str(error)
            return
        self.read_headers(block)

    def _whole_header(self) -> bytes:
        """Read a header in which a line is longer than a record.

        Behind such a line postcat sees no header any more, unless it shows the body too.
        """
        lines = []
        with Program(
            self.settings.command("cat_message", "-qhb", self.qid), self.settings.timeout
        ) as program:
            for line in program.lines():
                if not line:
                    break
                lines.append(line + b"\n")
        return b"".join(lines)

    def read_headers(self, block: bytes) -> None:
        """Take the header fields from a message's header block; then it is parsed."""
        self.head = MailHeaders.from_bytes(block)
        self.parsed = True
        self.parse_error = ""

    def dump(self) -> dict[str, dict[str, Any]]:
        """Return what is known of it: ``postqueue`` from the queue, ``headers`` from itself.

        ``headers`` holds a list of values by name, and is empty until the message was parsed.  The
        values are those of the attributes: a ``datetime`` is among them.
        """
        return {
            "postqueue": {
                "qid": self.qid,
                "status": self.status,
                "size": self.size,
                "date": self.date,
                "sender": self.sender,
                "recipients": list(self.recipients),
                "errors": list(self.errors),
                "forced_expire": self.forced_expire,
                "parsed": self.parsed,
                "parse_error": self.parse_error,
            },
            "headers": {name: list(values) for name, values in self.head.items()},
        }

    def show(self) -> str:
        """Return its description for a terminal: what the queue tells, then its header fields.

        What is not printable is written as an escape, and a folded field in one line.
        """
        facts = [
            ("Queue ID", self.qid),
            ("Status", f"{self.status}, expired by force" if self.forced_expire else self.status),
            ("Arrived", "" if self.date is None else f"{self.date:%Y-%m-%d %H:%M:%S}"),
            ("Size", f"{self.size} bytes"),
            ("Sender", self.sender or "<>"),
        ]
        for one in self.recipients:
            facts.append(("Recipient", f"{one} ({one.reason})" if one.reason else one))
        if self.parse_error:
            facts.append(("Not parsed", self.parse_error))
        lines = [f"{name + ':':<11} {value}" for name, value in facts if value]
        if self.parsed:
            lines.append("")
            for name, values in self.head.items():
                lines += [f"{name}: {_FOLD.sub(' ', value)}" for value in values]
        return "\n".join(map(printable, lines))
