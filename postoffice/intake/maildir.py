"""The Maildir: everything that was delivered into it, into the depot, exactly once.

A file leaves the spool when what became of it is durable, and not before:

1. files are read and decided on, some hundred at a time, in order of arrival;
2. one transaction stores them, with their names in the spool's journal;
3. they move to the archive, and the folders are written to the disk;
4. the next transaction's names replace theirs in the journal.

Whoever is killed in between leaves files behind that the journal names: the next run moves them
without importing them again.  One process at a time works on a spool; a lock sees to that.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import shutil
import stat
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.POSException import ConflictError, POSError

from postoffice.delivery import Intake, Prepared, Result
from postoffice.depot.durability import sync_folder
from postoffice.depot.folder import QueuesFolder
from postoffice.display import one_line, printable
from postoffice.exceptions import DepotUnavailable, PostofficeError, TemporaryError
from postoffice.intake.archive import Archive, Failure, local_day
from postoffice.intake.commit import commit, give_up, lacks_room
from postoffice.intake.reader import (
    SpoolFile,
    Unreadable,
    arrival,
    is_same_time,
    open_spool_file,
)
from postoffice.intake.reading import ReaderProcess
from postoffice.intake.report import report
from postoffice.queue import BLOB_SIZE

__all__ = [
    "BATCH",
    "Maildir",
    "MaildirBusy",
    "MaildirImport",
    "Outcome",
    "identity",
    "make_maildir",
    "unique",
    "waiting_files",
]

log = logging.getLogger("postoffice")

#: Messages a transaction.
BATCH = 100
_BATCH_BYTES = 8 << 20
# Batches that are read, or wait to be read, while one is stored.
_AHEAD = 3
# Of messages for which there is no room, before it is given up on all.
_MOST_LEFT = 20
_ATTEMPTS = 20
# What is restarted is back by then.
_AWAY_SECONDS = 10.0
_LOCK = ".postoffice.lock"
# A copy, where the archive is on another file system, fails with these as reading did.
_UNMOVABLE = frozenset({errno.EACCES, errno.EPERM, errno.EIO})


class MaildirBusy(TemporaryError):
    """Another process is importing from this Maildir."""


@dataclass(slots=True)
class Outcome:
    """What an import did.

    :ivar counts: how many messages, by verdict.
    :ivar set_aside: how many were newly set aside.
    :ivar dropped: how many files an earlier run had imported, and only had to be moved.
    """

    counts: dict[str, int] = field(default_factory=dict)
    set_aside: int = 0
    dropped: int = 0

    def count(self, verdict: str) -> None:
        """Count one message."""
        self.counts[verdict] = self.counts.get(verdict, 0) + 1

    @property
    def total(self) -> int:
        """How many messages were processed."""
        return sum(self.counts.values()) + self.set_aside


def make_maildir(path: Path) -> None:
    """Make the folders of a Maildir that are missing; the one above it has to be there.

    :raises OSError: they cannot be made.
    """
    for name in ("", "new", "cur", "tmp"):
        (path / name).mkdir(mode=0o700, exist_ok=True)


class Maildir:
    """A Maildir that is locked for this process.

    :ivar spool_id: what the spool is known by in the depot, wherever its folder is moved.
    """

    def __init__(self, path: Path) -> None:
        """Lock a Maildir; see :func:`make_maildir`.

        :raises MaildirBusy: another process has it.
        :raises OSError: it is not there, or cannot be opened.
        """
        self.path = path
        self._lock = os.open(
            path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = os.pread(self._lock, 64, 0).decode("ascii", "replace").strip()
            if len(text) != 32:
                text = uuid.uuid4().hex
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"{text}\n".encode("ascii"), 0)
                os.fsync(self._lock)
                # Without its id the spool would have lost its journal.
                sync_folder(str(path))
        except BlockingIOError:
            os.close(self._lock)
            raise MaildirBusy(f"another import of {path} is running") from None
        except BaseException:
            os.close(self._lock)
            raise
        self.spool_id = text

    def close(self) -> None:
        """Unlock the Maildir."""
        os.close(self._lock)

    def files(self) -> list[tuple[int, int, str]]:
        """Return arrival, size and place (``new/NAME``) of what waits, in order of arrival."""
        return waiting_files(self.path)


def waiting_files(path: Path) -> list[tuple[int, int, str]]:
    """Return arrival, size and place (``new/NAME``) of what waits, in order of arrival.

    Files only: dot files, folders, links, FIFOs and what vanishes meanwhile are passed over.

    :raises OSError: the Maildir cannot be read.
    """
    found = []
    for folder in ("new", "cur"):
        with os.scandir(path / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    if not entry.is_file(follow_symlinks=False):
                        continue
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found.append((status.st_mtime_ns, status.st_size, f"{folder}/{entry.name}"))
    found.sort()
    return found


class _Vanished(Exception):
    """A file that was read has left the spool, or is another one, before it was stored."""

    def __init__(self, source: str) -> None:
        self.source = source
        super().__init__(source)


class MaildirImport:
    """One run over a Maildir; see the module.

    :ivar outcome: what was done so far.
    """

    def __init__(
        self,
        maildir: Maildir,
        archive: Archive,
        connection: Any,
        folder: QueuesFolder,
        intake: Intake,
        reader: ReaderProcess,
        fingerprint: str,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Prepare a run.

        :param connection: of the depot's database, with an explicit transaction manager of its own.
        :param folder: the depot, in that connection.
        :param fingerprint: names version and configuration; kept with what is set aside.
        :param clock: the time, in nanoseconds since the epoch.
        """
        self.outcome = Outcome()
        self._maildir = maildir
        self._archive = archive
        self._connection = connection
        self._manager = connection.transaction_manager
        self._folder = folder
        self._intake = intake
        self._reader = reader
        self._fingerprint = fingerprint
        self._clock = clock
        self._paths: dict[str, str] = {}
        self._set_aside_names: set[str] = set()
        self._left = 0
        self._no_room: DepotUnavailable | None = None
        self._between: Callable[[], None]

    def run(
        self,
        retry: Callable[[Failure], bool],
        progress: Callable[[int, int], None] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Import all that waits.

        :param retry: says which of the messages that were set aside are to be tried again.
        :param progress: is called with how many are done, and how many there are.
        :param between: is called between two transactions; a
            :exc:`~postoffice.exceptions.PostofficeError` that it raises ends the run.
        :raises DepotUnavailable: the database failed; what was not imported waits in the spool.
            For want of room, that is raised at the end, when all was tried for which there is some.
        :raises OSError: the spool or the archive failed; likewise.
        """
        self._between = between
        # Forked now, the reader does not share the memory of the list of files.
        self._reader.start()
        self._recover()
        failed = self._failed(retry)
        waiting = self._waiting({file.name for file in failed})
        total = len(waiting) + len(failed)
        done = 0
        batches = _batches(failed, waiting, str(self._maildir.path))
        submitted: deque[list[SpoolFile]] = deque()
        while True:
            for batch in islice(batches, _AHEAD - len(submitted)):
                self._reader.submit(batch)
                submitted.append(batch)
            if not submitted:
                break
            batch = submitted.popleft()
            self._import(batch, self._reader.collect())
            done += len(batch)
            between()
            if progress is not None:
                progress(done, total)
        self._clear_journal()
        if self._no_room is not None:
            raise self._no_room
        return self.outcome

    def _failed(self, retry: Callable[[Failure], bool]) -> list[SpoolFile]:
        found = []
        for failure in self._archive.failures():
            self._set_aside_names.add(failure.name)
            if not retry(failure):
                continue
            path = os.path.join(self._archive.failed, failure.name)
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                continue
            found.append(SpoolFile(path, failure.name, status.st_mtime_ns, status.st_size))
        found.sort(key=lambda file: (file.arrived, file.name))
        return found

    def _waiting(self, retried: set[str]) -> list[tuple[int, int, str]]:
        """Return what waits, one file of a unique name in a run.

        A name tells files apart while they are under way, whatever their flags; what has the name
        of another waits for the next run.
        """
        found = []
        known = {unique(name) for name in retried}
        files = self._maildir.files()
        # In new there are no flags, so that names differ there as they are.
        clashing = {unique(one[2][4:]) for one in files if one[2][0] == "c" or ":" in one[2]}
        for one in files:
            name = one[2][4:]
            if name in self._set_aside_names:
                path = str(self._maildir.path / one[2])
                if self._archive.was_set_aside(path):
                    self._archive.finish_setting_aside(path)
                    continue
            if unique(name) in known:
                log.warning(
                    "%s has the name of another; it waits for the next run", printable(name)
                )
                continue
            if unique(name) in clashing:
                known.add(unique(name))
            found.append(one)
        return found

    def _recover(self) -> None:
        """Take out of the spool what a run that was cut off has stored."""
        names: dict[str, str] = {}
        self._transact(lambda: names.update(self._journal_names()), lambda: False)
        if not names:
            return
        for name in self._drop(names):
            log.info("%s was imported by a run that was cut off; archived", printable(name))
            self.outcome.dropped += 1
        self._archive.sync()
        self._clear_journal()

    def _drop(self, names: Mapping[str, str]) -> Iterator[str]:
        """Take the files of these identities out of the spool, whatever became of their flags."""
        known: dict[str, list[tuple[int, int, str]]] = {}
        for text, target in names.items():
            name, arrived, size = text.rsplit("/", 2)
            known.setdefault(name, []).append((int(arrived), int(size), target))
        for folder in (
            str(self._maildir.path / "new"),
            str(self._maildir.path / "cur"),
            self._archive.failed,
        ):
            try:
                there = os.listdir(folder)
            except FileNotFoundError:
                continue
            for name in there:
                if unique(name) not in known:
                    continue
                path = os.path.join(folder, name)
                try:
                    status = os.lstat(path)
                except FileNotFoundError:
                    continue
                place = next(
                    (
                        place
                        for arrived, size, place in known[unique(name)]
                        if size == status.st_size and is_same_time(arrived, arrival(status))
                    ),
                    None,
                )
                if place is not None and self._archive.take(path, place):
                    if folder == self._archive.failed:
                        self._archive.forget_failure(name)
                    yield name

    def _clear_journal(self) -> None:
        def clear() -> None:
            journal = self._folder.journals.get(self._maildir.spool_id)
            if journal is not None and journal.names:
                journal.names = {}

        self._transact(clear, lambda: not self._journal_names())

    # -- one batch ---------------------------------------------------------------------------------

    def _import(
        self, batch: Sequence[SpoolFile], read: Sequence[Prepared | Unreadable | None]
    ) -> None:
        self._paths = {file.name: file.path for file in batch}
        prepared = []
        for file, found in zip(batch, read, strict=True):
            if isinstance(found, Unreadable):
                self._set_aside(file, found.reason)
            elif found is not None:
                prepared.append(found)
        if not prepared:
            self._archive.sync()
            return
        try:
            self._deliver(prepared)
        except (PostofficeError, OSError) as error:
            if not isinstance(error, DepotUnavailable) or not lacks_room(error):
                raise
            # It may be one that is too large, and the others shall not wait for it.
            self._deliver_singly(prepared)
        except Exception as error:
            # A defect of ours, which a message has brought out; likewise.
            log.error("a batch could not be stored: %r; each message is tried by itself", error)
            self._deliver_singly(prepared)

    def _deliver_singly(self, prepared: Sequence[Prepared]) -> None:
        for one in prepared:
            try:
                self._deliver([one])
            except DepotUnavailable as error:
                self._leave(one, error)
            except (PostofficeError, OSError):
                raise
            except Exception as reason:
                path, values = self._paths[one.source], one.values
                file = SpoolFile(path, one.source, values["arrived"], values["size"])
                self._set_aside(file, f"{type(reason).__name__}: {one_line(reason)}")
        self._archive.sync()

    def _leave(self, one: Prepared, error: DepotUnavailable) -> None:
        """Leave a message in the spool for which there is no room, unless many are left already.

        :raises DepotUnavailable: it is not for want of room, or there seems to be none at all.
        """
        self._left += 1
        if not lacks_room(error) or self._left > _MOST_LEFT:
            raise error
        log.info("%s waits: %s", printable(one.source), one_line(error))
        self._no_room = error

    def _deliver(self, prepared: list[Prepared]) -> None:
        names = self._store(prepared, local_day(self._clock() / 1e9))
        elsewhere = {}
        for one in prepared:
            path = self._paths[one.source]
            key = _identity_of(one)
            if not self._archive.take(path, names[key]):
                elsewhere[key] = names[key]
            elif os.path.dirname(path) == self._archive.failed:
                self._archive.forget_failure(one.source)
        if elsewhere:
            # A mail reader has given them flags, and another name, meanwhile.
            moved = list(self._drop(elsewhere))
            if len(moved) < len(elsewhere):
                log.info("%d vanished before they were archived", len(elsewhere) - len(moved))
        self._archive.sync()

    def _set_aside(self, file: SpoolFile, reason: str) -> None:
        failure = Failure(file.name, reason, self._fingerprint, self._clock() // 1_000_000_000)
        self.outcome.set_aside += 1
        try:
            self._archive.set_aside(file.path, failure)
        except OSError as error:
            if error.errno not in _UNMOVABLE:
                raise
            # What cannot be read cannot be copied to another file system either.
            log.warning(
                "%s stays where it is, and cannot be processed: %s; nor set aside: %s",
                printable(file.path),
                printable(reason),
                error.strerror,
            )
            return
        log.warning(
            "%s is set aside: %s; it is in %s",
            printable(file.name),
            printable(reason),
            self._archive.failed,
        )

    def _store(self, prepared: list[Prepared], day: date) -> dict[str, str]:
        """Store messages and report them; return their identities with their places in the archive.

        Those whose files vanish meanwhile are removed from the list.
        """
        names = {_identity_of(one): self._archive.place(one.source, day) for one in prepared}
        results: list[Result] = []

        def store() -> None:
            for vanished in [one for one in prepared if one.source not in self._paths]:
                prepared.remove(vanished)
                del names[_identity_of(vanished)]
            results[:] = self._intake.deliver(
                prepared,
                self._clock(),
                lambda one: self._archive.place(one.source, day),
                self._fill,
            )
            self._folder.journal(self._maildir.spool_id).names = dict(names)

        while True:
            try:
                self._transact(store, lambda: bool(names) and self._journal_names() == names)
            except _Vanished as vanished:
                log.info("%s vanished while it was imported", printable(vanished.source))
                del self._paths[vanished.source]
            else:
                break
        self._intake.forget_bodies()
        for result in results:
            self.outcome.count(result.decision.verdict.value)
            report(result)
        return names

    def _fill(self, message: Prepared, blob: Blob) -> None:
        """Make a spool file a blob: by a hard link if it is ours alone, else by a copy."""
        path = self._paths[message.source]
        folder = self._connection.db().storage.temporaryDirectory()
        target = os.path.join(folder, f"postoffice-{os.getpid()}-{uuid.uuid4().hex}")
        values = message.values
        descriptor = open_spool_file(
            SpoolFile(path, message.source, values["arrived"], values["size"])
        )
        if descriptor is None:
            raise _Vanished(message.source)
        try:
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not (_is_ours(status) and _link(path, target, status)):
                    with open(target, "xb") as copy:
                        shutil.copyfileobj(file, copy, 1 << 20)
            blob.consumeFile(target)
        except BaseException:
            # On a full disk a piece that is of no use would be in the way of everything.
            with suppress(OSError):
                os.unlink(target)
            raise

    # -- transactions ------------------------------------------------------------------------------

    def _journal_names(self) -> dict[str, str]:
        journal = self._folder.journals.get(self._maildir.spool_id)
        return dict(journal.names) if journal is not None else {}

    def _begin(self) -> None:
        self._manager.begin()

    def _transact(self, work: Callable[[], None], committed: Callable[[], bool]) -> None:
        """Do some work in a transaction, again if that failed for a while.

        A commit that failed may have happened all the same (the server was killed after it, the
        disk reported an error late), so before each repetition the database is asked.

        :param committed: tells, in a new transaction, whether the work is done already.
        """
        attempt = 0
        since = time.monotonic()
        while True:
            try:
                self._begin()
                if attempt and committed():
                    self._manager.abort()
                    return
                work()
                commit(self._manager)
                return
            except TransientError as error:
                give_up(self._manager, self._intake)
                attempt += 1
                away = not isinstance(error, ConflictError)
                if attempt == _ATTEMPTS or (away and time.monotonic() - since > _AWAY_SECONDS):
                    raise DepotUnavailable(f"the database refuses: {one_line(error)}") from error
                self._between()
                time.sleep(random.uniform(0.5, 1) * min(0.01 * 2**attempt, 2))  # noqa: S311  # no secret
            except (POSError, OSError) as error:
                give_up(self._manager, self._intake)
                raise DepotUnavailable(f"the database failed: {one_line(error)}") from error
            except BaseException:
                give_up(self._manager, self._intake)
                raise


def unique(name: str) -> str:
    """Return the unique part of a Maildir file's name, without flags that a reader put there."""
    return name.partition(":")[0]


def identity(name: str, arrived: int, size: int) -> str:
    """Return what a spool file is known by in the journal, whatever its flags and its folder.

    :param arrived: see :func:`postoffice.intake.reader.arrival`.
    :param size: in bytes.
    """
    return f"{unique(name)}/{arrived}/{size}"


def _identity_of(message: Prepared) -> str:
    return identity(message.source, message.values["arrived"], message.values["size"])


def _batches(
    failed: list[SpoolFile], waiting: list[tuple[int, int, str]], folder: str
) -> Iterator[list[SpoolFile]]:
    """Share the files out into batches that are small in number and in bytes.

    `waiting` is emptied on the way: with many files its memory is wanted for other things.
    """

    def files() -> Iterator[SpoolFile]:
        yield from failed
        waiting.reverse()
        while waiting:
            arrived, size, place = waiting.pop()
            yield SpoolFile(f"{folder}/{place}", place[4:], arrived, size)

    batch: list[SpoolFile] = []
    size = 0
    for file in files():
        batch.append(file)
        if file.size < BLOB_SIZE:
            size += file.size
        if len(batch) == BATCH or size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_ours(status: os.stat_result) -> bool:
    """Tell whether nobody else can write the file, by this name or by another."""
    return (
        status.st_uid == os.geteuid()
        and status.st_nlink == 1
        and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _link(path: str, target: str, status: os.stat_result) -> bool:
    """Link a file, if the path still names the one of this status; tell whether it is done."""
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        # Another file system, or one without hard links; or the name has gone, but not the file.
        return False
    if os.path.samestat(os.lstat(target), status):
        return True
    os.unlink(target)
    return False
