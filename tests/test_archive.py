"""The archive: where files go when they leave the spool."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path

import pytest

from postoffice.intake.archive import Archive, Failure, local_day
from tests.spools import other_file_system

DAY = date(2026, 11, 21)
NOON = datetime(2026, 11, 21, 12).astimezone().timestamp()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """An empty Maildir."""
    for name in ("new", "cur", "tmp"):
        (tmp_path / "Maildir" / name).mkdir(parents=True)
    return tmp_path / "Maildir"


@pytest.fixture(params=["near", "far"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder for the archive, on the file system of the spool and on another."""
    if request.param == "near":
        yield tmp_path / "archive"
        return
    with tempfile.TemporaryDirectory(dir=other_file_system(tmp_path)) as far:
        yield Path(far) / "archive"


def put(spool: Path, name: str, raw: bytes) -> str:
    """Put a file into the spool and return its path."""
    path = spool / "new" / name
    path.write_bytes(raw)
    os.utime(path, ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))
    return str(path)


def failure(name: str) -> Failure:
    """Return a failure of this file."""
    return Failure(name, "too\udcffodd", "1.0/abc", 1_700_000_000)


def test_the_default_is_a_folder_of_the_maildir_for_each_day(spool: Path) -> None:
    """Without a folder of its own the archive is a Maildir++ folder a day, with all its parts."""
    archive = Archive(spool, None, keeps=True)
    assert archive.take(put(spool, "one:2,S", b"raw"), archive.place("one:2,S", DAY))
    day = spool / ".2026.11.21"
    assert (day / "cur" / "one:2,S").read_bytes() == b"raw"
    assert sorted(os.listdir(day)) == ["cur", "maildirfolder", "new", "tmp"]
    assert os.listdir(spool / "new") == []


def test_a_folder_of_its_own_has_a_folder_for_each_day(spool: Path, folder: Path) -> None:
    """In a folder of its own the archive has days, and a file keeps its bytes and its time."""
    archive = Archive(spool, folder, keeps=True)
    assert archive.take(put(spool, "one", b"raw"), archive.place("one", DAY))
    archive.sync()
    kept = folder / "2026.11.21" / "one"
    assert kept.read_bytes() == b"raw"
    assert kept.stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert os.listdir(folder / "2026.11.21") == ["one"]
    assert os.listdir(spool / "new") == []


def test_none_keeps_nothing(spool: Path) -> None:
    """An archive that keeps nothing removes the file, and makes no folder."""
    archive = Archive(spool, None, keeps=False)
    assert archive.place("one", DAY) == ""
    assert archive.take(put(spool, "one", b"raw"), "")
    assert not archive.take(str(spool / "new" / "one"), "")
    archive.sync()
    assert sorted(os.listdir(spool)) == ["cur", "new", "tmp"]


def test_no_file_is_replaced(spool: Path, folder: Path) -> None:
    """Files of one name stand beside each other, unless they hold the same bytes."""
    archive = Archive(spool, folder, keeps=True)
    place = archive.place("one", DAY)
    for raw in (b"first", b"other", b"third", b"other"):
        assert archive.take(put(spool, "one", raw), place)
    day = folder / "2026.11.21"
    found = {name: (day / name).read_bytes() for name in os.listdir(day)}
    assert found == {"one": b"first", "one.2": b"other", "one.3": b"third"}
    assert os.listdir(spool / "new") == []


def test_a_hard_link_to_what_is_archived_goes(spool: Path, tmp_path: Path) -> None:
    """A spool file that is archived already, under another link, leaves the spool."""
    archive = Archive(spool, tmp_path / "archive", keeps=True)
    path = put(spool, "one", b"raw")
    (tmp_path / "archive" / "2026.11.21").mkdir(parents=True)
    os.link(path, tmp_path / "archive" / "2026.11.21" / "one")
    assert archive.take(path, archive.place("one", DAY))
    assert os.listdir(spool / "new") == []
    assert os.listdir(tmp_path / "archive" / "2026.11.21") == ["one"]


def test_links_and_folders_in_the_archive_are_left_alone(spool: Path, tmp_path: Path) -> None:
    """A symbolic link or a folder at the place of a file is neither followed nor replaced."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"outside")
    day = tmp_path / "archive" / "2026.11.21"
    (day / "two").mkdir(parents=True)
    (day / "one").symlink_to(outside)
    (day / "three").symlink_to(tmp_path / "nowhere")
    archive = Archive(spool, tmp_path / "archive", keeps=True)
    for name in ("one", "two", "three"):
        assert archive.take(put(spool, name, b"raw"), archive.place(name, DAY))
        assert (day / f"{name}.2").read_bytes() == b"raw"
    assert outside.read_bytes() == b"outside"


def test_what_has_vanished_is_told(spool: Path, folder: Path) -> None:
    """Taking a file that is not in the spool any more says so and raises nothing."""
    archive = Archive(spool, folder, keeps=True)
    assert not archive.take(str(spool / "new" / "one"), archive.place("one", DAY))
    archive.sync()


def test_a_day_that_somebody_removed_is_made_again(spool: Path, folder: Path) -> None:
    """Removing a day's folder during an import does not keep files in the spool."""
    archive = Archive(spool, folder, keeps=True)
    assert archive.take(put(spool, "one", b"raw"), archive.place("one", DAY))
    archive.sync()
    shutil.rmtree(folder / "2026.11.21")
    assert archive.take(put(spool, "two", b"raw"), archive.place("two", DAY))
    assert os.listdir(folder / "2026.11.21") == ["two"]


def test_a_file_that_cannot_be_moved_stays(spool: Path, tmp_path: Path) -> None:
    """A failure to move is an error, and the file is still in the spool."""
    (tmp_path / "archive").write_bytes(b"no folder")
    archive = Archive(spool, tmp_path / "archive", keeps=True)
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        archive.take(put(spool, "one", b"raw"), archive.place("one", DAY))
    assert os.listdir(spool / "new") == ["one"]


def test_what_is_set_aside_has_its_reason_beside_it(spool: Path, folder: Path) -> None:
    """A file that cannot be processed goes to ``failed`` with its reason, and can leave it."""
    archive = Archive(spool, folder, keeps=True)
    archive.set_aside(put(spool, "one", b"raw"), failure("one"))
    archive.sync()
    assert (folder / "failed" / "one").read_bytes() == b"raw"
    assert json.loads((folder / "failed" / "one.reason").read_text())["fingerprint"] == "1.0/abc"
    assert list(archive.failures()) == [failure("one")]
    assert os.listdir(spool / "new") == []
    assert archive.take(str(folder / "failed" / "one"), archive.place("one", DAY))
    archive.forget_failure("one")
    archive.forget_failure("one")
    archive.sync()
    assert os.listdir(folder / "failed") == []


@pytest.mark.parametrize("keeps", [True, False])
def test_failed_is_a_folder_of_the_maildir_by_default(spool: Path, keeps: bool) -> None:
    """``failed`` is there even where nothing is archived."""
    archive = Archive(spool, None, keeps=keeps)
    archive.set_aside(put(spool, "one", b"raw"), failure("one"))
    assert (spool / ".failed" / "one").read_bytes() == b"raw"


def test_failing_again_renews_the_reason(spool: Path, folder: Path) -> None:
    """A file in ``failed`` that fails again stays there, with the new reason."""
    archive = Archive(spool, folder, keeps=True)
    archive.set_aside(put(spool, "one", b"raw"), failure("one"))
    again = Failure("one", "still", "2.0/abc", 1_800_000_000)
    archive.set_aside(str(folder / "failed" / "one"), again)
    assert list(archive.failures()) == [again]
    assert sorted(os.listdir(folder / "failed")) == ["one", "one.reason"]


def test_failures_of_one_name_each_have_their_reason(spool: Path, folder: Path) -> None:
    """A second file of a name that is in ``failed`` stands beside the first, each with a reason."""
    archive = Archive(spool, folder, keeps=True)
    for raw in (b"first", b"other"):
        archive.set_aside(put(spool, "one", raw), failure("one"))
    assert [one.name for one in archive.failures()] == ["one", "one.2"]
    assert {one.fingerprint for one in archive.failures()} == {"1.0/abc"}


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "one.reason", "a\udcff\n\x1b[2J"])
def test_any_name_can_be_set_aside(spool: Path, folder: Path, name: str) -> None:
    """A name that is long, odd, or like that of a reason is no obstacle."""
    archive = Archive(spool, folder, keeps=True)
    archive.set_aside(put(spool, name, b"raw"), failure(name))
    (found,) = archive.failures()
    assert found.reason == "too\udcffodd"
    assert (folder / "failed" / found.name).read_bytes() == b"raw"


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"reason": 1}', "\xff"])
def test_a_broken_reason_is_no_obstacle(spool: Path, tmp_path: Path, note: str) -> None:
    """A failure whose reason is missing or unreadable is listed all the same."""
    archive = Archive(spool, None, keeps=True)
    (spool / ".failed").mkdir()
    (spool / ".failed" / "one").write_bytes(b"raw")
    if note:
        (spool / ".failed" / "one.reason").write_bytes(note.encode("latin-1"))
    (found,) = archive.failures()
    assert (found.name, found.fingerprint) == ("one", "")
    assert "reason cannot be read" in found.reason


def test_a_full_disk_leaves_no_pieces(
    spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy to another file system that fails leaves the file, and no piece of the copy."""
    far = Path(tempfile.mkdtemp(dir=other_file_system(tmp_path)))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    try:
        archive = Archive(spool, far, keeps=True)
        monkeypatch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(OSError, match="No space"):
            archive.take(put(spool, "one", b"raw"), archive.place("one", DAY))
        assert os.listdir(far / "2026.11.21") == []
        assert os.listdir(spool / "new") == ["one"]
    finally:
        shutil.rmtree(far)


def test_two_that_write_the_same(spool: Path) -> None:
    """A file that another process is writing is waited for, and neither harms the other."""
    archive = Archive(spool, None, keeps=True)
    place = archive.place("one", DAY)
    path = Path(archive.path(place))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        # The other process has written half when this one begins.
        def pieces() -> Iterator[bytes]:
            yield b"x" * 100_000
            os.write(writing, b".")
            time.sleep(0.2)
            yield b"y" * 100_000

        status = 1
        try:
            Archive(spool, None, keeps=True).keep(place, pieces())
            status = 0
        finally:
            os._exit(status)
    os.read(reading, 1)
    archive.keep(place, [b"x" * 100_000, b"y" * 100_000])
    assert path.read_bytes() == b"x" * 100_000 + b"y" * 100_000
    assert os.waitpid(pid, 0)[1] == 0
    assert os.listdir(path.parent) == ["one"]
    os.close(reading)
    os.close(writing)


def test_what_a_killed_writer_has_left_goes(spool: Path) -> None:
    """A piece that a process left which was killed is replaced when the message comes again."""
    archive = Archive(spool, None, keeps=True)
    place = archive.place("one", DAY)
    pid = os.fork()
    if pid == 0:

        def pieces() -> Iterator[bytes]:
            yield b"x" * 100_000
            os.kill(os.getpid(), signal.SIGKILL)

        archive.keep(place, pieces())
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    path = Path(archive.path(place))
    assert [name[-8:] for name in os.listdir(path.parent)] == [".partial"]
    archive.keep(place, [b"short"])
    assert os.listdir(path.parent) == ["one"]
    assert path.read_bytes() == b"short"


def test_days_expire_as_a_whole(spool: Path, tmp_path: Path) -> None:
    """What ended longer ago than it is kept goes; other folders, links and odd names stay."""
    folder = tmp_path / "archive"
    names = ("2026.11.18", "2026.11.19", "2026.11.20", "2026.13.45", ".2026.01.01", "failed", "x")
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "mail").write_bytes(b"raw")
    (folder / "2025.01.01").symlink_to(folder / "failed")
    (folder / "2025.01.02").write_bytes(b"no folder")
    archive = Archive(spool, folder, keeps=True)
    assert archive.expire(2 * 86400, NOON) == ["2026.11.18"]
    stays = {*names, "2025.01.01", "2025.01.02"} - {"2026.11.18"}
    assert set(os.listdir(folder)) == stays
    assert Archive(spool, tmp_path / "none", keeps=True).expire(1, NOON) == []


def test_days_of_the_maildir_expire(spool: Path) -> None:
    """In the Maildir only its dated folders expire; its other folders stay."""
    for name in (".2020.01.01", ".2020.01.02", ".Sent", "2020.01.01"):
        (spool / name / "cur").mkdir(parents=True)
    assert Archive(spool, None, keeps=True).expire(1, NOON) == [
        ".2020.01.01",
        ".2020.01.02",
    ]
    assert (spool / ".Sent").exists()
    assert (spool / "2020.01.01").exists()


def test_what_cannot_expire_is_logged(
    spool: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A day that cannot be removed is a warning, and the next one is removed all the same."""
    for name in (".2020.01.01", ".2020.01.02"):
        (spool / name).mkdir()
    rmdir = os.rmdir

    def refuse(path: str) -> None:
        if path.endswith("01"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        rmdir(path)

    monkeypatch.setattr(os, "rmdir", refuse)
    with caplog.at_level(logging.WARNING):
        assert Archive(spool, None, keeps=True).expire(1, NOON) == [".2020.01.02"]
    assert ".2020.01.01 cannot be removed" in caplog.text


@pytest.mark.parametrize(
    ("zone", "day"), [("UTC", 21), ("Pacific/Kiritimati", 22), ("Pacific/Honolulu", 21)]
)
def test_a_day_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch, zone: str, day: int) -> None:
    """Days begin at midnight where the machine is."""
    noon = 1_795_262_400  # 12 h UTC on 21 November 2026
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert local_day(noon) == date(2026, 11, day)
    finally:
        monkeypatch.undo()
        time.tzset()
