"""``postoffice consume``: real processes, a real server, and what becomes of each when it dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postoffice.depot.policy import Policy
from tests.depots import QUEUE, Depot, Seat, subjects, zeo_depot
from tests.sites import Site

COMMAND = Path(sys.executable).parent / "postoffice"
LONGEST = 60.0

# The application.  What it does with a message is in the first word of the subject.
APPLICATION = """
import os
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent.parent


class Mail:
    @staticmethod
    def handle(message):
        subject = message["Subject"]
        what = subject.split("-")[0]
        print(os.getpid(), subject, flush=True)
        if what == "fail":
            raise ValueError("no \\x1b[31m such bill")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "exit":
            os._exit(7)
        if what == "wait":
            # Until the test says that it is enough.
            while not (HERE / "enough").exists():
                time.sleep(0.01)
        with (HERE / "done").open("a") as file:
            file.write(subject + "\\n")


number = 7
"""


class Application:
    """A folder with an application and a configuration, and the command run there."""

    def __init__(self, folder: Path, depot: Depot) -> None:
        self.folder = folder
        self.depot = depot
        self.said = b""
        (folder / "app").mkdir()
        (folder / "app" / "__init__.py").touch()
        (folder / "app" / "mail.py").write_text(APPLICATION)
        self.configure()

    def configure(self, *lines: str, uri: str | None = None) -> None:
        """Write the configuration, with these lines in the section of the queue."""
        (self.folder / "postoffice.ini").write_text(
            f"[post office]\nzodb_uri = {uri or self.depot.uri}\nmaildir = Maildir\n"
            f"[queue:{QUEUE}]\nfilters = header_regexp: To:\n" + "".join(f"{x}\n" for x in lines)
        )

    def start(self, *options: str, handler: str = "app.mail:Mail.handle") -> Consumers:
        """Start the command, by the script that people call."""
        with (self.folder / "output").open("ab") as output, (self.folder / "log").open("ab") as log:
            return Consumers(
                subprocess.Popen(
                    [COMMAND, "consume", QUEUE, handler, *options],
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=log,
                    start_new_session=True,
                )
            )

    @contextlib.contextmanager
    def consuming(self, *options: str) -> Iterator[Consumers]:
        """Have the command run, and stop it, which leaves no process behind."""
        consumers = self.start(*options)
        try:
            yield consumers
            consumers.stop()
        finally:
            consumers.end()

    @property
    def done(self) -> list[str]:
        """What the application has done, in order."""
        path = self.folder / "done"
        return path.read_text().split() if path.exists() else []

    @property
    def begun(self) -> list[tuple[int, str]]:
        """Which process began with which message, in order."""
        words = [line.split() for line in (self.folder / "output").read_text().splitlines()]
        return [(int(process), subject) for process, subject in words]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def enough(self) -> None:
        """Let the application go on with what it waits in."""
        (self.folder / "enough").touch()


class Consumers:
    """The command, running."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Tell it to stop; it ends with 0, and all of its workers with it."""
        self.process.send_signal(number)
        assert self.process.wait(LONGEST) == 0
        assert self.alive() == []

    def alive(self) -> list[int]:
        """Return the processes of its session."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(path.parent.name))
        return found

    def end(self) -> None:
        """Kill what is left of it, when a test has failed."""
        for process in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


def until(happened: Callable[[], object]) -> None:
    """Wait until it has happened."""
    end = time.monotonic() + LONGEST
    while not happened():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


@pytest.fixture(name="depot")
def server_depot(tmp_path: Path) -> Iterator[Depot]:
    """A depot behind a ZEO server."""
    with zeo_depot(tmp_path) as opened:
        yield opened


@pytest.fixture
def application(tmp_path: Path, depot: Depot) -> Application:
    """An application of the depot."""
    return Application(tmp_path, depot)


@pytest.fixture
def seat(depot: Depot) -> Seat:
    """A seat in the depot."""
    return depot.seat()


def left(seat: Seat) -> list[str]:
    """Return the subjects of what is in the queue."""
    seat.begin()
    return subjects(seat.queue)


def quarantined(seat: Seat) -> list[str]:
    """Return the subjects of what is in quarantine."""
    seat.begin()
    return subjects(message for message, _ in seat.queue.get_quarantined_messages())


# -- messages --------------------------------------------------------------------------------------


def test_workers_share_the_messages(application: Application, seat: Seat) -> None:
    """Each message is handled once, by one of the workers; and silently."""
    names = [f"bill-{number}" for number in range(30)]
    seat.add(*names)
    with application.consuming("--workers", "3"):
        until(lambda: len(application.done) == 30)
        until(lambda: not left(seat))
    assert sorted(application.done) == sorted(names)
    assert application.log == ""


def test_messages_that_come_later(application: Application, seat: Seat) -> None:
    """A worker that waits sees what comes, without being told."""
    with application.consuming():
        seat.add("first")
        until(lambda: application.done == ["first"])
        seat.add("second")
        until(lambda: application.done == ["first", "second"])
    assert left(seat) == []


def test_a_message_that_fails(application: Application, seat: Seat) -> None:
    """It is deferred, goes to quarantine at last, and holds up no other; each failure is a line."""
    application.configure("max_attempts = 2", "retry_delay = 1s")
    (failing, _) = seat.add("fail", "bill")
    with application.consuming():
        until(lambda: application.done == ["bill"])
        seat.begin()
        entry = seat.queue.find(failing)
        assert (entry.state, entry.attempts) == ("queued", 1)
        assert entry.not_before > entry.arrived
        until(lambda: quarantined(seat) == ["fail"])
    assert left(seat) == []
    assert [subject for _, subject in application.begun] == ["fail", "bill", "fail"]
    lines = application.log.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert f" WARNING queue '{QUEUE}'" in line
        assert str(failing) in line
        assert "<fail@example.com>" in line
        assert r"ValueError: no \x1b[31m such bill" in line
    assert "quarantine" in lines[1]


def test_the_policy_is_written_into_the_depot(application: Application, seat: Seat) -> None:
    """What the configuration says of the queue is what the depot says from then on."""
    application.configure("max_attempts = 3", "retry_delay = 5m", "lease = 15m")
    with application.consuming("--workers", "2"):
        seat.add("bill")
        until(lambda: application.done)
        seat.begin()
        assert seat.record.policy == Policy(3, 300.0, 900.0)


def test_verbose_lines_name_the_process(application: Application, seat: Seat) -> None:
    """With -v each line has the process that it comes from, and failures have their traceback."""
    application.configure("max_attempts = 1")
    seat.add("fail")
    with application.consuming("-v") as consumers:
        until(lambda: quarantined(seat))
    ((worker, _),) = application.begun
    moment = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.search(f"{moment} INFO {consumers.process.pid} worker {worker} ", application.log)
    assert re.search(f"{moment} WARNING {worker} queue ", application.log, re.MULTILINE)
    assert f" DEBUG {worker} Traceback (most recent call last):\n" in application.log
    assert r"ValueError: no \x1b[31m such bill" in application.log


# -- the end ---------------------------------------------------------------------------------------


def terminate(consumers: Consumers) -> None:
    """Tell the parent alone."""
    consumers.process.terminate()


def interrupt_terminal(consumers: Consumers) -> None:
    """Tell all processes, as Ctrl-C does."""
    os.killpg(consumers.process.pid, signal.SIGINT)


def stop_unit(consumers: Consumers) -> None:
    """Tell all processes, as systemd does."""
    os.killpg(consumers.process.pid, signal.SIGTERM)


@pytest.mark.parametrize("tell", [terminate, interrupt_terminal, stop_unit])
def test_what_is_in_hand_is_finished(
    application: Application, seat: Seat, tell: Callable[[Consumers], None]
) -> None:
    """When told to stop, each worker finishes its message, commits, and takes no other."""
    seat.add("wait-1", "wait-2", "bill-3", "bill-4")
    consumers = application.start("--workers", "2")
    try:
        until(lambda: len(application.begun) == 2)
        tell(consumers)
        # Enough for a worker to die of it that should not.
        time.sleep(0.2)
        assert application.done == []
        assert len(consumers.alive()) == 3
        application.enough()
        assert consumers.process.wait(LONGEST) == 0
        assert consumers.alive() == []
    finally:
        consumers.end()
    taken = {subject for _, subject in application.begun}
    assert len(taken) == 2
    assert set(application.done) == taken
    assert set(left(seat)) == {"wait-1", "wait-2", "bill-3", "bill-4"} - taken
    assert application.log == ""


def test_a_second_signal(application: Application, seat: Seat) -> None:
    """Told to stop a second time, the command kills its workers; what they had in hand waits on."""
    seat.add("wait")
    consumers = application.start()
    try:
        until(lambda: application.begun)
        consumers.process.terminate()
        # Two of a kind that come at once are one.
        time.sleep(0.2)
        consumers.stop()
    finally:
        consumers.end()
    assert application.done == []
    assert left(seat) == ["wait"]


def test_the_parent_is_killed(application: Application, seat: Seat) -> None:
    """Workers whose parent is gone finish what they have in hand, and are gone as well."""
    seat.add("wait", "bill")
    consumers = application.start()
    try:
        until(lambda: application.begun)
        consumers.process.kill()
        consumers.process.wait()
        assert len(consumers.alive()) == 1
        application.enough()
        until(lambda: not consumers.alive())
    finally:
        consumers.end()
    assert application.done == ["wait"]
    assert left(seat) == ["bill"]


# -- deaths ----------------------------------------------------------------------------------------


def test_a_worker_is_killed(application: Application, seat: Seat) -> None:
    """Another is started, and the message that it had in hand is done by somebody else."""
    seat.add("wait")
    with application.consuming("--workers", "2"):
        until(lambda: application.begun)
        ((killed, _),) = application.begun
        os.kill(killed, signal.SIGKILL)
        until(lambda: len(application.begun) == 2)
        application.enough()
        until(lambda: application.done == ["wait"])
        until(lambda: not left(seat))
    assert application.begun[1][0] != killed
    (line,) = application.log.splitlines()
    assert line.endswith(
        f" WARNING worker {killed} ended: killed by SIGKILL; another is started in 0.1 s"
    )


@pytest.mark.parametrize(
    ("what", "cause"), [("kill", "killed by SIGKILL"), ("exit", "exit status 7")]
)
def test_a_message_that_kills(application: Application, seat: Seat, what: str, cause: str) -> None:
    """A message of which workers die goes to quarantine at last, and all others go through."""
    application.configure("max_attempts = 3", "retry_delay = 0")
    bills = [f"bill-{number}" for number in range(5)]
    seat.add(what, *bills)
    with application.consuming("--workers", "2"):
        until(lambda: quarantined(seat) == [what])
        until(lambda: not left(seat))
    assert sorted(application.done) == bills
    assert [subject for _, subject in application.begun].count(what) == 3
    assert application.log.count(f" ended: {cause}; another is started in 0.") == 3


def test_deaths_in_a_row(tmp_path: Path) -> None:
    """A worker that dies again and again is started again later and later."""
    script = """
        import logging, os, signal
        from postoffice.workers import Workers

        logging.basicConfig()
        # Some that start programs leave it so.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        Workers(lambda: os._exit(3), 1).run()
    """
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=log)
    try:
        until(lambda: (tmp_path / "log").read_text().count("\n") == 5)
        process.terminate()
        assert process.wait(LONGEST) == 0
    finally:
        process.kill()
        process.wait()
    delays = re.findall(
        r"^WARNING:postoffice:worker \d+ ended: exit status 3; another is started in (.*) s$",
        (tmp_path / "log").read_text(),
        re.MULTILINE,
    )
    assert delays == ["0.1", "0.2", "0.4", "0.8", "1.6"]


def test_the_server_is_not_there(application: Application, tmp_path: Path) -> None:
    """A database that cannot be reached is a line for each attempt, and no reason to end."""
    application.configure(uri=f"zeo://{tmp_path}/none.sock?blob_dir={tmp_path}/b&wait_timeout=1")
    with application.consuming():
        until(lambda: application.log.count("\n") == 2)
    for line in application.log.splitlines():
        assert re.search(r" WARNING worker \d+ ended: .*none.sock.*; another is started in", line)


# -- what cannot be done ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queue", "handler", "status", "line"),
    [
        ("nix", "app.mail:Mail.handle", 69, f"no queue 'nix'; there are: '{QUEUE}'"),
        (QUEUE, "app.post:handle", 2, "app.post cannot be imported: ModuleNotFoundError: No modu"),
        (QUEUE, "app.faulty:handle", 2, r"app.faulty cannot be imported: KeyError: 'a\x1bb'"),
        (QUEUE, "app.mail:Mail.handel", 2, "app.mail:Mail.handel: there is no 'handel'; did you"),
        (QUEUE, "app.mail:number", 2, "app.mail:number is no function, but int"),
    ],
)
def test_no_worker_can_work(
    application: Application, queue: str, handler: str, status: int, line: str
) -> None:
    """A handler or a queue that is not there is one line, whatever the number of workers."""
    (application.folder / "app" / "faulty.py").write_text("{}['a\\x1bb']\n")
    done = subprocess.run(
        [COMMAND, "consume", queue, handler, "--workers", "3"],
        cwd=application.folder,
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert done.stderr.startswith(f"postoffice: {line}")


@pytest.mark.parametrize("handler", ["app.mail", "app.mail:", ":handle", "app/mail.py:handle"])
def test_no_name_of_a_handler(tmp_path: Path, handler: str) -> None:
    """What does not name a module and something in it is a wrong command line."""
    result = Site(tmp_path / "site").run("consume", "billing", handler)
    assert result.exit_code == 2
    assert "write MODULE:HANDLER, such as app.mail:handle" in result.stderr


def test_several_workers_of_one_file(tmp_path: Path) -> None:
    """A file that no server serves has room for one worker; that is said before any is started."""
    site = Site(tmp_path / "site")
    result = site.run("consume", "billing", "app:handle", "--workers", "2")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"database {site.folder}/var/depot.fs is a file that one" in result.stderr
    assert "`postoffice serve`" in result.stderr
