"""Reading one spool file, safely: what it holds, and where it goes."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import traceback
from dataclasses import dataclass

from postoffice.delivery import Prepared, oversize_message, prepare
from postoffice.display import one_line
from postoffice.exceptions import LimitExceeded
from postoffice.fingerprints import Digests
from postoffice.loops import LoopRule
from postoffice.message import Envelope, Message
from postoffice.queue import BLOB_SIZE
from postoffice.routing import Routing

__all__ = [
    "Reader",
    "SpoolFile",
    "Unreadable",
    "arrival",
    "body_digest",
    "header_end",
    "is_same_time",
    "open_message",
    "open_spool_file",
]

_LONGEST_HEADER = 1 << 20

# It has vanished, is a symbolic link, or a socket.
_NO_FILE = frozenset({errno.ENOENT, errno.ELOOP, errno.ENXIO})

# Any time, with what is added to it, fits into 63 bits of nanoseconds.
_LATEST = 1 << 62

# Nanoseconds; a float of today's seconds is exact to a quarter of that.
_FLOAT_ERROR = 1000

# Whose fault it is: the file's, so that it is set aside, rather than the machine's.
_UNREADABLE = frozenset({errno.EACCES, errno.EPERM, errno.EIO, errno.ENODATA, errno.EOVERFLOW})


@dataclass(frozen=True, slots=True)
class SpoolFile:
    """A file in the spool.

    :ivar path: where it is.
    :ivar name: its unique name, without the folder.
    :ivar arrived: its modification time, in nanoseconds since the epoch.
    :ivar size: in bytes.
    """

    path: str
    name: str
    arrived: int
    size: int


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that cannot be processed.

    :ivar source: its name.
    :ivar reason: one line.
    """

    source: str
    reason: str


class Reader:
    """Reads spool files and decides on them; touches neither database nor spool."""

    def __init__(self, routing: Routing, loop: LoopRule | None, way: str = "maildir") -> None:
        """Read by these rules."""
        self._routing = routing
        self._loop = loop
        self._way = way

    def read(self, file: SpoolFile) -> Prepared | Unreadable | None:
        """Return the message, prepared; why it cannot be processed; or ``None`` if it is not there.

        A symbolic link, a FIFO, a folder or a device is not there.  Nothing that a message holds
        makes it raise; what the machine cannot do (no memory, no descriptors) does.

        :raises OSError: the file cannot be read for a reason that is not its own.
        """
        try:
            descriptor = os.open(
                file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except OSError as error:
            if error.errno in _NO_FILE:
                return None
            if error.errno in _UNREADABLE:
                return Unreadable(file.name, f"cannot be read: {error.strerror}")
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return None
            return self._read(file, descriptor, status)
        except LimitExceeded as error:
            return Unreadable(file.name, f"limit exceeded: {error}")
        except OSError as error:
            if error.errno in _UNREADABLE:
                return Unreadable(file.name, f"cannot be read: {error.strerror}")
            raise
        finally:
            os.close(descriptor)

    def read_safely(self, file: SpoolFile) -> Prepared | Unreadable | None:
        """Read a file as :meth:`read` does; a defect of ours costs one message, not the run."""
        try:
            return self.read(file)
        except OSError:
            raise
        except MemoryError:
            return Unreadable(file.name, "it needs more memory than there is")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(where.filename)}:{where.lineno}"
            return Unreadable(file.name, f"{type(error).__name__} in {place}: {one_line(error)}")

    def _read(
        self, file: SpoolFile, descriptor: int, status: os.stat_result
    ) -> Prepared | Unreadable:
        message = open_message(self._routing, descriptor, arrival(status))
        digests = Digests(message, body_digest(descriptor) if message.oversize else None)
        return prepare(
            self._routing, self._loop, message, file.name, self._way, status.st_size, digests
        )


def arrival(status: os.stat_result) -> int:
    """Return when a spool file arrived, in nanoseconds since the epoch.

    Its modification time, which anybody may set to anything: what no entry can hold is brought to
    the nearest time that one can.
    """
    return min(max(status.st_mtime_ns, 0), _LATEST)


def is_same_time(one: int, other: int) -> bool:
    """Tell whether two times of a file, in nanoseconds, are the same but for what a float loses.

    Storages set the time of a blob's last reading, and with it the time of its last change as the
    float that they have read, on a file that may still be in the spool by another name.
    """
    return abs(one - other) < _FLOAT_ERROR


def open_spool_file(file: SpoolFile) -> int | None:
    """Return a descriptor of a file as it was listed; ``None`` if it is another one by now.

    A symbolic link, a FIFO, a folder or a device is another one, and is not waited for.

    :raises OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    status = os.fstat(descriptor)
    if (
        stat.S_ISREG(status.st_mode)
        and status.st_size == file.size
        and is_same_time(arrival(status), file.arrived)
    ):
        return descriptor
    os.close(descriptor)
    return None


def open_message(routing: Routing, descriptor: int, arrived: int) -> Message:
    """Return the message in an open file, as the rules are to see it.

    A large one is mapped, not copied.  Of one that is oversize only the header is read.

    :param descriptor: a regular file, at its beginning.
    :param arrived: nanoseconds since the epoch.
    :raises OSError: the file cannot be read.
    """
    size = os.fstat(descriptor).st_size
    oversize = routing.is_oversize(size)
    raw: bytes | mmap.mmap
    if oversize:
        start = os.read(descriptor, _LONGEST_HEADER)
        raw = oversize_message(start[: header_end(start)], size, routing.max_message_size or 0)
    else:
        raw = _read_small(descriptor) if size < BLOB_SIZE else b""
        if len(raw) >= BLOB_SIZE or size >= BLOB_SIZE:
            # Not closed, since an error may hold a view of it; it goes with the message.
            raw = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    message = Message.from_bytes(raw, (("X-Postoffice-Date", str(arrived // 1_000_000_000)),))
    message.envelope = Envelope.from_trace(message, arrived)
    if oversize:
        message.oversize = True
    return message


def header_end(start: bytes) -> int:
    """Return where the header ends, with its last line's end, in a message's first bytes."""
    ends = [end for end in (start.find(b"\n\n") + 1, start.find(b"\n\r\n") + 1) if end]
    return min(ends, default=len(start))


def body_digest(descriptor: int) -> bytes:
    """Return the sha256 of what follows the header of a file, read piece by piece."""
    place = header_end(os.pread(descriptor, _LONGEST_HEADER, 0))
    digest = hashlib.sha256()
    while piece := os.pread(descriptor, _LONGEST_HEADER, place):
        digest.update(piece)
        place += len(piece)
    return digest.digest()


def _read_small(descriptor: int) -> bytes:
    """Read a file, or the first part of one that has grown to be large meanwhile."""
    raw = os.read(descriptor, BLOB_SIZE)
    while len(raw) < BLOB_SIZE and (more := os.read(descriptor, BLOB_SIZE)):
        raw += more
    return raw
