"""Depots for tests: real databases, and seats in them that commit one apart from the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZEO
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from postoffice.depot.folder import QueuesFolder, find_folder, make_folder
from postoffice.depot.queue import QueueRecord
from postoffice.queue import Queue, find_queue

__all__ = ["QUEUE", "Depot", "Seat", "file_depot", "mail", "subjects", "zeo_depot"]

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
        with contextlib.closing(self.seat()) as seat:
            make_folder(seat.connection.root(), "postoffice").make(QUEUE)
            seat.commit()
        self._seats.clear()

    def seat(self) -> Seat:
        """Open another view of the depot."""
        seat = Seat(self._open())
        self._seats.append(seat)
        return seat

    def close(self) -> None:
        for seat in self._seats:
            seat.close()


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
def zeo_depot(folder: Path) -> Iterator[Depot]:
    """Open a depot behind a ZEO server; each of its seats is a client of its own."""
    blobs = folder / "blobs"
    address, stop = ZEO.server(path=str(folder / "depot.fs"), blob_dir=str(blobs))
    databases: list[DB] = []

    def client() -> DB:
        databases.append(
            ZEO.DB(address, blob_dir=str(blobs), shared_blob_dir=True, server_sync=True)
        )
        return databases[-1]

    host, port = address
    depot = Depot(client, f"zeo://{host}:{port}?blob_dir={blobs}&shared_blob_dir=true")
    try:
        yield depot
    finally:
        depot.close()
        for database in databases:
            database.close()
        stop()


@pytest.fixture(params=[file_depot, zeo_depot], ids=["FileStorage", "ZEO"])
def depot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Depot]:
    """A depot in a FileStorage, then one behind a ZEO server."""
    with request.param(tmp_path) as opened:
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
