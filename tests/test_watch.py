"""The daemon's watch over the folders of a Maildir, by inotify and without."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postoffice.daemon.watch import Watch, pause

_LONG = 30.0


@pytest.fixture
def stop() -> Iterator[tuple[int, int]]:
    """A pipe: what its first end can read ends the waiting."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture(params=["inotify", "looking"])
def watch(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Watch]:
    """A watch over a folder, by either means."""
    (tmp_path / "new").mkdir()
    made = Watch([str(tmp_path / "new")])
    if request.param == "looking":
        made.close()
        made.look()
    yield made
    made.close()


def later(act: Callable[[], object]) -> Callable[[], None]:
    """Return what does something at its second call, while somebody waits."""
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            act()

    return tick


def test_what_is_there_is_known(watch: Watch, tmp_path: Path, stop: tuple[int, int]) -> None:
    """What was there at the last look wakes nobody, and what goes does not either."""
    (tmp_path / "new" / "one").touch()
    watch.look()
    assert not watch.wait(1.5, stop[0], later((tmp_path / "new" / "one").unlink))


@pytest.mark.parametrize("way", ["rename", "link", "write"])
def test_what_comes_wakes(watch: Watch, tmp_path: Path, stop: tuple[int, int], way: str) -> None:
    """A file that comes wakes, whether it is renamed into the folder, linked or written there."""
    file, place = tmp_path / "one", tmp_path / "new" / "one"
    file.touch()
    deeds: dict[str, Callable[[], object]] = {
        "rename": lambda: file.rename(place),
        "link": lambda: place.hardlink_to(file),
        "write": place.touch,
    }
    assert watch.wait(_LONG, stop[0], later(deeds[way]))
    watch.look()
    assert not watch.wait(0.1, stop[0], lambda: None)


def test_a_folder_that_is_another_one(watch: Watch, tmp_path: Path, stop: tuple[int, int]) -> None:
    """A folder that goes and comes back wakes, and is watched again."""
    new = tmp_path / "new"
    for _ in range(2):
        shutil.rmtree(new)
        watch.look()
        if watch.wait(0.1, stop[0], lambda: None):
            watch.look()
        new.mkdir()
        watch.wait(1.5, stop[0], lambda: None)
        watch.look()
        assert watch.wait(_LONG, stop[0], later((new / "one").touch))
        watch.look()


def test_told_to_stop(watch: Watch, stop: tuple[int, int]) -> None:
    """Waiting and pausing end when they are told to."""
    threading.Timer(0.1, os.write, (stop[1], b"x")).start()
    assert not watch.wait(_LONG, stop[0], lambda: None)
    pause(_LONG, stop[0], lambda: None)
