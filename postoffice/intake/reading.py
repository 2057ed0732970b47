"""Reading in a process of its own, while transactions commit.

The reader is forked from the importer.  A message that kills it, or that it cannot finish, is set
aside, and the next reader goes on behind it.  It touches nothing but the spool files, which it
opens for reading, and ends when the importer does.
"""

from __future__ import annotations

import fcntl
import logging
import marshal
import mmap
import os
import select
import signal
import struct
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from postoffice.delivery import Prepared
from postoffice.display import printable
from postoffice.intake.reader import Reader, SpoolFile, Unreadable, open_spool_file

__all__ = ["LONGEST_SECONDS", "ReaderProcess"]

log = logging.getLogger("postoffice")

#: How long one message may take, in seconds, before the reader is taken for stuck.
LONGEST_SECONDS = 300.0

_LENGTH = struct.Struct("!Q")
_PROGRESS = struct.Struct("!QQ")
_PIPE_BYTES = 1 << 20
_LONGEST_SENT = 32 * 1024
_POLL_SECONDS = 1.0

_NOT_THERE, _PREPARED, _UNREADABLE, _FAILED = range(4)


class ReaderProcess:
    """Reads batches of spool files in a forked process, while others are stored.

    Each :meth:`submit` is answered by one :meth:`collect`, in order.  Belongs to one thread.
    """

    def __init__(self, reader: Reader, longest: float = LONGEST_SECONDS) -> None:
        """Read with this reader."""
        self._reader = reader
        self._longest = longest
        self._pid = 0
        self._requests = self._answers = -1
        # The number of the batch, and the index in it of the file, that the process is at.
        self._progress = mmap.mmap(-1, _PROGRESS.size)
        self._number = 0
        self._waiting: list[list[SpoolFile]] = []
        self._suspects: set[str] = set()

    def start(self) -> None:
        """Start the process, unless it runs; otherwise the first batch does."""
        if not self._pid:
            self._start()

    def submit(self, batch: Sequence[SpoolFile]) -> None:
        """Have a batch read."""
        self._waiting.append(list(batch))
        if not self._pid:
            self._start()
        else:
            self._ask(self._number + len(self._waiting) - 1, batch)

    def collect(self) -> list[Prepared | Unreadable | None]:
        """Return what the oldest batch that was submitted holds; see :meth:`Reader.read`.

        :raises OSError: a file could not be read for a reason that is not its own.
        """
        answer = self._answer()
        if answer is None:
            return self._collect_without_culprit()
        self._number += 1
        batch = self._waiting.pop(0)
        return [_from_wire(one, file) for one, file in zip(answer, batch, strict=True)]

    def _collect_without_culprit(self) -> list[Prepared | Unreadable | None]:
        """Go on when the process died or is stuck.

        What it had before it is read once more, alone: it may not have been its fault.
        """
        batch = self._waiting[0]
        number, index = _PROGRESS.unpack(self._progress[:])
        reason = self._end()
        if number != self._number:
            index = 0
        culprit = batch[index]
        log.error("the reader ended at %s: %s", printable(culprit.name), reason)
        guilty = culprit.path in self._suspects
        self._suspects.add(culprit.path)
        parts = [batch[:index], [] if guilty else [culprit], batch[index + 1 :]]
        self._waiting[:1] = [part for part in parts if part]
        self._start()
        found = self.collect() if parts[0] else []
        if guilty:
            found.append(Unreadable(culprit.name, f"reading it ended the reader: {reason}"))
        else:
            found += self.collect()
        return found + (self.collect() if parts[2] else [])

    def close(self) -> None:
        """End the process."""
        if self._pid:
            self._end()
        self._progress.close()

    # -- the importer's side -----------------------------------------------------------------------

    def _start(self) -> None:
        """Fork a reader and ask it for all that waits."""
        request_end, self._requests = os.pipe()
        self._answers, answer_end = os.pipe()
        _enlarge(answer_end)
        with warnings.catch_warnings():
            # The child of a process with threads may fork as long as it waits for none of their
            # locks, and this one only reads files.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if not self._pid:
            self._serve(request_end, answer_end)
        os.close(request_end)
        os.close(answer_end)
        for ahead, batch in enumerate(self._waiting):
            self._ask(self._number + ahead, batch)

    def _ask(self, number: int, batch: Sequence[SpoolFile]) -> None:
        files = [(file.path, file.name, file.arrived, file.size) for file in batch]
        try:
            _write(self._requests, marshal.dumps((number, files)))
        except BrokenPipeError:
            # It died; whoever collects finds out, and asks again.
            return

    def _answer(self) -> list[tuple[object, ...]] | None:
        """Return the next answer, or ``None`` when there will be none."""
        length = self._read(_LENGTH.size)
        data = self._read(_LENGTH.unpack(length)[0]) if length is not None else None
        if data is None:
            return None
        answer: list[tuple[object, ...]] = marshal.loads(data)  # noqa: S302  # of our own child
        return answer

    def _read(self, size: int) -> bytearray | None:
        data = bytearray()
        seen, since = self._progress[:], time.monotonic()
        while len(data) < size:
            if not select.select([self._answers], [], [], _POLL_SECONDS)[0]:
                if self._progress[:] != seen:
                    seen, since = self._progress[:], time.monotonic()
                elif time.monotonic() - since > self._longest:
                    return None
                continue
            piece = os.read(self._answers, min(size - len(data), _PIPE_BYTES))
            if not piece:
                return None
            data += piece
        return data

    def _end(self) -> str:
        """End the process; return why it ended, for a person."""
        os.close(self._requests)
        os.close(self._answers)
        pid, self._pid = self._pid, 0
        ended, status = os.waitpid(pid, os.WNOHANG)
        for _ in range(20):
            if ended:
                break
            # Its request pipe is closed, so it ends by itself unless it is stuck.
            time.sleep(0.005)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"it took longer than {self._longest:.0f} seconds"
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return f"status {os.waitstatus_to_exitcode(status)}"

    # -- the reader's side -------------------------------------------------------------------------

    def _serve(self, requests: int, answers: int) -> NoReturn:
        status = 1
        try:
            # The locks of spool and database are the importer's alone, and end with it.
            _close_others(requests, answers)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            logging.disable()
            while (length := _read_exactly(requests, _LENGTH.size)) is not None:
                data = _read_exactly(requests, _LENGTH.unpack(length)[0])
                if data is None:
                    break
                number, batch = marshal.loads(data)  # noqa: S302  # of our own parent
                _write(answers, marshal.dumps(self._read_batch(number, batch)))
            status = 0
        except BrokenPipeError:
            status = 0
        finally:
            os._exit(status)

    def _read_batch(
        self, number: int, batch: list[tuple[str, str, int, int]]
    ) -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = []
        for index, file in enumerate(batch):
            self._progress[:] = _PROGRESS.pack(number, index)
            try:
                found.append(_to_wire(self._reader.read_safely(SpoolFile(*file))))
            except OSError as error:
                found.append((_FAILED, error.errno, error.strerror, file[0]))
        return found


def _to_wire(one: Prepared | Unreadable | None) -> tuple[object, ...]:
    if one is None:
        return (_NOT_THERE,)
    if isinstance(one, Unreadable):
        return _UNREADABLE, one.source, one.reason
    if one.raw is not None and len(one.raw) > _LONGEST_SENT and not one.values.get("oversize"):
        # Reading the file again is cheaper than to carry it over, and keeps the pipe short.
        return _PREPARED, len(one.raw), *replace(one, raw=None).to_wire()
    return _PREPARED, 0, *one.to_wire()


def _from_wire(wire: tuple[object, ...], file: SpoolFile) -> Prepared | Unreadable | None:
    kind, *rest = wire
    if kind == _NOT_THERE:
        return None
    if kind == _UNREADABLE:
        return Unreadable(str(rest[0]), str(rest[1]))
    if kind == _FAILED:
        raise OSError(*rest)
    prepared = Prepared.from_wire(rest[1:])
    size = int(str(rest[0]))
    if not size:
        return prepared
    arrived = prepared.values["arrived"]
    # A file that is another one by now is left to the next run.
    descriptor = open_spool_file(replace(file, arrived=arrived, size=size))
    if descriptor is None:
        return None
    with open(descriptor, "rb", buffering=0) as opened:
        raw = opened.readall()
    return replace(prepared, raw=raw) if len(raw) == size else None


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(_LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_exactly(descriptor: int, size: int) -> bytearray | None:
    data = bytearray()
    while len(data) < size:
        piece = os.read(descriptor, size - len(data))
        if not piece:
            return None
        data += piece
    return data


def _enlarge(descriptor: int) -> None:
    """Give a pipe a larger buffer, where the system lets us."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except (AttributeError, OSError):
        log.debug("the pipe keeps its size")


def _close_others(*kept: int) -> None:
    previous = 2
    for descriptor in sorted(kept):
        os.closerange(previous + 1, descriptor)
        previous = descriptor
    os.closerange(previous + 1, os.sysconf("SC_OPEN_MAX"))
