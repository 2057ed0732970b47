"""Exactly once, whatever happens: imports that are killed, or failed by the system, at any call."""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash_import import DEFECT, FAILED, ImportServer
from tests.spools import Spool, Stored, digest, large, mail

# The system calls that change something, or whose failure must.
CHANGING = (
    "rename",
    "linkat",
    "unlink",
    "mkdir",
    "fsync",
    "write",
    "pwrite64",
    "ftruncate",
    "chmod",
    "fchmod",
    "utimensat",
    "flock",
)
OPENING = ("openat", "getdents64", "pread64")
EIO = ("rename", "linkat", "unlink", "mkdir", "fsync", "write", "pwrite64", "ftruncate", *OPENING)
ENOSPC = ("write", "pwrite64", "mkdir", "rename", "linkat", "openat")

# Each file system of these is another than that of the temporary folder, if any is.
OTHER_FILE_SYSTEMS = ("/dev/shm", "/run", "/var/tmp", "/tmp", str(Path.home()))  # noqa: S108

#: ``PLACE/FAULT/CALL/NUMBER``, as a failure names it, for that one alone; CALL may be a ``*``.
ONLY = os.environ.get("POSTOFFICE_SWEEP", "")


@dataclass(frozen=True, slots=True)
class World:
    """What the sweep imports, and what has to come of it."""

    spool: Spool
    expected: Stored


def other_file_system(than: Path) -> Path:
    """Return a folder that can be written on another file system."""
    for name in OTHER_FILE_SYSTEMS:
        path = Path(name)
        if path.is_dir() and os.access(path, os.W_OK) and path.stat().st_dev != than.stat().st_dev:
            return path
    pytest.skip("there is no second file system that this user can write to")


@pytest.fixture(scope="module")
def server() -> Iterator[ImportServer]:
    """The process that imports."""
    found = ImportServer()
    yield found
    found.close()


@pytest.fixture
def far_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    with tempfile.TemporaryDirectory(dir=other_file_system(tmp_path)) as folder:
        yield Path(folder)


def fill(spool: Spool) -> None:
    """Put one of everything into a spool."""
    for number in range(9):
        spool.put(mail(f"small {number}"))
    spool.put(large("large"))
    spool.put(mail("to a list", List_Id="<list.example.org>"))
    spool.put(mail("twice"))
    spool.put(mail("twice"))
    spool.put(large("large, and twice"))
    spool.put(large("large, and twice"))
    spool.put(mail("spam"))
    spool.put(mail("hopeless"))
    spool.put(mail("to myself", To="ann@example.org"))
    spool.put(mail("from nobody", From=""))
    spool.put(mail("seen", List_Id="<list.example.org>"), "1700000100.M1P1.host:2,S", place="cur")
    writable = spool.put(large("others may write it", 200_000))
    writable.chmod(0o666)
    spool.put(large("hopeless"))
    spool.put(mail("no Message-ID", Message_ID=""))
    spool.put(b"no header at all\n")
    for number in range(9, 11):
        spool.put(mail(f"small {number}"))


def world(folder: Path, archive: Path | None = None, options: str = "") -> World:
    """Return a filled spool, and what an import without accidents makes of it."""
    options = f"reject_filters =\n    header_regexp: ^Subject: spam\n{options}"
    spool = Spool(folder / "world", options, archive=archive and archive / "archive")
    fill(spool)
    originals = [path for place in ("new", "cur") for path in (spool.maildir / place).iterdir()]
    undisturbed = spool.copy_to(folder / "undisturbed", archive and archive / "undisturbed")
    outcome = undisturbed.run()
    assert outcome.set_aside == 2
    assert outcome.counts == {"queued": 18, "discarded": 5, "rejected": 1}
    expected = undisturbed.stored()
    assert not expected.left
    if "none" not in options:
        assert expected.archived == Counter(digest(path.read_bytes()) for path in originals)
    return World(spool, expected)


def again(spool: Spool) -> Stored:
    """Import without accidents until the spool is empty, and return what came of it."""
    for _ in range(3):
        spool.run()
        if not spool.waiting():
            break
    return spool.stored()


def names(place: str, archive: Path | None) -> Path | None:
    """Return where the archive of one attempt is."""
    return archive and archive / place


def calls(log: Path) -> dict[str, list[int]]:
    """Return the numbers of each call that strace saw, those for installed packages left out."""
    seen: Counter[str] = Counter()
    found: dict[str, list[int]] = {}
    for line in log.read_text(errors="replace").splitlines():
        call = line.partition("(")[0]
        seen[call] += 1
        if "-info" not in line and "-packages" not in line:
            found.setdefault(call, []).append(seen[call])
    return found


class Sweep:
    """Every call of an import, one after the other, killed or failed."""

    def __init__(self, place: str, folder: Path, server: ImportServer, archive: Path | None) -> None:
        self.place = place
        self.folder = folder
        self.server = server
        self.archive = archive
        options = "archive = none\n" if place == "none" else ""
        self.world = world(folder, archive, options)
        log = folder / "calls"
        ended = self._run("count", ["-o", str(log), "-e", "trace=" + ",".join((*CHANGING, *OPENING))])
        assert ended == 0
        self.calls = calls(log)

    def _run(self, name: str, strace: list[str]) -> int:
        spool = self.world.spool.copy_to(self.folder / name, names(name, self.archive))
        self.spool = spool
        ended = self.server.run(spool.ini, strace)
        self.output = ended.output
        return ended.status

    def points(self, fault: str, wanted: tuple[str, ...]) -> list[tuple[str, str, int]]:
        """Return what can be disturbed: the fault, the call and its number."""
        found = [(fault, call, number) for call in wanted for number in self.calls.get(call, ())]
        if not ONLY:
            return found
        return [
            point
            for point in found
            if all(
                part in ("*", str(one))
                for part, one in zip(ONLY.split("/"), (self.place, *point), strict=True)
            )
        ]

    def disturb(self, fault: str, call: str, number: int) -> str:
        """Disturb one call, import again, and return what is wrong then; ``""`` for nothing."""
        what = "signal=SIGKILL" if fault == "SIGKILL" else f"error={fault}"
        name = f"{fault}-{call}-{number}"
        strace = ["-o", "/dev/null", "-e", f"trace={call}"]
        status = self._run(name, [*strace, "-e", f"inject={call}:{what}:when={number}"])
        wrong = []
        if status == DEFECT:
            wrong.append(self.output)
        elif status not in (0, -9, FAILED):
            wrong.append(f"status {status}: {self.output}")
        stored = again(self.spool)
        if stored != self.world.expected:
            for title, one, other in (
                ("queues", stored.queues, self.world.expected.queues),
                ("archive", stored.archived, self.world.expected.archived),
                ("spool", stored.left, self.world.expected.left),
            ):
                if one != other:
                    wrong.append(f"{title}: {one} is not {other}")
        shutil.rmtree(self.spool.folder)
        if self.archive is not None:
            shutil.rmtree(self.archive / name, ignore_errors=True)
        return "\n".join([f"{self.place}/{fault}/{call}/{number}", *wrong]) if wrong else ""

    def all(self, fault: str, wanted: tuple[str, ...], step: int, first: int = 0) -> None:
        """Disturb every step-th call."""
        points = self.points(fault, wanted)
        wrong = [self.disturb(*point) for point in (points if ONLY else points[first::step])]
        told = [one for one in wrong if one]
        assert not told, "POSTOFFICE_SWEEP=" + "\nPOSTOFFICE_SWEEP=".join(told)


@pytest.mark.parametrize(
    ("fault", "wanted", "step"),
    [("SIGKILL", CHANGING, 9), ("EIO", EIO, 31), ("ENOSPC", ENOSPC, 31)],
)
def test_short_sweep(
    tmp_path: Path, server: ImportServer, fault: str, wanted: tuple[str, ...], step: int
) -> None:
    """An import that is disturbed at any of some calls leaves every message to be there once."""
    Sweep("maildir", tmp_path, server, None).all(fault, wanted, step, first=step // 2)


def test_short_sweep_to_another_file_system(
    tmp_path: Path, server: ImportServer, far_folder: Path
) -> None:
    """The same holds where the archive's files are copies."""
    sweep = Sweep("far", tmp_path, server, far_folder)
    sweep.all("SIGKILL", ("rename", "unlink", "fsync"), step=14, first=7)


@pytest.mark.torture
@pytest.mark.parametrize(
    ("fault", "wanted"),
    [("SIGKILL", (*CHANGING, "openat")), ("EIO", EIO), ("ENOSPC", ENOSPC)],
)
@pytest.mark.parametrize("place", ["maildir", "own", "none", "far"])
def test_sweep(
    tmp_path: Path,
    server: ImportServer,
    far_folder: Path,
    place: str,
    fault: str,
    wanted: tuple[str, ...],
) -> None:
    """An import that is disturbed at any call at all leaves every message to be there once."""
    archive = {"own": tmp_path, "far": far_folder}.get(place)
    Sweep(place, tmp_path, server, archive).all(fault, wanted, 1)


# -- kills at any time -----------------------------------------------------------------------------


def kill_at_random(folder: Path, server: ImportServer, mails: int, rounds: int, seed: int) -> None:
    """Kill imports at random times while mail comes in, and see that all is there once."""
    chance = random.Random(seed)
    spool = Spool(folder / f"seed-{seed}")
    expected: Counter[str] = Counter()
    number = 0
    for _ in range(rounds):
        for _ in range(mails // rounds):
            subject = f"mail {number}"
            raw = large(subject) if chance.random() < 0.03 else mail(subject)
            spool.put(raw, f"{1_700_000_000 + number}.M{number}P1.host", second=number)
            expected[digest(raw)] += 1
            number += 1
        ended = server.run(spool.ini, batch=25, kill_after=chance.uniform(0.01, 0.25))
        assert ended.status in (0, -9), f"seed {seed}: {ended.output}"
    stored = again(spool)
    assert stored.queues["all"] == expected, f"seed {seed}"
    assert stored.archived == expected, f"seed {seed}"
    assert not stored.left, f"seed {seed}"


def test_kills_at_random(tmp_path: Path, server: ImportServer) -> None:
    """Ten imports, killed at random times while mail comes in, import every mail once."""
    kill_at_random(tmp_path, server, mails=600, rounds=10, seed=1)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(20))
def test_many_kills_at_random(tmp_path: Path, server: ImportServer, seed: int) -> None:
    """A hundred imports, killed at random times while mail comes in, import every mail once."""
    kill_at_random(tmp_path, server, mails=5000, rounds=100, seed=seed)


# -- what comes before what ------------------------------------------------------------------------


def test_nothing_leaves_before_it_is_durable(tmp_path: Path, server: ImportServer) -> None:
    """A file leaves ``new`` after the fsync of the database, and its blob's, that followed it."""
    spool = Spool(tmp_path / "spool")
    for number in range(6):
        spool.put(mail(f"small {number}"))
        spool.put(large(f"large {number}"))
    log = tmp_path / "calls"
    traced = "openat,write,fsync,rename,linkat,unlink,chmod"
    ended = server.run(
        spool.ini, ["-y", "-s", "0", "-o", str(log), "-e", f"trace={traced}"], batch=4
    )
    assert ended.status == 0
    dirty: set[str] = set()
    left = 0
    for line in log.read_text().splitlines():
        if found := re.match(r"write\(\d+<(.*?)>", line):
            dirty.add(found[1])
        elif found := re.match(r"fsync\(\d+<(.*?)>", line):
            dirty.discard(found[1])
        elif found := re.match(r'rename\("(.*?)", "(.*?)"\) = 0', line):
            source, target = found.groups()
            if target.endswith(".blob"):
                dirty.update((target, os.path.dirname(target)))
            if source.startswith(str(spool.maildir / "new")):
                left += 1
                unsynced = {path for path in dirty if "/blobs/0x" in path or path.endswith(".fs")}
                assert not unsynced, f"{line}: before {unsynced} was written to the disk"
    assert left == 12


def test_the_archive_is_durable_before_the_journal_forgets(
    tmp_path: Path, server: ImportServer
) -> None:
    """Folders that files moved between are fsynced before the next write to the database."""
    spool = Spool(tmp_path / "spool")
    for number in range(8):
        spool.put(mail(f"small {number}"))
    log = tmp_path / "calls"
    ended = server.run(
        spool.ini, ["-y", "-s", "0", "-o", str(log), "-e", "trace=write,fsync,rename"], batch=4
    )
    assert ended.status == 0
    moved: set[str] = set()
    rounds = 0
    for line in log.read_text().splitlines():
        if found := re.match(r'rename\("(.*?)", "(.*?)"\) = 0', line):
            if "/new/" in found[1]:
                moved.update(os.path.dirname(path) for path in found.groups())
        elif found := re.match(r"fsync\(\d+<(.*?)>", line):
            moved.discard(found[1])
        elif re.match(r"write\(\d+<.*?depot\.fs>", line):
            assert not moved, f"{line}: before {moved}"
            rounds += 1
    assert rounds > 3
