"""The process that is asked what nothing else can answer in time, and that the kernel ends.

It is one for all threads, which wait for each other; a forked child starts its own, and it never
outlives the one that started it by more than a match's limit.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Final

from re2 import _re2

from postoffice.exceptions import LimitExceeded, MatchTimeout, TemporaryError
from postoffice.expressions.programs import BLOCK_MEMORY

if TYPE_CHECKING:
    from postoffice.expressions import Expression

__all__ = ["Worker", "shared"]

WORKER_MEMORY: Final = 1 << 30
WORKER_GRACE: Final = 5.0
WORKER_START_LIMIT: Final = 20.0

# The request: what is asked, flags, limit, and the lengths of the expression and the text.
_HEADER: Final = struct.Struct("=cIdQQ")

_WORKER_SOURCE: Final = r"""
import os, re, resource, signal, struct, sys

resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
header = struct.Struct(sys.argv[2])
read = open(0, "rb", closefd=False).read

def asked_of_re(place, source, flags, limit, data):
    pattern = re.compile(source.decode("utf-8", "surrogatepass"), flags)
    text = data.decode("utf-8", "surrogatepass")
    signal.setitimer(signal.ITIMER_PROF, limit)
    return (pattern.match if place == b"m" else pattern.search)(text) is not None

def asked_of_re2(place, source, limit, data):
    if sys.argv[3] not in sys.path:
        sys.path.append(sys.argv[3])
    from re2 import _re2
    anchor = _re2.RE2.Anchor
    options = _re2.RE2.Options()
    options.log_errors = False
    options.max_mem = int(sys.argv[4])
    program = _re2.RE2(source, options)
    signal.setitimer(signal.ITIMER_PROF, limit)
    place = anchor.ANCHOR_START if place == b"M" else anchor.UNANCHORED
    return program.Match(place, data, 0, len(data))[0][0] >= 0

os.write(0, b"+")
while len(head := read(header.size)) == header.size:
    place, flags, limit, source_size, size = header.unpack(head)
    source = read(source_size)
    try:
        data = read(size)
        if place in b"ms":
            found = asked_of_re(place, source, flags, limit, data)
        else:
            found = asked_of_re2(place, source, limit, data)
        answer = b"1" if found else b"0"
    except MemoryError:
        # What was not read of the request is lost: this was the last one.
        os.write(0, b"m")
        break
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    del data
    os.write(0, answer)
"""


class _WorkerLost(Exception):
    """The process ended without an answer, but not for want of time."""


class Worker:
    """The process that may be ended at any time: started when needed, and kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def ask(self, expression: Expression, place: str, source: bytes, data: bytes) -> bool:
        """Say what *source* answers on *data*.

        :param place: ``m`` to match with ``re``, ``s`` to search; upper case with RE2.
        """
        limit = expression.limit
        header = _HEADER.pack(
            place.encode("ascii"), expression.flags, limit, len(source), len(data)
        )
        shown = f"{expression.source[:100]!r} on a text of {len(data)} bytes"
        with self._lock:
            # Once more, since it may have been ended by someone else, and since long.
            for _ in range(2):
                try:
                    return self._answer((header, source, data), limit)
                except _WorkerLost:
                    continue
                except MemoryError:
                    raise LimitExceeded(
                        f"expression {shown}: more memory than it may have"
                    ) from None
                except TimeoutError:
                    raise MatchTimeout(f"expression {shown}: longer than {limit:g} s") from None
                except OSError as error:
                    raise TemporaryError(
                        f"expression {shown}: no process for it: {error}"
                    ) from error
            raise LimitExceeded(f"expression {shown}: its process died twice")

    def stop(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """In a forked child, leave the process to the parent."""
        self._lock = threading.Lock()
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            # It is no child of this process: nothing to wait for, nothing to warn of.
            self._process.returncode = 0
        self._channel = self._process = None

    def _answer(self, request: tuple[bytes, ...], limit: float) -> bool:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        channel = self._channel or self._start()
        try:
            channel.settimeout(limit + WORKER_GRACE)
            for part in request:
                channel.sendall(part)
            answer = channel.recv(1)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        except BaseException:
            # What it still sends would be taken for the next answer.
            self._stop()
            raise
        if answer == b"m":
            self._stop()
            raise MemoryError
        if answer == b"":
            if self._stop() == -signal.SIGPROF:
                raise TimeoutError
            raise _WorkerLost
        return answer == b"1"

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-I", "-S", "-W", "ignore", "-c", _WORKER_SOURCE),
                        *(str(WORKER_MEMORY), _HEADER.format),
                        *(_FOLDER_OF_RE2, str(BLOCK_MEMORY)),
                    ],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                )
            self._channel = ours
            ours.settimeout(WORKER_START_LIMIT)
            if ours.recv(1) != b"+":
                raise OSError("it ended while it started")
        except BaseException as error:
            ours.close()
            self._stop()
            if isinstance(error, TimeoutError):
                raise OSError(f"it did not start within {WORKER_START_LIMIT:g} s") from None
            raise
        return ours

    def _stop(self) -> int:
        """End the process and return its exit status; a negative one is a signal's number."""
        if self._channel is not None:
            self._channel.close()
        status = 0
        if self._process is not None:
            self._process.kill()
            status = self._process.wait()
        self._channel = self._process = None
        return status


shared: Final = Worker()
"""The process of this process, for all its threads."""

_FOLDER_OF_RE2: Final = os.path.dirname(os.path.dirname(os.path.abspath(_re2.__file__)))

atexit.register(shared.stop)
os.register_at_fork(after_in_child=shared.forget)
