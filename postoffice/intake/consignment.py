"""The consignment: a message that came over a connection, read and decided on."""

from __future__ import annotations

import hashlib
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from postoffice.delivery import Prepared, oversize_message, prepare
from postoffice.display import one_line
from postoffice.exceptions import LimitExceeded
from postoffice.fingerprints import Digests, receipt_digest
from postoffice.intake.arrival import Arrival
from postoffice.intake.reader import body_digest, header_end, open_message
from postoffice.loops import LoopRule
from postoffice.message import Envelope, Message, mta_queue_id
from postoffice.routing import Routing

__all__ = ["Consignment", "Parcel", "consign", "parcel_of"]

_PIECE = 1 << 20
# What an MTA writes in front of a message, one field; one that goes on in a second line is not its.
_TRACE = re.compile(rb"(Return-Path|Delivered-To|X-Original-To):([^\n]*)\n(?![ \t])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message as it came, its lines ended by LF.

    :ivar source: what this arrival is called in the log: unique.
    :ivar sender: envelope sender; ``""`` is the null reverse-path.
    :ivar recipients: envelope recipients, each once or more often.
    :ivar raw: its bytes; ``None`` where they are in a file.
    :ivar path: that file, or ``""``.
    :ivar size: in bytes.
    :ivar arrived: nanoseconds since the epoch.
    :ivar way: the way in: ``lmtp`` or ``pipe``.
    """

    source: str
    sender: str
    recipients: tuple[str, ...]
    raw: bytes | None
    path: str
    size: int
    arrived: int
    way: str

    def pieces(self, number: int) -> Iterator[bytes]:
        """Iterate over the bytes for one of the recipients, with its trace lines in front."""
        if self.raw is not None:
            yield self.trace(number, self.raw)
            yield self.raw
            return
        with open(self.path, "rb") as file:
            piece = file.read(_PIECE)
            yield self.trace(number, piece)
            while piece:
                yield piece
                piece = file.read(_PIECE)

    def trace(self, number: int, start: bytes) -> bytes:
        """Return the lines that an MTA writes in front of a message, for one of the recipients.

        With them in front it says in a Maildir what its envelope was (RFC 5321, 4.4).  Those that
        pipe(8) has written there already are left out.

        :param start: of the message.
        """
        wanted = (
            ("Return-Path", f"<{self.sender}>"),
            ("Delivered-To", self.recipients[number]),
        )
        there = _trace_fields(start)
        lines = b""
        for name, text in wanted:
            value = text.encode("utf-8", "surrogateescape")
            if there.get(name.lower().encode()) != value:
                lines += b"%s: %s\n" % (name.encode(), value)
        return lines


@dataclass(frozen=True, slots=True)
class Consignment:
    """An arrival that was read and decided on, ready for the intake transaction.

    :ivar parcel: what came.
    :ivar prepared: one for each recipient; none when it cannot be processed.
    :ivar receipts: the digest, for each recipient, by which it is known when it comes again.
    :ivar reason: why it cannot be processed, or ``""``.
    """

    parcel: Parcel
    prepared: tuple[Prepared, ...]
    receipts: tuple[bytes, ...]
    reason: str = ""

    def name(self, number: int) -> str:
        """Return what the message for the recipient of this number is called, here and in files."""
        return _name(self.receipts[number], self.parcel.way)


def parcel_of(arrival: Arrival, now: int, number: int, way: str) -> Parcel:
    """Name a message that has arrived in this process.

    :param now: the time of its arrival, in nanoseconds since the epoch.
    :param number: of the message, among all of this process.
    :param way: ``lmtp`` or ``pipe``.
    """
    pid = os.getpid()
    return Parcel(
        f"{now // 1_000_000_000}.M{now // 1000 % 1_000_000:06}P{pid}Q{number}.{way}",
        arrival.sender,
        arrival.recipients,
        arrival.raw,
        # A file without a name; another process of this user finds it here.
        "" if arrival.file is None else f"/proc/{pid}/fd/{arrival.file.fileno()}",
        arrival.size,
        now,
        way,
    )


def consign(routing: Routing, loop: LoopRule | None, parcel: Parcel) -> Consignment:
    """Read an arrival, and decide on it for each recipient.

    Pure, but that a large message's file is read.  Nothing that a message holds makes it raise.

    :raises OSError: the file cannot be read.
    """
    if parcel.raw is not None:
        content = hashlib.sha256(parcel.raw).digest()
    else:
        content = _file_digest(parcel.path)
    receipts = tuple(
        receipt_digest(parcel.sender, recipient, content) for recipient in parcel.recipients
    )
    try:
        prepared = _prepared(routing, loop, parcel, receipts, content)
        return Consignment(parcel, tuple(prepared), receipts)
    except OSError:
        raise
    except LimitExceeded as error:
        reason = f"limit exceeded: {one_line(error)}"
    except MemoryError:
        reason = "it needs more memory than there is"
    except Exception as error:
        # A defect of ours, which the message has brought out: it costs this one message alone.
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(where.filename)}:{where.lineno}"
        reason = f"{type(error).__name__} in {place}: {one_line(error)}"
    return Consignment(parcel, (), receipts, reason)


def _trace_fields(start: bytes) -> dict[bytes, bytes]:
    """Return the topmost trace fields of each name that a message begins with."""
    found: dict[bytes, bytes] = {}
    at = 0
    while field := _TRACE.match(start, at):
        found.setdefault(field[1].lower(), field[2].strip())
        at = field.end()
    return found


def _name(receipt: bytes, way: str) -> str:
    # The same when it comes again, so that what an attempt that was cut off has left is replaced.
    return f"{receipt.hex()}.{way}"


def _prepared(
    routing: Routing,
    loop: LoopRule | None,
    parcel: Parcel,
    receipts: Sequence[bytes],
    content: bytes,
) -> Sequence[Prepared]:
    body = None
    if parcel.raw is not None:
        message, body = _in_memory(routing, parcel.raw, parcel.arrived)
    else:
        descriptor = os.open(parcel.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            message = open_message(routing, descriptor, parcel.arrived)
            if message.oversize:
                body = body_digest(descriptor)
        finally:
            os.close(descriptor)
    queue_id = mta_queue_id(message)
    # An oversize message has other bytes than what came.
    digests = Digests(message, body, None if message.oversize else content)
    found = []
    for receipt, recipient in zip(receipts, parcel.recipients, strict=True):
        message.envelope = Envelope(parcel.sender, (recipient,), parcel.arrived, queue_id)
        source = _name(receipt, parcel.way)
        found.append(prepare(routing, loop, message, source, parcel.way, parcel.size, digests))
    return found


def _in_memory(routing: Routing, raw: bytes, arrived: int) -> tuple[Message, bytes | None]:
    own = (("X-Postoffice-Date", str(arrived // 1_000_000_000)),)
    if not routing.is_oversize(len(raw)):
        return Message.from_bytes(raw, own), None
    end = header_end(raw[:_PIECE])
    kept = oversize_message(raw[:end], len(raw), routing.max_message_size or 0)
    message = Message.from_bytes(kept, own)
    message.oversize = True
    return message, hashlib.sha256(raw[end:]).digest()


def _file_digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
