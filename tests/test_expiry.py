"""The archive's older days, removed bit by bit."""

from __future__ import annotations

import os
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from postoffice.intake.archive import Archive
from postoffice.intake.expiry import Expiry

NOON = datetime(2026, 11, 21, 12).astimezone().timestamp()
DAY = 86400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An archive of three days, with 120 files each."""
    for day in ("2026.11.10", "2026.11.11", "2026.11.20"):
        fill(tmp_path / day)
    return tmp_path


def fill(day: Path) -> None:
    """Make the folder of a day."""
    (day / "cur").mkdir(parents=True)
    for number in range(120):
        (day / "cur" / f"{number}").write_bytes(b"raw")


def expiry(folder: Path) -> Expiry:
    """Return what keeps the days of an archive for two."""
    return Expiry(Archive(folder / "Maildir", folder, keeps=True), 2 * DAY)


def left(folder: Path) -> int:
    """Return how many files there are."""
    return sum(len(names) for _, _, names in os.walk(folder))


def test_a_little_at_a_time(folder: Path) -> None:
    """Each call removes some files only, until nothing is left of what has expired."""
    here = expiry(folder)
    before = left(folder)
    while here.work(NOON):
        after = left(folder)
        assert before - 50 <= after < before
        before = after
    assert os.listdir(folder) == ["2026.11.20"]
    assert left(folder) == 120


def test_once_a_day(folder: Path) -> None:
    """What is there later is removed a day later, or when the clock was set back."""
    here = expiry(folder)
    while here.work(NOON):
        pass
    fill(folder / "2026.11.01")
    assert not here.work(NOON + DAY - 1)
    assert left(folder) == 240
    while here.work(NOON + DAY):
        pass
    assert left(folder) == 120
    fill(folder / "2026.01.01")
    while here.work(NOON - 30 * DAY):
        pass
    assert left(folder) == 120


def test_somebody_else_removes_it_too(folder: Path) -> None:
    """A day that vanishes in the midst of its removal is no obstacle to the next."""
    here = expiry(folder)
    assert here.work(NOON)
    shutil.rmtree(folder / "2026.11.10")
    while here.work(NOON):
        pass
    assert os.listdir(folder) == ["2026.11.20"]


def test_without_an_archive(tmp_path: Path) -> None:
    """Where nothing was archived yet there is nothing to do."""
    assert not expiry(tmp_path / "none").work(NOON)
