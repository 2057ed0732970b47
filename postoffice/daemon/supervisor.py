"""The supervisor: starts the parts, watches over them, replaces and ends them."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from postoffice.api import lmtp_address
from postoffice.config import Settings, TCPPlace, UnixPlace
from postoffice.daemon.parts import LMTP, STORAGE, Part, parts_of, refuse_unserved
from postoffice.daemon.readiness import Notifier
from postoffice.daemon.seat import SIGNALS, Process, Seat
from postoffice.daemon.state import DaemonRuns, DaemonState, StateFile, state_place
from postoffice.database_uri import database_file
from postoffice.display import one_line
from postoffice.exceptions import PostofficeError
from postoffice.intake.maildir import make_maildir
from postoffice.intake.sockets import Listening, listen

__all__ = ["Daemon"]

log = logging.getLogger("postoffice")

_TICK_SECONDS = 1.0
_READY_SECONDS = 10.0
_LOOK_SECONDS = 5.0
# The listener lets clients finish for half a minute; a commit may be tried for about as long.
_GRACE_SECONDS = 45.0
_STORAGE_GRACE_SECONDS = 15.0


class Daemon:
    """All that a depot needs to go on.  Belongs to the main thread of a process without others."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        parts: Callable[[Settings], list[Part]] = parts_of,
    ) -> None:
        """Prepare to serve.

        :param load: reads the configuration again, when SIGHUP comes, and sets up logging as it
            says.
        :param parts: says what the processes do.
        :raises postoffice.exceptions.ConfigurationError: it cannot be served.
        """
        refuse_unserved(settings)
        self._settings = settings
        self._load = load
        self._parts = parts
        self._notifier = Notifier(os.environ)
        self._state_file = StateFile(state_place(settings))
        self._state_fails = False
        self._state_due = 0.0
        self._seats = {part.name: Seat(part) for part in parts(settings)}
        self._leaving: list[Process] = []
        self._listening: Listening | None = None
        self._since = time.time()
        self._reload_error = ""
        self._said = ""
        self._ready_by: float | None = None
        self._stopping = False
        self._reloads = False
        self._hurries = False
        self._waking: socket.socket
        self._waker: socket.socket

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, and then until the parts have done what is in hand.

        A second such signal ends the parts at once.  On SIGHUP the configuration is read again.

        :raises DaemonRuns: another daemon serves this configuration.
        """
        _warn_root(self._settings)
        self._open_state()
        with suppress(OSError):
            # Later it is the administrator's: if it goes, it is waited for.
            make_maildir(self._settings.maildir)
        parent = os.getpid()
        with self._signals():
            self._ready_by = time.monotonic() + _READY_SECONDS
            try:
                while not self._stopping:
                    if self._reloads:
                        self._reload()
                    self._turn()
                self._stop()
            finally:
                if os.getpid() == parent:
                    self._end()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Have signals end the waiting, and note which came."""
        self._waking, self._waker = socket.socketpair()
        self._waking.setblocking(False)
        self._waker.setblocking(False)
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        waker = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(waker)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._waking.close()
            self._waker.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reloads = True
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._hurries = self._stopping
            self._stopping = True

    # -- one turn ----------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Start what is due, wait for something to happen, and see to it."""
        now = time.monotonic()
        for seat in self._seats.values():
            if seat.process is None and seat.due <= now:
                self._start(seat)
        self._see_to_leaving(now)
        self._tell()
        self._wait()
        now = time.monotonic()
        for seat in self._seats.values():
            seat.heed()
        self._collect()
        for seat in self._seats.values():
            seat.check(now)
        self._notifier.alive(now)

    def _wait(self) -> None:
        now = time.monotonic()
        due = [seat.due - now for seat in self._seats.values() if seat.process is None]
        poller = select.poll()
        poller.register(self._waking, select.POLLIN)
        for seat in self._seats.values():
            if seat.process is not None:
                poller.register(seat.process.signs.descriptor, select.POLLIN)
        poller.poll(1000 * max(0.0, min([_TICK_SECONDS, *due])))
        with suppress(BlockingIOError):
            self._waking.recv(4096)

    def _start(self, seat: Seat) -> None:
        listening = None
        if seat.part.name == LMTP and self._settings.lmtp is not None:
            try:
                listening = self._listen(self._settings.lmtp)
            except (OSError, PostofficeError) as error:
                seat.put_off(f"lmtp cannot listen: {one_line(error)}")
                return
        # A signal to the child, before it has its own reactions, would go into our pipe.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            seat.start(listening, self._descriptors(listening))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _listen(self, place: UnixPlace | TCPPlace) -> socket.socket:
        if self._listening is None:
            self._listening = listen(lmtp_address(place))
            log.info("lmtp listening at %s", place)
        return self._listening.socket

    def _descriptors(self, kept: socket.socket | None) -> list[int]:
        """Return what a part must not inherit."""
        found = [self._waking.fileno(), self._waker.fileno()]
        found += self._state_file.descriptors + self._notifier.descriptors
        processes = [seat.process for seat in self._seats.values() if seat.process is not None]
        found += [process.signs.descriptor for process in [*processes, *self._leaving]]
        if self._listening is not None and self._listening.socket is not kept:
            found.append(self._listening.socket.fileno())
        return found

    def _collect(self) -> None:
        """Look after the processes that have ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            end = _end_of(os.waitstatus_to_exitcode(status))
            for seat in self._seats.values():
                if seat.process is not None and seat.process.pid == pid:
                    seat.bury(seat.process, end)
            for process in [one for one in self._leaving if one.pid == pid]:
                process.signs.close()
                self._leaving.remove(process)
                log.info("%s stopped: process %d", process.part.name, pid)

    # -- telling -----------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Say how things are, to whom it may concern."""
        known = all(seat.is_known for seat in self._seats.values())
        said = "; ".join(map(str, self._seats.values()))
        now = time.monotonic()
        if said != self._said or now >= self._state_due:
            self._state_due = now + _LOOK_SECONDS
            self._write_state()
        if self._ready_by is not None and (known or time.monotonic() >= self._ready_by):
            self._ready_by = None
            self._notifier.ready(said)
            log.info("serve ready: %s", said)
        elif said != self._said:
            self._notifier.status(said)
        self._said = said

    def _open_state(self) -> None:
        try:
            self._state_file.open()
        except OSError as error:
            # Without its folder there is no database either, and that is waited for.
            self._doubt_state(error)

    def _doubt_state(self, error: Exception) -> None:
        level = logging.DEBUG if self._state_fails else logging.WARNING
        log.log(level, "serve state: %s cannot be written: %s", self._state_file.path, error)
        self._state_fails = True

    def _write_state(self) -> None:
        try:
            if not self._state_file.is_in_place():
                self._state_file.open()
            self._state_file.write(self.state)
        except (OSError, DaemonRuns) as error:
            self._doubt_state(error)
        else:
            self._state_fails = False

    @property
    def state(self) -> DaemonState:
        """How the daemon is."""
        parts = [seat.state for seat in self._seats.values()]
        return DaemonState(
            os.getpid(),
            importlib.metadata.version("postoffice"),
            self._since,
            str(self._settings.path),
            self._reload_error,
            tuple(parts),
        )

    # -- reloading ---------------------------------------------------------------------------------

    def _reload(self) -> None:
        self._reloads = False
        self._notifier.reloading()
        try:
            settings = self._load()
            refuse_unserved(settings)
        # What the file names may be of others, and raise anything.
        except Exception as error:
            self._reload_error = one_line(error)
            log.error("serve reload-failed: %s; what was in force stays", self._reload_error)
            self._notifier.ready(f"the configuration was not read again: {self._reload_error}")
            self._said = ""
            return
        self._reload_error = ""
        log.warning("serve reloaded: %s", settings.path)
        self._adopt(settings)
        self._ready_by = time.monotonic() + _READY_SECONDS

    def _adopt(self, settings: Settings) -> None:
        """Put the parts of other settings in the places of those that there are."""
        if settings.lmtp != self._settings.lmtp:
            self._close_listening()
        if state_place(settings) != self._state_file.path:
            self._state_file.close()
            self._state_file = StateFile(state_place(settings))
        self._settings = settings
        before, self._seats = self._seats, {}
        for part in self._parts(settings):
            seat = before.pop(part.name, None)
            if seat is None:
                seat = Seat(part)
            elif seat.part != part:
                self._part_with(seat.vacate())
                seat.part = part
            self._seats[part.name] = seat
        for seat in before.values():
            self._part_with(seat.vacate())

    def _part_with(self, process: Process | None) -> None:
        if process is not None:
            self._leaving.append(process)

    def _see_to_leaving(self, now: float) -> None:
        """Have processes end, the storage when nobody needs it any more."""
        others = [one for one in self._leaving if one.part.name != STORAGE]
        for process in others or self._leaving:
            process.end(_GRACE_SECONDS if others else _STORAGE_GRACE_SECONDS)
        for process in self._leaving:
            is_late = process.deadline is not None and now >= process.deadline
            if (is_late or self._hurries) and not process.killed:
                log.warning("%s killed: process %d", process.part.name, process.pid)
                process.kill()

    # -- stopping ----------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Have all parts end, and wait for it."""
        log.info("serve stopping")
        self._notifier.stopping()
        self._close_listening()
        for seat in self._seats.values():
            self._part_with(seat.vacate())
        self._seats = {}
        while self._leaving:
            self._see_to_leaving(time.monotonic())
            self._wait()
            self._collect()
            self._notifier.alive(time.monotonic())
        log.info("serve stopped")

    def _close_listening(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.remove()
            listening.socket.close()

    def _end(self) -> None:
        """Leave nothing behind, whatever this process failed of."""
        self._close_listening()
        for seat in self._seats.values():
            self._part_with(seat.vacate())
        for process in self._leaving:
            process.end(_GRACE_SECONDS)
        self._state_file.close()


def _warn_root(settings: Settings) -> None:
    """Warn root: what it makes beside another user's files, that user could not write."""
    path = database_file(settings.zodb_uri)
    folders = [str(settings.maildir), *([] if path is None else [os.path.dirname(path)])]
    for folder in folders:
        # What is not there yet belongs to nobody else.
        with suppress(OSError):
            owner = os.stat(folder).st_uid
            if owner and not os.geteuid():
                log.warning(
                    "serve as-root: %s belongs to user %d, who could not go on with what root "
                    "makes there; let that user run it",
                    folder,
                    owner,
                )


def _end_of(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
