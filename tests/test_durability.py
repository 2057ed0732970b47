"""Blob files are on the disk before the transaction that names them is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from postoffice.queue import BLOB_SIZE, open_queue
from tests.depots import (
    MAILS,
    Depot,
    Seat,
    depot,
    file_depot,
    local_depot,
    mail,
    one,
    seat,
    subjects,
    two,
)

__all__ = ["depot", "local_depot", "one", "seat", "two"]

ROOT = MAILS.parent.parent
LARGE = mail("large", body="x" * BLOB_SIZE)

ADDS_TWO = """
import sys, transaction
from postoffice import open_queue
with open_queue(sys.argv[1], "app") as queue:
    for name in ("first", "second"):
        queue.add(b"Subject: %s\\n\\n" % name.encode() + b"x" * int(sys.argv[2]))
        transaction.commit()
"""


def traced(uri: str, log: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Add two large messages in a process of its own, under strace."""
    return subprocess.run(
        [
            *("strace", "-f", "-y", "-o", str(log), *options),
            *(sys.executable, "-c", ADDS_TWO, uri, str(BLOB_SIZE)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """The URI of a depot in a FileStorage that nobody has open."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: what is written when cannot be seen")
    with file_depot(tmp_path) as depot:
        return depot.uri


def test_files_and_folders_first(uri: str, tmp_path: Path) -> None:
    """The blob, and each folder that is new on the way to it, is fsynced before the commit is."""
    run = traced(uri, tmp_path / "log", "-e", "trace=fsync,fdatasync")
    assert run.returncode == 0, run.stderr
    synced = re.findall(r"f(?:data)?sync\(\d+<([^>]*)>", (tmp_path / "log").read_text())
    commits = [index for index, path in enumerate(synced) if path.endswith("/depot.fs")]
    blobs = sorted((tmp_path / "blobs").rglob("*.blob"), key=lambda path: path.name)
    assert len(blobs) == 2
    # Opening the database commits nothing; each message does so once.
    start = 0
    for blob, commit in zip(blobs, commits[-2:], strict=True):
        before = synced[:commit]
        assert str(blob) in before
        folder = blob.parent
        while folder != tmp_path / "blobs":
            assert str(folder) in before
            folder = folder.parent
        assert str(tmp_path / "blobs") in before
        assert start < commit
        start = commit


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_an_error_in_the_vote_aborts(uri: str, tmp_path: Path, error: str) -> None:
    """When the blob cannot be written, the commit fails and leaves neither message nor file."""
    run = traced(
        uri, tmp_path / "log", "-e", "trace=fsync", "-e", f"inject=fsync:error={error}:when=1"
    )
    assert run.returncode == 1
    assert f"Errno {5 if error == 'EIO' else 28}" in run.stderr
    log = (tmp_path / "log").read_text()
    assert ".blob" in next(line for line in log.splitlines() if "(INJECTED)" in line)
    assert list((tmp_path / "blobs").rglob("*.blob")) == []
    run = traced(uri, tmp_path / "log")
    assert run.returncode == 0, run.stderr
    with open_queue(uri, "app") as queue:
        assert subjects(queue) == ["first", "second"]


def test_a_vanished_folder_aborts(seat: Seat, tmp_path: Path) -> None:
    """A transaction whose blobs have lost their place fails, and the next one is well."""
    seat.begin()
    seat.queue.add(LARGE)
    shutil.rmtree(tmp_path / "blobs" / "tmp")
    (tmp_path / "blobs" / "tmp").mkdir()
    with pytest.raises(OSError, match="No such file"):
        seat.commit()
    seat.abort()
    seat.begin()
    assert subjects(seat.queue) == []
    seat.queue.add(LARGE)
    seat.commit()
    seat.begin()
    assert seat.queue.pop_next().raw == LARGE


def test_a_rolled_back_blob_is_passed_over(depot: Depot, tmp_path: Path) -> None:
    """A large message that a rollback to a savepoint undid leaves no file, and no error."""
    seat = depot.seat()
    seat.begin()
    seat.queue.add(LARGE)
    savepoint = seat.transactions.savepoint()
    seat.queue.add(LARGE)
    seat.transactions.savepoint()
    savepoint.rollback()
    seat.queue.add(mail("small"))
    seat.commit()
    seat.begin()
    assert subjects(seat.queue) == ["large", "small"]
    assert len(list((tmp_path / "blobs").rglob("*.blob"))) == 1


def test_an_abort_leaves_no_file(depot: Depot, tmp_path: Path) -> None:
    """Large messages that were aborted leave no file behind."""
    seat = depot.seat()
    seat.begin()
    for _ in range(3):
        seat.queue.add(LARGE)
    seat.abort()
    left = [name for _, _, names in os.walk(tmp_path / "blobs") for name in names]
    assert [name for name in left if not name.startswith(".")] == []
