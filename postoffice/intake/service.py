"""The service: commits what the receiving process hands over, all that is there at a time.

A commit costs ten times what storing a message does, so messages that come at the same time share
one.  While as many are on their way as have come it is waited for them, some milliseconds; the rest
comes while those are committed, so that neither process waits for the other.  A lone message, and
one beside a client that has stopped talking, waits for nobody.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from transaction.interfaces import TransientError
from ZODB.POSException import POSError

from postoffice.display import one_line
from postoffice.exceptions import PostofficeError, TemporaryError
from postoffice.health import UNOBSERVED, Health
from postoffice.intake.consignment import Consignment
from postoffice.intake.conversation import Reply
from postoffice.intake.deposit import TRY_LATER, Deposit
from postoffice.intake.receiving import ALIVE, Frames, Receiver, consignment_of, frame

__all__ = ["CannotListen", "Service"]

log = logging.getLogger("postoffice")

_GATHER_SECONDS = 0.003
_MOST_AT_ONCE = 200
_PATIENCE_MILLISECONDS = 1000
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0
_FIRST_REHEARSAL = 1.0
_SOUND_SECONDS = 60.0
_UPKEEP_SECONDS = 1.0
_STOPS = (signal.SIGTERM, signal.SIGINT)


class CannotListen(TemporaryError):
    """Clients cannot be waited for where the configuration says."""


class Service:
    """Runs a receiving process, and deposits what it hands over.

    Belongs to the main thread.
    """

    def __init__(
        self,
        receiver: Receiver,
        open_deposit: Callable[[], Deposit],
        close_database: Callable[[], None],
        upkeep: Callable[[], object] = lambda: None,
        health: Health = UNOBSERVED,
    ) -> None:
        """Prepare to serve.

        :param open_deposit: opens the depot; tried again when it fails.
        :param close_database: closes what that has opened.
        :param upkeep: is called between two commits, about once a second; it does not take long.
        :param health: is told that both processes are at work, and whether messages can be stored.
        """
        self._health = health
        self._receiver = receiver
        self._open_deposit = open_deposit
        self._close_database = close_database
        self._deposit: Deposit | None = None
        self._opens_at = 0.0
        self._opening_delay = _FIRST_DELAY
        self._fails = False
        self._rehearses_at = 0.0
        self._rehearsal_delay = _FIRST_REHEARSAL
        self._waits = False
        self._upkeep = upkeep
        self._upkeep_at = 0.0
        self._pid = 0
        self._stopping = False

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT, and then until those are done who are within a message.

        :param ready: is called when clients can connect.
        :raises CannotListen: the address cannot be listened on.
        """
        before = {number: signal.signal(number, self._note) for number in _STOPS}
        delay = _FIRST_DELAY
        try:
            while not self._stopping:
                since = time.monotonic()
                with self._start() as channel:
                    self._serve(_Channel(channel, self._health), ready)
                status = self._wait()
                if self._stopping:
                    break
                # Whoever sent what it died of sends it again, after others.
                delay = _FIRST_DELAY if time.monotonic() - since > _SOUND_SECONDS else 2 * delay
                delay = min(delay, _LONGEST_DELAY)
                log.error("the receiver ended: %s; another is started", status)
                time.sleep(delay)
        finally:
            self._end()
            if self._deposit is not None:
                self._deposit.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._pid:
            os.kill(self._pid, signal.SIGTERM)

    # -- the receiving process ---------------------------------------------------------------------

    def _start(self) -> socket.socket:
        """Fork the receiver; return this side of the channel to it."""
        ours, theirs = socket.socketpair()
        # A signal meanwhile would find a process of which nobody knows the number yet.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        with warnings.catch_warnings():
            # The child of a process with threads may fork as long as it waits for none of their
            # locks, and this one has nothing to do with the database.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            if self._stopping:
                os.kill(self._pid, signal.SIGTERM)
            return ours
        status = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # An interrupt at the terminal reaches the parent too, which then tells us.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            _close_all_but({theirs.fileno(), *self._receiver.descriptors, *_log_files()})
            self._receiver.run(theirs)
            status = 0
        except BaseException as error:
            log.error("the receiver fails: %s: %s", type(error).__name__, one_line(error))
        finally:
            logging.shutdown()
            os._exit(status)

    def _wait(self) -> str:
        """Wait for the end of the receiver; return how it ended, for a person."""
        pid, self._pid = self._pid, 0
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return f"status {code}" if code >= 0 else signal.Signals(-code).name

    def _end(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGTERM)
            self._wait()

    # -- what it hands over ------------------------------------------------------------------------

    def _serve(self, channel: _Channel, ready: Callable[[], None]) -> None:
        """Store and answer until the receiver ends."""
        while (came := channel.receive(self._look_after)) is not None:
            if came[0] == "ready":
                # Whoever has started it learns now what every client would be told.
                self._opened()
                ready()
                if not self._fails:
                    self._health.well()
                continue
            if came[0] == "refused":
                # It ends by itself, and a signal now would come in the midst of that.
                self._wait()
                raise CannotListen(f"lmtp: {came[1]}")
            batch = [came]
            until = time.monotonic() + _GATHER_SECONDS
            # The last to come knows best how many are on their way.
            while len(batch) <= batch[-1][1] and len(batch) < _MOST_AT_ONCE:
                more = channel.receive_until(until)
                if more is None:
                    break
                batch.append(more)
            while len(batch) < _MOST_AT_ONCE and (more := channel.receive_until(0)) is not None:
                batch.append(more)
            replies = self._store([consignment_of(wire) for _, _, wire in batch])
            channel.send(
                [
                    (number, [tuple(one) for one in told])
                    for (number, _, _), told in zip(batch, replies, strict=True)
                ]
            )
            self._look_after()

    def _look_after(self) -> None:
        """Do what no message asks for, if it is time."""
        now = time.monotonic()
        if now < self._upkeep_at:
            return
        self._upkeep_at = now + _UPKEEP_SECONDS
        if self._waits:
            self._opened()
        elif self._fails and now >= self._rehearses_at:
            self._rehearse()
        self._upkeep()

    def _rehearse(self) -> None:
        """See whether messages can be stored again, if none comes that would show it."""
        deposit = self._opened()
        if deposit is None:
            return
        try:
            deposit.rehearse()
        except (PostofficeError, POSError, TransientError, OSError) as error:
            self._fail(one_line(error))
        else:
            self._recover()

    def _store(self, consignments: Sequence[Consignment]) -> list[list[Reply]]:
        deposit = self._opened()
        if deposit is None:
            return [[TRY_LATER] * len(one.parcel.recipients) for one in consignments]
        replies = deposit.store(consignments)
        if deposit.failed:
            self._fail(deposit.reason)
        elif self._fails:
            self._recover()
        return replies

    def _recover(self) -> None:
        self._fails = False
        self._rehearsal_delay = _FIRST_REHEARSAL
        log.warning("messages can be stored again")
        self._health.well()

    def _fail(self, reason: str) -> None:
        # Once is enough, however many messages come in an hour.
        level = logging.DEBUG if self._fails else logging.ERROR
        log.log(level, "nothing can be stored now: %s", reason)
        self._fails = True
        self._rehearses_at = time.monotonic() + self._rehearsal_delay
        self._rehearsal_delay = min(2 * self._rehearsal_delay, _LONGEST_DELAY)
        self._health.ill(reason)
        self._close()

    def _close(self) -> None:
        """Let go of a database that failed: its storage may have closed itself for good."""
        deposit, self._deposit = self._deposit, None
        for close in (
            self._close_database if deposit is None else deposit.close,
            self._close_database,
        ):
            try:
                close()
            except Exception as error:
                log.debug("closing failed too: %s", one_line(error))

    def _opened(self) -> Deposit | None:
        if self._deposit is None and time.monotonic() >= self._opens_at:
            try:
                self._deposit = self._open_deposit()
                self._opening_delay = _FIRST_DELAY
                if self._waits:
                    self._fails = self._waits = False
                    log.warning("the database can be used again")
                    self._health.well()
            except (PostofficeError, POSError, TransientError, OSError) as error:
                self._waits = True
                self._fail(one_line(error))
                self._opens_at = time.monotonic() + self._opening_delay
                self._opening_delay = min(2 * self._opening_delay, _LONGEST_DELAY)
        return self._deposit


def _log_files() -> Iterator[int]:
    """Iterate over the descriptors that logging writes to."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for handler in {one for each in loggers for one in getattr(each, "handlers", ())}:
        for name in ("stream", "socket", "sock"):
            # Not every stream has a descriptor, and not every socket is open.
            with suppress(AttributeError, OSError, ValueError):
                yield getattr(handler, name).fileno()


def _close_all_but(kept: set[int]) -> None:
    """Close all descriptors but these and the standard ones."""
    after = 2
    for descriptor in sorted(kept - {0, 1, 2}):
        os.closerange(after + 1, descriptor)
        after = descriptor
    os.closerange(after + 1, os.sysconf("SC_OPEN_MAX"))


class _Channel:
    """This process's side of the channel."""

    def __init__(self, sock: socket.socket, health: Health) -> None:
        self._socket = sock
        self._health = health
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)
        self._frames = Frames()
        self._values: deque[Any] = deque()
        self._ended = False

    def receive(self, meanwhile: Callable[[], None]) -> Any:
        """Wait for the next value; ``None`` at the end.

        :param meanwhile: is called about once a second.
        """
        while not self._values and not self._ended:
            # A signal that comes right before the wait does not end it.
            if self._poller.poll(_PATIENCE_MILLISECONDS):
                self._read()
            else:
                meanwhile()
        return self._values.popleft() if self._values else None

    def receive_until(self, until: float) -> Any:
        """Return the next value if it comes until then, a monotonic time; else ``None``."""
        while not self._values and not self._ended:
            left = max(0.0, until - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                break
            self._read()
        return self._values.popleft() if self._values else None

    def send(self, value: object) -> None:
        """Send a value; one that nobody takes any more is lost."""
        try:
            self._socket.sendall(frame(value))
        except (BrokenPipeError, ConnectionResetError):
            self._ended = True

    def _read(self) -> None:
        try:
            length = self._socket.recv_into(self._frames.room())
        except ConnectionResetError:
            length = 0
        self._ended = not length
        values = self._frames.take(length)
        if values:
            self._health.alive()
        self._values.extend(value for value in values if value != ALIVE)
