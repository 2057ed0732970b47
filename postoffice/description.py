"""Messages and entries: what the depot notes of a message, and a message made of what it noted."""

from __future__ import annotations

import email.message
import os
import traceback
import weakref
from types import TracebackType
from typing import Any

from ZODB.blob import Blob

from postoffice.depot.entry import Entry, ErrorText
from postoffice.fingerprints import raw_digest
from postoffice.message import Envelope, Message

__all__ = ["as_message", "describe", "error_text", "header_values", "message_of", "stored_bytes"]

_HEADER_LENGTH = 200
_ERROR_LENGTH = 64 * 1024


def as_message(message: email.message.Message | bytes) -> Message:
    """Return a message of ours for whatever an application has."""
    if isinstance(message, Message):
        return message
    if isinstance(message, bytes):
        return Message.from_bytes(message)
    return Message.from_bytes(message.as_bytes())


def stored_bytes(message: Message) -> bytes:
    """Return the bytes to keep of a message: what arrived, unless the application changed it."""
    return message.raw if message.is_untouched() else message.as_bytes()


def describe(message: Message, raw: bytes, arrived: int) -> dict[str, Any]:
    """Return the values of the entry of a message that an application adds.

    :param raw: the bytes that are kept of it.
    :param arrived: nanoseconds since the epoch, where the envelope does not say.
    """
    envelope = message.envelope
    values: dict[str, Any] = {
        "arrived": arrived,
        "way": "application",
        "size": len(raw),
        "digest": raw_digest(raw),
        "reason": "added-by-application",
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


class LargeBody:
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


def message_of(entry: Entry, queue_name: str) -> Message:
    """Return the message of an entry; it stays readable when the connection is closed."""
    envelope = Envelope(entry.sender, entry.recipients, entry.arrived, entry.mta_queue_id)
    own = [
        ("X-Postoffice-Id", str(entry.id)),
        ("X-Postoffice-Date", str(entry.arrived // 1_000_000_000)),
        *(("X-Postoffice-Rejected", mark) for mark in entry.marks),
    ]
    if isinstance(entry.body, Blob):
        message = Message.from_loader(LargeBody(entry.open_raw()), own, envelope)
    else:
        message = Message.from_bytes(entry.read_raw(), own, envelope)
    message.id = entry.id
    message.queue_name = queue_name
    message.oversize = entry.oversize
    message.entry = entry
    return message


def error_text(error: Any) -> ErrorText:
    """Return the text of ``sys.exc_info()``, of an exception, or of anything else."""
    kind, value, trace = "", "", ""
    if isinstance(error, BaseException):
        error = (type(error), error, error.__traceback__)
    if isinstance(error, tuple) and len(error) == 3:
        if all(isinstance(part, str) for part in error):
            return ErrorText(*error)
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
