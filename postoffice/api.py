"""The post office: a depot as its configuration describes it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transaction import TransactionManager
from transaction.interfaces import NoTransaction, TransientError
from ZODB.POSException import POSError

from postoffice import config
from postoffice.database import open_database
from postoffice.delivery import Intake
from postoffice.depot.folder import find_folder, make_folder
from postoffice.display import one_line
from postoffice.exceptions import DepotUnavailable, FolderMissing
from postoffice.intake.archive import Archive, Failure
from postoffice.intake.maildir import Maildir, MaildirImport, Outcome
from postoffice.intake.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from postoffice.depot.folder import QueuesFolder

__all__ = ["PostOffice"]

_ATTEMPTS = 20


class PostOffice:
    """A depot with its Maildir and its rules; opens the database when it is first needed.

    Use it as a context manager, or call :meth:`close`.

    :ivar settings: what the configuration file says.
    """

    def __init__(self, settings: config.Settings | str | os.PathLike[str]) -> None:
        """Take settings, or the path of the file that holds them.

        :raises postoffice.exceptions.ConfigurationError: the file cannot be used.
        """
        if not isinstance(settings, config.Settings):
            settings = config.load(Path(settings))
        self.settings = settings
        self._database: Any = None
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
            self._database = open_database(self.settings.zodb_uri)
        return self._database

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """Give a connection with an explicit transaction manager of its own, in a transaction.

        What is not committed at the end is aborted.
        """
        manager = TransactionManager(explicit=True)
        connection = self.database.open(manager)
        try:
            manager.begin()
            yield connection
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
            raise FolderMissing(f"{error}; `postoffice import` makes it") from None

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
            for name in folder.names():
                if name not in wanted:
                    self.log.warning(
                        "queue %r is not in %s any more; `postoffice queues remove` removes it",
                        name,
                        self.settings.path,
                    )
            return made

        made = self._committed(make)
        for name in made:
            self.log.info("queue %r is new", name)
        return made

    def _committed(self, work: Callable[[Any], Any]) -> Any:
        for attempt in range(_ATTEMPTS):
            with self.connection() as connection:
                try:
                    result = work(connection)
                    connection.transaction_manager.commit()
                    return result
                except TransientError as error:
                    if attempt == _ATTEMPTS - 1:
                        raise DepotUnavailable(one_line(error)) from error
                except (POSError, OSError) as error:
                    raise DepotUnavailable(f"the database failed: {one_line(error)}") from error
            time.sleep(0.01 * attempt)
        raise AssertionError("the last attempt returns or raises")

    def import_messages(
        self,
        progress: Callable[[int, int], None] | None = None,
        retry: Callable[[Failure], bool] | None = None,
    ) -> Outcome:
        """Import all that waits in the Maildir, and expire the archive.

        :param progress: is called with how many messages are done, and how many there are.
        :param retry: says which of the messages that were set aside are tried again; by default
            those that another version or configuration set aside.
        :raises postoffice.intake.maildir.MaildirBusy: another process is importing.
        :raises DepotUnavailable: the database failed; the rest waits in the Maildir.
        :raises OSError: the Maildir or the archive failed; likewise.
        """
        settings = self.settings
        fingerprint = self.fingerprint
        maildir = Maildir(settings.maildir)
        try:
            archive = self.archive()
            self.reconcile_queues()
            with self.connection() as connection:
                folder = self.folder(connection)
                connection.transaction_manager.abort()
                run = MaildirImport(
                    maildir,
                    archive,
                    connection,
                    folder,
                    Intake(folder, settings.loop),
                    Reader(settings.routing, settings.loop),
                    fingerprint,
                )
                outcome = run.run(
                    retry or (lambda failure: failure.fingerprint != fingerprint), progress
                )
            if settings.archive_keep is not None and archive.keeps:
                for day in archive.expire(settings.archive_keep, time.time()):
                    self.log.info("archive of %s has expired", day)
            return outcome
        finally:
            maildir.close()

    @property
    def fingerprint(self) -> str:
        """Version and configuration in one text, for what is set aside."""
        return f"{importlib.metadata.version('postoffice')}/{self.settings.fingerprint}"

    def archive(self) -> Archive:
        """Return the archive of the Maildir."""
        place = self.settings.archive
        folder = place if isinstance(place, Path) else None
        return Archive(self.settings.maildir, folder, keeps=place is not None)
