"""Clients of ZEO: one that asks for new object ids, and one for the server of a file.

A client has a hundred ids of new objects in advance, and ZEO 6.2 keeps them when the server is
restarted.  The server then gives those that were not used yet to others, too, so that for a while
transactions of both fail with a conflict, or with a :exc:`ValueError`, which is not transient.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from typing import Any

from ZEO.ClientStorage import ClientStorage
from ZEO.Exceptions import ClientDisconnected

__all__ = ["FreshIdsClientStorage", "ask_for_new_ids", "client_of"]

_CACHE_BYTES = 256 * 1024 * 1024
_OWNED = "owned"


class FreshIdsClientStorage(ClientStorage):  # type: ignore[misc]  # ZEO has no types
    """A client that forgets the ids that it has in advance whenever it is connected."""

    def notify_connected(self, conn: Any, info: Any) -> None:
        """Forget the ids, and do what is to be done besides."""
        self._oids.clear()
        super().notify_connected(conn, info)


def ask_for_new_ids(storage: Any) -> None:
    """Have a client ask for new ids whenever it is connected again."""
    # Whoever resolves URIs makes the storage.
    if type(storage) is ClientStorage:
        storage.__class__ = FreshIdsClientStorage


class _FileClientStorage(FreshIdsClientStorage):
    """A client of the server of a file, with which a transaction sees what was committed before.

    As with a file that one process has open; others of ZEO's clients see it a moment later.
    """

    def sync(self) -> None:
        """Wait for what the server has told of others' transactions, unless it is away."""
        if self.is_connected():
            with suppress(ClientDisconnected):
                self.ping()


class _CachingClientStorage(_FileClientStorage):
    """A client with a folder of its own for blobs, which goes when it is closed.

    The folder is locked as long as its process lives, so that others know those that were left.
    """

    def __init__(self, address: str, **options: Any) -> None:
        """Connect, as its base does."""
        self._folder, self._lock_of_folder = _new_folder()
        try:
            super().__init__(
                address,
                blob_dir=os.path.join(self._folder, "blobs"),
                blob_cache_size=_CACHE_BYTES,
                **options,
            )
        except BaseException:
            self._remove()
            raise

    def close(self) -> None:
        """Close, and remove the folder."""
        super().close()
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        lock, self._lock_of_folder = self._lock_of_folder, -1
        if lock >= 0:
            os.close(lock)


def client_of(
    address: str, blobs: str | None, seconds: float | None, *, read_only: bool
) -> ClientStorage:
    """Return a client of the server of a file, which is on this machine.

    :param address: the path of its socket.
    :param blobs: the server's folder of blobs.  Who could not make files there that the server can
        use has a folder of its own instead, for copies, below that of temporary files.
    :param seconds: how long calls wait for the server while it is away; ``None``: the usual time.
    :raises ZEO.Exceptions.ClientDisconnected: it does not answer.
    """
    options = {"wait_timeout": seconds, "read_only": read_only}
    if blobs is None:
        return _FileClientStorage(address, **options)
    if _shares(blobs, read_only=read_only):
        return _FileClientStorage(address, blob_dir=blobs, shared_blob_dir=True, **options)
    return _CachingClientStorage(address, **options)


def _shares(blobs: str, *, read_only: bool) -> bool:
    """Say whether this process may use the server's folder of blobs itself.

    Files of another user, root included, the server could not read, or not remove.
    """
    try:
        owner = os.stat(blobs).st_uid
    except OSError:
        return False
    if os.geteuid() == owner:
        return os.access(blobs, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)
    return read_only and os.geteuid() == 0


def _prefix() -> str:
    return f"postoffice-blobs-{os.geteuid()}-"


def _new_folder() -> tuple[str, int]:
    """Make a folder of this process's own, and remove those that killed processes have left."""
    parent = tempfile.gettempdir()
    for entry in os.scandir(parent):
        if entry.name.startswith(_prefix()):
            with suppress(OSError):
                _remove_left(entry.path)
    folder = tempfile.mkdtemp(prefix=_prefix(), dir=parent)
    path = os.path.join(folder, _OWNED)
    lock = os.open(f"{path}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    os.rename(f"{path}.new", path)
    return folder, lock


def _remove_left(folder: str) -> None:
    status = os.lstat(folder)
    if status.st_uid != os.geteuid():
        return
    lock = os.open(os.path.join(folder, _OWNED), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(lock)
