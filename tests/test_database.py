"""Opening a database by its URI, and what is said when that does not work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from postoffice.database import DatabaseMissing, open_database, open_for_inspection
from postoffice.exceptions import DepotUnavailable, TemporaryError
from tests.depots import file_depot

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
    assert caught.value.exit_status == 75
    return str(caught.value)


def test_a_database_opens(tmp_path: Path) -> None:
    """A URI of a file opens it with its blobs, and closing it removes the lock."""
    with file_depot(tmp_path) as depot:
        uri = depot.uri
    database = open_database(uri)
    assert "postoffice" in database.open().root()
    database.close()
    open_database(uri).close()


def test_a_locked_database_names_its_holder(tmp_path: Path) -> None:
    """It names the process that has the file open, and the two lines that mend it."""
    with file_depot(tmp_path) as depot:
        uri = depot.uri
    path = tmp_path / "depot.fs"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        said = refused(uri).splitlines()
        assert f"database {path} is locked by process {other.pid} ({sys.executable} -c" in said[0]
        assert "runzeo" in said[1]
        assert said[2].strip().startswith(f"zodb_uri = zeo://{tmp_path}/zeo.sock?blob_dir=")
        other.communicate(b"")
    open_database(uri).close()


def test_what_cannot_be_opened_is_said_in_one_line(tmp_path: Path) -> None:
    """An unknown kind, a missing folder, a server that is not there: one line each."""
    for uri, part in (
        ("nonsense://x", "no such kind of database"),
        (f"file://{tmp_path}/missing/depot.fs", "missing"),
        (f"zconfig://{tmp_path}/missing.conf#main", "missing.conf"),
        ("zeo://localhost:1?wait_timeout=1", "localhost:1"),
    ):
        said = refused(uri)
        assert part in said
        assert "\n" not in said


def test_no_password_is_shown() -> None:
    """A password in a URI does not come back in an error."""
    said = refused("postgres://user:secret@localhost:1/db?connect_timeout=1")
    assert "secret" not in said


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
