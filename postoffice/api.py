"""The post office: a depot as its configuration describes it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from transaction import TransactionManager
from transaction.interfaces import NoTransaction, TransientError
from ZODB.POSException import ConflictError, POSError

from postoffice import config
from postoffice.claims import living_claims
from postoffice.database import blob_folder, database_file, is_served, open_database
from postoffice.database_uri import blob_folder_named
from postoffice.delivery import Intake, memory_of_loops
from postoffice.depot.durability import sync_folder
from postoffice.depot.folder import find_folder, make_folder
from postoffice.depot.history import DUPLICATE_SECONDS
from postoffice.depot.receipts import RECEIPT_SECONDS
from postoffice.description import header_values
from postoffice.display import one_line
from postoffice.exceptions import ConfigurationError, DepotUnavailable, FolderMissing
from postoffice.health import UNOBSERVED, Health
from postoffice.intake.archive import Archive, Failure
from postoffice.intake.arrival import Arrival
from postoffice.intake.consignment import consign, parcel_of
from postoffice.intake.conversation import Reply
from postoffice.intake.deposit import Deposit, Unrouted
from postoffice.intake.expiry import Expiry
from postoffice.intake.importer import Importer
from postoffice.intake.listener import TCPAddress, UnixAddress
from postoffice.intake.maildir import Maildir, Outcome, make_maildir
from postoffice.intake.reader import open_message
from postoffice.intake.receiving import Receiver
from postoffice.intake.service import Service
from postoffice.message import Envelope
from postoffice.queue import Queue
from postoffice.routing import Decision, explain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from postoffice.depot.folder import QueuesFolder

__all__ = ["Explanation", "PostOffice", "QueueStatus", "lmtp_address"]

_ATTEMPTS = 20
# What is restarted is back by then.
_AWAY_SECONDS = 10.0
# Objects that a connection keeps while it imports.
_IMPORT_CACHE = 500


class PostOffice:
    """A depot with its Maildir and its rules; opens the database when it is first needed.

    Use it as a context manager, or call :meth:`close`.

    :ivar settings: what the configuration file says.
    """

    def __init__(
        self,
        settings: config.Settings | str | os.PathLike[str],
        opener: Callable[[str], Any] = open_database,
    ) -> None:
        """Take settings, or the path of the file that holds them.

        :param opener: opens the database by its URI; see :mod:`postoffice.database`.
        :raises postoffice.exceptions.ConfigurationError: the file cannot be used.
        """
        if not isinstance(settings, config.Settings):
            settings = config.load(Path(settings))
        self.settings = settings
        self._opener = opener
        self._database: Any = None
        self._told_strays: set[str] = set()
        self.log = logging.getLogger("postoffice")

    def __enter__(self) -> PostOffice:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the database, if it was opened."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    @property
    def database(self) -> Any:
        """The open database.

        :raises DepotUnavailable: it cannot be opened now.
        """
        if self._database is None:
            self._database = self._opener(self.settings.zodb_uri)
        return self._database

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """Give a connection with an explicit transaction manager of its own, in a transaction.

        What is not committed at the end is aborted.

        :raises DepotUnavailable: the database cannot be opened now, or failed.
        """
        manager = TransactionManager(explicit=True)
        try:
            connection = self.database.open(manager)
        except POSError as error:
            raise DepotUnavailable(f"the database failed: {one_line(error)}") from error
        try:
            manager.begin()
            yield connection
        except POSError as error:
            raise DepotUnavailable(f"the database failed: {one_line(error)}") from error
        finally:
            try:
                # After a commit there is nothing left to abort.
                with suppress(NoTransaction):
                    manager.abort()
            except (POSError, OSError) as error:
                # The storage is gone; the error that matters is on its way already.
                self.log.debug("abort failed: %s", error)
            connection.close()

    def folder(self, connection: Any) -> QueuesFolder:
        """Return the depot in a connection.

        :raises postoffice.exceptions.FolderMissing: it was not made yet.
        """
        try:
            return find_folder(connection.root(), self.settings.zodb_path)
        except FolderMissing as error:
            raise FolderMissing(f"{error}; the first intake of mail makes it") from None

    def reconcile_queues(self) -> list[str]:
        """Make the queues of the configuration that the depot does not have; return their names.

        A queue that the configuration does not have gets a warning, and stays.
        """
        wanted = [queue.name for queue in self.settings.routing.queues]

        def make(connection: Any) -> list[str]:
            folder = make_folder(connection.root(), self.settings.zodb_path)
            made = [name for name in wanted if name not in folder.queues]
            for name in made:
                folder.make(name)
            for name in wanted:
                folder.get(name).set_policy(self.settings.policies[name])
            for name in folder.names():
                if name not in wanted and name not in self._told_strays:
                    # Once is enough, however often a storage that fails is opened anew.
                    self._told_strays.add(name)
                    self.log.warning(
                        "queue %r is not in %s any more; `postoffice queues remove` removes it",
                        name,
                        self.settings.path,
                    )
            return made

        made: list[str] = self._committed(make)
        for name in made:
            self.log.info("queue %r is new", name)
        return made

    def apply_policy(self, name: str) -> None:
        """Write what the configuration says of a queue's failures and claims into the depot.

        Those find it there who do not read the configuration.  Each import does so, too.

        :raises postoffice.exceptions.FolderMissing: the depot was not made yet.
        :raises postoffice.exceptions.QueueMissing: there is no such queue.
        """
        policy = self.settings.policies.get(name)

        def work(connection: Any) -> None:
            record = self.folder(connection).get(name)
            if policy is not None:
                record.set_policy(policy)

        self._committed(work)

    def _committed(self, work: Callable[[Any], Any]) -> Any:
        since = time.monotonic()
        for attempt in range(_ATTEMPTS):
            with self.connection() as connection:
                try:
                    result = work(connection)
                    connection.transaction_manager.commit()
                    return result
                except TransientError as error:
                    away = not isinstance(error, ConflictError)
                    late = away and time.monotonic() - since > _AWAY_SECONDS
                    if attempt == _ATTEMPTS - 1 or late:
                        raise DepotUnavailable(one_line(error)) from error
                except (POSError, OSError) as error:
                    raise DepotUnavailable(f"the database failed: {one_line(error)}") from error
            # Whoever was in the way gets on meanwhile.
            time.sleep(0.01 * attempt)
        raise AssertionError("the last attempt returns or raises")

    def _sync_folders(self) -> None:
        """Have the folders written to the disk in which a new database was made.

        ZODB writes its file to the disk, and not the name of the file.  The server of a file does
        it by itself.
        """
        uri = self.settings.zodb_uri
        if is_served(self.database):
            return
        made = (database_file(uri), blob_folder(uri))
        for folder in {os.path.dirname(path) for path in made if path is not None}:
            sync_folder(folder)

    def import_messages(
        self,
        progress: Callable[[int, int], None] | None = None,
        retry: Callable[[Failure], bool] | None = None,
    ) -> Outcome:
        """Import all that waits in the Maildir, and expire the archive.

        :param progress: is called with how many messages are done, and how many there are.
        :param retry: says which of the messages that were set aside are tried again; by default
            those that another version or configuration set aside.
        :raises postoffice.exceptions.ConfigurationError: there is no queue.
        :raises postoffice.intake.maildir.MaildirBusy: another process is importing.
        :raises DepotUnavailable: the database failed; the rest waits in the Maildir.
        :raises OSError: the Maildir or the archive failed; likewise.
        """
        self.refuse_without_queues()
        make_maildir(self.settings.maildir)
        # Who finds another import at work need not wait for the database.
        maildir = Maildir(self.settings.maildir)
        try:
            with self.open_importer() as importer:
                return importer.run(maildir, progress, retry)
        except POSError as error:
            raise DepotUnavailable(f"the database failed: {one_line(error)}") from error
        finally:
            maildir.close()

    def open_importer(self) -> Importer:
        """Return what imports from the Maildir, again and again; close it before this.

        Queues that are new in the configuration are made.

        :raises postoffice.exceptions.ConfigurationError: there is no queue.
        :raises DepotUnavailable: the database cannot be opened now, or failed.
        """
        self.refuse_without_queues()
        connection, folder = self._open_depot()
        return Importer(self.settings, self.archive(), connection, folder, self.fingerprint)

    def expire_histories(self, now: int) -> None:
        """Drop what queues remember and need not any more, of those that nothing comes to, too.

        :param now: in seconds since the epoch.
        :raises DepotUnavailable: the database failed.
        """
        loop = self.settings.loop

        def work(connection: Any) -> None:
            folder = self.folder(connection)
            if folder.receipts is not None:
                folder.receipts.expire(now - RECEIPT_SECONDS)
            for name in folder.names():
                record = folder.get(name)
                record.duplicates.expire(now - DUPLICATE_SECONDS)
                record.arrivals.expire(now - memory_of_loops(loop))

        self._committed(work)

    # -- messages that come over connections -------------------------------------------------------

    def serve_lmtp(
        self,
        ready: Callable[[], None] = lambda: None,
        listening: socket.socket | None = None,
        health: Health = UNOBSERVED,
    ) -> None:
        """Take mail by LMTP where the configuration says, until SIGTERM or SIGINT.

        To be called in the main thread of a process that has not opened the database yet.  A
        database that cannot be reached is waited for; clients are told to try again meanwhile.

        :param ready: is called when clients can connect.
        :param listening: a socket that listens there already.
        :param health: is told how the work goes.
        :raises postoffice.exceptions.ConfigurationError: there is no queue, or no address.
        :raises postoffice.intake.service.CannotListen: the address cannot be listened on.
        """
        settings = self.settings
        self.refuse_without_queues()
        if settings.lmtp is None:
            raise ConfigurationError(
                str(settings.path),
                "post office",
                "lmtp",
                "the option is missing",
                "write where to listen, such as unix:/var/spool/postfix/postoffice/lmtp",
            )
        receiver = Receiver(
            settings.routing,
            settings.loop,
            listening or lmtp_address(settings.lmtp),
            socket.gethostname(),
            self._folder_of_large_messages(),
            settings.rejects_unrouted,
        )
        expiry = self.expiry()
        upkeep = (lambda: None) if expiry is None else (lambda: expiry.work(time.time()))
        Service(receiver, self._open_deposit, self.close, upkeep, health).run(ready)

    def deliver(self, arrival: Arrival) -> list[Reply]:
        """Store one message; return the reply for each of its recipients.

        What was stored is durable.  The same message comes again without harm.

        :raises postoffice.exceptions.PostofficeError: it cannot be stored now.
        :raises OSError: likewise.
        """
        self.refuse_without_queues()
        deposit = self._open_deposit()
        try:
            parcel = parcel_of(arrival, time.time_ns(), 1, "pipe")
            consignment = consign(self.settings.routing, self.settings.loop, parcel)
            replies = deposit.store([consignment])[0]
            if deposit.failed:
                self.log.error("nothing can be stored now: %s", deposit.reason)
            return replies
        finally:
            deposit.close()

    def _folder_of_large_messages(self) -> str:
        """Return a folder from which a file can become a blob without being copied, if there is."""
        blobs = blob_folder_named(self.settings.zodb_uri)
        folder = None if blobs is None else os.path.join(blobs, "tmp")
        if folder is None or not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            return tempfile.gettempdir()
        return folder

    def _open_deposit(self) -> Deposit:
        settings = self.settings
        connection, folder = self._open_depot()
        return Deposit(
            connection,
            folder,
            Intake(folder, settings.loop),
            self.archive(),
            self.fingerprint,
            Unrouted.REJECT if settings.rejects_unrouted else Unrouted.DISCARD,
        )

    def _open_depot(self) -> tuple[Any, QueuesFolder]:
        """Return a connection of its own transactions, and the depot in it with all its queues."""
        if self.reconcile_queues():
            self._sync_folders()
        # What was stored is not looked at again; the usual thousands would fill the memory.
        self.database.setCacheSize(_IMPORT_CACHE)
        manager = TransactionManager(explicit=True)
        connection = self.database.open(manager)
        try:
            manager.begin()
            folder = self.folder(connection)
            manager.abort()
        except BaseException:
            connection.close()
            raise
        return connection, folder

    def refuse_without_queues(self) -> None:
        """Raise an error unless there is a queue that mail could go to.

        :raises postoffice.exceptions.ConfigurationError: there is none.
        """
        if not self.settings.routing.queues:
            raise ConfigurationError(
                str(self.settings.path),
                None,
                None,
                "there is no section [queue:NAME], so that all mail would be discarded",
                "write one for each application",
            )

    @property
    def fingerprint(self) -> str:
        """Version and configuration in one text, for what is set aside."""
        return f"{importlib.metadata.version('postoffice')}/{self.settings.fingerprint}"

    def archive(self) -> Archive:
        """Return the archive of the Maildir."""
        place = self.settings.archive
        folder = place if isinstance(place, Path) else None
        return Archive(self.settings.maildir, folder, keeps=place is not None)

    def expiry(self) -> Expiry | None:
        """Return what removes the archive's older days bit by bit; ``None``: all are kept."""
        archive, keep = self.archive(), self.settings.archive_keep
        return None if keep is None or not archive.keeps else Expiry(archive, keep)

    # -- what administrators ask and do ------------------------------------------------------------

    def explain(self, file: BinaryIO, arrived: int) -> Explanation:
        """Say what every rule answers to the message in a file, and where it would go.

        The message is read as the import reads it.  Changes nothing, opens no database, and so
        knows neither of duplicates nor of throttled senders.

        :param file: a file of the file system, open for reading in binary.
        :param arrived: when it arrived, in nanoseconds since the epoch.
        :raises postoffice.exceptions.LimitExceeded: the import would set the message aside.
        :raises OSError: the file cannot be read.
        """
        routing = self.settings.routing
        size = os.fstat(file.fileno()).st_size
        message = open_message(routing, file.fileno(), arrived)
        return Explanation(
            explain(routing, message),
            Envelope.from_trace(message, arrived),
            size,
            message.oversize,
            header_values(message),
        )

    @contextmanager
    def queue(self, name: str) -> Iterator[Queue]:
        """Give a queue, to look at it in one transaction that is aborted in the end.

        :raises postoffice.exceptions.FolderMissing: the depot was not made yet.
        :raises postoffice.exceptions.QueueMissing: there is no such queue.
        """
        with self.connection() as connection:
            yield Queue(self.folder(connection).get(name))

    def queues(self) -> list[QueueStatus]:
        """Tell how the queues are: those of the configuration in its order, then all others.

        :raises postoffice.exceptions.FolderMissing: the depot was not made yet.
        """
        configured = self.settings.queue_names
        with self.connection() as connection:
            folder = self.folder(connection)
            others = [name for name in folder.names() if name not in configured]
            return [_status(name, folder, name in configured) for name in [*configured, *others]]

    def remove_queue(self, name: str) -> None:
        """Remove a queue that holds nothing, neither waiting nor in quarantine.

        A message that is added at the same time is kept: its transaction, or this one, fails.

        :raises postoffice.exceptions.QueueMissing: there is no such queue.
        :raises postoffice.exceptions.QueueNotEmpty: it holds messages.
        """
        self._committed(lambda connection: self.folder(connection).remove(name))

    def requeue(self, name: str, ids: Sequence[str]) -> int:
        """Put messages from quarantine behind the tail of their queue, in order of arrival.

        All of them, or none on an error.

        :raises postoffice.exceptions.QueueMissing: there is no such queue.
        :raises postoffice.exceptions.MessageMissing: one is not in its quarantine.
        """

        def work(connection: Any) -> int:
            queue = Queue(self.folder(connection).get(name))
            entries = {entry.id: entry.arrived for entry in map(queue.find, ids)}
            for id in sorted(entries, key=lambda id: (entries[id], id)):
                queue.requeue(id)
            return len(entries)

        done: int = self._committed(work)
        return done

    def requeue_all(self, name: str) -> int:
        """Put all messages from quarantine behind the tail, in order of arrival; say how many.

        :raises postoffice.exceptions.QueueMissing: there is no such queue.
        """

        def work(connection: Any) -> int:
            return Queue(self.folder(connection).get(name)).requeue_quarantined_messages()

        done: int = self._committed(work)
        return done

    def release(self, name: str, ids: Sequence[str]) -> int:
        """Let claimed messages be taken by anybody, and deferred ones be due; say how many were so.

        All of them, or none on an error.

        :raises postoffice.exceptions.QueueMissing: there is no such queue.
        :raises postoffice.exceptions.MessageMissing: one does not wait in it.
        """

        def work(connection: Any) -> int:
            queue = Queue(self.folder(connection).get(name))
            return sum(queue.give_back(id) for id in dict.fromkeys(ids))

        done: int = self._committed(work)
        return done

    def release_all(self, name: str) -> int:
        """Let all that is claimed or deferred be taken by anybody; say how many were.

        :raises postoffice.exceptions.QueueMissing: there is no such queue.
        """

        def work(connection: Any) -> int:
            return Queue(self.folder(connection).get(name)).give_all_back()

        done: int = self._committed(work)
        return done

    def discard(self, name: str, ids: Sequence[str]) -> int:
        """Discard messages from quarantine for good: all, or none on an error; say how many.

        :raises postoffice.exceptions.QueueMissing: there is no such queue.
        :raises postoffice.exceptions.MessageMissing: one is not in its quarantine.
        """

        def work(connection: Any) -> int:
            queue = Queue(self.folder(connection).get(name))
            for id in dict.fromkeys(ids):
                queue.remove_from_quarantine(queue.get_quarantined_message(id))
            return len(dict.fromkeys(ids))

        done: int = self._committed(work)
        return done


def lmtp_address(place: config.UnixPlace | config.TCPPlace) -> UnixAddress | TCPAddress:
    """Return what the configuration names, as what can be listened on."""
    if isinstance(place, config.TCPPlace):
        return TCPAddress(place.host, place.port)
    return UnixAddress(str(place.path), place.mode, place.group)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the rules say to one message.

    :ivar decision: where it would go; its trail has the answer of every rule.
    :ivar envelope: as its trace headers tell it.
    :ivar size: in bytes.
    :ivar oversize: whether it is larger than ``max_message_size``.
    :ivar headers: what its entry would show: ``header_from``, ``header_to``, ``subject`` and
        ``message_id``.
    """

    decision: Decision
    envelope: Envelope
    size: int
    oversize: bool
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """How one queue is.

    :ivar name: its name.
    :ivar waiting: how many messages wait, those held and deferred included.
    :ivar held: how many of them consumers hold, to take them soon.
    :ivar deferred: how many of them were given back and are not to be taken yet.
    :ivar quarantined: how many are in quarantine.
    :ivar oldest: arrival of the message at its head, in nanoseconds since the epoch, or ``None``.
    :ivar configured: whether the configuration has it.
    :ivar made: whether the depot has it; the next intake of mail makes what it has not.
    """

    name: str
    waiting: int
    held: int
    deferred: int
    quarantined: int
    oldest: int | None
    configured: bool
    made: bool


def _status(name: str, folder: QueuesFolder, configured: bool) -> QueueStatus:
    if name not in folder.queues:
        return QueueStatus(name, 0, 0, 0, 0, None, configured, made=False)
    record = folder.get(name)
    now = time.time_ns()
    held = sum(1 for _ in living_claims(record, now))
    head = next(Queue(record).entries(limit=1), None)
    return QueueStatus(
        name,
        record.waiting(),
        held,
        record.count_deferred(now),
        int(record.quarantined()),
        None if head is None else head.arrived,
        configured,
        made=True,
    )
