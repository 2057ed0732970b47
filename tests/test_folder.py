"""The folder of queues: where it is, which formats it opens, and what it refuses."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
from BTrees.OOBTree import OOBTree
from persistent import Persistent
from persistent.mapping import PersistentMapping
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError

from postoffice.depot.folder import FORMAT_VERSION, find_folder, make_folder, split_path
from postoffice.exceptions import DepotFormatError, FolderMissing, PermanentError, QueueMissing
from postoffice.queue import open_queue
from tests.depots import MAILS, Depot, Seat, depot, local_depot, one, seat, two

__all__ = ["depot", "local_depot", "one", "seat", "two"]

GOLDEN = MAILS.parent / "golden"


@pytest.fixture
def connection() -> Iterator[Any]:
    """A connection to an empty database in memory."""
    database = DB(MappingStorage())
    opened = database.open(transaction.TransactionManager())
    yield opened
    opened.transaction_manager.abort()
    opened.close()
    database.close()


@pytest.mark.parametrize("number", range(1, FORMAT_VERSION + 1))
def test_a_depot_of_each_format_opens(tmp_path: Path, number: int) -> None:
    """A depot written by the release that began a format is read, and goes on being used."""
    shutil.copytree(GOLDEN / f"format-{number}", tmp_path / "depot")
    uri = f"file://{tmp_path}/depot/depot.fs?blobstorage_dir={tmp_path}/depot/blobs"
    with open_queue(uri, "first", "/mail/postoffice") as queue:
        entries = list(queue.entries())
        assert [entry.subject for entry in entries] == ["small", "large", "again"]
        assert [entry.attempts for entry in entries] == [0, 0, 1]
        assert entries[0].arrived == 1_700_000_000 * 10**9
        assert (entries[0].sender, entries[0].recipients) == ("a@example.com", ("b@example.org",))
        assert (entries[0].mta_queue_id, entries[0].way) == ("4XyZ", "application")
        assert len(queue) == 3
        messages = [queue.pop_next() for _ in range(3)]
        assert [message["Subject"] for message in messages] == ["small", "large", "again"]
        assert len(messages[1].raw) > 128 * 1024
        transaction.commit()
        queue.add(messages[0].raw)
        transaction.commit()
        assert len(queue) == 1
    with open_queue(uri, "second queue", "/mail/postoffice") as queue:
        ((message, error),) = queue.get_quarantined_messages()
        assert (message["Subject"], error.type, error.message) == (
            "bad",
            "ValueError",
            "second error",
        )
        assert len(queue) == 0
        folder = find_folder(queue.record._p_jar.root(), "mail/postoffice")
        assert folder.format_version == number
        assert folder.journal("spool").names == {"1.M1.host": "cur/1.M1.host"}


def one_line(error: BaseException) -> str:
    """Return an error's text, which must be one line."""
    assert "\n" not in str(error)
    return str(error)


def test_a_newer_format_is_refused(seat: Seat) -> None:
    """A depot of a format that this release does not know is refused in one line."""
    seat.begin()
    seat.folder.format_version = FORMAT_VERSION + 1
    seat.commit()
    root = seat.connection.root()
    for open_it in (find_folder, make_folder):
        with pytest.raises(DepotFormatError, match="install a newer postoffice") as caught:
            open_it(root, "postoffice")
        assert f"format {FORMAT_VERSION + 1}" in one_line(caught.value)
        assert isinstance(caught.value, PermanentError)


def test_data_of_repoze_postoffice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A depot of repoze.postoffice is refused in one line, with its package there or not."""
    name = "repoze.postoffice.queue"
    module = types.ModuleType(name)
    kind = type("QueuesFolder", (OOBTree,), {"__module__": name})
    monkeypatch.setattr(module, "QueuesFolder", kind, raising=False)
    for package in ("repoze.postoffice", name):
        monkeypatch.setitem(sys.modules, package, module)
    for is_there in (True, False):
        database = DB(FileStorage(str(tmp_path / "depot.fs")))
        manager = transaction.TransactionManager()
        root = database.open(manager).root()
        if is_there:
            root["postoffice"] = kind()
            manager.commit()
        for open_it in (find_folder, make_folder):
            with pytest.raises(DepotFormatError) as caught:
                open_it(root, "postoffice")
            assert one_line(caught.value) == (
                "/postoffice of the database holds data of repoze.postoffice, which is not a "
                "depot of this program; give another zodb_path and import the mail again"
            )
        manager.abort()
        database.close()
        monkeypatch.undo()


def test_anything_else_is_refused(connection: Any) -> None:
    """What is no depot at all is refused too, and named."""
    root = connection.root()
    root["postoffice"] = PersistentMapping()
    root["text"] = "text"
    root["mine"] = Persistent()
    for path in ("postoffice", "text", "mine", ""):
        with pytest.raises(DepotFormatError, match="which is not a depot of this program"):
            find_folder(root, path)
    with pytest.raises(DepotFormatError):
        make_folder(root, "postoffice")
    with pytest.raises(DepotFormatError):
        find_folder(root, "mine/below")
    with pytest.raises(DepotFormatError):
        make_folder(root, "mine/below")


def test_a_missing_folder_names_those_there_are(connection: Any) -> None:
    """The text says how far the path leads, and what is there."""
    root = connection.root()
    with pytest.raises(FolderMissing, match="no depot at '/postoffice' of the database; in '/'"):
        find_folder(root, "postoffice")
    make_folder(root, "/some/where/")
    make_folder(root, "some/where else")
    with pytest.raises(FolderMissing) as caught:
        find_folder(root, "/some/other/")
    assert one_line(caught.value) == (
        "no depot at '/some/other' of the database; in '/some' there are: 'where', 'where else'"
    )
    assert find_folder(root, "some/where") is make_folder(root, ("some", "where"))
    with pytest.raises(QueueMissing, match="there are: none"):
        find_folder(root, "some/where").get("app")


def test_paths() -> None:
    """Slashes around a path, or too many within, do not matter."""
    assert split_path("/a//b c/") == split_path(["a", "b c"]) == ("a", "b c")
    assert split_path("/") == ()


def test_two_makers_of_one_queue_conflict(one: Seat, two: Seat) -> None:
    """Of two processes that make the same queue at once, one makes it."""
    one.begin()
    two.begin()
    one.folder.make("new")
    two.folder.make("new")
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    assert two.folder.names() == ["app", "new"]


def test_removing_a_queue(local: Depot) -> None:
    """A removed queue is gone, one of the same name may be made anew, others stay."""
    seat = local.seat()
    seat.folder.make("other")
    seat.folder.remove("app")
    seat.commit()
    assert seat.folder.names() == ["other"]
    with pytest.raises(QueueMissing, match="no queue 'app'; there are: 'other'"):
        seat.folder.remove("app")
    seat.folder.make("app")
    seat.commit()
    seat._queues.clear()
    seat.add("a")
    seat.database.pack()
    seat.begin()
    assert len(seat.queue) == 1
