"""Exactly once, whatever happens: deliveries that are killed, or failed by the system, at any call.

What was acknowledged (status 0, or 250) is where it belongs; what was not is sent again, as Postfix
does, and then is there once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from postoffice.database import blob_folder, open_database
from postoffice.delivery import oversize_message
from postoffice.depot.folder import find_folder
from postoffice.queue import BLOB_SIZE, Queue
from tests import disks
from tests.crash_delivery import (
    LARGEST,
    POST,
    ROOT,
    URI,
    Codes,
    DeliveryServer,
    Ended,
    Posted,
    Service,
    configure,
    lines,
    send_at_once,
    send_in_turn,
    tracing,
)
from tests.spools import digest, mail

# The calls that change something, or whose failure must; those of Linux on other machines too.
CHANGING = (
    "rename",
    "renameat2",
    "link",
    "linkat",
    "unlink",
    "mkdir",
    "fsync",
    "write",
    "writev",
    "pwrite64",
    "ftruncate",
    "chmod",
    "fchmod",
    "flock",
    "fcntl",
    "sendto",
    "sendmsg",
)
READING = (
    "openat",
    "getdents64",
    "read",
    "pread64",
    "recvfrom",
    "recvmsg",
    "newfstatat",
    "close",
)
FILES = tuple(one for one in (*CHANGING, *READING) if not one.startswith(("send", "recv")))
ENOSPC = ("write", "pwrite64", "mkdir", "rename", "link", "linkat", "openat", "fsync", "ftruncate")

TEMPORARY = 75
# Seconds after which a service that runs has to take mail again.
PATIENCE = 10.0
#: ``PLACE/FAULT/CALL/NUMBER``, as a failure names it, for that one alone; each may be a ``*``.
ONLY = os.environ.get("POSTOFFICE_SWEEP", "")


@dataclass(frozen=True, slots=True)
class Kept:
    """What there is of messages.

    :ivar queues: how often each queue has each message, by :func:`tests.spools.digest`.
    :ivar archived: how often the archive has each original, its trace lines in front.
    :ivar set_aside: how often ``failed`` has.
    :ivar litter: what belongs to nothing, and nobody removes.
    """

    queues: dict[str, Counter[str]]
    archived: Counter[str]
    set_aside: Counter[str]
    litter: tuple[str, ...] = ()


def expected(posts: Sequence[Posted]) -> Kept:
    """Return what there has to be of some messages."""
    kept = Kept({"one": Counter(), "two": Counter()}, Counter(), Counter())
    for post in posts:
        for recipient, fate in zip(post.recipients, post.fates, strict=True):
            trace = f"Return-Path: <{post.sender}>\nDelivered-To: {recipient}\n".encode()
            if fate == "failed":
                kept.set_aside[digest(trace + post.raw)] += 1
            elif fate == "archive":
                kept.archived[digest(trace + post.raw)] += 1
            elif len(post.raw) > LARGEST:
                header, blank, _ = post.raw.partition(b"\n\n")
                notice = oversize_message(header + blank, len(post.raw), LARGEST)
                kept.queues[fate][digest(notice)] += 1
                kept.archived[digest(trace + post.raw)] += 1
            else:
                kept.queues[fate][digest(post.raw)] += 1
    return kept


class Office:
    """A folder with a configuration, and what is kept there.

    :ivar archive: the archive's own folder, or ``None``: it is in the Maildir.
    """

    def __init__(self, folder: Path, uri: str = URI, archive: Path | None = None) -> None:
        self.folder = folder
        self.uri = uri.format(folder=folder)
        self.archive = archive
        options = f"archive = {archive}\n" if archive else ""
        self.ini = configure(folder, uri, options)

    def copy_to(self, folder: Path) -> Office:
        """Return a copy that knows nothing of this one."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("lmtp"))
        return Office(folder)

    def kept(self) -> Kept:
        """Return what there is; to be asked while nobody has the database open."""
        queues: dict[str, Counter[str]] = {"one": Counter(), "two": Counter()}
        database = open_database(self.uri)
        try:
            with database.transaction() as connection:
                folder = find_folder(connection.root(), "postoffice")
                for name in folder.names():
                    queues[name] = Counter(digest(one.raw) for one in Queue(folder.get(name)))
        finally:
            database.close()
        maildir = self.folder / "Maildir"
        if self.archive is None:
            archived, failed = maildir.glob(".????.??.??/cur/*"), maildir.glob(".failed/*")
        else:
            archived, failed = self.archive.glob("????.??.??/*"), self.archive.glob("failed/*")
        return Kept(queues, *self._files(sorted(archived), sorted(failed)))

    def _files(
        self, archived: list[Path], failed: list[Path]
    ) -> tuple[Counter[str], Counter[str], tuple[str, ...]]:
        """Return what files there are: the archive's, those set aside, and litter."""
        # A reason that belongs to a file, and the file that it belongs to.
        names = {path.name for path in failed}
        aside = [path for path in failed if f"{path.name}.reason" in names]
        reasons = {f"{path.name}.reason" for path in aside}
        # glob() finds what begins with a dot.
        litter = [path for path in archived if path.name.startswith(".")]
        litter += [path for path in failed if path not in aside and path.name not in reasons]
        blobs = blob_folder(self.uri)
        assert blobs is not None
        litter += sorted(Path(blobs, "tmp").glob("*"))
        return (
            Counter(digest(path.read_bytes()) for path in archived if path not in litter),
            Counter(digest(path.read_bytes()) for path in aside),
            tuple(map(str, litter)),
        )


def differences(found: Kept, wanted: Kept) -> list[str]:
    """Return what is not as it has to be, one line for each."""
    wrong = []
    for name in ("queues", "archived", "set_aside", "litter"):
        one, other = getattr(found, name), getattr(wanted, name)
        if one != other:
            wrong.append(f"{name}: {one} is not {other}")
    return wrong


@pytest.fixture(scope="module")
def server() -> Iterator[DeliveryServer]:
    """The program that takes mail."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with tempfile.TemporaryDirectory() as folder:
        found = DeliveryServer(Path(folder) / "server")
        yield found
        found.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path that is short enough for a socket in it."""
    with tempfile.TemporaryDirectory(prefix="po-") as name:
        yield Path(name)


def counted(log: Path) -> dict[str, list[int]]:
    """Return the numbers of each call that strace saw, those that are not of the work left out."""
    # Installed packages, our own modules, and the pipe that a process is let begin by.
    others = ("-info", "-packages", f"{ROOT}/", f"<{ROOT}>", "<pipe:")
    seen: Counter[str] = Counter()
    found: dict[str, list[int]] = {}
    for line in log.read_text(errors="replace").splitlines():
        call, bracket, _ = line.partition("(")
        if not bracket or not call.isidentifier():
            continue
        seen[call] += 1
        if not any(part in line for part in others):
            found.setdefault(call, []).append(seen[call])
    return found


def points(place: str, calls: dict[str, list[int]], fault: str, wanted: Sequence[str]) -> list[str]:
    """Return what can be disturbed, each as ``PLACE/FAULT/CALL/NUMBER``."""
    found = [
        f"{place}/{fault}/{call}/{number}" for call in wanted for number in calls.get(call, ())
    ]
    if not ONLY:
        return found
    chosen = ONLY.split("/")
    return [
        point
        for point in found
        if all(one in ("*", part) for one, part in zip(chosen, point.split("/"), strict=True))
    ]


def injection(point: str) -> list[str]:
    """Return the options of strace that disturb a point."""
    _, fault, call, number = point.split("/")
    what = "signal=SIGKILL" if fault == "SIGKILL" else f"error={fault}"
    return ["-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={number}"]


def counting(log: Path) -> list[str]:
    """Return the options of strace that write all calls down, with the files that they are on."""
    calls = ",".join(f"?{call}" for call in (*CHANGING, *READING))
    return ["-o", str(log), "-y", "-s", "0", "-e", f"trace={calls}"]


def fail_with(found: list[str]) -> None:
    """Fail if anything was found, naming each so that it can be had alone."""
    assert not found, "POSTOFFICE_SWEEP=" + "\nPOSTOFFICE_SWEEP=".join(found)


# -- by pipe ---------------------------------------------------------------------------------------


class PipeSweep:
    """Every call of a delivery by pipe, one after the other, killed or failed."""

    def __init__(self, folder: Path, server: DeliveryServer, post: Posted, first: Posted | None):
        """Count the calls.

        :param first: what was delivered before; ``None`` where there is no depot yet.
        """
        self.server, self.folder, self.post = server, folder, post
        self.place = post.name if first else f"{post.name}-first"
        self.office = Office(folder / "office")
        self.wanted = expected([post])
        if first is not None:
            assert server.deliver(self.office.ini, first).status == 0
            self.wanted = expected([first, post])
        log = folder / "calls"
        office = self.office.copy_to(folder / "counted")
        ended = server.deliver(office.ini, post, counting(log))
        assert ended.status == 0, ended.output
        assert office.kept() == self.wanted
        self.calls = counted(log)

    def disturb(self, point: str) -> str:
        """Disturb one call, deliver again if need be; return what is wrong, ``""`` for nothing."""
        office = self.office.copy_to(self.folder / "disturbed")
        ended = self.server.deliver(office.ini, self.post, injection(point))
        wrong = self._judged(ended)
        if ended.status != 0:
            again = self.server.deliver(office.ini, self.post)
            if again.status != 0:
                wrong.append(f"again: status {again.status}: {again.output}")
        wrong += differences(office.kept(), self.wanted)
        shutil.rmtree(office.folder)
        return "\n".join([point, *wrong]) if wrong else ""

    @staticmethod
    def _judged(ended: Ended) -> list[str]:
        if ended.status in (0, -9):
            return []
        if ended.status != TEMPORARY:
            return [f"status {ended.status}: {ended.output}"]
        said = ended.output.splitlines()[-1:]
        return [] if said and said[0].startswith("4.") else [f"it said: {ended.output}"]

    def all(self, fault: str, wanted: Sequence[str], step: int = 1, first: int = 0) -> list[str]:
        """Disturb every step-th call; return what is wrong."""
        found = points(self.place, self.calls, fault, wanted)
        told = [self.disturb(point) for point in (found if ONLY else found[first::step])]
        return [one for one in told if one]


FIRST = Posted("first", ("one@example.com",), mail("the first"), ("one",))
BY_NAME = {post.name: post for post in POST}


@pytest.mark.parametrize("name", ["small", "two", "blob", "rejected", "set-aside"])
def test_short_sweep_of_a_pipe(folder: Path, server: DeliveryServer, name: str) -> None:
    """A delivery by pipe that is disturbed at any of some calls leaves its message to be once."""
    sweep = PipeSweep(folder, server, BY_NAME[name], FIRST)
    found = sweep.all("SIGKILL", CHANGING, step=9, first=4)
    found += sweep.all("EIO", FILES, step=61, first=17)
    found += sweep.all("ENOSPC", ENOSPC, step=29, first=13)
    fail_with(found)


@pytest.mark.torture
@pytest.mark.parametrize("fault", ["SIGKILL", "EIO", "ENOSPC"])
@pytest.mark.parametrize("name", [*BY_NAME, "small-first", "blob-first"])
def test_sweep_of_a_pipe(folder: Path, server: DeliveryServer, name: str, fault: str) -> None:
    """A delivery by pipe that is disturbed at any call at all leaves its message to be once."""
    first = None if name.endswith("-first") else FIRST
    sweep = PipeSweep(folder, server, BY_NAME[name.removesuffix("-first")], first)
    wanted = {"SIGKILL": (*CHANGING, "openat"), "EIO": FILES, "ENOSPC": ENOSPC}
    fail_with(sweep.all(fault, wanted[fault]))


# -- by LMTP ---------------------------------------------------------------------------------------

Send = Callable[[str, Sequence[Posted]], Codes]


def waiting(posts: Sequence[Posted], codes: Codes) -> list[Posted]:
    """Return what a client still has to send: the messages, for those who do not have them."""
    found = []
    for post in posts:
        rest = [
            (recipient, fate)
            for recipient, fate in zip(post.recipients, post.fates, strict=True)
            if codes.get((post.name, recipient), "")[:3] != "250"
        ]
        if rest:
            recipients, fates = zip(*rest, strict=True)
            found.append(replace(post, recipients=recipients, fates=fates))
    return found


class ServiceSweep:
    """Every call of one of the service's two processes, one after the other, killed or failed."""

    def __init__(
        self,
        folder: Path,
        server: DeliveryServer,
        process: str,
        send: Send,
        posts: Sequence[Posted],
    ) -> None:
        """Count the calls.

        :param process: ``service``, which stores, or ``receiver``.
        :param send: sends messages to an address.
        """
        self.server, self.folder, self.process = server, folder, process
        self.send, self.posts = send, posts
        self.place = f"{process}-{send.__name__}"
        self.office = Office(folder / "office")
        assert server.deliver(self.office.ini, FIRST).status == 0
        self.wanted = expected([FIRST, *posts])
        log = folder / "calls"
        office = self.office.copy_to(folder / "counted")
        with Service(server, office.ini) as service:
            with tracing(self._pid(service), counting(log)):
                codes = send(service.address, posts)
            ended = service.end()
        assert not waiting(posts, codes), ended.output
        assert ended.status == 0, ended.output
        assert office.kept() == self.wanted
        self.calls = counted(log)

    def _pid(self, service: Service) -> int:
        return service.pid if self.process == "service" else service.receiver

    def disturb(self, point: str) -> str:
        """Disturb one call, send again if need be; return what is wrong, ``""`` for nothing."""
        office = self.office.copy_to(self.folder / "disturbed")
        with Service(self.server, office.ini) as service:
            with tracing(self._pid(service), injection(point)):
                codes = self.send(service.address, self.posts)
            wrong = self._judged(codes)
            if service.is_alive:
                # What has failed once does no more: the same service has to get on.
                wrong += self._send_rest(service, codes)
            ended = service.end()
        if ended.status not in (0, -9, TEMPORARY):
            wrong.append(f"status {ended.status}")
        if waiting(self.posts, codes):
            with Service(self.server, office.ini) as service:
                wrong += self._send_rest(service, codes)
        wrong += differences(office.kept(), self.wanted)
        wrong += self._all_again(office)
        if wrong:
            wrong.append(ended.output)
        shutil.rmtree(office.folder)
        return "\n".join([point, *wrong]) if wrong else ""

    def _send_rest(self, service: Service, codes: Codes) -> list[str]:
        """Send what is not acknowledged until it is; return what is wrong."""
        until = time.monotonic() + PATIENCE
        while (rest := waiting(self.posts, codes)) and time.monotonic() < until:
            codes |= send_in_turn(service.address, rest)
            # Another receiver is started, or the database opened, after a moment.
            time.sleep(0.02)
        still = [post.name for post in waiting(self.posts, codes)]
        return [f"sent again, and not taken: {still}: {codes}"] if still else []

    def _all_again(self, office: Office) -> list[str]:
        """Send everything again, as if no acknowledgement had come; return what is wrong."""
        with Service(self.server, office.ini) as service:
            codes = send_in_turn(service.address, self.posts)
            ended = service.end()
        wrong = [] if not waiting(self.posts, codes) else [f"known, and not taken: {codes}"]
        if ended.status != 0:
            wrong.append(f"status {ended.status} at last: {ended.output}")
        return wrong + [f"all again: {one}" for one in differences(office.kept(), self.wanted)]

    @staticmethod
    def _judged(codes: Codes) -> list[str]:
        odd = {key: code for key, code in codes.items() if code[:1] not in ("2", "4", "")}
        return [f"told: {odd}"] if odd else []

    def all(self, fault: str, wanted: Sequence[str], step: int = 1, first: int = 0) -> list[str]:
        """Disturb every step-th call; return what is wrong."""
        found = points(self.place, self.calls, fault, wanted)
        told = [self.disturb(point) for point in (found if ONLY else found[first::step])]
        return [one for one in told if one]


SERVICES = [("service", send_in_turn), ("receiver", send_in_turn), ("service", send_at_once)]
SHORT = tuple(BY_NAME[name] for name in ("small", "two", "file", "rejected", "set-aside"))


@pytest.mark.parametrize(("process", "send"), SERVICES)
def test_short_sweep_of_the_service(
    folder: Path, server: DeliveryServer, process: str, send: Send
) -> None:
    """The service, disturbed at any of some calls, leaves every message to be there once."""
    sweep = ServiceSweep(folder, server, process, send, SHORT)
    steps = {"SIGKILL": 40, "EIO": 160, "ENOSPC": 60} if process == "service" else {"SIGKILL": 9}
    found = []
    for fault, step in steps.items():
        wanted = {"SIGKILL": CHANGING, "EIO": FILES, "ENOSPC": ENOSPC}[fault]
        found += sweep.all(fault, wanted, step, first=step // 3)
    fail_with(found)


@pytest.mark.torture
@pytest.mark.parametrize("fault", ["SIGKILL", "EIO", "ENOSPC"])
@pytest.mark.parametrize(("process", "send"), [*SERVICES, ("receiver", send_at_once)])
def test_sweep_of_the_service(
    folder: Path, server: DeliveryServer, process: str, send: Send, fault: str
) -> None:
    """The service, disturbed at any call at all, leaves every message to be there once."""
    sweep = ServiceSweep(folder, server, process, send, POST)
    wanted = {"SIGKILL": (*CHANGING, "openat"), "EIO": FILES, "ENOSPC": ENOSPC}
    fail_with(sweep.all(fault, wanted[fault]))


# -- full disks ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk that is soon full."""
    with disks.small_disk(folder / "disk") as disk:
        yield disk


def office_on(disk: Path, folder: Path, what: str) -> tuple[Office, list[Posted]]:
    """Return an office of which a part is on a small disk, and more mail than that has room for."""
    subject, fate = ("spam", "archive") if what == "archive" else ("mail", "one")
    uri = URI
    if what == "database":
        uri = f"file://{disk}/depot.fs?blobstorage_dir={{folder}}/blobs"
    elif what == "blobs":
        uri = f"file://{{folder}}/depot.fs?blobstorage_dir={disk}/blobs"
    office = Office(folder / "office", uri, disk / "archive" if what == "archive" else None)
    sizes = [BLOB_SIZE + 9 if number % 2 else 200_000 for number in range(12)]
    # One for whose bytes there is not even room while they come.
    sizes[10] = 1_400_000
    return office, [
        Posted(f"{number}", ("one@example.com",), lines(f"{subject} {number}", size), (fate,))
        for number, size in enumerate(sizes)
    ]


DISKS = ["database", "blobs", "archive"]


@pytest.mark.parametrize("what", DISKS)
def test_a_full_disk_under_a_pipe(
    folder: Path, server: DeliveryServer, small_disk: Path, what: str
) -> None:
    """On a full disk a delivery ends with 75; with room, every message comes to be there once."""
    office, posts = office_on(small_disk, folder, what)
    statuses = {post.name: server.deliver(office.ini, post).status for post in posts}
    assert set(statuses.values()) == {0, TEMPORARY}
    rest = [post for post in posts if statuses[post.name]]
    disks.enlarge(small_disk)
    assert office.kept() == expected([post for post in posts if post not in rest])
    assert {server.deliver(office.ini, post).status for post in rest} == {0}
    assert office.kept() == expected(posts)


@pytest.mark.parametrize("what", DISKS)
@pytest.mark.parametrize("send", [send_in_turn, send_at_once])
def test_a_full_disk_under_the_service(
    folder: Path, server: DeliveryServer, small_disk: Path, what: str, send: Send
) -> None:
    """On a full disk clients are told to try again; with room, they are served as if never."""
    office, posts = office_on(small_disk, folder, what)
    with Service(server, office.ini) as service:
        codes = send(service.address, posts[:1])
        for _ in range(2):
            codes |= send(service.address, waiting(posts, codes))
            assert {code[:3] for code in codes.values()} <= {"250", "451", "452"}
            assert waiting(posts, codes)
        disks.enlarge(small_disk)
        codes |= send(service.address, waiting(posts, codes))
        assert not waiting(posts, codes), service.said
        ended = service.end()
    assert ended.status == 0, ended.output
    assert office.kept() == expected(posts)
