"""Packing a database: giving back the space of what is neither current nor young.

What a storage keeps of the past, and how it packs, differs by its kind; a :class:`Packing` knows.
Nothing in postoffice needs it to be done.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any

import zc.lockfile
from ZEO.ClientStorage import ClientStorage
from ZEO.Exceptions import ClientDisconnected, ServerException
from ZODB.FileStorage.FileStorage import FileStorage

from postoffice.display import one_line, printable
from postoffice.exceptions import DepotUnavailable

__all__ = ["Packing", "durably_packed"]

# By their names: RelStorage need not be installed.
_BUSY_ERRORS = {"LockError", "UnableToAcquirePackUndoLockError"}


class Packing:
    """One packing of an open database.

    Others may use the database meanwhile, as its storage allows.  Whenever it is cut off, what the
    database holds is what it held, and a packing may begin anew.
    """

    def __init__(self, database: Any) -> None:
        """Prepare to pack an open ``ZODB.DB``; nothing happens yet."""
        self._database = database
        self._storage = database.storage
        self._file = _file_storage(self._storage)

    @property
    def keeps_size(self) -> bool:
        """Whether the storage keeps the space that is free now for what comes, as RelStorage does.

        Its size then is the same before and after.
        """
        return self._file is None and not isinstance(self._storage, ClientStorage)

    @property
    def at_server(self) -> bool:
        """Whether a ZEO server packs, and the files are with it."""
        return isinstance(self._storage, ClientStorage)

    def size(self) -> int:
        """Return the size of the database in bytes, without blobs that are files.

        :raises DepotUnavailable: the server is gone.
        """
        with _one_error():
            return int(self._storage.getSize())

    def copied(self) -> int | None:
        """Return the size in bytes of the copy that :meth:`run` is making of a file.

        ``None``: it has not begun to copy, or what is packed is no file of this process.  Any
        thread may ask.
        """
        if self._file is None:
            return None
        try:
            return os.stat(_copy_of(self._file)).st_size
        except FileNotFoundError:
            return None

    def run(self, before: float) -> None:
        """Pack, and return when it is done.

        An interrupt ends it, but for the packing of a ZEO server, which goes on.

        :param before: what was not current any more at this time goes; seconds since the epoch.
        :raises DepotUnavailable: another packing is under way, the disk is full, the server is
            gone.
        """
        with _one_error(), self._alone():
            self._storage.pack(before, self._database.references)

    def leftovers(self) -> list[str]:
        """Return the paths of what holds the state before, which the next packing replaces."""
        if self._file is None:
            return []
        places = [_path_of(self._file), self._file.blob_dir]
        return [f"{path}.old" for path in places if path and os.path.exists(f"{path}.old")]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep out a second packing where the storage does not, and see to a file's safety."""
        if self._file is not None:
            with durably_packed(self._file):
                yield
            return
        # RelStorage has no lock against it on SQLite, whose adapter alone has this folder.
        folder = getattr(getattr(self._storage, "_adapter", None), "data_dir", None)
        if folder is None:
            yield
            return
        lock = zc.lockfile.LockFile(os.path.join(folder, "pack.lock"))
        try:
            yield
        finally:
            lock.close()


def _file_storage(storage: Any) -> Any:
    """Return the FileStorage that a storage is, or has below it; ``None`` if there is none."""
    # A proxy for blobs, which a file:// URI opens, has no public way to what it stands for.
    below = [storage, *vars(storage).values()]
    return next((one for one in below if isinstance(one, FileStorage)), None)


def _path_of(file: Any) -> str:
    return os.path.abspath(str(file.getName()))


def _copy_of(file: Any) -> str:
    return f"{_path_of(file)}.pack"


@contextlib.contextmanager
def durably_packed(file: Any) -> Iterator[None]:
    """Whenever a FileStorage is packed, have the copy on the disk before it takes its place.

    In the end there is none left behind.

    ZODB renames the copy without fsync: a power failure soon afterwards could leave an empty file.
    """
    path, copy, packer = _path_of(file), _copy_of(file), file.packer

    def durable_packer(*arguments: Any) -> Any:
        result = packer(*arguments)
        if result is not None:
            try:
                _make_like(path, copy)
                _sync(copy)
            except BaseException:
                # A packer returns with the commit lock held, and its caller is not reached.
                file._commit_lock.release()
                raise
        return result

    file.packer = durable_packer
    try:
        yield
    finally:
        file.packer = packer
        if os.path.exists(copy):
            if not os.path.exists(path):
                # Cut off between ZODB's two renames.
                os.rename(f"{path}.old", path)
            os.remove(copy)
    _sync(os.path.dirname(path))


def _make_like(path: str, copy: str) -> None:
    """Give the copy the mode of the file, and its owner: root may pack what is another user's."""
    status = os.stat(path)
    os.chmod(copy, stat.S_IMODE(status.st_mode))
    if os.geteuid() == 0:
        os.chown(copy, status.st_uid, status.st_gid)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Turn whatever a storage raises into one line."""
    try:
        yield
    except Exception as error:
        # Storages and their drivers raise errors of their own; what is not known is temporary.
        raise DepotUnavailable(_line(error)) from error


def _line(error: Exception) -> str:
    reason = _reason(error)
    if type(error).__name__ in _BUSY_ERRORS or reason.endswith("Already packing"):
        return "another packing of this database is under way; that one is enough"
    if isinstance(error, ClientDisconnected):
        reason = "the server went away"
    return f"packing failed: {reason}; nothing is lost, and it may be packed again"


def _reason(error: Exception) -> str:
    if isinstance(error, ServerException):
        kind, values = error.args  # of the error there: its class's name, what it was made with
        return printable(str(values[-1] if values else kind))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {one_line(error)}"
