"""RelStorage made as trustworthy as ZODB's own storages: outages, late commits, lost ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import transaction
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from ZODB.blob import Blob

from postoffice.database import open_database
from postoffice.exceptions import DepotDisconnected, DepotMisconfigured
from postoffice.relational import TransientRelStorage
from tests.postgresql import PostgreSQL, ServerMissing


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    """A PostgreSQL server that tests may stop and start."""
    try:
        server = PostgreSQL()
        server.start()
    except ServerMissing as error:
        pytest.skip(f"no PostgreSQL: {error}")
    yield server
    server.remove()


def sqlite_uri(folder: Path) -> str:
    return f"sqlite:///?data_dir={folder}/var&blob_dir={folder}/blobs"


def test_outages_are_transient_errors(server: PostgreSQL, tmp_path: Path) -> None:
    """While the server is away, loads and commits are transient errors; begin and abort work."""
    uri = server.uri(server.new_database(), tmp_path / "blobs")
    with closing(open_database(uri)) as database:
        assert isinstance(database.storage, TransientRelStorage)
        manager = transaction.TransactionManager()
        with closing(database.open(manager)) as connection:
            root = connection.root()
            root["a"], root["b"] = PersistentMapping(x=1), PersistentMapping(x=1)
            root["blob"] = Blob(b"large")
            manager.commit()
            connection.cacheMinimize()
            root["a"]["x"] += 1
            server.stop("immediate")
            with pytest.raises(DepotDisconnected):
                manager.commit()
            manager.abort()
            for _ in range(2):
                manager.begin()
                with pytest.raises(TransientError):
                    root["b"]["x"] += 1
                with pytest.raises(TransientError), root["blob"].open() as file:
                    file.read()
                manager.abort()
            server.start()
            manager.begin()
            assert (root["a"]["x"], root["b"]["x"]) == (1, 1)
            with root["blob"].open() as file:
                assert file.read() == b"large"
            manager.abort()


def test_attempts_outlive_an_outage(server: PostgreSQL, tmp_path: Path) -> None:
    """The three lines that retry go on when the server is back, with what others did meanwhile."""
    uri = server.uri(server.new_database(), tmp_path / "blobs")
    with closing(open_database(uri)) as mine, closing(open_database(uri)) as another:
        manager, other = transaction.TransactionManager(), transaction.TransactionManager()
        with closing(mine.open(manager)) as connection, closing(another.open(other)) as second:
            connection.root()["count"] = PersistentMapping(x=0)
            manager.commit()
            tries = 0
            for attempt in manager.attempts(10):
                with attempt:
                    tries += 1
                    if tries == 1:
                        server.stop("immediate")
                    if tries == 4:
                        server.start()
                        other.begin()
                        second.root()["count"]["x"] += 10
                        other.commit()
                    connection.root()["count"]["x"] += 1
            assert tries >= 4
            other.begin()
            assert second.root()["count"]["x"] == 11
            other.abort()


def test_sqlite_waits_for_the_disk(tmp_path: Path) -> None:
    """A commit to SQLite is on the disk when it returns."""
    manager = transaction.TransactionManager()
    with (
        closing(open_database(sqlite_uri(tmp_path))) as database,
        closing(database.open(manager)) as connection,
    ):
        cursor = connection._storage._load_connection.cursor
        assert cursor.connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_ids_of_sqlite_are_never_given_twice(tmp_path: Path) -> None:
    """When SQLite's counter of ids is lost, new objects do not take the place of old ones."""
    manager = transaction.TransactionManager()
    for turn in ("first", "second"):
        with (
            closing(open_database(sqlite_uri(tmp_path))) as database,
            closing(database.open(manager)) as connection,
        ):
            for number in range(100):
                connection.root()[f"{turn} {number}"] = PersistentMapping(turn=turn)
            manager.commit()
            connection.cacheMinimize()
            found = {key: value["turn"] for key, value in connection.root().items()}
            assert all(key.startswith(value) for key, value in found.items())
            manager.abort()
        (tmp_path / "var" / "oids.sqlite3").unlink()
    assert len(found) == 200


@pytest.mark.parametrize("kept", ["true", "false"])
def test_history_stays_what_it_was(tmp_path: Path, kept: str) -> None:
    """A SQLite database is refused, and left alone, when the URI has the other keep_history."""
    uri = f"{sqlite_uri(tmp_path)}&keep_history={kept}"
    open_database(uri).close()
    other = {"true": "false", "false": "true"}[kept]
    with pytest.raises(DepotMisconfigured, match="history, which stays so"):
        open_database(f"{sqlite_uri(tmp_path)}&keep_history={other}")
    open_database(uri).close()
