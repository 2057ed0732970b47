"""Notices to the sender of a message: the bounce, and the note that a message is delayed.

A notice goes to the envelope sender alone, from the null reverse-path (RFC 5321 section 4.5.5),
and says of itself that it is automatic (RFC 3834 section 3).  It is never an answer to automatic
mail (RFC 3834 section 2).  A bounce is a delivery status notification (RFC 3464) whenever the
recipient that failed is known.

Everything here takes values and returns values: nothing is sent, no clock is read.  Whatever bytes
the original holds, what is taken from it is cleaned and cut before it enters a notice.  All
functions may be called from any thread.
"""

from __future__ import annotations

import copy
import quopri
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.charset import QP, Charset
from email.header import Header
from email.message import Message as StdlibMessage
from email.policy import Compat32, EmailPolicy
from email.utils import format_datetime, getaddresses, quote
from types import MappingProxyType

import idna

from postoffice.message import Message

__all__ = [
    "REASONS",
    "Notice",
    "automatic",
    "compose_bounce",
    "compose_quarantine_notice",
    "recipient_of_notice",
]

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "null-sender": "it came from the null reverse-path, as every notice does",
        "unknown-sender": "its envelope sender is not known",
        "invalid-sender": "its envelope sender is not one address that mail can be sent to",
        "own-address": "its envelope sender is also one of its recipients",
        "role-sender": "its envelope sender is a list's or a program's address",
        "notice": "it is itself a notice of postoffice",
        "auto-submitted": "it says that a program sent it",
        "precedence": "its Precedence is that of bulk mail, of a list or of a program",
        "mailing-list": "it came through a mailing list",
        "suppressed": "it asks for no automatic response",
        "report": "it is a report about another message",
    }
)
"""Why no notice may go to a message's sender: stable names, and what each says of the message."""

DEFAULT_REASON = "The message is invalid."

MAX_ADDRESS_OCTETS = 254  # RFC 5321 section 4.5.3.1.3: 256 with the angle brackets
MAX_HEADER_BLOCK = 64 * 1024
MAX_ID_LENGTH = 250
MAX_IDS_TEXT = 64 * 1024
MAX_LINE = 998  # RFC 5322 section 2.1.1
MAX_NAME = 100
MAX_REASON_LINES = 50
MAX_REASON_TEXT = 2000
MAX_RECIPIENTS = 100
MAX_REFERENCES = 20
MAX_SHOWN = 200

_ATEXT = r"0-9A-Za-z!#$%&'*+/=?^_`{|}~\-\u0080-\U0010FFFF"
# Misplaced dots are tolerated: such mailboxes exist.  No quoted pairs, and neither "<" nor ">"
# even when quoted: every program that a notice passes must see the same address.
_LOCAL_PART = re.compile(rf'[{_ATEXT}.]+|"[{_ATEXT}.,:;@()\[\]]+"')
_LABEL = re.compile(r"[0-9A-Za-z_](?:[0-9A-Za-z_-]*[0-9A-Za-z_])?")
_DOMAIN_LITERAL = re.compile(r"\[[0-9A-Za-z.:-]+\]")

_MESSAGE_ID = re.compile(rf"<[!-;=?-~]{{1,{MAX_ID_LENGTH - 2}}}>")
_SPECIAL = re.compile(r'[]()<>[:;@\\,."]')
_SEVEN_BIT = re.compile(rb"(?:[\t -~]{0,%d}\n)*" % MAX_LINE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# RFC 3834 section 2 and RFC 5230 section 4.6 name the first ones; the rest is what is seen.
_ROLE = re.compile(
    r"(?:mailer-daemon|postmaster|daemon|nobody|listserv|majordomo|mailman)(?:[+].*)?"
    r"|owner-.*|.*-(?:request|owner|bounces?)(?:[-+=].*)?|bounces?(?:[-+=_.].*)?"
    r"|(?:no|do[-_.]?not)[-_.]?reply(?:[-+=_.].*)?"
)

_AUTOMATIC_FIELDS = ("Auto-Submitted", "X-Autoreply", "X-Autorespond", "X-Autoresponder")
_AUTOMATIC_PRECEDENCE = frozenset({"bulk", "junk", "list", "auto_reply"})
# Of the values in Microsoft's [MS-OXCMAIL], those that speak of answers, not of receipts.
_SUPPRESSING = frozenset({"all", "ndr", "oof", "autoreply"})
_LIST_FIELDS = frozenset({"mailing-list", "x-mailing-list"})
_REPORT_TYPES = frozenset(
    {
        "multipart/report",
        "message/delivery-status",
        "message/global-delivery-status",
        "message/disposition-notification",
        "message/global-disposition-notification",
        "message/feedback-report",
    }
)

_BOUNCE_BODY = """\
Your message has bounced.
{details}
The reason given is:

{reason}

Nobody has received it there. If you think that this is a mistake, please
ask those who run the service that you wrote to.
"""

_QUARANTINE_BODY = """\
Your message has arrived, but a fault on our side keeps it from being
processed.
{details}
It is kept safe and its processing will be tried again when the fault is
mended. You need not send it again. We are sorry for the delay.
"""


class _NoticePolicy(Compat32):
    """The stdlib's default policy, but an address in UTF-8 stays what it is (RFC 6532).

    The default one would make an encoded word of it, which is no address any more.
    """

    utf8 = True  # SMTP.send_message makes a clone with it for an address that is not ASCII

    def fold(self, name: str, value: str) -> str:
        """Return the header field with its line break."""
        if value.isascii() or not value.isprintable():
            return super().fold(name, value)
        return f"{name}: {value}{self.linesep}"

    def fold_binary(self, name: str, value: str) -> bytes:
        """Return the header field with its line break, in UTF-8."""
        if value.isascii() or not value.isprintable():
            return super().fold_binary(name, value)
        return self.fold(name, value).encode()


_POLICY = _NoticePolicy(mangle_from_=False)
_TEXT = Charset("utf-8")
_TEXT.body_encoding = QP


@dataclass(frozen=True, slots=True)
class Notice:
    """A composed notice with its envelope, ready to be sent.

    :ivar sender: the reverse-path; always ``''``, so that nobody answers.
    :ivar recipients: the one address that it goes to.
    :ivar message: the notice; ``as_bytes()`` does not raise.  If the recipient's local part is
        not ASCII, it must be sent with SMTPUTF8 (RFC 6531).
    """

    sender: str
    recipients: tuple[str, ...]
    message: StdlibMessage


def automatic(message: Message) -> str | None:
    """Return why no notice may go to this message's sender, or ``None`` if one may.

    The answer is one of the names in :data:`REASONS`; the first that holds.  RFC 3834 section 2
    is the source of most.  Takes time linear in the size of the header; never raises on hostile
    input.
    """
    envelope = message.envelope
    if envelope is not None and envelope.sender == "":
        return "null-sender"
    if any(_is_null_path(path) for path in message.get_all("Return-Path", ())):
        return "null-sender"
    if envelope is None or envelope.sender is None:
        return "unknown-sender"
    sender = recipient_of_notice(message)
    if sender is None:
        return "invalid-sender"
    if sender.casefold() in {address.casefold() for address in envelope.recipients}:
        return "own-address"
    if _ROLE.fullmatch(sender.rpartition("@")[0].strip('"').lower()):
        return "role-sender"
    if _is_notice(message):
        return "notice"
    return _said_by_header(message)


def recipient_of_notice(message: Message) -> str | None:
    """Return the address that a notice about this message would go to, or ``None``.

    It is the envelope sender, never what the header says, if that is one mailbox with a domain,
    of at most 254 octets, without white space or anything unprintable, and not starting with a
    hyphen (a program that sends mail would take it for an option).  A domain in another script is
    returned in its ASCII form (RFC 5890).  Whether a notice *may* go there is :func:`automatic`'s
    question.
    """
    envelope = message.envelope
    if envelope is None or not envelope.sender:
        return None
    return _mailbox(envelope.sender)


def compose_bounce(
    message: Message,
    from_addr: str,
    now: datetime,
    reason: str | None = None,
    custom: StdlibMessage | None = None,
) -> Notice | None:
    """Compose the notice that this message was refused.

    Returns ``None`` if :func:`automatic` forbids one, or if it would go to ``from_addr`` itself.

    :param from_addr: one address, with a display name or without; becomes the notice's From.
    :param now: the time, with its zone; becomes the notice's Date.
    :param reason: the reason for people to read, any text; cut to 50 lines and 2,000 characters.
    :param custom: a message to be sent instead of ours.  A copy is sent as given, apart from
        X-Postoffice, which is set, and From, To, Date, Message-ID, Auto-Submitted, In-Reply-To
        and References, which are added where they are missing.
    :raises ValueError: ``reason`` and ``custom`` are both given, ``from_addr`` is not one address
        with a domain, or ``now`` has no zone.  What ``custom`` raises on serialising is raised
        here too, before anything is sent.

    Without ``custom`` it is a ``multipart/report`` (RFC 3464) of the text, the delivery status and
    the header of the original (at most 64 KiB, never its body); or the text alone if the envelope
    names no recipient, since a status must be about one.
    """
    if reason is not None and custom is not None:
        raise ValueError("only one of reason and custom may be given")
    origin = _Origin.parse(from_addr)
    if now.utcoffset() is None:
        raise ValueError("now has no time zone")
    recipient = _permitted_recipient(message, origin)
    if recipient is None:
        return None
    headers = _headers(message, origin, recipient, now)
    if custom is not None:
        return Notice("", (recipient,), _completed(custom, headers, recipient))
    notice = _notice(headers, f"Your message{_to(message)} has bounced.")
    reason_lines = _reason_lines(reason)
    body = _BOUNCE_BODY.format(details=_details(message), reason=_indented(reason_lines))
    failed = _failed_recipients(message)
    if not failed:
        _set_text(notice, body)
        return Notice("", (recipient,), notice)
    text = StdlibMessage(_POLICY)
    _set_text(text, body)
    status = _delivery_status(message, origin, failed, " ".join(reason_lines))
    notice.add_header("Content-Type", "multipart/report", report_type="delivery-status")
    notice.set_payload([text, status, _original_header(message)])
    return Notice("", (recipient,), notice)


def compose_quarantine_notice(message: Message, from_addr: str, now: datetime) -> Notice | None:
    """Compose the notice that this message is kept until a fault of ours is mended.

    It is no failure, so it is a plain text and not a delivery status notification.  Returns
    ``None`` as :func:`compose_bounce` does.

    :param from_addr: one address, with a display name or without; becomes the notice's From.
    :param now: the time, with its zone; becomes the notice's Date.
    :raises ValueError: ``from_addr`` is not one address with a domain, or ``now`` has no zone.
    """
    origin = _Origin.parse(from_addr)
    if now.utcoffset() is None:
        raise ValueError("now has no time zone")
    recipient = _permitted_recipient(message, origin)
    if recipient is None:
        return None
    headers = _headers(message, origin, recipient, now)
    notice = _notice(headers, f"An error has occurred while processing your email{_to(message)}")
    _set_text(notice, _QUARANTINE_BODY.format(details=_details(message)))
    return Notice("", (recipient,), notice)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Whom a notice is from: the text of its From field, the address in it, and its domain."""

    field: str
    address: str
    domain: str

    @classmethod
    def parse(cls, from_addr: str) -> _Origin:
        """Read the application's address; raise :exc:`ValueError` if there is not exactly one."""
        mailboxes = getaddresses([from_addr]) if from_addr.isprintable() else []
        address = _mailbox(mailboxes[0][1]) if len(mailboxes) == 1 else None
        if address is None:
            raise ValueError(f"not one address with a domain: {_line(from_addr, MAX_SHOWN)!r}")
        field = address
        name = _line(mailboxes[0][0], MAX_NAME)
        if name:
            needs_quotes = name.isascii() and _SPECIAL.search(name)
            phrase = f'"{quote(name)}"' if needs_quotes else _encoded(name)
            field = f"{phrase} <{address}>"
        return cls(field, address, address.rpartition("@")[2])


def _permitted_recipient(message: Message, origin: _Origin) -> str | None:
    if automatic(message) is not None:
        return None
    recipient = recipient_of_notice(message)
    if recipient is None or recipient.casefold() == origin.address.casefold():
        return None
    return recipient


def _mailbox(text: str) -> str | None:
    """Return the addr-spec with its domain in ASCII, or ``None`` if it is not a safe one."""
    if len(text) > MAX_ADDRESS_OCTETS or not text.isprintable() or text.startswith("-"):
        return None
    local, _, domain = text.rpartition("@")
    if not _LOCAL_PART.fullmatch(local):
        return None
    address = f"{local}@{_ascii_domain(domain)}"
    if address.endswith("@") or len(address.encode()) > MAX_ADDRESS_OCTETS:
        return None
    return address


def _ascii_domain(domain: str) -> str:
    """Return the domain in ASCII, without a last dot; the empty string if it is none."""
    if _DOMAIN_LITERAL.fullmatch(domain):
        return domain
    if not domain.isascii():
        try:
            domain = idna.encode(domain, uts46=True).decode("ascii")
        except UnicodeError:
            return ""
    domain = domain.removesuffix(".")
    labels = domain.split(".")
    return domain if all(len(x) <= 63 and _LABEL.fullmatch(x) for x in labels) else ""


def _is_null_path(path: str) -> bool:
    text = "".join(path.split())
    return text == "" or text.startswith("<>")


def _is_notice(message: Message) -> bool:
    # A message hides such a field if the sender wrote it; as a sign of a notice it is believed.
    values = [*message.get_all("X-Postoffice", ()), *message.written("X-Postoffice")]
    return any(_keyword(value) == "bounced" for value in values)


def _said_by_header(message: Message) -> str | None:
    """Return the reason that the original's own header gives, or ``None``."""
    for name in _AUTOMATIC_FIELDS:
        if any(_keyword(value) != "no" for value in message.get_all(name, ())):
            return "auto-submitted"
    if not _AUTOMATIC_PRECEDENCE.isdisjoint(map(_keyword, message.get_all("Precedence", ()))):
        return "precedence"
    names = map(str.lower, message.keys())
    if any(name.startswith("list-") or name in _LIST_FIELDS for name in names):
        return "mailing-list"
    for value in message.get_all("X-Auto-Response-Suppress", ()):
        if not _SUPPRESSING.isdisjoint(item.strip().lower() for item in value.split(",")):
            return "suppressed"
    if message.get_content_type() in _REPORT_TYPES:
        return "report"
    return None


def _keyword(value: str) -> str:
    """Return the first word of a header's value in lower case, without parameters or comments."""
    words = re.split(r"[\s;(,]", value.strip(), maxsplit=1)
    return words[0].lower()


def _line(text: str, limit: int) -> str:
    """Return the beginning of ``text`` as one printable line of at most ``limit`` characters."""
    part = text[: 4 * limit]
    line = " ".join("".join(c if c.isprintable() else " " for c in part).split())
    if len(line) <= limit and len(part) == len(text):
        return line
    return f"{line[: limit - 3].rstrip()}..."


def _encoded(text: str) -> str:
    """Return one line as the ASCII text of an unstructured header field (RFC 2047)."""
    # What looks like an encoded word, but is text of the original, must not be decoded again.
    if text.isascii() and "=?" not in text:
        return text
    return Header(text, "utf-8", header_name="Subject").encode(linesep="\n").replace("\n ", " ")


def _shown_recipients(message: Message) -> str:
    """Return the recipients for people to read, or the empty string."""
    shown = _line(message.get("To") or "", MAX_SHOWN)
    if not shown and message.envelope is not None:
        shown = _line(", ".join(message.envelope.recipients[:MAX_RECIPIENTS]), MAX_SHOWN)
    return shown


def _to(message: Message) -> str:
    shown = _shown_recipients(message)
    return f" to {shown}" if shown else ""


def _details(message: Message) -> str:
    """Return the paragraph by which the sender knows the message again, if there is one."""
    fields = {
        "To": _shown_recipients(message),
        "Sent": _line(message.get("Date") or "", MAX_NAME),
        "Received": _arrival_date(message),
        "Subject": _line(message.get("Subject") or "", MAX_SHOWN),
    }
    known = [f"{name}: {text}" for name, text in fields.items() if text]
    return f"\n{_indented(known)}\n" if known else ""


def _indented(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _arrival_date(message: Message) -> str:
    """Return the time of arrival as a header field shows it, or the empty string if unknown."""
    arrived = message.envelope.arrived if message.envelope is not None else 0
    if arrived <= 0:
        return ""
    try:
        return format_datetime(_EPOCH + timedelta(seconds=arrived // 1_000_000_000))
    except OverflowError:
        return ""


def _reason_lines(reason: str | None) -> list[str]:
    text = (reason or "")[:MAX_REASON_TEXT]
    lines = [_line(line, MAX_REASON_TEXT) for line in text.splitlines()[:MAX_REASON_LINES]]
    return [line for line in lines if line] or [DEFAULT_REASON]


def _headers(message: Message, origin: _Origin, recipient: str, now: datetime) -> dict[str, str]:
    """Return the header fields that every notice has, apart from its Subject."""
    headers = {
        "From": origin.field,
        "To": recipient,
        "Date": format_datetime(now),
        "Message-ID": f"<{now:%Y%m%d%H%M%S}.{secrets.token_hex(12)}@{origin.domain}>",
        "Auto-Submitted": "auto-replied",
        "X-Postoffice": "Bounced",
    }
    # RFC 5322 section 3.6.4
    own = _message_ids(message.get("Message-ID") or "")[:1]
    replied_to = _message_ids(message.get("In-Reply-To") or "")
    chain = _message_ids(message.get("References") or "")
    if not chain and len(replied_to) == 1:
        chain = replied_to
    chain = list(dict.fromkeys([x for x in chain if x not in own] + own))
    if len(chain) > MAX_REFERENCES:
        chain = chain[:1] + chain[1 - MAX_REFERENCES :]
    if own:
        headers["In-Reply-To"] = own[0]
    if chain:
        headers["References"] = " ".join(chain)
    return headers


def _message_ids(text: str) -> list[str]:
    found = _MESSAGE_ID.findall(text[-MAX_IDS_TEXT:])
    return [x for x in found if "@" in x[2:-2]]


def _notice(headers: Mapping[str, str], subject: str) -> StdlibMessage:
    notice = StdlibMessage(_POLICY)
    for name, value in headers.items():
        notice[name] = value
    notice["Subject"] = _encoded(subject)
    notice["MIME-Version"] = "1.0"
    return notice


def _completed(custom: StdlibMessage, headers: Mapping[str, str], recipient: str) -> StdlibMessage:
    """Return a copy of the application's message with the fields that it must have."""
    notice = copy.deepcopy(custom)
    if not recipient.isascii():
        policy = notice.policy
        notice.policy = policy.clone(utf8=True) if isinstance(policy, EmailPolicy) else _POLICY
    del notice["X-Postoffice"]
    for name, value in headers.items():
        if name not in notice:
            notice[name] = value
    notice.as_bytes()
    return notice


def _set_text(part: StdlibMessage, text: str) -> None:
    part.set_payload(text, _TEXT)


def _failed_recipients(message: Message) -> list[str]:
    known = message.envelope.recipients if message.envelope is not None else ()
    return list(filter(None, map(_mailbox, known[:MAX_RECIPIENTS])))


def _delivery_status(
    message: Message, origin: _Origin, failed: list[str], reason: str
) -> StdlibMessage:
    """Return the part for programs (RFC 3464 section 2)."""
    about_message = StdlibMessage(_POLICY)
    about_message["Reporting-MTA"] = f"dns; {origin.domain}"
    arrival = _arrival_date(message)
    if arrival:
        about_message["Arrival-Date"] = arrival
    blocks: list[StdlibMessage | str] = [about_message]
    diagnostic = _line(reason, MAX_SHOWN).encode("ascii", "replace").decode("ascii")
    for address in failed:
        block = StdlibMessage(_POLICY)
        block["Final-Recipient"] = _typed_address(address)
        block["Action"] = "failed"
        block["Status"] = "5.0.0"
        block["Diagnostic-Code"] = f"X-Postoffice; {diagnostic}"
        blocks.append(block)
    part = StdlibMessage(_POLICY)
    part["Content-Type"] = "message/delivery-status"
    part.set_payload(blocks)
    return part


def _typed_address(address: str) -> str:
    if address.isascii():
        return f"rfc822; {address}"
    # RFC 6533 section 3, utf-8-addr-xtext
    return "utf-8; " + "".join(
        c if c.isascii() and c not in "+=\\" else f"\\x{{{ord(c):X}}}" for c in address
    )


def _original_header(message: Message) -> StdlibMessage:
    """Return the part with the header of the original (RFC 6522 section 4)."""
    block = bytes(message.raw[: min(message.header_end, MAX_HEADER_BLOCK)])
    if message.header_end > MAX_HEADER_BLOCK:
        block = block[: block.rfind(b"\n") + 1] or block
    block = re.sub(rb"\r+\n", b"\n", block).strip(b"\r\n") + b"\n"
    part = StdlibMessage(_POLICY)
    part["Content-Type"] = "text/rfc822-headers"
    if _SEVEN_BIT.fullmatch(block):
        part["Content-Transfer-Encoding"] = "7bit"
        part.set_payload(block.decode("ascii"))
    else:
        part["Content-Transfer-Encoding"] = "quoted-printable"
        # binascii takes a carriage return for part of a line break, wherever it stands.
        encoded = quopri.encodestring(block).replace(b"\r", b"=0D")
        part.set_payload(encoded.decode("ascii"))
    return part
