"""Servers of databases for processes under test, to be stopped and started again and again."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from tests.file_server import FileServer
from tests.postgresql import PostgreSQL
from tests.zeo_server import ZeoServer, free_port

__all__ = ["SERVERS", "Server"]


class Server(Protocol):
    """A server that can be stopped and started again, with the same data and address."""

    @property
    def how(self) -> Sequence[str]:
        """The ways in which it can be stopped."""

    def start(self) -> None:
        """Start it, and wait until it answers."""

    def stop(self, how: str) -> object:
        """Stop it in one of its ways, and wait until it has ended."""

    def uri(self, client: str) -> str:
        """Return what a client on the machine of this name opens."""


class _Zeo:
    """A ZEO server, whose clients do not wait long for it."""

    how = ZeoServer.how

    def __init__(self, folder: Path, address: Path | int) -> None:
        self._server = ZeoServer(folder, address)
        self.start = self._server.start
        self.stop = self._server.stop

    def uri(self, client: str) -> str:
        return self._server.uri(wait_seconds=3)


class _File:
    """The server of a file, which clients find by the file's URI."""

    how = FileServer.how

    def __init__(self, folder: Path, address: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._server = FileServer(folder, address)
        self.start = self._server.start
        self.stop = self._server.stop

    def uri(self, client: str) -> str:
        return self._server.uri


class _PostgreSQL:
    """A PostgreSQL server with one database, whose clients each have a folder of blobs."""

    how = ("immediate", "fast")

    def __init__(self, folder: Path, server: PostgreSQL) -> None:
        self._folder = folder
        self._server = server
        self._database = ""

    def start(self) -> None:
        self._server.start()
        self._database = self._database or self._server.new_database()

    def stop(self, how: str) -> None:
        self._server.stop("fast" if how == "fast" else "immediate")

    def uri(self, client: str) -> str:
        return self._server.uri(self._database, self._folder / f"blobs-{client}")


@contextlib.contextmanager
def _zeo_on_tcp(folder: Path) -> Iterator[Server]:
    server = _Zeo(folder, free_port())
    try:
        yield server
    finally:
        server.stop("SIGKILL")


@contextlib.contextmanager
def _zeo_on_socket(folder: Path) -> Iterator[Server]:
    # The folders of tests have names that are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="zeo") as place:
        server = _Zeo(folder, Path(place) / "socket")
        try:
            yield server
        finally:
            server.stop("SIGKILL")


@contextlib.contextmanager
def _file(folder: Path) -> Iterator[Server]:
    # The folders of tests have names that are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="zeo") as place:
        server = _File(folder, Path(place) / "socket")
        try:
            yield server
        finally:
            server.stop("SIGKILL")


@contextlib.contextmanager
def _postgresql(folder: Path) -> Iterator[Server]:
    server = PostgreSQL()
    try:
        yield _PostgreSQL(folder, server)
    finally:
        server.remove()


#: Makes a server, which is not started yet, in a folder, and stops it in the end.
SERVERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Server]]] = {
    "zeo": _zeo_on_tcp,
    "zeo-socket": _zeo_on_socket,
    "file": _file,
    "postgresql": _postgresql,
}
