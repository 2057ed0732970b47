"""The server of a database file: one process has it open, any number of others use it by a socket.

::

    serve_storage("file:///srv/depot.fs?blobstorage_dir=/srv/blobs", settings.zeo_listen)

It is a ZEO server.  ZEO knows neither users nor passwords, and unpickles what clients send: whoever
may connect can read, change and destroy all that is in the database, and run code as the user of
the server and of each of its clients.  What keeps others out is the mode of the socket, and of the
folders that lead to it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import zc.lockfile
from BTrees.OOBTree import OOBTree
from ZEO.asyncio.server import Acceptor, ServerProtocol
from ZEO.StorageServer import SlowMethodThread, StorageServer, ZEOStorage
from ZODB.FileStorage import FileStorage, packed_version
from ZODB.fsIndex import fsBucket, fsIndex
from ZODB.utils import u64

from postoffice.database import (
    blob_folder,
    database_file,
    explained,
    locked_text,
    mend_files,
    quota,
    remove_unfinished_blobs,
)
from postoffice.database_uri import shown
from postoffice.depot.durability import sync_file, sync_folder
from postoffice.exceptions import (
    DepotMisconfigured,
    DepotUnavailable,
    PermanentError,
    TemporaryError,
)
from postoffice.packing import durably_packed
from postoffice.storage_socket import LONGEST_ADDRESS, Presence, is_locked, look, name_beside
from postoffice.workers import die_with

if TYPE_CHECKING:
    from postoffice.config import UnixPlace

__all__ = ["StorageFailed", "serve_storage"]

log = logging.getLogger("postoffice")

_STOPS = (signal.SIGTERM, signal.SIGINT)
# A client that comes back is told what changed in so many transactions, and keeps what it has else.
_REMEMBERED_TRANSACTIONS = 1000
# A client that stopped between its vote and its commit would keep all others from committing.
_COMMIT_SECONDS = 60
# Blobs that are being written belong to clients, which live on when the server is killed.
_UNFINISHED_SECONDS = 24 * 3600.0
_ATTEMPTS = 5
_ATTEMPT_SECONDS = 0.1

# No transaction ends before.
_LEAST_POSITION = 40
_INDEX_SECONDS = 2.0
_INDEX_REST_SECONDS = 60.0
# FileStorage reads about 100 MB a second when it has no index of them.
_INDEX_BYTES = 16 * 1024 * 1024


class StorageFailed(DepotUnavailable):
    """The disk failed in the last step of a commit: the file has to be opened anew."""


class _Stopped(BaseException):
    """A signal came while the file was being opened."""


def serve_storage(uri: str, place: UnixPlace, ready: Callable[[], None] = lambda: None) -> None:
    """Serve the file of a ``file://`` URI until SIGTERM or SIGINT.

    To be called in the main thread of a process of its own, which ends soon afterwards: what a
    thread is still packing then is left as it was.  When the parent process dies, the kernel sends
    SIGTERM.

    The socket has its mode and group before anybody can connect.  One that a dead process has left
    is replaced; on a living one nothing is changed.

    :param place: where to listen; where that is not beside the file, a link to it is.
    :param ready: is called when clients can connect.
    :raises postoffice.exceptions.DepotMisconfigured: the URI names no file, or asks for what cannot
        be served.
    :raises postoffice.exceptions.DepotUnavailable: the file is locked, damaged, or cannot be used.
    :raises postoffice.exceptions.PermanentError: no socket can be at that place.
    :raises postoffice.exceptions.TemporaryError: another process listens there.
    :raises StorageFailed: the disk failed later; the same call may be made again, by a new process.
    """
    path = database_file(uri)
    if path is None:
        raise DepotMisconfigured(f"zodb_uri {shown(uri)}: only a file:// can be served")
    most = quota(uri)
    seat = _Seat(path, place)
    before = {number: signal.signal(number, _stop) for number in _STOPS}
    try:
        die_with(os.getppid())
        with explained(uri):
            os.stat(os.path.dirname(path))
        if is_locked(path):
            raise DepotUnavailable(locked_text(path, uri))
        seat.claim()
        with explained(uri):
            mend_files(uri)
            file = _opened(path, blob_folder(uri), most)
            remove_unfinished_blobs(uri, file, _UNFINISHED_SECONDS)
            sync_folder(os.path.dirname(path))
        with file.at_rest_in_the_end():
            _serve(file, seat, ready)
    except _Stopped:
        return
    finally:
        seat.leave()
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    # A second signal must not cut off the closing.
    for one in _STOPS:
        signal.signal(one, signal.SIG_IGN)
    raise _Stopped


def _opened(path: str, blobs: str | None, most: int | None) -> _ServedFile:
    """Open the file, even if somebody just looks whether it is locked."""
    for _ in range(_ATTEMPTS):
        with suppress(zc.lockfile.LockError):
            return _ServedFile(path, blob_dir=blobs, quota=most)
        time.sleep(_ATTEMPT_SECONDS)
    return _ServedFile(path, blob_dir=blobs, quota=most)


def _serve(file: _ServedFile, seat: _Seat, ready: Callable[[], None]) -> None:
    """Serve an open file until a signal comes, or the disk fails."""
    acceptors: list[_Acceptor] = []

    def accept(server: Any, address: str, ssl: None, msgpack: bool) -> _Acceptor:
        acceptors.append(_Acceptor(server, address, seat.bind()))
        return acceptors[0]

    server = StorageServer(
        seat.address,
        {"1": file},
        invalidation_queue_size=_REMEMBERED_TRANSACTIONS,
        Acceptor=accept,
    )
    loop = acceptors[0].event_loop
    for manager in server.lock_managers.values():
        manager.timeout = _CommitLimit(loop, _COMMIT_SECONDS)
    file.when_failed = lambda: loop.call_soon_threadsafe(loop.stop)
    for number in _STOPS:
        loop.add_signal_handler(number, loop.stop)
    seat.take()
    threading.Thread(target=_keep_index, args=(file,), daemon=True).start()
    log.info("database %s is served at %s", file.getName(), seat.address)
    ready()
    loop.run_forever()
    if file.has_failed:
        raise StorageFailed(f"database {file.getName()}: the disk failed while it was written to")


class _Acceptor(Acceptor):  # type: ignore[misc]  # ZEO has no types
    """An acceptor of ZEO's whose socket is made by somebody else."""

    def __init__(self, server: Any, address: str, bound: socket.socket) -> None:
        """Listen on a socket that is bound; its base would make one, with a mode of the umask's."""
        self.storage_server = server
        self.addr = address
        self.ssl_context = None
        self.msgpack = False
        self.event_loop = asyncio.new_event_loop()
        self.server = self.event_loop.run_until_complete(
            self.event_loop.create_unix_server(self.factory, sock=bound)
        )

    def factory(self) -> _Protocol:
        """Return what talks to a client that has connected."""
        handler = _Handler(self.storage_server, self.storage_server.read_only)
        return _Protocol(self.event_loop, self.addr, handler, self.msgpack)


class _Handler(ZEOStorage):  # type: ignore[misc]  # ZEO has no types
    """What does the work for a client; what takes long does not keep the process from ending."""

    def pack(self, time: float, wait: Any = 1) -> Any:
        """Pack in a thread; the reply comes when it is done."""
        return _in_thread(self._pack_impl, time)

    def undoInfo(self, first: int, last: int, spec: Any) -> Any:
        """Look in a thread for what can be undone."""
        return _in_thread(self.storage.undoInfo, first, last, spec)

    def undoLog(self, first: int, last: int) -> Any:
        """Look in a thread for what can be undone."""
        return _in_thread(self.storage.undoLog, first, last)


def _in_thread(method: Callable[..., Any], *arguments: Any) -> Any:
    thread = SlowMethodThread(method, arguments)
    thread.daemon = True
    thread.start()
    return thread.delay


class _Protocol(ServerProtocol):  # type: ignore[misc]  # ZEO has no types
    """What talks to a client, and takes it for no error that one goes."""

    def close(self) -> None:
        """Cut the client off, and give back what it holds.

        ZEO 6.2 leaves the lock of commits with a client that the server itself cuts off.
        """
        handler = self.zeo_storage
        super().close()
        if handler is not None and handler.connected:
            handler.notify_disconnected()

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the client."""
        super().connection_lost(None if isinstance(error, ConnectionError) else error)


class _CommitLimit:
    """Cuts off a client that holds the lock of commits for too long.

    In the place of ZEO's own, which goes by the wall clock.  Used in the thread of the loop only.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, client: Any) -> None:
        """Count from now on for a client."""
        self._timer = self._loop.call_later(self._seconds, self._cut_off, client)

    def end(self, client: Any) -> None:
        """Count no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def is_alive(self) -> bool:
        """See ``ZEO.StorageServer.TimeoutThread``."""
        return True

    def _cut_off(self, client: Any) -> None:
        log.warning(
            "a client voted for a commit and did not finish it within %g s; it is cut off",
            self._seconds,
        )
        client.connection.close()


class _ServedFile(FileStorage):  # type: ignore[misc]  # ZODB has no types
    """A FileStorage that is made for a server.

    :ivar has_failed: whether it has closed itself, as it does when the disk fails in the last step
        of a commit.
    :ivar when_failed: is called then.
    """

    has_failed = False
    is_leaving = False
    when_failed: Callable[[], object] = staticmethod(lambda: None)

    def close(self) -> None:
        """Close; whoever calls this before the end has failed."""
        if self.has_failed:
            return
        super().close()
        if not self.is_leaving:
            self.has_failed = True
            self.when_failed()

    def _check_sanity(self, index: Any, pos: int) -> Any:
        """Return the id of the last transaction, if an index goes up to it; else 0.

        ZODB 6.4 does not believe an index when the last transaction has a record twice, as ZEO
        makes them of blobs, and then reads the whole file again.
        """
        return super()._check_sanity(index, pos) or self._ends_with(index, pos)

    def _ends_with(self, index: Any, pos: int) -> Any:
        if not _LEAST_POSITION <= pos <= os.fstat(self._file.fileno()).st_size:
            return 0
        self._file.seek(pos - 8)
        length = u64(self._file.read(8))
        start = pos - length - 8
        if start < len(packed_version):
            return 0
        header = self._read_txn_header(start)
        if header.tlen != length or header.status not in " p" or length < header.headerlen():
            return 0
        at, end = start + header.headerlen(), start + length
        last: dict[bytes, int] = {}
        while at < end:
            record = self._read_data_header(at)
            if at + record.recordlen() > end or record.tloc != start:
                return 0
            last[record.oid] = at
            at += record.recordlen()
        return header.tid if last and all(index.get(oid) == last[oid] for oid in last) else 0

    def lastInvalidations(self, count: int) -> list[tuple[bytes, list[bytes]]]:
        """Return what a server begins with: the last transaction, without what it changed.

        A client that has seen it keeps what it has.  To read what the last ones changed takes
        seconds where they were large.
        """
        return [(self.lastTransaction(), [])]

    def storeBlob(
        self, oid: bytes, old: bytes, data: bytes, file: str, version: str, transaction: Any
    ) -> None:
        """Store a blob, and have one that has come by the socket on the disk.

        ZODB does not write blobs to the disk.  A client that shares the folder does it itself.
        """
        came = os.path.dirname(os.path.abspath(file)) == os.path.abspath(self.temporaryDirectory())
        super().storeBlob(oid, old, data, file, version, transaction)
        if came:
            sync_file(self.fshelper.getBlobFilename(oid, self._tid))
            folder = os.path.normpath(self.fshelper.getPathForOID(oid))
            base = os.path.normpath(self.fshelper.base_dir)
            while len(folder) >= len(base):
                sync_folder(folder)
                folder = os.path.dirname(folder)

    @contextmanager
    def at_rest_in_the_end(self) -> Iterator[None]:
        """Close the file in the end, so that no thread of this process touches it any more."""
        try:
            with durably_packed(self):
                try:
                    yield
                finally:
                    # Never released.  A thread that packs renames the files with this lock, and
                    # another process may have opened them before this one has ended.
                    self._lock.acquire()
        finally:
            self.is_leaving = True
            self.close()


def _keep_index(file: _ServedFile) -> None:
    """Save the index of a file every now and then, for ever.

    FileStorage does it when it is closed only.  After it was killed, it reads all that came since.
    """
    position, since = file._pos, time.monotonic()
    while True:
        time.sleep(_INDEX_SECONDS)
        grown, now = file._pos - position, time.monotonic()
        if grown == 0 or (grown < _INDEX_BYTES and now - since < _INDEX_REST_SECONDS):
            continue
        try:
            position = save_index(file)
        except OSError as error:
            # It is for speed only.
            log.info("the index of %s is not saved: %s", file.getName(), error.strerror)
            position = file._pos
        since = now


def save_index(file: Any) -> int:
    """Save the index of an open FileStorage; return the position up to which it goes.

    Commits wait for as long as it takes to copy the index in memory: 10 ms for 2,000,000 objects.

    :raises OSError: it cannot be written.
    """
    with file._lock:
        index, position = file._index, file._pos
        buckets = [(key, bucket.toString()) for key, bucket in index._data.items()]
    copy = fsIndex()
    copy._data = OOBTree([(key, fsBucket().fromString(text)) for key, text in buckets])
    path = f"{file.getName()}.index"
    fresh = f"{path}.new"
    try:
        copy.save(position, fresh)
        sync_file(fresh)
        with file._lock:
            # A packed file has another index, and its positions mean nothing in the old one.
            if file._index is index:
                os.rename(fresh, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(fresh)
    return int(position)


class _Seat:
    """The place at which a server listens, and the name by which it is found.

    :ivar address: the path of the socket.
    """

    def __init__(self, path: str, place: UnixPlace) -> None:
        """Note where the server of the file at `path` is to listen.

        :raises PermanentError: no socket can be there.
        """
        self.address = os.path.abspath(place.path)
        self._name = name_beside(path)
        self._mode = place.mode
        self._group = place.group
        self._folder = os.path.dirname(self.address)
        # Clients show this name as that of their server.
        self._fresh = f"{self.address}.{os.getpid()}"
        if len(os.fsencode(self._fresh)) > LONGEST_ADDRESS:
            self._fresh = os.path.join(self._folder, f".{os.getpid()}")
        self._files: set[tuple[int, int]] = set()
        if len(os.fsencode(self.address)) > LONGEST_ADDRESS:
            raise PermanentError(
                f"{self.address} has more than {LONGEST_ADDRESS} bytes, too many for a socket's "
                "address; name a shorter path with zeo_listen"
            )

    def claim(self) -> None:
        """Have it seen that a server is starting: a socket is there, and nobody answers.

        :raises PermanentError: something else is there.
        :raises TemporaryError: somebody answers, or no file can be made there.
        """
        with self._no_error_of_the_system():
            for one in {self.address, self._name}:
                if os.path.lexists(one) and not _is_ours(one):
                    raise PermanentError(f"{one} is no socket, and is left alone")
                if look(one) is Presence.LISTENING:
                    raise TemporaryError(f"another process listens at {one}")
            if self._name != self.address:
                self._link()
            with socket.socket(socket.AF_UNIX) as marker:
                # Nobody will answer, so that anybody may ask.
                os.fchmod(marker.fileno(), 0o666)
                try:
                    marker.bind(self.address)
                    self._remember(self.address)
                except OSError as error:
                    # What a server has left that was killed does as well.
                    if error.errno != errno.EADDRINUSE:
                        raise

    def _link(self) -> None:
        fresh = f"{self._name}.{os.getpid()}"
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        os.symlink(self.address, fresh)
        os.rename(fresh, self._name)
        self._remember(self._name)

    def bind(self) -> socket.socket:
        """Return a socket that is bound, with its mode and its group, and not at its place yet."""
        with self._no_error_of_the_system():
            with suppress(FileNotFoundError):
                os.unlink(self._fresh)
            bound = socket.socket(socket.AF_UNIX)
            try:
                # Linux gives the file the socket's own mode, and nobody gets in before it is right.
                os.fchmod(bound.fileno(), 0o600)
                bound.bind(self._fresh)
                self._remember(self._fresh)
                if self._group is not None:
                    os.chown(self._fresh, -1, self._group)
                os.chmod(self._fresh, self._mode)
            except BaseException:
                bound.close()
                raise
            return bound

    def take(self) -> None:
        """Put the socket that is bound, and that listens by now, at its place."""
        with self._no_error_of_the_system(), self._alone():
            if self._name != self.address and os.path.realpath(self._name) != os.path.realpath(
                self.address
            ):
                # Of two servers that started at once the other one, which has failed, was here.
                self._link()
            os.rename(self._fresh, self.address)

    def leave(self) -> None:
        """Remove what this server has put there, and is there still."""
        with suppress(OSError), self._alone():
            for one in (self._name, self.address, self._fresh):
                with suppress(FileNotFoundError):
                    if _identity(one) in self._files:
                        os.unlink(one)

    def _remember(self, path: str) -> None:
        self._files.add(_identity(path))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep out another server of the same place."""
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    @contextmanager
    def _no_error_of_the_system(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DepotUnavailable(
                f"no server can listen at {self.address}: {error.strerror or error}; zeo_listen "
                "names another place, and zeo_group another group"
            ) from error


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _is_ours(path: str) -> bool:
    mode = os.lstat(path).st_mode
    return stat.S_ISSOCK(mode) or stat.S_ISLNK(mode)
