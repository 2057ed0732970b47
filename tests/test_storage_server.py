"""The server of a database file: real processes, killed and started again, and who finds it."""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transaction
from transaction.interfaces import TransientError
from ZEO.ClientStorage import ClientStorage
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from postoffice.database import DatabaseMissing, open_database, open_for_inspection, open_soon
from postoffice.exceptions import DepotMisconfigured, DepotUnavailable
from postoffice.packing import Packing
from postoffice.storage_server import save_index, serve_storage
from postoffice.config import UnixPlace
from postoffice.storage_socket import Presence, look
from tests.file_server import FileServer

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="file") as place:
        yield Path(place)


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    """The server of a file in that folder, not started yet."""
    prepared = FileServer(folder)
    try:
        yield prepared
    finally:
        prepared.stop("SIGKILL")


@contextlib.contextmanager
def opened(uri: str, opener: Callable[[str], DB] = open_database) -> Iterator[DB]:
    """Open a database, and close it."""
    database = opener(uri)
    try:
        yield database
    finally:
        transaction.abort()
        database.close()


def store(uri: str, name: str, value: object = True) -> None:
    """Store something below the root, in a transaction."""
    with opened(uri) as database:
        connection = database.open()
        connection.root()[name] = value
        transaction.commit()
        connection.close()


def names(uri: str, opener: Callable[[str], DB] = open_database) -> set[str]:
    """Return what is below the root."""
    with opened(uri, opener) as database:
        connection = database.open()
        found = set(connection.root())
        connection.close()
        return found


def run(program: str, *words: str, **process: object) -> subprocess.Popen[str]:
    """Run a program of Python's in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **process,  # type: ignore[call-overload]  # what it is started with
    )


def test_everybody_finds_the_server(server: FileServer) -> None:
    """While the server has the file, all that open its URI go through it, be it to look only."""
    store(server.uri, "before")
    with server:
        store(server.uri, "meanwhile")
        for opener in (open_database, open_soon, open_for_inspection):
            assert {"before", "meanwhile"} <= names(server.uri, opener)
            with opened(server.uri, opener) as database:
                assert isinstance(database.storage, ClientStorage)
        server.stop()
        assert not os.path.lexists(server.name)
    assert {"before", "meanwhile"} <= names(server.uri)


def test_options_of_the_uri_hold_for_the_client(server: FileServer) -> None:
    """What the URI says of the database holds, though the file is opened by somebody else."""
    with server, opened(f"{server.uri}&connection_cache_size=7&database_name=depot") as database:
        assert (database.getCacheSize(), database.database_name) == (7, "depot")


def test_a_new_database_is_made_by_its_server(server: FileServer) -> None:
    """A server makes the file that is not there, and what looks at it then finds it empty."""
    with server:
        with pytest.raises(DatabaseMissing, match="is empty"):
            open_for_inspection(server.uri)
        store(server.uri, "first")
        assert names(server.uri, open_for_inspection) == {"first"}


def test_the_socket_has_its_mode_and_its_group(folder: Path) -> None:
    """Mode and group are those that were asked for, whatever the umask."""
    group = os.getgroups()[0] if os.getuid() else grp.getgrall()[-1].gr_gid
    before = os.umask(0o022)
    try:
        with FileServer(folder, mode=0o620, group=group) as server:
            status = server.address.stat()
            assert stat.S_IMODE(status.st_mode) == 0o620
            assert status.st_gid == group
    finally:
        os.umask(before)


def test_another_place_has_a_link_beside_the_file(folder: Path) -> None:
    """A socket elsewhere is found by a link beside the file, and both go with the server."""
    with tempfile.TemporaryDirectory(prefix="zeo") as place:
        with FileServer(folder, Path(place) / "depot.zeo") as server:
            assert os.readlink(server.name) == str(server.address)
            store(server.uri, "linked")
            assert names(server.uri) == {"linked"}
            server.stop()
            assert not os.path.lexists(server.name)
            assert not os.path.lexists(server.address)
        assert os.listdir(place) == []


def test_a_server_is_closed_in_order(server: FileServer) -> None:
    """On SIGTERM a server ends with status 0, and the index of the file is up to date."""
    server.start()
    store(server.uri, "kept")
    index = Path(f"{server.file}.index")
    before = index.stat().st_mtime_ns
    assert server.stop("SIGTERM") == 0
    assert index.stat().st_mtime_ns > before
    storage = FileStorage(str(server.file))
    assert storage._used_index == 1
    storage.close()


def test_an_index_that_ends_with_a_blob_is_used(server: FileServer) -> None:
    """The record of a blob comes twice in its transaction, and the index is believed all the same.

    Otherwise a server of a large file would read all of it at each start.
    """
    server.start()
    store(server.uri, "blob", Blob(b"large"))
    server.stop()
    server.start()
    assert names(server.uri) == {"blob"}
    server.stop()
    assert "Ignoring index" not in server.errors


def test_the_index_is_saved_without_closing(folder: Path) -> None:
    """An index that was saved meanwhile is one that FileStorage uses, with what came since."""
    path = str(folder / "depot.fs")
    with contextlib.closing(DB(FileStorage(path))) as database:
        connection = database.open()
        connection.root()["one"] = 1
        transaction.commit()
        position = save_index(database.storage)
        assert position == os.stat(path).st_size
        connection.root()["two"] = 2
        transaction.commit()
        for name in ("depot.fs", "depot.fs.index"):
            shutil.copy(folder / name, folder / f"copy-{name}")
        connection.close()
    (folder / "copy-depot.fs").rename(folder / "copy.fs")
    (folder / "copy-depot.fs.index").rename(folder / "copy.fs.index")
    storage = FileStorage(str(folder / "copy.fs"))
    assert storage._used_index == 1
    with contextlib.closing(DB(storage)) as database:
        assert set(database.open().root()) == {"one", "two"}
        transaction.abort()


def test_an_index_of_the_time_before_packing_is_not_kept(folder: Path) -> None:
    """An index that is being saved while the file is packed does not take the new one's place."""
    path = folder / "depot.fs"
    with contextlib.closing(DB(FileStorage(str(path)))) as database:
        connection = database.open()
        for number in range(20):
            connection.root()["number"] = number
            transaction.commit()
        storage = database.storage
        copied = threading.Event()
        packed = threading.Event()

        class Slow:
            """The lock of the storage, which lets a packing in before it is taken again."""

            def __enter__(self) -> None:
                if copied.is_set():
                    packed.wait()
                lock.acquire()

            def __exit__(self, *error: object) -> None:
                lock.release()
                copied.set()

        lock = storage._lock
        storage._lock = Slow()
        saving = threading.Thread(target=save_index, args=(storage,))
        saving.start()
        copied.wait()
        storage._lock = lock
        database.pack(time.time())
        index = Path(f"{path}.index").read_bytes()
        packed.set()
        saving.join()
        assert Path(f"{path}.index").read_bytes() == index
        connection.close()


def test_a_dead_servers_socket_is_replaced(server: FileServer) -> None:
    """After SIGKILL the socket stays, nobody answers, and the next server is found there."""
    server.start()
    store(server.uri, "one")
    server.stop("SIGKILL")
    assert look(str(server.name)) is Presence.SILENT
    server.start()
    assert names(server.uri) == {"one"}


def test_a_living_server_is_left_alone(server: FileServer, folder: Path) -> None:
    """A second server of the same file ends, names the first one, and takes nothing from it."""
    with server:
        socket_before = server.name.stat().st_ino
        said, status = FileServer(folder).refused()
        assert said.startswith("DepotUnavailable: ")
        assert server.process is not None
        assert f"locked by process {server.process.pid} " in said
        assert status == 75
        assert server.name.stat().st_ino == socket_before
        store(server.uri, "one")


def test_what_is_no_socket_is_left_alone(server: FileServer) -> None:
    """A file of somebody else's at the server's name stays, and is not taken for a server."""
    server.name.write_text("notes")
    assert server.refused() == (f"PermanentError: {server.name} is no socket, and is left alone", 65)
    store(server.uri, "one")
    assert server.name.read_text() == "notes"


def test_somebody_who_has_the_file_open_is_named(server: FileServer) -> None:
    """A server whose file an application has open says which process that is, and leaves nothing.

    Meanwhile the application works on.
    """
    with opened(server.uri):
        said, status = server.refused()
        assert f"is locked by process {os.getpid()} " in said
        assert status == 75
        assert not os.path.lexists(server.name)
    server.start()


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("memory://", ["only a file:// can be served"]),
        ("file://{folder}/depot.fs?read_only=1", ["option read_only", "leave it out"]),
        ("file://{folder}/depot.fs?create=1", ["option create", "leave it out"]),
        ("file://{folder}/missing/depot.fs", ["{folder}/missing"]),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    folder: Path, uri: str, parts: list[str]
) -> None:
    """A URI that cannot be served is refused before anything is made, in one line."""
    said, status = FileServer(folder, folder / "zeo", uri=uri.format(folder=folder)).refused()
    for part in parts:
        assert part.format(folder=folder) in said
    assert "\n" not in said
    assert status in (2, 75)
    assert os.listdir(folder) == ["server.err"]
