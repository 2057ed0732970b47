"""Depots that are measured again and again, each time as they were when they were filled."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from servers import postgresql_server, serve

__all__ = ["SHELVES", "Shelf"]


class Shelf(Protocol):
    """Where one depot is kept.

    :ivar notes: a file for whoever fills the depot; where it is, the depot was filled.
    :ivar file: the file of the database that grows, or ``None``.
    """

    notes: Path
    file: Path | None

    def new(self) -> AbstractContextManager[str]:
        """Make the depot's database; give its URI for as long as it is being filled."""

    def keep(self) -> None:
        """Keep the depot as it is now."""

    def depot(self) -> AbstractContextManager[str]:
        """Give the URI of the depot as it was kept."""


class _FileShelf:
    """A FileStorage, alone or behind a ZEO server: it is cut off where it was kept."""

    def __init__(self, storage: str, place: Path) -> None:
        self._storage = storage
        self._place = place
        self.notes = place / "notes.json"
        self.file: Path | None = place / "depot.fs"
        self._index, self._kept = place / "depot.fs.index", place / "kept"

    def new(self) -> AbstractContextManager[str]:
        """See :meth:`Shelf.new`."""
        # What an interrupted run has left is no depot.
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True)
        return serve(self._storage, self._place)

    def keep(self) -> None:
        """See :meth:`Shelf.keep`."""
        self._kept.mkdir()
        shutil.copy(self._index, self._kept / "index")
        (self._kept / "size").write_text(str((self._place / "depot.fs").stat().st_size))

    def depot(self) -> AbstractContextManager[str]:
        """See :meth:`Shelf.depot`."""
        os.truncate(self._place / "depot.fs", int((self._kept / "size").read_text()))
        shutil.copy(self._kept / "index", self._index)
        return serve(self._storage, self._place)


class _PostgreSQLShelf:
    """A database of a PostgreSQL server, of which each round has a copy."""

    def __init__(self, server: Any, place: Path) -> None:
        place.mkdir()
        self._server = server
        self._blobs = place / "blobs"
        self._name = server.new_database()
        self.notes = place / "notes.json"
        self.file: Path | None = None

    @contextlib.contextmanager
    def new(self) -> Iterator[str]:
        """See :meth:`Shelf.new`."""
        yield self._server.uri(self._name, self._blobs)

    def keep(self) -> None:
        """See :meth:`Shelf.keep`; nobody changes it."""

    @contextlib.contextmanager
    def depot(self) -> Iterator[str]:
        """See :meth:`Shelf.depot`."""
        copy = f"{self._name}_copy"
        self._server.execute(f"CREATE DATABASE {copy} TEMPLATE {self._name}")
        try:
            yield self._server.uri(copy, self._blobs)
        finally:
            self._server.execute(f"DROP DATABASE {copy} WITH (FORCE)")


@contextlib.contextmanager
def _files(storage: str, folder: Path) -> Iterator[Callable[[int], Shelf]]:
    # Behind a server it is the same file as without.
    yield lambda size: _FileShelf(storage, folder / f"depot-{size}")


@contextlib.contextmanager
def _databases(storage: str, folder: Path) -> Iterator[Callable[[int], Shelf]]:
    known: dict[int, Shelf] = {}
    with postgresql_server() as server:

        def shelf(size: int) -> Shelf:
            if size not in known:
                known[size] = _PostgreSQLShelf(server, folder / f"postgresql-{size}")
            return known[size]

        yield shelf


#: By the storage's name: what gives, in a folder, the shelf for each number of messages.
SHELVES: dict[str, Callable[[str, Path], AbstractContextManager[Callable[[int], Shelf]]]] = {
    "file": _files,
    "zeo": _files,
    "postgresql": _databases,
}
