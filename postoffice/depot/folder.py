"""The folder of queues: the depot itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from BTrees.OOBTree import OOBTree
from persistent import Persistent
from persistent.mapping import PersistentMapping

from postoffice.depot.journal import Journal
from postoffice.depot.queue import QueueRecord
from postoffice.depot.receipts import Receipts
from postoffice.exceptions import DepotFormatError, FolderMissing, QueueMissing, QueueNotEmpty

__all__ = ["FORMAT_VERSION", "QueuesFolder", "find_folder", "make_folder", "split_path"]

#: The format that this release writes; it reads this one and those before it.
FORMAT_VERSION = 1


class QueuesFolder(Persistent):
    """All queues of a depot, by name, and the intake journals.

    :ivar format_version: the format of everything below; see :data:`FORMAT_VERSION`.
    :ivar queues: :class:`postoffice.depot.queue.QueueRecord` by name.
    :ivar journals: :class:`postoffice.depot.journal.Journal` by the id of the spool.
    :ivar receipts: what came over connections lately; ``None`` in a depot that was made before
        there was such a log, until one comes.
    """

    receipts: Receipts | None = None

    def __init__(self) -> None:
        """Make a depot without queues."""
        self.format_version = FORMAT_VERSION
        self.queues = OOBTree()
        self.journals = OOBTree()
        self.receipts = Receipts()

    def names(self) -> list[str]:
        """Return the names of the queues, in alphabetical order."""
        return list(self.queues.keys())

    def get(self, name: str) -> QueueRecord:
        """Return a queue.

        :raises QueueMissing: there is none of this name.
        """
        record: QueueRecord | None = self.queues.get(name)
        if record is None:
            raise QueueMissing(name, self.names())
        return record

    def make(self, name: str) -> QueueRecord:
        """Make an empty queue.

        :raises ValueError: there is one of this name.
        """
        if name in self.queues:
            raise ValueError(f"there is a queue {name!r} already")
        record = self.queues[name] = QueueRecord(name)
        return record

    def remove(self, name: str) -> None:
        """Remove a queue that holds no message, neither waiting nor in quarantine.

        Whoever adds to it at the same time meets a conflict, or this does.

        :raises QueueMissing: there is none of this name.
        :raises QueueNotEmpty: it holds messages.
        """
        record = self.get(name)
        waiting, quarantined = record.waiting(), int(record.quarantined())
        if waiting or quarantined:
            raise QueueNotEmpty(
                f"queue {name!r} still holds {waiting} waiting and {quarantined} quarantined "
                "messages; consume, requeue or discard them first"
            )
        record.close()
        del self.queues[name]

    def journal(self, spool: str) -> Journal:
        """Return the journal of a spool, made when there is none."""
        journal: Journal | None = self.journals.get(spool)
        if journal is None:
            journal = self.journals[spool] = Journal()
        return journal


def split_path(path: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names on a path such as ``/postoffice``; slashes around it do not matter."""
    if not isinstance(path, str):
        return tuple(path)
    return tuple(name for name in path.strip("/").split("/") if name)


def find_folder(root: Any, path: str | Sequence[str]) -> QueuesFolder:
    """Return the depot at a path of the database.

    :raises FolderMissing: there is none; the text names what there is.
    :raises DepotFormatError: what is there is not of a format that this release reads.
    """
    here = root
    passed = ""
    for name in split_path(path):
        if passed:
            _check_way(here, passed)
        try:
            here = here[name]
        except (KeyError, TypeError):
            there_are = ", ".join(repr(str(key)) for key in list(_keys(here))[:10])
            raise FolderMissing(
                f"no depot at {passed + '/' + name!r} of the database; "
                f"in {passed or '/'!r} there are: {there_are or 'nothing'}"
            ) from None
        passed += "/" + name
    return _checked(here, passed)


def make_folder(root: Any, path: str | Sequence[str]) -> QueuesFolder:
    """Return the depot at a path of the database, made when there is none.

    Folders that are missing on the way are made too.

    :raises DepotFormatError: something else is there.
    """
    *way, last = split_path(path)
    here = root
    passed = ""
    for name in way:
        _check_way(here, passed)
        if name not in here:
            here[name] = PersistentMapping()
        here = here[name]
        passed += "/" + name
    _check_way(here, passed)
    if last not in here:
        here[last] = QueuesFolder()
    return _checked(here[last], "/" + "/".join([*way, last]))


def _check_way(here: Any, path: str) -> None:
    if isinstance(here, QueuesFolder) or not hasattr(here, "__contains__"):
        kind = type(here)
        raise DepotFormatError(
            f"{path} of the database is no folder, but an object of "
            f"{kind.__module__}.{kind.__qualname__}; give another zodb_path"
        )


def _keys(here: Any) -> list[Any]:
    keys = getattr(here, "keys", None)
    return list(keys()) if callable(keys) else []


def _checked(folder: Any, path: str) -> QueuesFolder:
    if not isinstance(folder, QueuesFolder):
        kind = type(folder)
        told = f"an object of {kind.__module__}.{kind.__name__}"
        if kind.__module__.startswith("repoze.postoffice"):
            told = "data of repoze.postoffice"
        raise DepotFormatError(
            f"{path} of the database holds {told}, which is not a depot of this program; "
            "give another zodb_path and import the mail again"
        )
    if folder.format_version > FORMAT_VERSION:
        raise DepotFormatError(
            f"{path} of the database is a depot of format {folder.format_version}, and this "
            f"release reads up to {FORMAT_VERSION}; install a newer postoffice"
        )
    return folder
