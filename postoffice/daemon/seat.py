"""The seat of a part: its process, those that come after it, and how they fare."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from postoffice.daemon.parts import Part
from postoffice.daemon.signs import SignReader, SignWriter
from postoffice.daemon.state import PartState
from postoffice.display import one_line, printable
from postoffice.exceptions import EX_TEMPFAIL, PostofficeError
from postoffice.workers import FIRST_DELAY, LONGEST_DELAY, SOUND_AFTER, die_with

__all__ = ["SIGNALS", "Process", "Seat"]

log = logging.getLogger("postoffice")

#: What the daemon heeds, and its parts each in their own way.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

STARTING, RUNNING, FAILING, DOWN = "starting", "running", "failing", "down"
# Of deaths in a row that are told, so that the log of a part that dies all the time has an end.
_TOLD_DEATHS = 2


@dataclass(slots=True)
class Process:
    """A process of a part.

    :ivar part: what it does.
    :ivar pid: its id.
    :ivar signs: where it gives signs of life.
    :ivar deadline: when it is killed if it has not ended, monotonic; ``None``: it is to go on.
    :ivar killed: whether it was.
    :ivar cause: what it said last that it suffers from; ``""``: nothing.
    """

    part: Part
    pid: int
    signs: SignReader
    deadline: float | None = None
    killed: bool = False
    cause: str = ""

    def end(self, seconds: float) -> None:
        """Tell it to finish what is in hand, within so many seconds."""
        if self.deadline is None:
            self.deadline = time.monotonic() + seconds
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill it."""
        self.killed = True
        os.kill(self.pid, signal.SIGKILL)


class Seat:
    """The place of one part: has a process, or will have one when it is due.

    :ivar part: what its processes do.
    :ivar process: the one that there is.
    :ivar due: when one is to be started, monotonic.
    """

    def __init__(self, part: Part) -> None:
        """Begin with a process that is due now."""
        self.part = part
        self.process: Process | None = None
        self.due = 0.0
        self._state = STARTING
        self._since = time.time()
        self._cause = ""
        self._restarts = -1
        self._delay = FIRST_DELAY
        self._deaths = 0
        self._told_cause = ""
        self._told_recovery = True
        self._sound_from = 0.0
        self._last_sign = 0.0

    # -- starting ----------------------------------------------------------------------------------

    def start(self, listening: socket.socket | None, others: Sequence[int]) -> None:
        """Start a process; where that fails, it is due again later.

        :param listening: what it listens on.
        :param others: the descriptors that are none of its business.
        """
        parent = os.getpid()
        reading, writing = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(reading)
            os.close(writing)
            self.put_off(f"no process can be started: {error.strerror}")
            return
        if pid == 0:
            _be(self.part, listening, parent, writing, (reading, *others))
        os.close(writing)
        self.process = Process(self.part, pid, SignReader(reading))
        self._restarts += 1
        self._last_sign = self._sound_from = time.monotonic()
        self._enter(STARTING)
        log.info("%s started: process %d", self.part.name, pid)

    def vacate(self) -> Process | None:
        """Give the process away, so that another can take its place; return it."""
        process, self.process = self.process, None
        self.due = 0.0
        self._restarts = max(-1, self._restarts - 1)
        return process

    # -- signs -------------------------------------------------------------------------------------

    def heed(self) -> None:
        """Take in the signs that have come."""
        process = self.process
        if process is None:
            return
        for sign in process.signs.read():
            self._last_sign = time.monotonic()
            if sign.well is None:
                continue
            state = RUNNING if sign.well else FAILING
            process.cause = sign.cause
            self._cause = sign.cause or self._cause
            if state == RUNNING:
                self._recover()
            self._enter(state)

    def _recover(self) -> None:
        if self._deaths == 1 and not self._told_recovery:
            self._told_recovery = True
            log.warning("%s recovered", self.part.name)

    def check(self, now: float) -> None:
        """Kill a process that hangs, and note one that has been sound for long."""
        if self.process is None:
            return
        if not self.process.killed and now - self._last_sign > self.part.patience:
            log.error(
                "%s hung: process %d gives no sign of life for %.0f s; it is killed",
                self.part.name,
                self.process.pid,
                self.part.patience,
            )
            self.process.kill()
        elif self._deaths and self._state != STARTING and now - self._sound_from >= SOUND_AFTER:
            if not self._told_recovery:
                log.warning("%s recovered", self.part.name)
            self._deaths, self._delay, self._told_recovery = 0, FIRST_DELAY, True
            self._told_cause = ""

    # -- the end of a process ----------------------------------------------------------------------

    def bury(self, process: Process, end: str) -> None:
        """Note that its process has ended.

        :param end: how, for a person.
        """
        self.heed()
        process.signs.close()
        self.process = None
        self.put_off(f"{end}: {process.cause}" if process.cause else end)

    def put_off(self, cause: str) -> None:
        """Have a process started later, since it cannot be now."""
        self._deaths += 1
        told = self._deaths <= _TOLD_DEATHS or cause != self._told_cause
        log.log(
            logging.WARNING if told else logging.DEBUG,
            "%s ended: %s; another is started in %.1f s",
            self.part.name,
            printable(cause),
            self._delay,
        )
        self._told_cause, self._told_recovery = cause, False
        self._cause = cause
        self.due = time.monotonic() + self._delay
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        self._enter(DOWN)

    # -- state -------------------------------------------------------------------------------------

    def _enter(self, state: str) -> None:
        if state != self._state:
            self._state, self._since = state, time.time()

    @property
    def is_known(self) -> bool:
        """Whether it has turned out how the part is."""
        return self._state != STARTING

    @property
    def state(self) -> PartState:
        """How the part is."""
        due = self.due - time.monotonic() + time.time() if self.process is None else None
        return PartState(
            self.part.name,
            self._state,
            self._since,
            0 if self.process is None else self.process.pid,
            max(0, self._restarts),
            self._cause,
            due,
        )

    def __str__(self) -> str:
        """Return how the part is, in a few words."""
        if self._state == RUNNING:
            return f"{self.part.name} running"
        return f"{self.part.name} {self._state}" + (f": {self._cause}" if self._cause else "")


def _be(
    part: Part,
    listening: socket.socket | None,
    parent: int,
    signs: int,
    others: Sequence[int],
) -> None:
    """Be the process of a part, to its end."""
    status = EX_TEMPFAIL
    try:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # What a terminal sends to all of its processes is the daemon's business: it stops the
        # storage last.
        os.setpgid(0, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for descriptor in others:
            os.close(descriptor)
        die_with(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        status = _work(part, listening, SignWriter(signs))
    finally:
        logging.shutdown()
        os._exit(status)


def _work(part: Part, listening: socket.socket | None, health: SignWriter) -> int:
    """Do a part's work; return the exit status."""
    try:
        part.work(health, listening)
    except PostofficeError as error:
        health.ill(one_line(error))
        return error.exit_status
    # Whatever it is: the next process tries again.
    except Exception as error:
        log.exception("%s fails", part.name)
        health.ill(f"{type(error).__name__}: {one_line(error)}")
        return EX_TEMPFAIL
    return 0
