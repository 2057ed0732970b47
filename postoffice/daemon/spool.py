"""The spool's part: imports what is delivered into the Maildir, as it comes, and tidies up.

It waits for new files, imports all that is there, and waits again.  What cannot be imported now is
tried again, after a second first and half a minute in the end, however much comes meanwhile.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from transaction.interfaces import TransientError
from ZODB.POSException import POSError

from postoffice.api import PostOffice
from postoffice.daemon.watch import Watch, pause
from postoffice.display import one_line
from postoffice.exceptions import PostofficeError, TemporaryError
from postoffice.health import Health
from postoffice.intake.importer import Importer
from postoffice.intake.maildir import Maildir, MaildirBusy

__all__ = ["SpoolMissing", "SpoolPart"]

log = logging.getLogger("postoffice")

_FIRST_DELAY, _LONGEST_DELAY = 1.0, 30.0
_FIRST_TURN, _LONGEST_TURN = 0.2, 5.0
_ABSENCE_SECONDS = 1.0
# What a mail server delivers at once is imported at once; and a copy made by hand gets complete.
_SETTLE_SECONDS = 0.05
# Archives expire, and what stayed behind is tried again, though nothing is delivered.
_LOOK_SECONDS = 60.0
_DAY_SECONDS = 24 * 60 * 60.0
_FOLDERS = ("new", "cur")


class SpoolMissing(TemporaryError):
    """The Maildir, which was there, is not."""


class _Stopped(TemporaryError):
    """The import was told to end."""


class SpoolPart:
    """Imports until SIGTERM.  Belongs to the main thread of a process of its own."""

    def __init__(
        self, open_post_office: Callable[[], PostOffice], maildir: str, health: Health
    ) -> None:
        """Prepare.

        :param open_post_office: returns one whose database is not open yet.
        :param maildir: the path of its Maildir, which is there or can be made.
        """
        self._open_post_office = open_post_office
        self._maildir = maildir
        self._health = health
        self._office: PostOffice | None = None
        self._importer: Importer | None = None
        self._stopping = self._interruptible = False
        self._delay = _FIRST_DELAY
        self._turn = _FIRST_TURN
        self._cause = ""
        self._next_day = 0.0

    def run(self) -> None:
        """Import what comes until SIGTERM or SIGINT, and then what is in hand."""
        stop, waker = os.pipe()
        for descriptor in (stop, waker):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        watch = Watch([os.path.join(self._maildir, name) for name in _FOLDERS])
        try:
            while not self._stopping:
                watch.look()
                self._follow(self._attempt(), watch, stop)
        finally:
            watch.close()
            self._close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._interruptible:
            # Nothing is in hand, and a database that is away may be waited for long.
            raise _Stopped

    def _follow(self, seconds: float, watch: Watch, stop: int) -> None:
        """Wait until the next attempt is due; only while all is well, new mail makes it so."""
        if self._cause:
            pause(seconds, stop, self._health.alive)
        elif watch.wait(seconds, stop, self._health.alive):
            pause(_SETTLE_SECONDS, stop, self._health.alive)

    # -- an attempt --------------------------------------------------------------------------------

    def _attempt(self) -> float:
        """Import what waits; return after how many seconds to do so again, if nothing comes."""
        try:
            self._import()
        except _Stopped:
            return 0.0
        except MaildirBusy as error:
            # Somebody imports by hand, or our predecessor has something in hand.
            log.debug("%s", error)
            self._turn, turn = min(2 * self._turn, _LONGEST_TURN), self._turn
            return turn
        except SpoolMissing as error:
            self._fail(one_line(error))
            return _ABSENCE_SECONDS
        except (PostofficeError, POSError, TransientError, OSError) as error:
            self._fail(_told(error))
        except Exception as error:
            if not self._cause:
                log.exception("the import fails")
            self._fail(f"{type(error).__name__}: {one_line(error)}")
        else:
            self._recover()
            return _LOOK_SECONDS
        self._delay, delay = min(2 * self._delay, _LONGEST_DELAY), self._delay
        return delay

    def _import(self) -> None:
        for name in _FOLDERS:
            if not os.path.isdir(os.path.join(self._maildir, name)):
                # One that was made in its place would be in the way of its return.
                raise SpoolMissing(f"there is no {os.path.join(self._maildir, name)}")
        importer = self._opened()
        if not self._cause:
            self._health.well()
        maildir = Maildir(Path(self._maildir))
        try:
            importer.run(maildir, between=self._go_on)
        finally:
            maildir.close()
        self._expire_histories()

    def _opened(self) -> Importer:
        if self._importer is None:
            with self._interruptibly():
                self._office = self._open_post_office()
                self._importer = self._office.open_importer()
        return self._importer

    @contextmanager
    def _interruptibly(self) -> Iterator[None]:
        """Let SIGTERM break off what is done meanwhile, in whatever instant it comes."""
        self._interruptible = True
        try:
            self._go_on()
            yield
        finally:
            self._interruptible = False

    def _go_on(self) -> None:
        self._health.alive()
        if self._stopping:
            raise _Stopped

    def _expire_histories(self) -> None:
        now = time.monotonic()
        if self._office is not None and now >= self._next_day:
            with self._interruptibly():
                self._office.expire_histories(int(time.time()))
            self._next_day = now + _DAY_SECONDS

    # -- what it ends in ---------------------------------------------------------------------------

    def _fail(self, cause: str) -> None:
        # Once is enough, however long it lasts.
        level = logging.DEBUG if self._cause else logging.ERROR
        log.log(level, "spool failing: %s; the mail waits in the Maildir", cause)
        self._cause = cause
        self._health.ill(cause)
        # A storage may have closed itself for good.
        self._close()

    def _recover(self) -> None:
        if self._cause:
            log.warning("spool recovered: mail is imported again")
        self._cause = ""
        self._delay, self._turn = _FIRST_DELAY, _FIRST_TURN
        self._health.well()

    def _close(self) -> None:
        importer, self._importer = self._importer, None
        office, self._office = self._office, None
        for one in (importer, office):
            if one is None:
                continue
            try:
                one.close()
            # A storage that failed may raise anything when it is closed, and is left to itself.
            except Exception as error:
                log.debug("closing failed too: %s", one_line(error))


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return one_line(error)
