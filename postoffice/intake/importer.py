"""The importer: empties a Maildir, once or again and again, through one open connection."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from postoffice.config import Settings
from postoffice.delivery import Intake
from postoffice.depot.folder import QueuesFolder
from postoffice.intake.archive import Archive, Failure
from postoffice.intake.maildir import Maildir, MaildirImport, Outcome
from postoffice.intake.reader import Reader
from postoffice.intake.reading import ReaderProcess

__all__ = ["Importer"]

log = logging.getLogger("postoffice")


class Importer:
    """Imports from the Maildir of a configuration.  Belongs to one thread.

    What it has learnt of the depot's histories it keeps from one run to the next.  After a run that
    raised an error it is of no more use: close it, and open another.
    """

    def __init__(
        self,
        settings: Settings,
        archive: Archive,
        connection: Any,
        folder: QueuesFolder,
        fingerprint: str,
    ) -> None:
        """Prepare to import.

        :param connection: of the depot's database, with an explicit transaction manager of its own;
            closed with the importer.
        :param folder: the depot, in that connection.
        :param fingerprint: names version and configuration; kept with what is set aside.
        """
        self._settings = settings
        self._archive = archive
        self._connection = connection
        self._folder = folder
        self._fingerprint = fingerprint
        self._intake = Intake(folder, settings.loop)

    def __enter__(self) -> Importer:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def run(
        self,
        maildir: Maildir,
        progress: Callable[[int, int], None] | None = None,
        retry: Callable[[Failure], bool] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Import all that waits now, and expire the archive.

        :param maildir: that of the configuration.
        :param progress: is called with how many messages are done, and how many there are.
        :param retry: says which of the messages that were set aside are tried again; by default
            those that another version or configuration set aside.
        :param between: is called between two transactions; a
            :exc:`~postoffice.exceptions.PostofficeError` that it raises ends the run.
        :raises postoffice.exceptions.DepotUnavailable: the database failed; the rest waits in the
            Maildir.
        :raises OSError: the Maildir or the archive failed; likewise.
        """
        settings, archive = self._settings, self._archive
        reader = ReaderProcess(Reader(settings.routing, settings.loop))
        try:
            run = MaildirImport(
                maildir,
                archive,
                self._connection,
                self._folder,
                self._intake,
                reader,
                self._fingerprint,
            )
            outcome = run.run(retry or self._is_of_another_time, progress, between)
            if settings.archive_keep is not None and archive.keeps:
                for day in archive.expire(settings.archive_keep, time.time()):
                    log.info("archive of %s has expired", day)
            return outcome
        finally:
            reader.close()

    def _is_of_another_time(self, failure: Failure) -> bool:
        return failure.fingerprint != self._fingerprint
