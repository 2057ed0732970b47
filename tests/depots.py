"""Depots for tests: real databases, and seats in them that commit one apart from the other."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZEO
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from postoffice.database import open_database
from postoffice.depot.folder import QueuesFolder, find_folder, make_folder
from postoffice.depot.queue import QueueRecord
from postoffice.queue import Queue, find_queue
from tests.file_server import FileServer
from tests.postgresql import ServerMissing, shared_server

__all__ = [
    "QUEUE",
    "STORAGES",
    "Depot",
    "Seat",
    "file_depot",
    "mail",
    "postgresql_depot",
    "served_file_depot",
    "sqlite_depot",
    "subjects",
    "zeo_depot",
    "zeo_socket_depot",
]

QUEUE = "app"
MAILS = Path(__file__).parent / "mail"


class Seat:
    """One process's view of a depot: a connection with a transaction manager of its own."""

    def __init__(self, database: DB) -> None:
        self.database = database
        self.transactions = transaction.TransactionManager()
        self.connection = database.open(self.transactions)
        self._queues: dict[str, Queue] = {}
        self._open = True

    @property
    def folder(self) -> QueuesFolder:
        return find_folder(self.connection.root(), "postoffice")

    @property
    def record(self) -> QueueRecord:
        return self.folder.get(QUEUE)

    @property
    def queue(self) -> Queue:
        """The queue of tests; the same object every time."""
        return self.named(QUEUE)

    def named(self, name: str) -> Queue:
        if name not in self._queues:
            self._queues[name] = find_queue(self.connection.root(), name)
        return self._queues[name]

    def begin(self) -> None:
        self.transactions.begin()

    def commit(self) -> None:
        self.transactions.commit()

    def abort(self) -> None:
        self.transactions.abort()

    def add(self, *names: str) -> list[int]:
        """Add mails of these subjects, and commit."""
        self.begin()
        ids = [self.queue.add(mail(name)) for name in names]
        self.commit()
        return ids

    def close(self) -> None:
        if self._open:
            self._open = False
            self.transactions.abort()
            self.connection.close()


class Depot:
    """A depot with one queue, and the seats that were taken in it."""

    def __init__(self, open_database: Callable[[], DB], uri: str) -> None:
        self.uri = uri
        self._open = open_database
        self._seats: list[Seat] = []
        database = open_database()
        with contextlib.closing(Seat(database)) as seat:
            make_folder(seat.connection.root(), "postoffice").make(QUEUE)
            seat.commit()
        self._unseated = [database]

    def seat(self) -> Seat:
        """Open another view of the depot."""
        seat = Seat(self._unseated.pop() if self._unseated else self._open())
        self._seats.append(seat)
        return seat

    def close(self) -> None:
        for seat in self._seats:
            seat.close()


@contextlib.contextmanager
def _opened(
    client: Callable[[], DB], uri: str, at_end: Callable[[DB], object] = lambda database: None
) -> Iterator[Depot]:
    """Open a depot whose seats are clients of their own, as other processes would be.

    :param at_end: is called with the first client when all seats are closed.
    """
    databases: list[DB] = []

    def database() -> DB:
        databases.append(client())
        return databases[-1]

    try:
        depot = Depot(database, uri)
        try:
            yield depot
        finally:
            depot.close()
        at_end(databases[0])
    finally:
        for opened in databases:
            opened.close()


@contextlib.contextmanager
def file_depot(folder: Path) -> Iterator[Depot]:
    """Open a depot in a FileStorage, whose seats share one database."""
    path, blobs = folder / "depot.fs", folder / "blobs"
    database = DB(FileStorage(str(path), blob_dir=str(blobs)))
    depot = Depot(lambda: database, f"file://{path}?blobstorage_dir={blobs}")
    try:
        yield depot
    finally:
        depot.close()
        database.close()


@contextlib.contextmanager
def _zeo_depot(folder: Path, port: int | str) -> Iterator[Depot]:
    blobs = folder / "blobs"
    address, stop = ZEO.server(path=str(folder / "depot.fs"), blob_dir=str(blobs), port=port)
    where = address if isinstance(address, str) else f"{address[0]}:{address[1]}"

    def client() -> DB:
        return ZEO.DB(address, blob_dir=str(blobs), shared_blob_dir=True, server_sync=True)

    try:
        with _opened(client, f"zeo://{where}?blob_dir={blobs}&shared_blob_dir=true") as depot:
            yield depot
    finally:
        stop()


@contextlib.contextmanager
def zeo_depot(folder: Path) -> Iterator[Depot]:
    """Open a depot behind a ZEO server on TCP."""
    with _zeo_depot(folder, 0) as depot:
        yield depot


@contextlib.contextmanager
def zeo_socket_depot(folder: Path) -> Iterator[Depot]:
    """Open a depot behind a ZEO server on a unix socket."""
    # The folders of tests have names that are too long for a socket.
    with (
        tempfile.TemporaryDirectory(prefix="zeo") as place,
        _zeo_depot(folder, f"{place}/socket") as depot,
    ):
        yield depot


@contextlib.contextmanager
def served_file_depot(folder: Path) -> Iterator[Depot]:
    """Open a depot in a file that a server has open, which everybody finds by the file's URI."""
    # The folders of tests have names that are too long for a socket.
    with (
        tempfile.TemporaryDirectory(prefix="zeo") as place,
        FileServer(folder, Path(place) / "socket") as server,
        _opened(lambda: open_database(server.uri), server.uri) as depot,
    ):
        yield depot


@contextlib.contextmanager
def postgresql_depot(folder: Path, **options: str) -> Iterator[Depot]:
    """Open a depot in a database of PostgreSQL's, each seat with a folder of blobs of its own.

    :param options: of the URI, such as ``keep_history="false"``.
    """
    try:
        server = shared_server()
    except ServerMissing as missing:
        pytest.skip(str(missing))
    # To empty a database takes a quarter of the time that a new one takes.
    spare = server.spare[tuple(options.items())]
    name = spare.pop() if spare else server.new_database()
    folders = (folder / "blobs" / f"client{number}" for number in itertools.count(1))

    def client() -> DB:
        return open_database(server.uri(name, next(folders), **options))

    def empty(database: DB) -> None:
        database.storage.zap_all(slow=True)  # which deletes rows, and needs no lock
        spare.append(name)

    with _opened(client, server.uri(name, folder / "blobs" / "others", **options), empty) as depot:
        yield depot


@contextlib.contextmanager
def sqlite_depot(folder: Path) -> Iterator[Depot]:
    """Open a depot in a RelStorage on SQLite."""
    uri = f"sqlite:///?data_dir={folder}/depot&blob_dir={folder}/blobs&shared_blob_dir=true"
    with _opened(lambda: open_database(uri), uri) as depot:
        yield depot


#: How to open a depot in each kind of storage.
STORAGES: dict[str, Callable[[Path], contextlib.AbstractContextManager[Depot]]] = {
    "FileStorage": file_depot,
    "ZEO": zeo_depot,
    "ZEO-socket": zeo_socket_depot,
    "served-file": served_file_depot,
    "PostgreSQL": postgresql_depot,
    "SQLite": sqlite_depot,
}


@pytest.fixture(params=STORAGES)
def depot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Depot]:
    """A depot in each kind of storage."""
    with STORAGES[request.param](tmp_path) as opened:
        yield opened


@pytest.fixture(name="local")
def local_depot(tmp_path: Path) -> Iterator[Depot]:
    """A depot in a FileStorage."""
    with file_depot(tmp_path) as opened:
        yield opened


@pytest.fixture
def one(depot: Depot) -> Seat:
    """The first seat in the depot."""
    return depot.seat()


@pytest.fixture
def two(depot: Depot) -> Seat:
    """The second seat in the depot."""
    return depot.seat()


@pytest.fixture
def seat(local: Depot) -> Seat:
    """A seat in a depot in a FileStorage."""
    return local.seat()


def mail(name: str, *, body: str = "", sender: str = "a@example.com") -> bytes:
    """Return a small mail with this subject."""
    return (
        f"Return-Path: <{sender}>\nFrom: {sender}\nTo: b@example.org\nSubject: {name}\n"
        f"Message-ID: <{name}@example.com>\n\n{body or name}\n"
    ).encode()


def subjects(messages: Any) -> list[str]:
    """Return the subjects of messages, in order."""
    return [str(message["Subject"]) for message in messages]
