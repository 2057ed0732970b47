"""A message on its way in by LMTP: its bytes in memory, or in a file without a name."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from postoffice.intake.conversation import Begin

__all__ = ["Arrival", "Incoming", "Memory"]

# What a file system says that cannot make files without names.
_NAMED_ONLY = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Arrival:
    """A complete message with its envelope.

    :ivar sender: the reverse-path; ``""`` is the null one.
    :ivar recipients: the forward-paths that were accepted, each once, at least one.
    :ivar smtputf8: whether the client asked for SMTPUTF8 (RFC 6531).
    :ivar raw: the message, its lines ended by LF; ``None`` when it is in `file`.
    :ivar file: the message likewise, read from its beginning; ``None`` when it is in `raw`.  A
        real file, open for reading and writing, which is closed after delivery.
    :ivar size: its bytes.
    :ivar way: the way in: ``lmtp`` or ``pipe``.
    """

    sender: str
    recipients: tuple[str, ...]
    smtputf8: bool
    raw: bytes | None
    file: BinaryIO | None
    size: int
    way: str = "lmtp"


class Memory:
    """How many bytes all the messages of one listener have in memory, and may have."""

    def __init__(self, limit: int) -> None:
        """Begin with none of `limit` bytes."""
        self.limit = limit
        self.used = 0


class Incoming:
    """A message while its bytes come.

    It goes on in a file once it is larger than what one message may have in memory, or once all
    messages together have more than they may: a client that stops in the middle of its message
    then keeps no other from being received.  The files are written to where they are called for,
    in the system's cache, without waiting for the disk.

    :ivar begin: the envelope.
    :ivar size: bytes so far.
    """

    def __init__(self, begin: Begin, folder: str, memory: Memory, most: int) -> None:
        """Begin with no bytes.

        :param folder: where a file is made.
        :param most: bytes that this message may have in memory.
        """
        self.begin = begin
        self._folder = folder
        self._memory = memory
        self._most = most
        self._held: bytes | bytearray = b""
        self._counted = 0
        self._file: BinaryIO | None = None
        self.size = 0

    def add(self, data: bytes) -> None:
        """Take more bytes.

        :raises OSError: they cannot be stored; the message is to be discarded.
        """
        self.size += len(data)
        if self._file is not None:
            _write(self._file, data)
            return
        if not self._held:
            # Most messages come as one piece, which then is the message itself.
            self._held = data
        else:
            if isinstance(self._held, bytes):
                self._held = bytearray(self._held)
            self._held += data
        self._counted += len(data)
        self._memory.used += len(data)
        if self.size > self._most or self._memory.used > self._memory.limit:
            self._file = _unnamed_file(self._folder)
            _write(self._file, self._held)
            self._let_go()

    def arrival(self) -> Arrival:
        """Return the complete message.

        :raises OSError: its file cannot be read.
        """
        begin = self.begin
        raw = None
        if self._file is None:
            raw = bytes(self._held)
        else:
            self._file.seek(0)
        return Arrival(
            *(begin.sender, begin.recipients, begin.smtputf8, raw, self._file),
            *(self.size, begin.way),
        )

    def discard(self) -> None:
        """Free what it holds; the second time does nothing."""
        self._let_go()
        if self._file is not None:
            # What cannot be written any more is not wanted any more.
            with suppress(OSError):
                self._file.close()

    def _let_go(self) -> None:
        self._memory.used -= self._counted
        self._counted = 0
        self._held = b""


def _unnamed_file(folder: str) -> BinaryIO:
    """Make a file that is gone when it is closed, whatever happens to this process."""
    try:
        # Without O_EXCL, so that a name can be given to it instead of copying it.
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NAMED_ONLY:
            raise
        descriptor, path = tempfile.mkstemp(dir=folder)
        os.unlink(path)
    return open(descriptor, "w+b", buffering=0)


def _write(file: BinaryIO, data: bytes | bytearray) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
