"""Several processes on one queue over ZEO, some of them killed: each message exactly once."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from BTrees.OOBTree import OOBTree

from tests.depots import Seat, subjects, zeo_depot

ROOT = Path(__file__).resolve().parent.parent
PRODUCERS, CONSUMERS = 2, 3


def start(role: str, uri: str, name: str, seed: int, count: int) -> subprocess.Popen[str]:
    """Start a producer or a consumer."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.processes", role, uri, name, str(seed), str(count)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> None:
    """Wait for a process, which must end well."""
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


def everything(seat: Seat, names: list[str]) -> Counter[str]:
    """Count the subjects that were taken, still wait, or are in quarantine."""
    seat.begin()
    root = seat.connection.root()
    found: Counter[str] = Counter()
    for name in names:
        for subject, count in root[name].items():
            found[subject] += count
    found.update(subjects(seat.queue))
    found.update(subjects(message for message, _ in seat.queue.get_quarantined_messages()))
    return found


def exactly_once(folder: Path, seed: int, count: int, kills: int) -> None:
    """Run producers and consumers, kill some of the latter, and count."""
    chance = random.Random(seed)
    with zeo_depot(folder) as depot:
        seat = depot.seat()
        root = seat.connection.root()
        names = [f"taken {number}" for number in range(CONSUMERS + kills)]
        for name in names:
            root[name] = OOBTree()
        seat.commit()
        producers = [
            start("produce", depot.uri, f"p{number}", seed + number, count)
            for number in range(PRODUCERS)
        ]
        consumers = [
            start("consume", depot.uri, names[number], seed + number, 0)
            for number in range(CONSUMERS)
        ]
        for number in range(CONSUMERS, CONSUMERS + kills):
            time.sleep(chance.uniform(0.3, 0.9))
            victim = consumers.pop(0)
            victim.kill()
            victim.communicate()
            consumers.append(start("consume", depot.uri, names[number], seed + number, 0))
        for process in producers:
            finished(process)
        seat.begin()
        seat.connection.root()["stop"] = True
        seat.commit()
        for process in consumers:
            finished(process)
        wanted = Counter(f"p{one}-{number}" for one in range(PRODUCERS) for number in range(count))
        assert everything(seat, names) == wanted, f"seed {seed}"
        seat.begin()
        assert len(seat.queue) == 0
        assert not seat.queue


def test_each_message_exactly_once(tmp_path: Path) -> None:
    """With consumers that abort and are killed, each message is somewhere, and once."""
    exactly_once(tmp_path, seed=1, count=150, kills=3)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(10, 16))
def test_each_message_exactly_once_for_long(tmp_path: Path, seed: int) -> None:
    """The same over thousands of messages, in several rounds whose seeds are known."""
    exactly_once(tmp_path, seed=seed, count=1500, kills=20)
