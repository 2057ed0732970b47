"""Fingerprints: what makes two messages the same, and two senders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from postoffice.headers import Buffer
    from postoffice.message import Message

__all__ = [
    "Digests",
    "duplicate_digest",
    "raw_digest",
    "receipt_digest",
    "sender_digest",
    "values_digest",
]


def raw_digest(raw: Buffer) -> bytes:
    """Return the sha256 of raw bytes."""
    return hashlib.sha256(raw).digest()


def duplicate_digest(message: Message, body: bytes | None = None) -> bytes:
    """Return 16 bytes that agree for messages that are duplicates of each other, and only then.

    Duplicates have the same Message-ID, the same original recipient (of the envelope where that is
    known, else of the topmost X-Original-To or Delivered-To) and the same body.

    :param body: what stands for the body of a message that was left without it.
    """
    return Digests(message, body).duplicate()


class Digests:
    """The digests of one message, whose bytes are hashed once, however many recipients it has.

    Its envelope may change meanwhile.
    """

    def __init__(
        self, message: Message, body: bytes | None = None, content: bytes | None = None
    ) -> None:
        """Hash nothing yet.

        :param body: see :func:`duplicate_digest`.
        :param content: the sha256 of the message's bytes, where it is known.
        """
        self._message = message
        self._body = body
        self._content = content
        self._hashed: hashlib._Hash | None = None

    def raw(self) -> bytes:
        """Return the sha256 of the message's bytes."""
        if self._content is None:
            self._content = raw_digest(self._message.buffer)
        return self._content

    def duplicate(self) -> bytes:
        """Return what :func:`duplicate_digest` does."""
        message = self._message
        envelope = message.envelope
        recipients: Sequence[str] = envelope.recipients if envelope is not None else ()
        if not recipients:
            recipients = message.addresses("X-Original-To") or message.addresses("Delivered-To")
        identity = "\0".join([message.message_id, *(name.lower() for name in recipients)])
        if self._hashed is None:
            self._hashed = hashlib.sha256(message.body_view if self._body is None else self._body)
        digest = self._hashed.copy()
        digest.update(b"\0")
        digest.update(identity.encode("utf-8", "surrogatepass"))
        return digest.digest()[:16]


def sender_digest(user: str) -> bytes:
    """Return 16 bytes that stand for a sender."""
    return hashlib.sha256(user.encode("utf-8", "surrogatepass")).digest()[:16]


def values_digest(values: Sequence[tuple[str, str]]) -> bytes:
    """Return 8 bytes that stand for the values of some headers, in whatever order."""
    pairs = sorted((name.lower(), value) for name, value in values)
    text = "\0".join(f"{name}\0{value}" for name, value in pairs)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]


def receipt_digest(sender: str, recipient: str, content: bytes) -> bytes:
    """Return what one delivery to one recipient is known by, when it comes again: 16 bytes.

    :param content: digest of the message's bytes.
    """
    parts = [one.encode("utf-8", "surrogateescape") for one in (sender, recipient)]
    text = b"".join(len(part).to_bytes(4, "big") + part for part in (*parts, content))
    return hashlib.sha256(text).digest()[:16]
