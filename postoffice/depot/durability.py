"""Blob files on the disk before the transaction that names them.

ZODB fsyncs its own file and never those of blobs, nor their folders, so that a power failure
could leave a committed message without its body.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transaction.interfaces import ISavepointDataManager
from zope.interface import implementer

if TYPE_CHECKING:
    from ZODB.blob import Blob

__all__ = ["BlobDurability", "sync_file", "sync_folder"]


# Folders that this process has seen written to the disk, in the folders above them, by their
# inodes: packing removes empty ones, and later blobs may need them again.
_durable: dict[str, int] = {}
_MOST_KNOWN = 100_000


def sync_folder(path: str) -> None:
    """Have the entries of a folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _KeepWatching:
    """A savepoint of ours: a blob that is rolled back has no file, and is passed over."""

    def rollback(self) -> None:
        """See ``IDataManagerSavepoint``."""


@implementer(ISavepointDataManager)
class BlobDurability:
    """Joins a transaction that makes blobs, and votes for it when they are on the disk.

    Its vote comes last, after the database has put the blob files into their places and before
    anything is committed; an error there (EIO, ENOSPC) aborts the transaction.  Storages that keep
    blobs elsewhere than in a folder of this machine look after them themselves.

    From the vote on the files stay.  When the very last step fails (the disk reports an error
    late), the transaction may be in the database all the same, and ZODB would then remove its
    blobs.  Files that belong to nothing go when the database is packed.
    """

    def __init__(self, connection: Any) -> None:
        """Watch over new blobs of this connection."""
        self.transaction_manager = connection.transaction_manager
        self._storage = connection.db().storage
        self._helper = _blob_files(self._storage)
        self._blobs: list[Blob] = []
        self._made: dict[str, int] = {}

    def watch(self, blob: Blob) -> None:
        """Take care of one new blob."""
        self._blobs.append(blob)

    def sortKey(self) -> str:
        """Sort last: whoever votes behind this one could still abort the transaction."""
        return "~~postoffice.blobs"

    def savepoint(self) -> _KeepWatching:
        """See ``ISavepointDataManager``."""
        return _KeepWatching()

    def tpc_begin(self, transaction: Any) -> None:
        """See ``IDataManager``; there is nothing to do."""

    def commit(self, transaction: Any) -> None:
        """See ``IDataManager``; there is nothing to do before the vote."""

    def tpc_vote(self, transaction: Any) -> None:
        """Write each blob's file, and the folders that lead to it."""
        if self._helper is None:
            return
        base = os.path.normpath(self._helper.base_dir)
        folders: set[str] = set()
        for blob in self._blobs:
            if blob._p_oid is None:
                continue
            folder = os.path.normpath(self._helper.getPathForOID(blob._p_oid))
            if not os.path.isdir(folder):
                continue
            for name in os.listdir(folder):
                if name.endswith(".blob"):
                    sync_file(os.path.join(folder, name))
            folders.add(folder)
            # A folder that is new has to be written in the one above, up to one that is known.
            while len(folder) > len(base):
                inode = os.stat(folder).st_ino
                if _durable.get(folder) == inode:
                    break
                self._made[folder] = inode
                folder = os.path.dirname(folder)
                folders.add(folder)
        for folder in folders:
            sync_folder(folder)
        written: list[Any] | None = getattr(self._storage, "dirty_oids", None)
        if written is not None:
            written.clear()

    def tpc_finish(self, transaction: Any) -> None:
        """See ``IDataManager``; all was done at the vote."""
        if len(_durable) > _MOST_KNOWN:
            _durable.clear()
        _durable.update(self._made)
        self._blobs.clear()

    def tpc_abort(self, transaction: Any) -> None:
        """See ``IDataManager``; the database removes the files."""
        self._blobs.clear()

    abort = tpc_abort


def _blob_files(storage: Any) -> Any:
    """Return what knows the files of blobs, where they are in a folder of this machine."""
    relational = getattr(storage, "blobhelper", None)
    if relational is not None:
        from relstorage.blobhelper.shared import SharedBlobHelper

        # RelStorage keeps blobs in the database, and its folder is a cache, unless it is shared.
        return relational.fshelper if isinstance(relational, SharedBlobHelper) else None
    return getattr(storage, "fshelper", None)


def sync_file(path: str) -> None:
    """Have the contents of a file written to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
