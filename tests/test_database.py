"""Opening a database by its URI, and what is said when that does not work."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from postoffice import database
from postoffice.database import DatabaseMissing, open_database, open_for_inspection, open_soon
from postoffice.exceptions import DepotMisconfigured, DepotUnavailable, TemporaryError
from tests.depots import file_depot, sqlite_depot, zeo_depot
from tests.file_server import FileServer
from tests.postgresql import PASSWORD, USER, PostgreSQL, ServerMissing, shared_server
from tests.zeo_server import ZeoServer

HOLDS = """
import sys
from ZODB.FileStorage import FileStorage
storage = FileStorage(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
storage.close()
"""


def refused(uri: str) -> str:
    """Return what is said of a database that cannot be opened."""
    with pytest.raises(DepotUnavailable) as caught:
        open_database(uri)
    assert isinstance(caught.value, TemporaryError)
    mendable = isinstance(caught.value, DepotMisconfigured)
    assert caught.value.exit_status == (2 if mendable else 75)
    return str(caught.value)


def test_a_database_opens(tmp_path: Path) -> None:
    """A URI of a file opens it with its blobs, and closing it removes the lock."""
    with file_depot(tmp_path) as depot:
        uri = depot.uri
    opened = open_database(uri)
    assert "postoffice" in opened.open().root()
    opened.close()
    open_database(uri).close()


def test_a_locked_database_names_its_holder(tmp_path: Path) -> None:
    """It names the process that has the file open, and the command that mends it, in one line."""
    with file_depot(tmp_path) as depot:
        uri = depot.uri
    path = tmp_path / "depot.fs"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        said = refused(uri)
        assert f"database {path} is locked by process {other.pid} ({sys.executable} -c" in said
        assert "start `postoffice serve`" in said
        assert "\n" not in said
        other.communicate(b"")
    open_database(uri).close()


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("nonsense://x", ["no scheme 'nonsense'; use one of: demo, file"]),
        ("file://{here}/missing/depot.fs", ["{here}/missing"]),
        ("zconfig://{here}/missing.conf#main", ["{here}/missing.conf"]),
        (
            "file://{here}/depot.fs?blobstorage_dir={here}/plain/blobs",
            ["the folder of blobs {here}/plain/blobs cannot be used (Not a directory)"],
        ),
        (
            "zeo://localhost:1?wait_timeout=1",
            ["no ZEO server at localhost:1 (Connection refused); is the address right, "],
        ),
        (
            "zeo://{here}/zeo.sock?wait_timeout=1",
            ["no ZEO server at {here}/zeo.sock (No such file or directory); is the address "],
        ),
        (
            "zeo://no.such.host.invalid:9991?wait_timeout=1",
            ["no ZEO server at no.such.host.invalid:9991 ("],
        ),
        (
            "zeo://localhost:1?wait_timeout=1&blob_dir={here}/plain/blobs",
            ["the folder of blobs {here}/plain/blobs cannot be used (Not a directory)"],
        ),
        (
            "sqlite:///?data_dir={here}/plain/data&blob_dir={here}/blobs",
            ["the folder of data {here}/plain/data cannot be used (Not a directory)"],
        ),
        (
            "sqlite:///?data_dir={here}/plain&blob_dir={here}/blobs",
            ["the folder of data {here}/plain cannot be used", "name one that this user can write"],
        ),
        (
            "sqlite:///?data_dir={here}/data&blob_dir={here}/plain",
            ["the folder of blobs {here}/plain cannot be used (Not a directory)"],
        ),
        ("sqlite:///?blob_dir={here}/blobs", ["no folder for the data; write sqlite:///?data_dir"]),
        (
            "postgres://user:secret@localhost:1/db",
            ["database postgres://user:***@localhost:1/db: Connection refused; is PostgreSQL runn"],
        ),
        (
            "postgres://user:secret@no.such.host.invalid:5432/db",
            ['host name "no.such.host.invalid"', "is the host's name right?"],
        ),
        ("postgres://user:secret@localhost/db", ["it names no port", "@HOST:5432/DATABASE"]),
        ("postgres://user:secret@localhost:1/db?such=1", ["keyword(s): such"]),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, uri: str, parts: list[str]
) -> None:
    """Which database, what is wrong and what would be right, in one line without a password."""
    (tmp_path / "plain").write_text("no folder")
    said = refused(uri.format(here=tmp_path))
    for part in parts:
        assert part.format(here=tmp_path) in said
    assert "\n" not in said
    assert "secret" not in said
    assert caplog.records == []


@pytest.fixture(scope="module")
def postgresql() -> PostgreSQL:
    """A PostgreSQL server, which this test process shares."""
    try:
        return shared_server()
    except ServerMissing as missing:
        pytest.skip(str(missing))


def test_what_postgresql_refuses_is_said_in_one_line(
    postgresql: PostgreSQL, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Passwords, databases, rights and kinds that are not right are told apart, and mended."""
    name = postgresql.new_database()
    uri = postgresql.uri(name, tmp_path / "blobs")
    open_database(uri).close()
    postgresql.execute("CREATE ROLE guest LOGIN PASSWORD 'sesame'")
    for wrong, parts in (
        (
            uri.replace(f":{PASSWORD}@", ":secret@"),
            ["postgres://postoffice:***@", "authentication failed", "are user and password right?"],
        ),
        (uri.replace(f":{PASSWORD}@", "@"), ["are user and password right?"]),
        (uri.replace(f"/{name}?", "/other?"), ['database "other" does not exist; make it: crea']),
        (
            uri.replace(f"//{USER}:", "//guest:").replace(f"/{name}?", "/postgres?"),
            ["permission denied for schema public; make the user the owner"],
        ),
        (f"{uri}&keep_history=false", ["keep_history stays what it was when the database was"]),
        (
            postgresql.uri(name, Path("/proc/blobs")),
            ["the folder of blobs /proc/blobs cannot be used (No such file or directory)"],
        ),
    ):
        said = refused(wrong)
        assert [part for part in parts if part not in said] == [], said
        assert "\n" not in said
        assert "secret" not in said
        assert PASSWORD not in said
    assert caplog.records == []


def test_who_is_no_zeo_server_is_told(tmp_path: Path) -> None:
    """Something else that listens at the address of a ZEO server is not taken for one."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        said = refused(f"zeo://{address}?wait_timeout=1")
    assert f"what answers at {address} is no ZEO server" in said


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An application that names a database without its driver is told what to install."""
    for module in ("psycopg2", "psycopg2cffi", "pg8000"):
        monkeypatch.setitem(sys.modules, module, None)
    said = refused("postgres://user:secret@localhost:1/db")
    assert said == (
        "zodb_uri postgres://user:***@localhost:1/db: postgres:// needs the module psycopg2 or "
        "psycopg2cffi or pg8000, which is not installed; run pip install 'postoffice[relstorage]'"
    )


def test_somebody_who_waits_does_not_wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a command at a terminal a server that is away is waited for a few seconds, not for 30."""
    monkeypatch.setattr(database, "_SOON", 1)
    for opening in (open_soon, open_for_inspection):
        started = time.monotonic()
        with pytest.raises(DepotUnavailable, match="no ZEO server at localhost:1"):
            opening("zeo://localhost:1")
        assert time.monotonic() - started < 25


def test_opening_soon_opens_as_any_other(tmp_path: Path) -> None:
    """What needs no server is opened the same way; a limit that the URI has stays."""
    for open_depot in (file_depot, sqlite_depot, zeo_depot):
        folder = tmp_path / open_depot.__name__
        folder.mkdir()
        with open_depot(folder) as depot:
            uri = depot.uri
            if open_depot is zeo_depot:
                open_soon(f"{uri}&wait_timeout=10").close()
                open_soon(uri).close()
        if open_depot is not zeo_depot:
            open_soon(uri).close()


def test_a_refusal_leaves_nothing_open(tmp_path: Path) -> None:
    """After a refusal no descriptor and no lock of ours is left."""
    before = set(os.listdir("/proc/self/fd"))
    refused(f"file://{tmp_path}/missing/depot.fs")
    refused("zeo://localhost:1?wait_timeout=1")
    assert set(os.listdir("/proc/self/fd")) <= before
    assert list(tmp_path.iterdir()) == []


def test_looking_makes_no_database(tmp_path: Path) -> None:
    """A database that is not there yet is said to be missing, and is not made by asking."""
    for uri in (
        f"file://{tmp_path}/depot.fs?blobstorage_dir={tmp_path}/blobs",
        f"sqlite:///?data_dir={tmp_path}/data",
    ):
        with pytest.raises(DatabaseMissing):
            open_for_inspection(uri)
        assert list(tmp_path.iterdir()) == []
        open_database(uri).close()
        open_for_inspection(uri).close()
        for made in tmp_path.iterdir():
            shutil.rmtree(made) if made.is_dir() else made.unlink()


def test_several_who_open_a_database_that_is_empty(tmp_path: Path) -> None:
    """Who opens a database while another one makes its root waits for that, and has it too."""

    def look(number: int) -> int:
        opened = open_database(server.uri(number))
        try:
            with opened.transaction() as connection:
                return len(connection.root())
        finally:
            opened.close()

    for attempt in range(5):
        folder = tmp_path / str(attempt)
        server = ZeoServer(folder, folder / "z")
        with server, ThreadPoolExecutor(4) as pool:
            assert list(pool.map(look, range(4))) == [0] * 4


def test_several_who_open_a_new_file_that_is_served(tmp_path: Path) -> None:
    """Who opens a served file while another one makes its root waits for that, and has it too."""

    def look(uri: str, all_here: Barrier) -> int:
        all_here.wait()
        opened = open_database(uri)
        try:
            with opened.transaction() as connection:
                return len(connection.root())
        finally:
            opened.close()

    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with FileServer(folder) as server, ThreadPoolExecutor(4) as pool:
            assert list(pool.map(look, [server.uri] * 4, [Barrier(4)] * 4)) == [0] * 4
