"""The consumer: the loop that takes a queue's messages to a function of the application.

::

    from postoffice.consumer import consume

    def handle(message, connection):
        connection.root()["bills"].append(message["Subject"])

    consume("zeo:///srv/depot/zeo.sock?blob_dir=/srv/depot/blobs", "billing", handle)

Each message has a transaction of its own, which the handler's work and the message's leaving the
queue share.  What becomes of a message:

* the handler returns: the transaction is committed, and the message is done;
* it raises a transient error, such as a conflict: the same message is tried again at once;
* it raises anything else: the transaction is aborted, and the message is deferred, for longer each
  time; the next message comes;
* it has failed as often as a message may, or has raised a
  :exc:`postoffice.exceptions.PermanentError`: it goes to quarantine with the error.

A consumer that dies counts as a failure of the message that it had in hand, so that one that kills
whoever touches it ends in quarantine too.
"""

from __future__ import annotations

import inspect
import logging
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import transaction
from transaction.interfaces import NoTransaction, TransientError
from ZODB.POSException import ConflictError, POSError, POSKeyError
from ZODB.utils import maxtid, z64

from postoffice.claimed import ClaimedMessage
from postoffice.claims import Claims
from postoffice.depot.policy import Policy
from postoffice.display import one_line, printable
from postoffice.exceptions import (
    DepotUnavailable,
    HandlerError,
    MessageTaken,
    PermanentError,
    QueueRemoved,
)
from postoffice.message import Message
from postoffice.queue import Queue, open_queue

__all__ = ["Counts", "Handler", "consume", "drain"]

log = logging.getLogger("postoffice")

#: What is called with each message; also with the connection, if it has a parameter of this name.
Handler = Callable[..., Any]

_MOST_AT_ONCE = 50
# What is claimed at once is to be worked off within about this many seconds.
_BATCH_SECONDS = 1.0
_IDLE_SECONDS = 0.5
# How often a message is tried again at once after transient errors.
_RETRIES = 16
_LONGEST_PAUSE = 1.0
_SHORTEST_WAIT, _LONGEST_WAIT = 0.1, 5.0


@dataclass(slots=True)
class Counts:
    """What a consumer did.

    :ivar done: messages that were processed.
    :ivar deferred: failed attempts after which a message was deferred.
    :ivar quarantined: messages that went to quarantine.
    """

    done: int = 0
    deferred: int = 0
    quarantined: int = 0


def consume(
    db_or_uri: Any,
    queue_name: str,
    handler: Handler,
    *,
    path: str = "postoffice",
    transaction_manager: Any = None,
    max_attempts: int | None = None,
    retry_delay: float | None = None,
    lease: float | None = None,
    stop: Callable[[], bool] | None = None,
) -> Counts:
    """Give each message of a queue to a handler, as they come, until told to stop.

    Any number of processes may consume one queue.  Each message is committed by one of them.

    In the main thread, SIGTERM and SIGINT end it when the message in hand is done; a second one is
    not waited for.  The storage may go away and come back meanwhile; a FileStorage that has closed
    itself after an error of the disk is opened anew, if a URI tells how.

    :param db_or_uri: an open ``ZODB.DB``, which stays open, or a zodburi URI.
    :param queue_name: the queue's name.
    :param handler: is called within a transaction, with the message; if it has a parameter named
        ``connection``, with the database connection too.
    :param path: path of the depot in the database.
    :param transaction_manager: whose transactions are used, an explicit one or not; ``None``: those
        of the thread.
    :param max_attempts: with this many failures a message goes to quarantine; ``None``, here and in
        the next two: what the configuration says of the queue.
    :param retry_delay: seconds until a message that failed is tried again; twice as many each time.
    :param lease: seconds that a claim holds; longer than the handler ever takes.
    :param stop: is asked between two messages, and twice a second when there is none.
    :return: what was done.
    :raises postoffice.exceptions.DepotUnavailable: the database cannot be opened now; or it was
        given open, and has closed itself.
    :raises postoffice.exceptions.QueueMissing: there is no such queue, or it was removed.
    :raises postoffice.exceptions.HandlerError: the handler cannot be called with a message.
    :raises ValueError: a number is too small; a :exc:`TypeError` if it is none.
    """
    with _consumer(
        db_or_uri, queue_name, handler, path, transaction_manager, max_attempts, retry_delay, lease
    ) as consumer:
        return consumer.run(stop, consumer.wait_for_mail)


def drain(
    db_or_uri: Any,
    queue_name: str,
    handler: Handler,
    *,
    path: str = "postoffice",
    transaction_manager: Any = None,
    max_attempts: int | None = None,
    retry_delay: float | None = None,
    lease: float | None = None,
    stop: Callable[[], bool] | None = None,
) -> Counts:
    """Do as :func:`consume` does, and end when there is no message to take now.

    What others hold then, or what is deferred, is left for another time.
    """
    with _consumer(
        db_or_uri, queue_name, handler, path, transaction_manager, max_attempts, retry_delay, lease
    ) as consumer:
        return consumer.run(stop, lambda: False)


@contextmanager
def _consumer(
    db_or_uri: Any,
    queue_name: str,
    handler: Handler,
    path: str,
    manager: Any,
    max_attempts: int | None,
    retry_delay: float | None,
    lease: float | None,
) -> Iterator[_Consumer]:
    if manager is None:
        manager = transaction.manager
    given: dict[str, Any] = {
        "max_attempts": max_attempts,
        "retry_delay": retry_delay,
        "lease": lease,
    }
    given = {name: value for name, value in given.items() if value is not None}
    _check_policy(Policy()._replace(**given))
    source = _Source(db_or_uri, queue_name, path, manager)
    consumer = _Consumer(source, handler, given)
    try:
        yield consumer
    finally:
        source.close()


class _Source:
    """Where a queue comes from, and how it is opened anew.

    :ivar queue: the open queue; the former one when it could not be opened again yet.
    """

    def __init__(self, db_or_uri: Any, queue_name: str, path: str, manager: Any) -> None:
        """Open the queue.

        :raises postoffice.exceptions.PostofficeError: as :func:`postoffice.queue.open_queue`.
        """
        self._arguments = (db_or_uri, queue_name, path, manager)
        self.manager = manager
        self._close: Callable[[], None] | None = None
        self._claims: Claims | None = None
        self.queue: Queue
        self._open()

    def _open(self) -> None:
        self.queue, self._close = open_queue(*self._arguments)
        self.connection = self.queue.record._p_jar

    @property
    def can_open(self) -> bool:
        """Whether it was opened here, and so can be opened anew."""
        return isinstance(self._arguments[0], str)

    def close(self) -> None:
        """Abort what is under way, and close what was opened."""
        close, self._close = self._close, None
        if close is not None:
            close()

    def is_closed(self, error: Exception) -> bool:
        """Tell whether the storage has closed itself, as a FileStorage does on some disk errors.

        :param error: what it has raised.
        """
        if self._close is None:
            return True
        # What is done with a closed file raises this; a server that is away is not asked again.
        if not isinstance(error, ValueError):
            return False
        try:
            storage = self.connection.db().storage
            storage.loadBefore(z64, maxtid)
        except ValueError:
            return True
        except Exception as other:
            log.debug("queue %r: the storage cannot be asked: %r", self.queue.name, other)
        return False

    def open_anew(self) -> None:
        """Open what has closed itself; what was claimed by then is given back.

        :raises postoffice.exceptions.DepotUnavailable: it cannot be opened now.
        """
        self._claims = self.queue.taking.surrender() or self._claims
        try:
            self.close()
        except Exception as error:
            # Nothing of it works any more.
            log.debug("queue %r: closing failed: %r", self.queue.name, error)
        if not self.can_open:
            raise DepotUnavailable(
                f"queue {self.queue.name!r}: the database has closed itself; open it anew"
            )
        self._open()
        if self._claims is not None:
            self.queue.take_claims_over(self._claims)
            self._claims = None


def _check_policy(policy: Policy) -> None:
    """Refuse what no message could be treated by.

    :raises ValueError: a number is too small.
    :raises TypeError: one is no number.
    """
    if policy.max_attempts < 1 or policy.retry_delay < 0 or policy.lease <= 0:
        raise ValueError(
            "max_attempts is at least 1, retry_delay not below 0, and lease more than 0 seconds"
        )


def _takes_connection(handler: Handler) -> bool:
    """Tell whether a handler has a parameter for the connection.

    :raises HandlerError: it cannot be called with a message.
    """
    if not callable(handler):
        raise HandlerError(f"{handler!r} cannot be called")
    if inspect.iscoroutinefunction(handler):
        raise HandlerError(_NOT_AWAITED)
    try:
        signature = inspect.signature(handler)
    except ValueError:
        # Functions written in C need not tell.
        return False
    wants = "connection" in signature.parameters
    try:
        signature.bind(None, **({"connection": None} if wants else {}))
    except TypeError as error:
        raise HandlerError(f"{handler!r} cannot be called with a message: {error}") from None
    return wants


class _Consumer:
    """One run of the loop."""

    def __init__(self, source: _Source, handler: Handler, given: dict[str, Any]) -> None:
        self._source = source
        self._queue = source.queue
        self._manager = source.manager
        self._handler = handler
        self._given = given
        self._policy = Policy()
        self._takes_connection = _takes_connection(handler)
        self._counts = Counts()
        self._signalled = False
        self._batch = 1
        self._outage = _Outage(self._queue.name)

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool] | None, wait: Callable[[], bool]) -> Counts:
        """Work until told to stop, or until `wait` says that there is nothing to wait for."""

        def stopped() -> bool:
            return self._signalled or (stop is not None and stop())

        with self._signals():
            try:
                while not stopped():
                    held = self._claim()
                    if held is None:
                        self._outage.wait(stopped)
                    elif held:
                        self._work_off(held, stopped)
                    elif not wait():
                        break
                if self._signalled:
                    log.info("queue %r: told to stop", self._queue.name)
            finally:
                if self._outage.lasts:
                    # Others find out that this process has ended.
                    self._queue.abandon_claims()
                else:
                    self._queue.release_claims()
        return self._counts

    def wait_for_mail(self) -> bool:
        """Pause before looking again."""
        time.sleep(_IDLE_SECONDS)
        return True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT end the loop, where this is the thread that receives them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}

        def note(number: int, frame: FrameType | None) -> None:
            self._signalled = True
            restore()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note) or signal.SIG_DFL
        try:
            yield
        finally:
            restore()

    def _claim(self) -> list[ClaimedMessage] | None:
        """Claim some messages; ``None`` when the database cannot be asked now."""
        try:
            self._manager.begin()
            try:
                record = self._queue.record
                if record.removed:
                    raise QueueRemoved(self._queue.name)
                self._policy = record.policy._replace(**self._given)
                limit = record.share(self._batch)
            finally:
                self._abort()
            held = self._queue.claim(limit, self._policy.lease)
        except PermanentError:
            raise
        except Exception as error:
            # What a storage that is away raises, only its driver knows; unknown is temporary.
            self._outage.note(error)
            self._open_anew(error)
            return None
        self._outage.over()
        return held

    def _open_anew(self, error: Exception) -> bool:
        """Open a storage that has closed itself; return whether this was so, and is done.

        :param error: what the storage has raised.
        :raises postoffice.exceptions.DepotUnavailable: it was given to us open.
        """
        if not self._source.is_closed(error):
            return False
        try:
            self._source.open_anew()
        except Exception as again:
            if not self._source.can_open:
                raise
            self._outage.note(again)
            return False
        self._queue = self._source.queue
        log.warning("queue %r: the database had closed itself, and is open again", self._queue.name)
        return True

    def _work_off(self, held: list[ClaimedMessage], stopped: Callable[[], bool]) -> None:
        started = time.monotonic()
        queue = self._queue
        for done, one in enumerate(held):
            # What was claimed of a storage that has closed itself was given back.
            if done and (stopped() or self._queue is not queue):
                break
            self._process(one, stopped)
        seconds = (time.monotonic() - started) / len(held)
        wanted = int(_BATCH_SECONDS / seconds) if seconds > 0 else _MOST_AT_ONCE
        # One that takes long may come at any time, with the others of its batch behind it.
        self._batch = max(1, min(wanted, self._batch * 4, _MOST_AT_ONCE))

    # -- one message -------------------------------------------------------------------------------

    def _process(self, held: ClaimedMessage, stopped: Callable[[], bool]) -> None:
        """Work on one message until something has become of it."""
        queue = self._queue
        tries = outages = unnoted = 0
        in_doubt = False
        while True:
            tries += 1
            committing = False
            error: Exception
            try:
                self._manager.begin()
                held.check()
                if held.attempts < self._policy.max_attempts:
                    self._call(held)
                    held.ack()
                    committing = True
                    self._manager.commit()
                    self._counts.done += 1
                else:
                    self._abort()
                    self._give_up(held)
                return
            except MessageTaken as taken:
                self._abort()
                if in_doubt:
                    # The commit that seemed to fail was made.
                    self._counts.done += 1
                else:
                    log.info("queue %r: %s", self._queue.name, taken)
                return
            except (TransientError, POSError) as raised:
                error = raised
            except Exception as raised:
                error = raised
                tries = _RETRIES
            except BaseException:
                self._abort()
                raise
            self._abort()
            in_doubt = committing and not isinstance(error, ConflictError)
            if tries < _RETRIES and not isinstance(error, POSKeyError):
                if isinstance(error, ConflictError):
                    _pause(tries)
                elif not self._is_ours_still(held, error, stopped):
                    if in_doubt and self._is_gone(held, queue):
                        self._counts.done += 1
                    return
                else:
                    # The conflicts before an outage have nothing to do with those after it.
                    outages += 1
                    tries = outages
                continue
            try:
                self._fail(held, error)
            except MessageTaken as taken:
                log.info("queue %r: %s", self._queue.name, taken)
            except Exception as raised:
                unnoted += 1
                if unnoted > _RETRIES:
                    raise
                # With the database away it is no wonder that the handler failed.
                tries = 0
                if self._is_ours_still(held, raised, stopped):
                    continue
                if in_doubt and self._is_gone(held, queue):
                    self._counts.done += 1
            return

    def _call(self, held: ClaimedMessage) -> None:
        if self._takes_connection:
            returned = self._handler(held.message, connection=self._source.connection)
        else:
            returned = self._handler(held.message)
        if inspect.iscoroutine(returned):
            returned.close()
            raise HandlerError(_NOT_AWAITED)

    def _is_ours_still(
        self, held: ClaimedMessage, error: Exception, stopped: Callable[[], bool]
    ) -> bool:
        """Wait until the database answers; return whether to go on with the message."""
        self._outage.note(error)
        while True:
            self._outage.wait(stopped)
            if stopped():
                return False
            try:
                held.renew(self._policy.lease)
            except MessageTaken:
                # Or done with: a commit that seemed to fail was made.
                self._outage.over()
                return True
            except Exception as again:
                self._outage.note(again)
                if self._open_anew(again):
                    return False
            else:
                self._outage.over()
                return True

    def _is_gone(self, held: ClaimedMessage, queue: Queue) -> bool:
        """Tell whether a message is not in the storage that was opened anew.

        :param queue: as it was before; where nothing was opened, nobody knows.
        """
        if self._queue is queue:
            return False
        try:
            return self._queue.taking.lend().read(lambda record: record.live(held.place) is None)
        except Exception as error:
            self._outage.note(error)
            return False

    def _fail(self, held: ClaimedMessage, error: Exception) -> None:
        """Defer a message that has failed, or put it into quarantine."""
        failures = held.attempts + 1
        if isinstance(error, PermanentError) or failures >= self._policy.max_attempts:
            self._quarantine(held, error, 1)
            where = "it is in quarantine"
        else:
            delay = self._policy.delay(failures)
            held.defer(delay, error)
            self._counts.deferred += 1
            where = f"it is tried again in {delay:.3g} s"
        self._report(held, f"{type(error).__name__}: {one_line(error)}", failures, where, error)

    def _give_up(self, held: ClaimedMessage) -> None:
        """Put a message into quarantine that has failed as often as it may before this."""
        error: Any = _NOBODY_TOLD if held.lapses else held.last_error
        self._quarantine(held, error, 0)
        text = error if held.lapses else ": ".join(error[:2])
        self._report(held, text, held.attempts, "it is in quarantine", None)

    def _quarantine(self, held: ClaimedMessage, error: Any, attempts: int) -> None:
        for attempt in range(_RETRIES):
            try:
                self._manager.begin()
                held.quarantine(error, attempts)
                self._manager.commit()
                self._counts.quarantined += 1
                return
            except MessageTaken:
                self._abort()
                if attempt:
                    # The commit that seemed to fail was made, or somebody else has the message.
                    return
                raise
            except ConflictError:
                self._abort()
                if attempt == _RETRIES - 1:
                    raise
            except BaseException:
                self._abort()
                raise
            _pause(attempt)

    def _report(
        self, held: ClaimedMessage, text: str, failures: int, where: str, error: Exception | None
    ) -> None:
        read = held.read
        log.warning(
            "queue %r: message %d (Message-ID %s) failed, attempt %d of %d: %s; %s",
            self._queue.name,
            held.id,
            printable(read.message_id) if isinstance(read, Message) else "unknown",
            failures,
            self._policy.max_attempts,
            printable(text),
            where,
        )
        if error is not None and log.isEnabledFor(logging.DEBUG):
            # A message's text may be in it.
            trace = "".join(traceback.format_exception(error))
            log.debug("%s", "\n".join(map(printable, trace.splitlines())))

    def _abort(self) -> None:
        try:
            self._manager.abort()
        except NoTransaction:
            # An explicit manager is between two transactions after a failed begin.
            pass
        except Exception as error:
            # The storage is gone, and with it what the transaction was about to do.
            log.debug("queue %r: abort failed: %r", self._queue.name, error)


_NOT_AWAITED = "the handler is a coroutine function; give a plain one, which may call asyncio.run"
_NOBODY_TOLD = "the processes that had it in hand ended, or did not finish in time"


def _pause(tries: int) -> None:
    """Let whoever was in the way get on, longer each time."""
    most = min(0.002 * 2**tries, _LONGEST_PAUSE)
    time.sleep(random.uniform(0, most))  # noqa: S311  # spreads, hides nothing


class _Outage:
    """The storage's being away: logged once, waited for with growing delay."""

    def __init__(self, queue_name: str) -> None:
        self._queue_name = queue_name
        self._failures = 0
        self._since = 0.0

    def note(self, error: Exception) -> None:
        """Take note of one more failure."""
        if self._failures == 0:
            self._since = time.monotonic()
            log.warning(
                "queue %r: the database does not answer: %s; waiting for it",
                self._queue_name,
                printable(f"{type(error).__name__}: {one_line(error)}"),
            )
        self._failures += 1

    @property
    def lasts(self) -> bool:
        """Whether the storage did not answer when it was last asked."""
        return self._failures > 0

    def wait(self, stopped: Callable[[], bool]) -> None:
        """Wait, longer each time, but not beyond the time to stop."""
        wanted = min(_SHORTEST_WAIT * 2.0 ** min(self._failures, 16), _LONGEST_WAIT)
        until = time.monotonic() + wanted * random.uniform(0.5, 1)  # noqa: S311  # spreads
        while not stopped() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _IDLE_SECONDS))

    def over(self) -> None:
        """Take note that it answers."""
        if self._failures:
            log.warning(
                "queue %r: the database answers again after %.0f s",
                self._queue_name,
                time.monotonic() - self._since,
            )
        self._failures = 0
