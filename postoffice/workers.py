"""Workers: processes that do the same work, started again when they die, and stopped together.

::

    def work() -> None:
        consume(uri, "billing", handle)     # returns after SIGTERM

    refusal = Workers(work, 4).run()

The parent of the workers does nothing but start them and wait, so that it has nothing to die of: it
opens no database and imports nothing of the application.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from postoffice.display import one_line, printable
from postoffice.exceptions import EX_TEMPFAIL, EX_UNAVAILABLE, EX_USAGE, PostofficeError

__all__ = ["FIRST_DELAY", "LONGEST_DELAY", "SOUND_AFTER", "Refusal", "Workers", "die_with"]

log = logging.getLogger("postoffice")

FIRST_DELAY = 0.1
LONGEST_DELAY = 30.0
#: A worker that lived for so many seconds is started again without much delay.
SOUND_AFTER = 60.0

# No other attempt would fare better; a person has to change something first.
_REFUSALS = frozenset({EX_USAGE, EX_UNAVAILABLE})
_STOPS = frozenset({signal.SIGTERM, signal.SIGINT})
_AWAITED = _STOPS | {signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1
# What a pipe takes at once, be nobody reading.
_LONGEST_REPORT = 4096
_STATUS = struct.Struct("B")

_Mask = set[int | signal.Signals]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the work cannot be done, however often a worker is started.

    :ivar text: a line for a person, and others below it.
    :ivar status: the exit status that belongs to it.
    """

    text: str
    status: int


@dataclass(slots=True)
class _Seat:
    """The place of one worker, and of those that come after it.

    :ivar process: its process's id; 0 while there is none.
    :ivar report: the end of a pipe on which it can say what it ends of.
    :ivar since: when it was started; monotonic, like the next.
    :ivar due: when the next is started.
    :ivar delay: seconds to the start of the next, should it die now.
    """

    process: int = 0
    report: int = -1
    since: float = 0.0
    due: float = 0.0
    delay: float = FIRST_DELAY


class Workers:
    """Some processes that all do the same work until they are told to stop.

    A worker is a fork of this process, which therefore must not have threads.
    """

    def __init__(self, work: Callable[[], None], count: int) -> None:
        """Have `count` processes do `work`.

        :param work: is called in each of them, without arguments, with the default reactions to
            SIGTERM and SIGINT; it returns when it was told to stop by one of them.
        """
        self._work = work
        self._seats = [_Seat() for _ in range(count)]
        self._stopping = False
        self._told = False
        self._refusal: Refusal | None = None

    def run(self) -> Refusal | None:
        """Start the workers, and return when all have ended.

        On SIGTERM or SIGINT they get a SIGTERM, which some may have had from elsewhere as well; on
        a second one they are killed.  A worker that dies or fails is started again, after a delay
        that grows from 0.1 s to 30 s, and begins anew once a worker lived for a minute.  When this
        process dies, the kernel sends each worker a SIGTERM.

        :return: what a worker said that could not do its work at all: an error of postoffice with
            the status 2 or 69.  Then the others were stopped too.
        :raises SystemExit: in each worker, when its work is done.
        """
        parent = os.getpid()
        # Were it ignored, the kernel would keep no dead worker for us to ask after.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with _blocked() as before:
            try:
                self._serve(before)
            finally:
                if os.getpid() == parent:
                    self._end()
        return self._refusal

    def _serve(self, before: _Mask) -> None:
        while not self._stopping or any(seat.process for seat in self._seats):
            now = time.monotonic()
            for seat in self._seats:
                if not self._stopping and not seat.process and seat.due <= now:
                    self._start(seat, before)
            self._wait()
            self._collect()

    def _start(self, seat: _Seat, before: _Mask) -> None:
        parent = os.getpid()
        reading, writing = os.pipe()
        try:
            process = os.fork()
        except OSError as error:
            os.close(reading)
            os.close(writing)
            self._put_off(seat, f"no worker can be started: {error.strerror}")
            return
        if process == 0:
            os.close(reading)
            for other in self._seats:
                if other.process:
                    os.close(other.report)
            die_with(parent)
            for number in _STOPS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            raise SystemExit(_do(self._work, writing))
        os.close(writing)
        os.set_blocking(reading, False)
        seat.process, seat.report, seat.since = process, reading, time.monotonic()
        log.info("worker %d is started", process)

    def _wait(self) -> None:
        """Wait for a signal, or until the next worker is to be started."""
        idle = [seat.due for seat in self._seats if not seat.process]
        if self._stopping or not idle:
            number = signal.sigwaitinfo(_AWAITED).si_signo
        else:
            seconds = max(0.0, min(idle) - time.monotonic())
            found = signal.sigtimedwait(_AWAITED, seconds)
            if found is None:
                return
            number = found.si_signo
        if number in _STOPS:
            self._stop(signal.SIGKILL if self._told else signal.SIGTERM)
            self._told = True

    def _stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Start no more workers, and send a signal to those that there are."""
        self._stopping = True
        for seat in self._seats:
            if seat.process:
                os.kill(seat.process, number)

    def _collect(self) -> None:
        """Look after each worker that has ended."""
        seats = {seat.process: seat for seat in self._seats if seat.process}
        for process, status in _ended():
            # As the first process of a container, we are also the parent of strangers.
            if process in seats:
                self._bury(seats[process], os.waitstatus_to_exitcode(status))

    def _bury(self, seat: _Seat, code: int) -> None:
        process, seat.process = seat.process, 0
        told = _read_report(seat.report)
        if told is not None and told.status in _REFUSALS:
            if self._refusal is None:
                self._refusal = told
                self._stop()
            return
        if self._stopping:
            # One that was not at work yet dies of the signal itself.
            if code not in (0, -signal.SIGTERM, -signal.SIGINT):
                log.warning("worker %d ended: %s", process, _cause(code))
            return
        if time.monotonic() - seat.since >= SOUND_AFTER:
            seat.delay = FIRST_DELAY
        cause = " ".join(told.text.split()) if told is not None else _cause(code)
        self._put_off(seat, f"worker {process} ended: {cause}")

    def _put_off(self, seat: _Seat, cause: str) -> None:
        log.warning("%s; another is started in %.1f s", printable(cause), seat.delay)
        seat.due = time.monotonic() + seat.delay
        seat.delay = min(2 * seat.delay, LONGEST_DELAY)

    def _end(self) -> None:
        """Leave no worker behind, whatever this process failed of."""
        self._stop()
        for seat in self._seats:
            if seat.process:
                os.waitpid(seat.process, 0)
                seat.process = 0


@contextmanager
def _blocked() -> Iterator[_Mask]:
    """Have signals wait until they are asked for; give the mask that was there before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with(parent: int) -> None:
    """Have the kernel send this process a SIGTERM when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        # It died before it was asked for.
        os.kill(os.getpid(), signal.SIGTERM)


def _do(work: Callable[[], None], report: int) -> int:
    """Work, and return the exit status; an error is reported to the parent."""
    try:
        work()
    except PostofficeError as error:
        _write_report(report, error.exit_status, str(error))
        return error.exit_status
    # What an application may raise, and what it means, nobody knows: the next worker tries again.
    except Exception as error:
        log.exception("worker %d fails: %s: %s", os.getpid(), type(error).__name__, one_line(error))
        return EX_TEMPFAIL
    return 0


def _write_report(report: int, status: int, text: str) -> None:
    data = _STATUS.pack(status) + text.encode("utf-8", "backslashreplace")
    os.write(report, data[:_LONGEST_REPORT])


def _read_report(report: int) -> Refusal | None:
    try:
        data = os.read(report, _LONGEST_REPORT)
    except BlockingIOError:
        # Nothing was said, and a process of the worker's own has the other end open still.
        return None
    finally:
        os.close(report)
    if not data:
        return None
    return Refusal(data[_STATUS.size :].decode("utf-8", "replace"), *_STATUS.unpack_from(data))


def _ended() -> Iterator[tuple[int, int]]:
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not process:
            return
        yield process, status


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
