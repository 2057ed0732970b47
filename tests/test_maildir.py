"""The Maildir: what is taken from it, in which order, and what is not."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transaction.interfaces import IDataManager
from ZEO.Exceptions import ClientDisconnected
from ZODB.POSException import ConflictError
from zope.interface import implementer

from postoffice.api import PostOffice
from postoffice.delivery import Intake, Prepared, Result
from postoffice.exceptions import DepotUnavailable, TemporaryError
from postoffice.intake import maildir
from postoffice.intake.archive import local_day
from postoffice.intake.commit import commit as commit_intake
from postoffice.intake.maildir import (
    Maildir,
    MaildirBusy,
    MaildirImport,
    identity,
    make_maildir,
    unique,
)
from postoffice.queue import BLOB_SIZE
from tests.spools import EPOCH, Spool, digest, large, mail, other_file_system, post_office


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """An empty spool."""
    return Spool(tmp_path / "spool")


def before_storing(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[list[Prepared]], None]
) -> None:
    """Have something happen after the first batch was read and before it is stored."""
    original = MaildirImport._store
    waiting = [action]

    def store(run: MaildirImport, prepared: list[Prepared], day: date) -> dict[str, str]:
        while waiting:
            waiting.pop()(prepared)
        return original(run, prepared, day)

    monkeypatch.setattr(MaildirImport, "_store", store)


def subjects(spool: Spool) -> list[str]:
    """Return the subjects in the queue, in order."""
    return [raw.split(b"Subject: ")[1].split(b"\n")[0].decode() for raw in spool.raws()]


# -- what waits ------------------------------------------------------------------------------------


def test_mail_is_imported_in_order_of_arrival(spool: Spool) -> None:
    """Modification times order the mail of ``new`` and ``cur``, whatever the names."""
    for number, name in enumerate(["zz", "10", "9", "aa:2,S", "é", "b:2,", "-"]):
        place = "cur" if ":" in name else "new"
        spool.put(mail(f"mail {number}"), name, place, second=number)
    spool.put(mail("earliest"), "zzz", second=-5)
    os.utime(spool.maildir / "new" / "zzz", ns=(EPOCH - 1, EPOCH - 1))
    spool.run()
    assert subjects(spool) == ["earliest", *(f"mail {number}" for number in range(7))]
    assert spool.waiting() == []


def test_batches_keep_the_order(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of arrival holds from transaction to transaction."""
    monkeypatch.setattr(maildir, "BATCH", 3)
    for number in range(20):
        spool.put(mail(f"{number}"), f"name {97 * number % 20}", second=number)
    seen: list[tuple[int, int]] = []
    with post_office(spool.ini) as office:
        office.import_messages(lambda done, total: seen.append((done, total)))
    assert subjects(spool) == [str(number) for number in range(20)]
    assert seen == [(min(done, 20), 20) for done in range(3, 22, 3)]


def test_only_files_are_taken(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dot files, folders, links, FIFOs, sockets and what is in ``tmp`` stay where they are."""
    outside = tmp_path / "outside"
    outside.write_bytes(mail("outside"))
    new = spool.maildir / "new"
    (new / ".dot").write_bytes(mail("dot"))
    (new / "folder").mkdir()
    (new / "folder" / "mail").write_bytes(mail("within"))
    (new / "link").symlink_to(outside)
    (new / "dangling").symlink_to(tmp_path / "nowhere")
    (new / "loop").symlink_to(new / "loop")
    os.mkfifo(new / "fifo")
    (spool.maildir / "tmp" / "unfinished").write_bytes(mail("unfinished"))
    with socket.socket(socket.AF_UNIX) as listener:
        # The path of a socket may not be as long as that of a temporary folder.
        with monkeypatch.context() as patch:
            patch.chdir(new)
            listener.bind("socket")
        there = spool.waiting()
        spool.put(mail("real"))
        assert spool.run().counts == {"queued": 1}
    assert subjects(spool) == ["real"]
    assert spool.waiting() == there
    assert (spool.maildir / "tmp" / "unfinished").exists()
    assert outside.read_bytes() == mail("outside")


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "nothing", "other"])
def test_what_is_listed_and_then_something_else_is_passed_over(
    spool: Spool, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is replaced between listing and reading stops nobody and is not followed."""
    outside = tmp_path / "outside"
    outside.write_bytes(mail("outside"))
    path = spool.put(mail("changes"), second=0)
    spool.put(mail("stays"), second=1)
    original = Maildir.files

    def files(self: Maildir) -> list[tuple[int, int, str]]:
        found = original(self)
        path.unlink()
        if kind == "link":
            path.symlink_to(outside)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "other":
            path.write_bytes(mail("other"))
        return found

    monkeypatch.setattr(Maildir, "files", files)
    spool.run()
    expected = ["other", "stays"] if kind == "other" else ["stays"]
    assert sorted(subjects(spool)) == expected
    assert spool.waiting() == ([] if kind in ("nothing", "other") else [f"new/{path.name}"])
    assert outside.read_bytes() == mail("outside")


@pytest.mark.parametrize("size", [500, BLOB_SIZE + 1])
def test_what_vanishes_before_it_is_stored_harms_nobody(
    spool: Spool, size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is removed after it was read is stored or not; the others are, once."""
    gone = spool.put(large("gone", size), second=0)
    others = [spool.put(large(f"other {number}", size)) for number in range(3)]
    raws = [path.read_bytes() for path in others]
    before_storing(monkeypatch, lambda prepared: gone.unlink())
    with caplog.at_level(logging.INFO):
        spool.run()
    found = spool.raws()
    assert [raw for raw in found if b"gone" not in raw] == raws
    assert len(found) == (3 if size > BLOB_SIZE else 4)
    assert "vanished" in caplog.text
    assert spool.waiting() == []
    assert len(spool.archived()) == 3


@pytest.mark.parametrize("size", [500, BLOB_SIZE + 1])
def test_what_a_mail_reader_moves_meanwhile_is_imported_once(
    spool: Spool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that goes from ``new`` to ``cur`` after it was read is there once in the end."""
    path = spool.put(large("moved", size))

    def move(prepared: list[Prepared]) -> None:
        path.rename(spool.maildir / "cur" / f"{path.name}:2,S")

    before_storing(monkeypatch, move)
    spool.run()
    spool.run()
    assert spool.raws() == [large("moved", size)]
    assert spool.waiting() == []
    assert [path.name for path in spool.archived()] == [
        path.name if size < BLOB_SIZE else f"{path.name}:2,S"
    ]


def test_a_large_file_that_changes_meanwhile_waits(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is not the one which was read is not stored under the other's decision."""
    path = spool.put(large("before"))
    spool.put(large("other"))

    def change(prepared: list[Prepared]) -> None:
        path.write_bytes(large("behind", BLOB_SIZE + 5000))

    before_storing(monkeypatch, change)
    spool.run()
    assert spool.raws() == [large("other")]
    assert spool.waiting() == [f"new/{path.name}"]
    spool.run()
    assert spool.raws() == [large("other"), large("behind", BLOB_SIZE + 5000)]


def test_files_of_one_unique_name_are_all_imported(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    """Two files whose names differ in flags alone are two messages, each imported once."""
    spool.put(mail("in new"), "same", second=0)
    spool.put(large("in cur"), "same:2,S", place="cur", second=1)
    spool.put(large("in cur too"), "same", place="cur", second=2)
    assert [spool.run().counts for _ in range(3)] == [{"queued": 1}] * 3
    assert "waits for the next run" in caplog.text
    assert subjects(spool) == ["in new", "in cur", "in cur too"]
    assert spool.waiting() == []
    assert len(spool.archived()) == 3


def test_identities_tell_files_apart() -> None:
    """What a file is known by does not change with its flags, and differs with time and size."""
    assert unique("1.M2P3.host:2,RS") == unique("1.M2P3.host") == "1.M2P3.host"
    assert identity("a:2,S", 1, 2) == identity("a", 1, 2)
    assert len({identity("a", 1, 2), identity("a", 1, 3), identity("a", 2, 2)}) == 3


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [BLOB_SIZE - 1, BLOB_SIZE, BLOB_SIZE + 1, 5_000_000])
@pytest.mark.parametrize("archive", ["", "archive = none"])
def test_every_byte_arrives(spool: Spool, size: int, archive: str) -> None:
    """Messages around the size from which they are blobs, and of 5 MB, arrive byte for byte."""
    spool.configure(archive)
    raw = large("sizes", size)
    spool.put(raw)
    spool.run()
    assert spool.raws() == [raw]
    assert [path.read_bytes() for path in spool.archived()] == ([] if archive else [raw])


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n",
        b"\0" * 100,
        b"\r\n\r\n",
        b"From: a@b\r\n\r\n\xff\xfe",
        b"Subject: \xff\0\x1b[2J\n",
    ],
)
def test_odd_files_are_archived_as_they_are(spool: Spool, raw: bytes) -> None:
    """Empty and broken files go somewhere, and their bytes are in the archive."""
    spool.put(raw)
    outcome = spool.run()
    assert outcome.total == 1
    assert outcome.set_aside == 0
    assert spool.waiting() == []
    assert [path.read_bytes() for path in spool.archived()] == [raw]


@pytest.mark.parametrize("name", ["x" * 255, "\udcff\udcfe", "a\nb\x1b[31m", "x.reason", "a b'\"$"])
@pytest.mark.parametrize("subject", ["fine", "hopeless"])
def test_any_name_will_do(
    spool: Spool, name: str, subject: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A long or hostile name is no obstacle, and nothing of it reaches the log raw."""
    spool.put(mail(subject), name)
    with caplog.at_level(logging.INFO):
        assert spool.run().total == 1
    assert spool.waiting() == []
    assert len(spool.archived()) == 1
    assert all(record.getMessage().isprintable() for record in caplog.records)


def hard_linked(spool: Spool) -> bool:
    """Tell whether the one blob is the archived file itself."""
    (original,) = spool.archived()
    (blob,) = (spool.folder / "blobs").glob("0x*/**/*.blob")
    assert original.read_bytes() == blob.read_bytes()
    return blob.samefile(original)


def test_a_file_of_ours_alone_becomes_a_blob_by_a_link(spool: Spool) -> None:
    """A large file that nobody else can write is not copied."""
    spool.put(large("ours"))
    spool.run()
    assert hard_linked(spool)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_copied(spool: Spool, mode: int) -> None:
    """A large file that its group or others can write becomes a blob as a copy."""
    path = spool.put(large("theirs"))
    path.chmod(mode)
    spool.run()
    assert not hard_linked(spool)


def test_a_file_with_another_name_is_copied(spool: Spool, tmp_path: Path) -> None:
    """A large file with a second hard link, which others may write by, becomes a blob as a copy."""
    path = spool.put(large("theirs"))
    os.link(path, tmp_path / "other name")
    spool.run()
    assert not hard_linked(spool)
    (original,) = spool.archived()
    assert original.samefile(tmp_path / "other name")


def test_a_file_of_somebody_else_is_copied(spool: Spool) -> None:
    """A large file that belongs to another user becomes a blob as a copy."""
    if os.geteuid():
        pytest.skip("only root can give a file to another user")
    path = spool.put(large("theirs"))
    os.chown(path, 65534, 65534)
    spool.run()
    assert not hard_linked(spool)


@pytest.fixture
def far_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    with tempfile.TemporaryDirectory(dir=other_file_system(tmp_path)) as folder:
        yield Path(folder)


def test_blobs_may_be_on_another_file_system(tmp_path: Path, far_folder: Path) -> None:
    """Where a link cannot be made a large message is copied, byte for byte; nothing remains."""
    uri = f"file://{{folder}}/depot.fs?blobstorage_dir={far_folder}/blobs"
    spool = Spool(tmp_path / "spool", uri=uri)
    spool.put(large("far"))
    spool.run()
    assert spool.raws() == [large("far")]
    assert os.listdir(far_folder / "blobs" / "tmp") == []


def test_the_archive_may_be_on_another_file_system(tmp_path: Path, far_folder: Path) -> None:
    """Originals are copied there, byte for byte, with their time, and leave the spool."""
    spool = Spool(tmp_path / "spool", archive=far_folder / "archive")
    spool.put(large("far"))
    spool.put(mail("small"))
    spool.put(mail("hopeless"))
    spool.run()
    assert spool.waiting() == []
    found = Counter(digest(path.read_bytes()) for path in spool.archived())
    assert found == Counter(map(digest, (large("far"), mail("small"), mail("hopeless"))))
    assert {path.stat().st_mtime_ns for path in spool.archived()} == {
        EPOCH + number * 1_000_000_000 for number in range(3)
    }


# -- what cannot be read ---------------------------------------------------------------------------


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def give_up_power() -> None:
    """Let permissions hold for this process even if it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = _Header(0x20080522, 0)
    data = (_Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0
    data[0].effective &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(ctypes.byref(header), data) == 0


def without_power(work: Callable[[], None]) -> None:
    """Do some work in a child for which permissions hold."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            give_up_power()
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_what_may_not_be_read_is_set_aside(spool: Spool) -> None:
    """A file without read permission is set aside with the reason, and the others are imported."""
    spool.put(mail("fine"))
    spool.put(mail("secret")).chmod(0)
    spool.put(mail("fine too"))

    def work() -> None:
        outcome = spool.run()
        assert outcome.set_aside == 1
        assert outcome.counts == {"queued": 2}

    without_power(work)
    assert subjects(spool) == ["fine", "fine too"]
    (name,) = spool.set_aside()
    assert "Permission denied" in (spool.failed / f"{name}.reason").read_text()
    assert spool.waiting() == []


def test_what_may_not_be_read_nor_moved_stops_nobody(tmp_path: Path, far_folder: Path) -> None:
    """Where setting aside means copying, an unreadable file stays, and the others are imported."""
    spool = Spool(tmp_path / "spool", archive=far_folder / "archive")
    spool.put(mail("secret")).chmod(0)
    spool.put(mail("fine"))

    def work() -> None:
        outcome = spool.run()
        assert outcome.set_aside == 1
        assert outcome.counts == {"queued": 1}

    without_power(work)
    assert len(spool.waiting()) == 1
    assert subjects(spool) == ["fine"]


def test_a_maildir_that_may_not_be_read_is_an_error(spool: Spool) -> None:
    """Where ``new`` cannot be listed the import fails, and says what it could not read."""
    spool.put(mail("waits"))

    def work() -> None:
        (spool.maildir / "new").chmod(0)
        with pytest.raises(PermissionError, match="new"):
            spool.run()

    without_power(work)
    (spool.maildir / "new").chmod(0o700)
    spool.run()
    assert subjects(spool) == ["waits"]


# -- what is set aside -----------------------------------------------------------------------------


def test_setting_aside_is_told_once(spool: Spool) -> None:
    """What is set aside counts in that run, stays for the next ones, and does not count again."""
    spool.put(mail("hopeless"))
    spool.put(mail("fine"))
    first = spool.run()
    assert (first.set_aside, first.counts, first.total) == (1, {"queued": 1}, 2)
    for _ in range(2):
        later = spool.run()
        assert (later.set_aside, later.total) == (0, 0)
    assert len(spool.set_aside()) == 1


def test_setting_aside_can_be_tried_again(spool: Spool) -> None:
    """Asked to, an import tries again what is set aside; failing again, it stays and counts."""
    spool.put(mail("hopeless"))
    spool.run()
    assert spool.run_failed().set_aside == 1
    assert len(spool.set_aside()) == 1


@pytest.mark.parametrize("keeps", [True, False])
def test_a_new_configuration_tries_again(spool: Spool, keeps: bool) -> None:
    """What another configuration set aside is tried once more; done, it leaves ``failed``."""
    spool.configure("" if keeps else "archive = none")
    raw = mail("hopeless")
    spool.put(raw)
    assert spool.run().set_aside == 1
    (name,) = spool.set_aside()
    # The next one has the filter no more that gives up.
    spool.configure("max_message_size = 1g" + ("" if keeps else "\narchive = none"))
    with PostOffice(spool.ini) as office:
        assert office.import_messages().counts == {"queued": 1}
    assert spool.raws() == [raw]
    assert os.listdir(spool.failed) == []
    assert [path.name for path in spool.archived()] == ([name] if keeps else [])


def test_the_same_name_again_is_no_obstacle(spool: Spool) -> None:
    """A message of the name of one that is set aside is imported, or set aside beside it."""
    spool.put(mail("hopeless"), "same")
    spool.run()
    spool.put(mail("fine"), "same")
    assert spool.run().counts == {"queued": 1}
    spool.put(mail("hopeless", "another\n"), "same")
    assert spool.run().set_aside == 1
    assert spool.set_aside() == ["same", "same.2"]
    assert spool.run().total == 0


def test_a_copy_that_was_being_set_aside_is_not_imported_twice(
    tmp_path: Path, far_folder: Path
) -> None:
    """A file that a killed run had copied to ``failed`` and not removed is one message."""
    spool = Spool(tmp_path / "spool", archive=far_folder / "archive")
    spool.put(mail("hopeless"), "same")
    spool.run()
    spool.put(mail("hopeless"), "same")
    with PostOffice(spool.ini) as office:
        assert office.import_messages(retry=lambda failure: True).counts == {"queued": 1}
    assert spool.raws() == [mail("hopeless")]
    assert spool.waiting() == []
    assert spool.set_aside() == []


# -- the lock, the journal -------------------------------------------------------------------------


def test_one_import_at_a_time(spool: Spool) -> None:
    """A second import of a Maildir is told that there is another, a temporary error."""
    held = Maildir(spool.maildir)
    with pytest.raises(MaildirBusy, match="another import") as caught:
        spool.run()
    assert isinstance(caught.value, TemporaryError)
    held.close()
    assert spool.run().total == 0


def test_a_spool_keeps_its_id(spool: Spool) -> None:
    """The id of a spool is in it, and is the same the next time; a damaged one is replaced."""
    ids = []
    lock = spool.maildir / ".postoffice.lock"
    for content in (None, None, b"too short", b"x" * 60, b"\xff" * 33):
        if content is not None:
            lock.write_bytes(content)
        for _ in range(2):
            held = Maildir(spool.maildir)
            ids.append(held.spool_id)
            held.close()
    assert ids[0] == ids[1] == ids[2] == ids[3]
    assert all(one == other for one, other in zip(ids[::2], ids[1::2], strict=True))
    assert len(set(ids)) == 4


def test_a_maildir_is_made(tmp_path: Path) -> None:
    """A Maildir that is missing is made, for its owner only."""
    make_maildir(tmp_path / "Maildir")
    Maildir(tmp_path / "Maildir").close()
    assert {path.name for path in (tmp_path / "Maildir").iterdir()} == {
        "new",
        "cur",
        "tmp",
        ".postoffice.lock",
    }
    assert (tmp_path / "Maildir").stat().st_mode & 0o077 == 0


def test_a_link_is_no_lock(spool: Spool, tmp_path: Path) -> None:
    """A symbolic link in the place of the lock is not followed."""
    (tmp_path / "victim").write_bytes(b"untouched")
    (spool.maildir / ".postoffice.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        Maildir(spool.maildir)
    assert (tmp_path / "victim").read_bytes() == b"untouched"


def test_what_the_journal_names_is_archived_and_not_imported(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a run that stored messages and could not move them, the next one moves them only."""
    for number in range(3):
        spool.put(mail(f"mail {number}"), f"name{number}")
    blocked = spool.maildir / f".{local_day(time.time()):%Y.%m.%d}"
    blocked.write_bytes(b"in the way")
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        spool.run()
    assert len(spool.waiting()) == 3
    (spool.maildir / "new" / "name1").rename(spool.maildir / "cur" / "name1:2,FS")
    # Another file of the same unique name is another message.
    spool.put(mail("other"), "name2:2,S", place="cur", second=50)
    blocked.unlink()
    with caplog.at_level(logging.INFO):
        outcome = spool.run()
    assert outcome.dropped == 3
    assert outcome.counts == {"queued": 1}
    assert "by a run that was cut off" in caplog.text
    assert subjects(spool) == ["mail 0", "mail 1", "mail 2", "other"]
    assert spool.waiting() == []
    assert len(spool.archived()) == 4


def test_a_file_is_known_though_a_consumer_has_read_its_blob(spool: Spool) -> None:
    """What a float loses of a file's time makes no other file of one that was stored."""
    spool.put(large("read meanwhile"), "name")
    path = spool.maildir / "new" / "name"
    time_ns = 1_795_292_404_557_197_344
    os.utime(path, ns=(time_ns, time_ns))
    blocked = spool.maildir / f".{local_day(time.time()):%Y.%m.%d}"
    blocked.write_bytes(b"in the way")
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        spool.run()
    # As RelStorage and ZEO's client do to a blob, which this file is, when it is opened.
    os.utime(path, (time.time(), path.stat().st_mtime))
    assert path.stat().st_mtime_ns != time_ns
    blocked.unlink()
    outcome = spool.run()
    assert outcome.dropped == 1
    assert outcome.counts == {}


def test_a_full_archive_stops_the_run_and_loses_nothing(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When archiving fails in the middle of a batch, the rest is archived by the next run."""
    for number in range(4):
        spool.put(mail(f"mail {number}"))
    original = os.rename
    renamed: list[str] = []

    def rename(source: str, target: str) -> None:
        if "/new/" in str(source):
            renamed.append(source)
            if len(renamed) == 3:
                raise OSError(28, "No space left on device")
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="No space"):
            spool.run()
    assert len(spool.waiting()) == 2
    assert spool.run().dropped == 2
    assert subjects(spool) == [f"mail {number}" for number in range(4)]


def test_a_database_that_fails_is_told_in_a_line(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the database ends the run as a temporary error, and the mail waits."""
    spool.put(mail("waits"))
    spool.run()
    spool.put(mail("waits too"))

    def fail(self: MaildirImport, *args: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Intake, "deliver", fail)
        with pytest.raises(DepotUnavailable, match=r"database failed: .*Input/output"):
            spool.run()
    assert len(spool.waiting()) == 1
    spool.run()
    assert subjects(spool) == ["waits", "waits too"]


def test_conflicts_are_tried_again(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that meets conflicts is run again, and stores each message once."""
    for number in range(3):
        spool.put(mail(f"mail {number}"))
    spool.put(large("blob"))
    original = Intake.deliver
    conflicts = [3]

    def deliver(self: Intake, *args: Any) -> list[Result]:
        results = original(self, *args)
        if conflicts[0]:
            conflicts[0] -= 1
            raise ConflictError
        return results

    monkeypatch.setattr(Intake, "deliver", deliver)
    assert spool.run().counts == {"queued": 4}
    assert conflicts == [0]
    assert subjects(spool) == ["mail 0", "mail 1", "mail 2", "blob"]
    assert os.listdir(spool.folder / "blobs" / "tmp") == []


def test_endless_conflicts_end(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many conflicts on end the run gives up with a temporary error, and the mail waits."""
    spool.put(mail("waits"))

    def deliver(self: Intake, *args: object) -> None:
        raise ConflictError

    monkeypatch.setattr(maildir, "_ATTEMPTS", 3)
    monkeypatch.setattr(Intake, "deliver", deliver)
    with pytest.raises(DepotUnavailable, match="refuses"):
        spool.run()
    assert len(spool.waiting()) == 1


@implementer(IDataManager)
class LosesConnection:
    """Fails when the database has committed, as a client does whose server was killed then."""

    transaction_manager = None

    def sortKey(self) -> str:
        """Sort last of all."""
        return "~~~"

    def nothing(self, transaction: Any) -> None:
        """Do nothing."""

    abort = tpc_begin = commit = tpc_vote = tpc_abort = nothing

    def tpc_finish(self, transaction: Any) -> None:
        """Fail."""
        raise ClientDisconnected("the server was killed after it had committed")


def test_a_commit_in_doubt_is_looked_up(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that happened while the connection was lost is neither repeated nor miscounted."""
    monkeypatch.setattr(maildir, "BATCH", 2)
    for number in range(5):
        spool.put(mail(f"mail {number}"))
    spool.put(large("blob"))
    original = commit_intake
    commits: list[int] = []

    def commit(manager: Any) -> None:
        commits.append(1)
        if len(commits) % 2:
            manager.get().join(LosesConnection())
        original(manager)

    monkeypatch.setattr(maildir, "commit", commit)
    assert spool.run().counts == {"queued": 6}
    assert subjects(spool) == [*(f"mail {number}" for number in range(5)), "blob"]
    assert spool.waiting() == []
    assert len(spool.archived()) == 6


@pytest.mark.parametrize("when", [-(10**18), 5 * 10**18, 10**19])
def test_an_impossible_time_stops_nothing(spool: Spool, when: int) -> None:
    """Mail whose file has a time before 1970, or in 2200 or later, is imported like any other."""
    spool.configure("ooo_loop_frequency = 1")
    for number in range(3):
        os.utime(spool.put(mail(f"odd {number}")), ns=(when, when))
    spool.put(mail("even"))
    outcome = spool.run()
    assert (outcome.counts, outcome.set_aside) == ({"queued": 4}, 0)
    assert spool.waiting() == []
    assert spool.run().dropped == 0


def test_a_defect_in_storing_costs_one_message(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that brings out a defect of ours is set aside; its batch is stored without it."""
    original = Intake._deliver

    def deliver(intake: Intake, message: Prepared, *more: Any) -> Any:
        if message.values["subject"] == "two":
            raise ZeroDivisionError("a defect")
        return original(intake, message, *more)

    monkeypatch.setattr(Intake, "_deliver", deliver)
    for subject in ("one", "two", "three"):
        spool.put(mail(subject))
    outcome = spool.run()
    assert (outcome.counts, outcome.set_aside) == ({"queued": 2}, 1)
    assert subjects(spool) == ["one", "three"]
    assert len(spool.set_aside()) == 1
    assert spool.waiting() == []


def test_long_names_that_meet_in_the_archive(spool: Spool) -> None:
    """Two files with one name as long as a name may be are both archived."""
    name = "1." + "x" * 253
    spool.put(mail("one"), name=name)
    spool.run()
    spool.put(mail("two"), name=name)
    spool.run()
    assert subjects(spool) == ["one", "two"]
    assert len(spool.archived()) == 2
    assert spool.waiting() == []


def test_oversize_messages_are_told_apart_by_their_bodies(spool: Spool) -> None:
    """Of two with one Message-ID and one size both are queued, and a true duplicate is not."""
    spool.configure("max_message_size = 1k")
    header = {"Message-ID": "<one@example.com>"}
    for body in ("a" * 5000, "b" * 5000, "a" * 5000):
        spool.put(mail("large", body, **header))
    assert spool.run().counts == {"queued": 2, "discarded": 1}
