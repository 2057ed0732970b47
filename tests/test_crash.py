"""Exactly once, whatever happens: imports that are killed, or failed by the system, at any call."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import transaction
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from postoffice.depot.folder import make_folder
from postoffice.exceptions import DepotUnavailable, PostofficeError
from postoffice.queue import BLOB_SIZE, find_queue
from tests import disks
from tests.crash_import import BUSY, DEFECT, FAILED, ImportServer
from tests.spools import FILE_STORAGE, Spool, Stored, digest, large, mail, other_file_system

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

#: ``PLACE/FAULT/CALL/NUMBER``, as a failure names it, for that one alone; CALL may be a ``*``.
ONLY = os.environ.get("POSTOFFICE_SWEEP", "")


@dataclass(frozen=True, slots=True)
class World:
    """What the sweep imports, and what has to come of it."""

    spool: Spool
    expected: Stored


@pytest.fixture(scope="module")
def server() -> Iterator[ImportServer]:
    """The process that imports."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
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
    writable = spool.put(large("others may write it"))
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

    def __init__(
        self, place: str, folder: Path, server: ImportServer, archive: Path | None
    ) -> None:
        self.place = place
        self.folder = folder
        self.server = server
        self.archive = archive
        options = "archive = none\n" if place == "none" else ""
        self.world = world(folder, archive, options)
        log = folder / "calls"
        ended = self._run(
            "count", ["-o", str(log), "-e", "trace=" + ",".join((*CHANGING, *OPENING))]
        )
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
        try:
            stored = again(self.spool)
        except (PostofficeError, OSError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
            stored = self.world.expected
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


def test_a_copy_is_durable_before_the_original_goes(
    tmp_path: Path, server: ImportServer, far_folder: Path
) -> None:
    """To another file system a file is copied, fsynced with its folder, and then removed."""
    spool = Spool(tmp_path / "spool", archive=far_folder / "archive")
    for subject in ("small", "hopeless"):
        spool.put(mail(subject))
    log = tmp_path / "calls"
    ended = server.run(
        spool.ini, ["-y", "-s", "0", "-o", str(log), "-e", "trace=write,fsync,rename,unlink"]
    )
    assert ended.status == 0
    far = str(far_folder)
    dirty: set[str] = set()
    left = 0
    for line in log.read_text().splitlines():
        if found := re.match(r"write\(\d+<(.*?)>", line):
            dirty.add(found[1])
        elif found := re.match(r"fsync\(\d+<(.*?)>", line):
            dirty.discard(found[1])
        elif found := re.match(r'rename\("(.*?)", "(.*?)"\) = 0', line):
            dirty.update(os.path.dirname(path) for path in found.groups())
            if found[2].startswith(far):
                assert found[1] not in dirty, f"{line}: before its bytes were written to the disk"
        elif found := re.match(r'unlink\("(.*?/new/.*?)"\) = 0', line):
            left += 1
            unsynced = {path for path in dirty if path.startswith(far)}
            assert not unsynced, f"{line}: before {unsynced}"
    assert left == 2


def test_a_new_database_is_durable(tmp_path: Path, server: ImportServer) -> None:
    """The folders in which database and blobs are made are fsynced before anything leaves."""
    spool = Spool(tmp_path / "spool")
    spool.put(mail("small"))
    log = tmp_path / "calls"
    ended = server.run(spool.ini, ["-y", "-s", "0", "-o", str(log), "-e", "trace=fsync,rename"])
    assert ended.status == 0
    before, found, _ = log.read_text().partition(f'rename("{spool.maildir}/new/')
    assert found
    assert re.search(rf"^fsync\(\d+<{re.escape(str(spool.folder))}>\) += 0$", before, re.MULTILINE)


# -- what cannot be read ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "subject"), [("openat", "small"), ("read", "small"), ("openat", "large")]
)
def test_a_file_with_a_bad_sector_is_set_aside(
    tmp_path: Path, server: ImportServer, call: str, subject: str
) -> None:
    """A file that the disk cannot read is set aside with the reason; the others are imported."""
    spool = Spool(tmp_path / "spool")
    bad = spool.put(large(subject) if subject == "large" else mail(subject))
    spool.put(mail("other"))
    ended = server.run(
        spool.ini,
        [
            "-f",
            "-o",
            "/dev/null",
            "-P",
            str(bad),
            "-e",
            f"trace={call}",
            "-e",
            f"inject={call}:error=EIO:when=1",
        ],
    )
    assert ended.status == 0, ended.output
    assert spool.raws() == [mail("other")]
    assert spool.set_aside() == [bad.name]
    assert "Input/output error" in (spool.failed / f"{bad.name}.reason").read_text()
    assert spool.waiting() == []


def test_a_message_that_kills_its_reader_is_set_aside(tmp_path: Path, server: ImportServer) -> None:
    """A message at which the reading process dies every time is set aside; the others are not."""
    spool = Spool(tmp_path / "spool")
    paths = [spool.put(mail(f"mail {number}")) for number in range(12)]
    ended = server.run(
        spool.ini,
        [
            "-f",
            "-o",
            "/dev/null",
            "-P",
            str(paths[5]),
            "-e",
            "trace=openat",
            "-e",
            "inject=openat:signal=SIGKILL:when=1",
        ],
    )
    assert ended.status == 0, ended.output
    assert "the reader ended at" in ended.output
    assert spool.raws() == [mail(f"mail {number}") for number in range(12) if number != 5]
    assert spool.set_aside() == [paths[5].name]
    assert "SIGKILL" in (spool.failed / f"{paths[5].name}.reason").read_text()
    assert spool.waiting() == []


# -- two at once -----------------------------------------------------------------------------------


@pytest.fixture
def second_server() -> Iterator[ImportServer]:
    """Another process that imports."""
    found = ImportServer()
    yield found
    found.close()


def test_two_imports_of_one_maildir(
    tmp_path: Path, server: ImportServer, second_server: ImportServer
) -> None:
    """While one process imports, a second one says so and does nothing; each mail is there once."""
    spool = Spool(tmp_path / "spool")
    raws = [mail(f"mail {number}") for number in range(40)]
    for raw in raws:
        spool.put(raw)
    slowly = ["-o", "/dev/null", "-e", "trace=rename", "-e", "inject=rename:delay_enter=30000"]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.run, spool.ini, slowly)
        while not (spool.maildir / ".postoffice.lock").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        second = second_server.run(spool.ini)
        assert not first.done()
        assert first.result().status == 0
    assert second.status == BUSY
    assert "another import" in second.output
    assert spool.raws() == raws
    assert spool.waiting() == []


class ZeoServer:
    """A ZEO server in a process of its own, to be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The path of a socket has to be short.
        self.socket = tempfile.mktemp(prefix="zeo", suffix=".sock")  # noqa: S306  # ZEO makes it
        self.uri = (
            f"zeo://{self.socket}?blob_dir={folder}/blobs&shared_blob_dir=true"
            "&wait_timeout=20&storage=main"
        )
        (folder / "zeo.conf").write_text(
            f"<zeo>\n address {self.socket}\n</zeo>\n"
            f"<filestorage main>\n path {folder}/depot.fs\n blob-dir {folder}/blobs\n"
            "</filestorage>\n"
        )
        self.start()

    def start(self) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ZEO.runzeo", "-C", str(self.folder / "zeo.conf")],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self) -> None:
        """Wait until it answers."""
        for _ in range(200):
            with socket.socket(socket.AF_UNIX) as client:
                if not client.connect_ex(self.socket):
                    return
            time.sleep(0.05)
        raise AssertionError("the ZEO server did not start")

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def zeo(tmp_path: Path) -> Iterator[ZeoServer]:
    """A running ZEO server."""
    (tmp_path / "zeo").mkdir()
    found = ZeoServer(tmp_path / "zeo")
    found.wait()
    yield found
    found.kill()
    Path(found.socket).unlink(missing_ok=True)


def test_two_maildirs_into_one_depot(
    tmp_path: Path, server: ImportServer, second_server: ImportServer, zeo: ZeoServer
) -> None:
    """Two processes that import two Maildirs into one depot at once import every mail once."""
    spools = [Spool(tmp_path / name, uri=zeo.uri) for name in ("one", "two")]
    expected: Counter[str] = Counter()
    for spool in spools:
        for number in range(120):
            subject = f"{spool.folder.name} {number}"
            raw = large(subject) if number % 20 == 0 else mail(subject)
            spool.put(raw)
            expected[digest(raw)] += 1
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(one.run, spool.ini, None, 3)
            for one, spool in zip((server, second_server), spools, strict=True)
        ]
        assert [(run.result().status, run.result().output) for run in runs] == [
            (0, "Outcome(counts={'queued': 120}, set_aside=0, dropped=0)\n")
        ] * 2
    assert spools[0].stored().queues["all"] == expected
    assert [spool.waiting() for spool in spools] == [[], []]


def kill_zeo(folder: Path, server: ImportServer, zeo: ZeoServer, seed: int, rounds: int) -> None:
    """Kill the database's server in the middle of imports, and see that all is there once."""
    chance = random.Random(seed)
    spool = Spool(folder / "spool", uri=zeo.uri)
    expected: Counter[str] = Counter()
    number = 0

    def accident() -> None:
        time.sleep(chance.uniform(0.05, 0.5))
        zeo.kill()
        time.sleep(chance.uniform(0, 0.2))
        zeo.start()

    for _ in range(rounds):
        for _ in range(120):
            subject = f"mail {number}"
            raw = large(subject) if number % 30 == 0 else mail(subject)
            spool.put(raw, f"{1_700_000_000 + number}.M{number}P1.host", second=number)
            expected[digest(raw)] += 1
            number += 1
        with ThreadPoolExecutor() as pool:
            run = pool.submit(server.run, spool.ini, None, 4)
            pool.submit(accident).result()
            assert run.result().status in (0, FAILED), f"seed {seed}: {run.result().output}"
        zeo.wait()
    stored = again(spool)
    assert stored.queues["all"] == expected, f"seed {seed}"
    assert stored.archived == expected, f"seed {seed}"
    assert not stored.left, f"seed {seed}"


def test_a_database_server_that_is_killed(
    tmp_path: Path, server: ImportServer, zeo: ZeoServer
) -> None:
    """An import whose ZEO server is killed and started again imports every mail once."""
    kill_zeo(tmp_path, server, zeo, seed=1, rounds=2)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(10))
def test_a_database_server_that_is_killed_often(
    tmp_path: Path, server: ImportServer, zeo: ZeoServer, seed: int
) -> None:
    """Imports whose ZEO server is killed many times import every mail once."""
    kill_zeo(tmp_path, server, zeo, seed, rounds=10)


# -- commits in doubt, full disks ------------------------------------------------------------------


def test_a_commit_that_failed_late(tmp_path: Path, server: ImportServer) -> None:
    """A commit that the disk reports as failed, and that happened, is not repeated."""
    spool = Spool(tmp_path / "spool")
    spool.put(mail("before"))
    spool.run()
    raws = [mail("before"), mail("small"), large("large"), mail("small too")]
    for raw in raws[1:]:
        spool.put(raw)
    log = tmp_path / "calls"
    database = str(spool.folder / "depot.fs")
    ended = server.run(
        spool.ini,
        [
            "-o",
            str(log),
            "-P",
            database,
            "-e",
            "trace=fsync",
            "-e",
            "inject=fsync:error=EIO:when=1",
        ],
    )
    assert ended.status == FAILED, ended.output
    assert "Input/output error" in ended.output
    assert len(spool.waiting()) == 3
    outcome = spool.run()
    assert (outcome.counts, outcome.dropped) == ({}, 3)
    assert spool.raws() == raws
    assert spool.waiting() == []
    assert len(spool.archived()) == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that is soon full."""
    with disks.small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.mark.parametrize("what", ["database", "blobs", "archive"])
def test_a_full_disk(tmp_path: Path, server: ImportServer, small_disk: Path, what: str) -> None:
    """On a full disk an import fails for the time being; with room, every mail is there once."""
    uri = FILE_STORAGE
    if what == "database":
        uri = f"file://{small_disk}/depot.fs?blobstorage_dir={{folder}}/blobs"
    elif what == "blobs":
        uri = f"file://{{folder}}/depot.fs?blobstorage_dir={small_disk}/blobs"
    archive = small_disk / "archive" if what == "archive" else None
    spool = Spool(tmp_path / "spool", uri=uri, archive=archive)
    expected: Counter[str] = Counter()
    for number in range(24):
        raw = large(f"mail {number}", BLOB_SIZE + 9 if number % 2 else 90_000)
        spool.put(raw)
        expected[digest(raw)] += 1
    for _ in range(2):
        ended = server.run(spool.ini)
        assert ended.status == FAILED, ended.output
        assert "No space left" in ended.output
    disks.enlarge(small_disk)
    stored = again(spool)
    assert stored.queues["all"] == expected
    assert stored.archived == expected
    assert not stored.left


def test_what_fits_goes_past_what_does_not(tmp_path: Path, small_disk: Path) -> None:
    """A message that is too large for the rest of the disk does not stop those behind it."""
    uri = f"file://{small_disk}/depot.fs?blobstorage_dir={small_disk}/blobs"
    spool = Spool(tmp_path / "site", uri=uri)
    big = large("big", 1_400_000)
    small = [mail(f"small {number}") for number in range(3)]
    for number, raw in enumerate([small[0], big, *small[1:]]):
        spool.put(raw, f"{number}", second=number)
    with pytest.raises(DepotUnavailable, match="No space left"):
        spool.run()
    assert spool.raws() == small
    assert spool.waiting() == ["new/1"]
    with pytest.raises(DepotUnavailable, match="No space left"):
        spool.run()
    disks.enlarge(small_disk)
    spool.run()
    assert spool.raws() == [*small, big]
    assert spool.waiting() == []


def test_no_room_at_all(tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a disk that has no room for anything the import ends soon, whatever waits."""
    uri = f"file://{small_disk}/depot.fs?blobstorage_dir={small_disk}/blobs"
    spool = Spool(tmp_path / "site", uri=uri)
    spool.put(mail("first"))
    spool.run()
    names = [f"new/{spool.put(large(f'{number}', 1_100_000)).name}" for number in range(30)]
    with caplog.at_level(logging.INFO), pytest.raises(DepotUnavailable, match="No space left"):
        spool.run()
    assert caplog.text.count(" waits: ") == 20
    assert sorted(spool.waiting()) == sorted(names)
    disks.enlarge(small_disk)
    spool.run()
    assert len(spool.raws()) == 31


def test_a_full_disk_cuts_no_message_short(small_disk: Path) -> None:
    """A large message that an application adds is stored whole, or not at all."""
    blobs = small_disk / "blobs"
    with closing(DB(FileStorage(str(small_disk / "depot.fs"), blob_dir=str(blobs)))) as database:
        manager = transaction.TransactionManager()
        connection = database.open(manager)
        make_folder(connection.root(), "postoffice").make("app")
        manager.commit()
        queue = find_queue(connection.root(), "app")
        raw = b"Subject: large\n\n" + b"x" * BLOB_SIZE
        for _ in range(10):
            try:
                queue.add(raw)
                manager.commit()
            except OSError:
                manager.abort()
                break
            # What is left of the disk gets less, to below the size of a message.
            with open(small_disk / "others", "ab", buffering=0) as file:
                file.write(b"x" * 30_000)
        else:
            pytest.fail("the disk did not fill up")
        manager.begin()
        assert len(queue) >= 1
        assert all(message.raw == raw for message in queue)
        manager.abort()
        connection.close()
