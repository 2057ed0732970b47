"""``postoffice serve``: real processes, and what they bear."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from postoffice.cli.daemon_state import daemon_json, tell_daemon
from postoffice.config import load
from postoffice.database import open_database
from postoffice.queue import BLOB_SIZE, open_queue
from tests.application import Application, lay_out, taken
from tests.deposits import BILLING, QUEUES, SALES
from tests.lmtp_client import Client
from tests.lmtp_service import crlf, wait_until
from tests.serving import Serving, drop
from tests.spools import FILE_STORAGE, Spool, large, mail
from tests.zeo_server import ZeoServer

STORED, LATER = "250 2.0.0", "451 4.3.0"
COMMAND = (sys.executable, "-m", "postoffice.cli")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="po") as name:
        yield Path(name)


class Place:
    """A configuration, and what reaches its daemon.

    :ivar socket: where clients of LMTP connect.
    :ivar uri: of the database, as an application opens it.
    """

    def __init__(self, folder: Path, options: str = "", uri: str = FILE_STORAGE) -> None:
        self.folder = folder
        self.socket = str(folder / "l")
        self.spool = Spool(folder / "s", self.options(options), queues=QUEUES, uri=uri)
        self.uri = uri.format(folder=self.spool.folder)

    def options(self, more: str = "") -> str:
        """Return the lines of the main section."""
        return f"lmtp = unix:{self.socket}\n{more}"

    def serve(self, **options: object) -> Serving:
        """Start a daemon; return it when it is ready."""
        return Serving(self.spool.ini, **options).wait_ready()  # type: ignore[arg-type]

    def drop(self, name: str, to: str = BILLING) -> None:
        """Deliver a message into the Maildir."""
        drop(self.spool.maildir, name, mail(name, X_Original_To=to, To=to))

    def subjects(self, queue: str = "billing") -> list[str]:
        """Return the subjects of what waits in a queue, in order of their names."""
        with open_queue(self.uri, queue) as found:
            return sorted(str(one["Subject"]) for one in found)

    def wait_for(self, *subjects: str, queue: str = "billing") -> None:
        """Wait until just this waits in a queue."""
        wait_until(lambda: self.subjects(queue) == sorted(subjects))


@pytest.fixture
def place(folder: Path) -> Place:
    """A configuration with a file, LMTP and a Maildir."""
    return Place(folder)


# -- what it does ----------------------------------------------------------------------------------


def test_mail_is_in_its_queue(place: Place) -> None:
    """Mail of both ways is in its queue at once, for whoever opens the file's URI meanwhile."""
    with place.serve() as serving:
        assert [(part.name, part.state) for part in serving.state.parts] == [
            ("storage", "running"),
            ("lmtp", "running"),
            ("spool", "running"),
        ]
        place.drop("one")
        place.drop("two", SALES)
        assert serving.deliver(place.socket, mail("three"), BILLING, SALES) == [STORED] * 2
        body = large("four", BLOB_SIZE + 1000) + b"\n"
        assert serving.deliver(place.socket, body, BILLING) == [STORED]
        place.wait_for("four", "one", "three")
        place.wait_for("three", "two", queue="sales")
        assert serving.stop() == 0
        assert "Traceback" not in serving.said
        assert "ERROR" not in serving.said
    assert not os.path.lexists(place.socket)
    assert place.spool.waiting() == []
    # The file is free again.
    assert place.subjects() == ["four", "one", "three"]


def test_it_says_how_it_is(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether a daemon runs, and how its parts are, shows from the configuration alone."""
    settings = load(place.spool.ini)
    assert daemon_json(settings) is None
    with place.serve() as serving:
        tell_daemon(settings)
        told = capsys.readouterr().out.splitlines()
        assert told[0].startswith(f"daemon: process {serving.process.pid}, for ")
        assert [line.split()[:2] for line in told[1:]] == [
            [name, "running"] for name in ("storage", "lmtp", "spool")
        ]
        found = daemon_json(settings)
        assert found is not None
        assert found["process"] == serving.process.pid
        serving.stop(signal.SIGKILL)
    assert daemon_json(settings) is None
    tell_daemon(settings)
    assert capsys.readouterr().out == "daemon: not running\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root works beside another user's files")
def test_root_is_warned(place: Place) -> None:
    """Root is told whose files are about to be joined by root's own."""
    os.chown(place.spool.maildir, 65534, -1)
    with place.serve() as serving:
        line = f"WARNING serve as-root: {place.spool.maildir} belongs to user 65534, "
        assert serving.said.count(line) == 1
        assert serving.stop() == 0


def test_systemd_is_told(place: Place) -> None:
    """Readiness, the state in a line, signs of life, a reload and the end are told as systemd asks.

    In its units that is Type=notify-reload, with WatchdogSec.
    """
    with place.serve(environment={"WATCHDOG_USEC": "400000"}) as serving:
        wait_until(lambda: serving.notes().count("WATCHDOG=1") > 3)
        assert "READY=1\nSTATUS=storage running; lmtp running; spool running" in serving.told
        serving.reload()
        assert any(note.startswith("RELOADING=1\nMONOTONIC_USEC=") for note in serving.told)
        assert serving.stop() == 0
        assert serving.notes()[-1] == "STOPPING=1" or "STOPPING=1" in serving.told


def test_lines_for_journald(place: Place) -> None:
    """Where standard error is the journal, a line begins with its priority, and has no time."""
    reading, writing = os.pipe()
    status = os.fstat(writing)
    journal = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    words = [*COMMAND, "-C", str(place.spool.ini), "-v", "serve"]
    with subprocess.Popen(words, stderr=writing, env=os.environ | journal) as process:
        os.close(writing)
        with open(reading, encoding="utf-8") as said:
            assert said.readline().startswith("<6>storage started: process ")
            process.terminate()
            rest = said.read().splitlines()
    assert process.returncode == 0
    assert [line for line in rest if not line.startswith(("<6>", "<4>"))] == []


def test_a_second_one_is_refused(place: Place) -> None:
    """A second daemon of one configuration ends at once, and names the first one's process."""
    with place.serve() as serving:
        done = subprocess.run(
            [*COMMAND, "-C", str(place.spool.ini), "serve"], capture_output=True, text=True
        )
        assert done.returncode == 75
        (line,) = done.stderr.splitlines()
        assert f"process {serving.process.pid}" in line
        assert serving.deliver(place.socket, mail("one"), BILLING) == [STORED]


@pytest.mark.parametrize(
    ("options", "uri", "queues", "fault"),
    [
        ("no_such_option = 1\n", FILE_STORAGE, QUEUES, "no_such_option"),
        ("", FILE_STORAGE, "", "there is no section [queue:NAME]"),
        ("", "memory://", QUEUES, "a database in one process's memory"),
        ("zeo_listen = none\n", FILE_STORAGE, QUEUES, "only one of lmtp and the import"),
    ],
)
def test_a_configuration_that_cannot_be_used(
    folder: Path, options: str, uri: str, queues: str, fault: str
) -> None:
    """A configuration that cannot be served is refused at once, in one line, with status 2."""
    place = Place(folder, uri=uri)
    place.spool.configure(place.options(options), queues)
    done = subprocess.run(
        [*COMMAND, "-C", str(place.spool.ini), "serve"], capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert fault in line


# -- what it bears ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["storage", "lmtp", "spool"])
def test_a_part_is_killed(place: Place, name: str) -> None:
    """A part that dies is started again at once, and all mail is stored once."""
    with place.serve() as serving:
        place.drop("one")
        place.wait_for("one")
        serving.kill(name)
        assert f"{name} ended: killed by SIGKILL; another is started in 0.1 s" in serving.said
        wait_until(lambda: f"{name} recovered" in serving.said)
        assert serving.part(name).restarts == 1
        place.drop("two")
        wait_until(lambda: serving.is_stored(place.socket, mail("three"), BILLING))
        place.wait_for("one", "three", "two")
        assert serving.stop() == 0


def test_clients_wait_while_the_listener_is_another_one(place: Place) -> None:
    """While the part that talks to clients is started again, connecting is never refused."""
    with place.serve() as serving:
        for _ in range(3):
            pid = serving.strike("lmtp")
            greeted = False
            while not greeted:
                # Refused, this raises another error than those of who was let in and turned out.
                with (
                    Client(place.socket) as client,
                    suppress(BrokenPipeError, ConnectionResetError, AssertionError),
                ):
                    client.greet()
                    greeted = True
            serving.wait_for_another("lmtp", pid)


def test_the_first_process_is_killed(place: Place) -> None:
    """When the daemon itself is killed its parts end too, and the next one goes on."""
    with place.serve() as serving:
        assert serving.deliver(place.socket, mail("one"), BILLING) == [STORED]
        place.drop("two")
        assert serving.stop(signal.SIGKILL) == -signal.SIGKILL
        place.drop("three")
    with place.serve() as serving:
        place.wait_for("one", "three", "two")
        assert serving.stop() == 0


@pytest.mark.parametrize("name", ["storage", "lmtp", "spool"])
def test_a_part_that_hangs(place: Place, name: str) -> None:
    """A part that gives no sign of life is killed, and another one does its work."""
    words = ("-m", "tests.impatient_daemon", str(place.spool.ini))
    with place.serve(words=words) as serving:
        pid = serving.strike(name, signal.SIGSTOP)
        serving.wait_for_another(name, pid)
        assert f"{name} hung: process {pid}" in serving.said
        serving.wait_until(name, "running")
        place.drop("one")
        place.wait_for("one")
        assert serving.stop() == 0


def test_told_to_stop_in_the_middle(place: Place) -> None:
    """SIGTERM ends an import between two transactions; the next daemon imports the rest, once."""
    names = [f"{number:04}" for number in range(1500)]
    for name in names:
        place.drop(name)
    with place.serve() as serving:
        wait_until(lambda: len(place.spool.waiting()) < 1400)
        assert serving.stop() == 0
        assert len(place.spool.waiting()) > 0
    with place.serve() as serving:
        wait_until(lambda: not place.spool.waiting())
        assert place.subjects() == names
        assert serving.stop() == 0


def test_interrupted_at_a_terminal(place: Place) -> None:
    """An interrupt, which a terminal sends to all processes, ends the storage last."""
    for number in range(500):
        place.drop(f"{number:03}")
    with place.serve(start_new_session=True) as serving, Client(place.socket) as client:
        client.greet()
        assert client.begin("ann@example.org", [BILLING])[-1] == "354"
        os.killpg(serving.process.pid, signal.SIGINT)
        wait_until(lambda: "spool stopped" in serving.said)
        client.send(crlf(mail("in hand")) + b".\r\n")
        assert client.codes(1) == [STORED]
        assert serving.process.wait(60) == 0
        ends = re.findall(r"INFO (\w+) stopped", serving.said)
        assert ends == ["spool", "lmtp", "storage", "serve"]


def test_a_queue_too_many_is_told_once(place: Place) -> None:
    """Who opens the database again and again tells of a queue without a section once."""
    with place.serve() as serving:
        assert serving.stop() == 0
    place.spool.configure(place.options(), QUEUES.partition("[queue:sales]")[0])
    new, away = place.spool.maildir / "new", place.folder / "away"
    with place.serve() as serving:
        for _ in range(2):
            new.rename(away)
            serving.wait_until("spool", "failing")
            away.rename(new)
            serving.wait_until("spool", "running")
        assert serving.stop() == 0
        # One of each part that opens it.
        assert serving.said.count("queue 'sales' is not in") == 2


def test_the_maildir_goes_and_comes_back(place: Place) -> None:
    """A Maildir that is moved away is not made anew, and is used again when it is back."""
    maildir, away = place.spool.maildir, place.folder / "away"
    with place.serve() as serving:
        for number in range(2):
            maildir.rename(away)
            serving.wait_until("spool", "failing")
            assert str(maildir) in serving.part("spool").error
            assert not maildir.exists()
            drop(
                away,
                f"waited {number}",
                mail(f"waited {number}", To=BILLING, X_Original_To=BILLING),
            )
            away.rename(maildir)
            serving.wait_until("spool", "running")
        # Made anew: a copy, as from a backup.
        shutil.copytree(maildir, away)
        shutil.rmtree(maildir)
        serving.wait_until("spool", "failing")
        shutil.copytree(away, maildir)
        serving.wait_until("spool", "running")
        place.drop("new")
        place.wait_for("new", "waited 0", "waited 1")
        assert serving.stop() == 0
        assert serving.said.count("spool failing: ") == 3
        assert serving.said.count("spool recovered") == 3


def test_the_storage_goes_and_comes_back(folder: Path) -> None:
    """While the database is away mail waits, clients are told to, and the log says so once."""
    with ZeoServer(folder / "zeo", folder / "z") as zeo:
        place = Place(folder, uri=zeo.uri(1))
        with place.serve() as serving:
            assert [part.name for part in serving.state.parts] == ["lmtp", "spool"]
            place.drop("one")
            place.wait_for("one")
            zeo.stop()
            place.drop("two")
            serving.wait_until("spool", "failing")
            for _ in range(3):
                assert serving.deliver(place.socket, mail("three"), BILLING) == [LATER]
            serving.wait_until("lmtp", "failing")
            zeo.start()
            place.wait_for("one", "two")
            wait_until(lambda: serving.is_stored(place.socket, mail("three"), BILLING))
            serving.wait_until("lmtp", "running")
            place.wait_for("one", "three", "two")
            assert serving.stop() == 0
            assert serving.said.count("spool failing: ") == 1
            assert serving.said.count("nothing can be stored now: ") == 1


def test_a_file_that_another_process_has(place: Place) -> None:
    """A daemon that finds the file locked says by whom, and goes on when it is free."""
    database = open_database(place.uri)
    try:
        with Serving(place.spool.ini) as serving:
            wait_until(lambda: "storage ended: " in serving.said)
            assert f"is locked by process {os.getpid()}" in serving.said
            place.drop("one")
            database.close()
            serving.wait_until("spool", "running")
            place.wait_for("one")
            assert serving.stop() == 0
    finally:
        database.close()


# -- reloading -------------------------------------------------------------------------------------


def test_reloading(place: Place) -> None:
    """On SIGHUP the configuration is read again, and no client is refused meanwhile."""
    with place.serve() as serving, Client(place.socket) as client:
        client.greet()
        assert client.begin("ann@example.org", [BILLING])[-1] == "354"
        more = f"{QUEUES}[queue:more]\nfilters =\n    envelope_to: @more.example.com\n"
        place.spool.configure(place.options(), more)
        serving.reload()
        # The part that has the message in hand finishes it.
        client.send(crlf(mail("one")) + b".\r\n")
        assert client.codes(1) == [STORED]
        assert serving.deliver(place.socket, mail("two"), "in@more.example.com") == [STORED]
        place.wait_for("two", queue="more")
        place.wait_for("one")
        assert serving.stop() == 0


def test_reloading_another_listener(place: Place) -> None:
    """On SIGHUP the listener moves to where the configuration says, or goes."""
    with place.serve() as serving:
        other = str(place.folder / "o")
        place.spool.configure(f"lmtp = unix:{other}\n", QUEUES)
        serving.reload()
        assert serving.deliver(other, mail("one"), BILLING) == [STORED]
        assert not os.path.lexists(place.socket)
        place.spool.configure("", QUEUES)
        serving.reload()
        assert [part.name for part in serving.state.parts] == ["storage", "spool"]
        wait_until(lambda: not os.path.lexists(other))
        place.wait_for("one")
        assert serving.stop() == 0


def test_reloading_what_is_broken(place: Place) -> None:
    """A file that cannot be used changes nothing, and is said to be so, also in the state."""
    with place.serve() as serving:
        before = [part.process for part in serving.state.parts]
        place.spool.configure(place.options("no_such_option = 1"), QUEUES)
        serving.reload()
        assert "serve reload-failed: " in serving.said
        wait_until(lambda: "no_such_option" in serving.state.reload_error)
        assert [part.process for part in serving.state.parts] == before
        assert serving.deliver(place.socket, mail("one"), BILLING) == [STORED]
        place.spool.configure(place.options(), QUEUES)
        serving.reload()
        wait_until(lambda: serving.state.reload_error == "")
        assert serving.stop() == 0


# -- applications ----------------------------------------------------------------------------------


def test_applications_go_on(place: Place) -> None:
    """Two applications take each message once, whatever is killed, restarted and reloaded."""
    names: list[str] = []
    lay_out(place.uri, ["one", "two"])
    said = place.folder / "applications"

    def send(serving: Serving, count: int = 20) -> None:
        for _ in range(count):
            name = f"{len(names):04}"
            names.append(name)
            if len(names) % 2:
                place.drop(name)
            else:
                while not serving.is_stored(place.socket, mail(name), BILLING):
                    time.sleep(0.01)

    with ExitStack() as stack:
        serving = stack.enter_context(place.serve())
        for name in ("one", "two"):
            stack.enter_context(Application(place.uri, "billing", name, said, 0.005))
        send(serving)
        for part in ("storage", "lmtp", "spool", "storage"):
            pid = serving.strike(part)
            send(serving)
            serving.wait_for_another(part, pid)
        serving.reload()
        send(serving)
        assert serving.stop(signal.SIGKILL) == -signal.SIGKILL
        for how in (signal.SIGTERM, signal.SIGKILL):
            serving = stack.enter_context(place.serve())
            send(serving)
            serving.stop(how)
        serving = stack.enter_context(place.serve())
        wait_until(lambda: sorted(taken(place.uri)) == names)
        found = taken(place.uri)
        assert {name: len(times) for name, times in found.items() if len(times) > 1} == {}
        assert place.subjects() == []
        assert serving.stop() == 0
