"""The launcher that Postfix runs, and ``postoffice deliver`` which it falls back to."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transaction

from postoffice.queue import open_queue
from tests.scripted_lmtp import SILENCE, ScriptedListener
from tests.sites import Site

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "etc" / "postoffice-deliver"
MAIL = b"From: a@x.example\nTo: b@billing.example.com\nSubject: one\n\nHello.\n"
TO = ("-f", "a@x.example", "--", "b@billing.example.com")
LATER = b"4.3.0 mail cannot be taken at the moment\n"

# A Python that notes how it was called and what it was given.
STUB = """#!/bin/sh
printf '%s\\n' "$@" >> {folder}/arguments
cat > {folder}/message
echo 'Traceback: not for strangers: /srv/secret' >&2
{end}
"""


class Wiring:
    """A copy of the launcher, and what it names."""

    def __init__(self, folder: Path) -> None:
        """Make an environment as pip does, with the Python that runs the tests."""
        self.folder = folder
        self.launcher = folder / "deliver"
        self.config = folder / "postoffice.ini"
        self.socket = folder / "lmtp"
        self.python = folder / "venv" / "bin" / "python"
        self.python.parent.mkdir(parents=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = folder / "venv" / "lib" / version / "site-packages"
        packages.mkdir(parents=True)
        self.package = packages / "postoffice"
        self.package.symlink_to(ROOT / "postoffice")
        self.use(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
        self.write()

    def write(self, **changes: str) -> None:
        """Write the launcher with these values of its variables."""
        values = {
            "PYTHON": str(self.python),
            "CONFIG": str(self.config),
            "SOCKET": str(self.socket),
            "TIMEOUT": "100",
            **changes,
        }
        text = LAUNCHER.read_text()
        for name, value in values.items():
            text, found = re.subn(rf"(?m)^{name}=.*$", f"{name}={value}", text)
            assert found == 1, name
        self.launcher.write_text(text)
        self.launcher.chmod(0o755)

    def use(self, python: str) -> None:
        """Use this script for a Python."""
        self.python.write_text(python)
        self.python.chmod(0o755)

    def stub(self, end: str = "exit 0") -> None:
        """Use a Python that notes how it is called, and ends like this."""
        self.use(STUB.format(folder=self.folder, end=end))

    def noted(self, name: str) -> bytes:
        """Return what the stub noted: its arguments or the message."""
        return (self.folder / name).read_bytes()

    def run(self, *words: str, raw: bytes = MAIL) -> tuple[int, bytes]:
        """Run the launcher as Postfix does; return its status and all that it printed."""
        done = subprocess.run(
            [self.launcher, *(words or TO)],
            input=raw,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            env={"PATH": "/usr/bin:/bin", "LANG": "C"},
            timeout=100,
        )
        return done.returncode, done.stdout

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start the launcher; its standard input stays open."""
        return subprocess.Popen(
            [self.launcher, *(words or TO)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture
def wiring(tmp_path: Path) -> Wiring:
    """Return a launcher without listener or configuration."""
    return Wiring(tmp_path)


@pytest.fixture
def site(wiring: Wiring) -> Site:
    """Return a site whose configuration the launcher names; nobody listens."""
    site = Site(wiring.folder / "site")
    wiring.config = site.ini
    wiring.write()
    return site


def wait_until(true: Callable[[], object]) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- by hand-over ----------------------------------------------------------------------------------


def test_hands_over(wiring: Wiring) -> None:
    """Where a listener is, it gets the message, and the second way is not gone."""
    with ScriptedListener(wiring.socket) as listener:
        assert wiring.run() == (0, b"2.6.0 stored\n")
    assert bytes(listener.session.message) == MAIL.replace(b"\n", b"\r\n")
    assert listener.session.commands[1] == "MAIL FROM:<a@x.example> BODY=8BITMIME"


@pytest.mark.parametrize(
    ("fate", "status"),
    [
        ("451 4.3.0 storage is gone", 75),
        ("554 5.6.0 bare", 65),
        ("550 5.1.1 unknown", 67),
        ("554 5.7.1 no", 69),
    ],
)
def test_passes_the_listener_s_word_on(wiring: Wiring, fate: str, status: int) -> None:
    """The listener's refusal is the launcher's status, and its text what is printed."""
    with ScriptedListener(wiring.socket, fates=[fate]):
        assert wiring.run() == (status, f"{fate.partition(' ')[2]}\n".encode())


def test_hands_over_arguments_as_they_are(wiring: Wiring) -> None:
    """Null sender, recipients, spaces, quotes, dollars and UTF-8 pass the shell unharmed."""
    recipients = ["ü@y.example", "a b@y.example", '"$(id)" `id`@y.example', "-f@y.example"]
    with ScriptedListener(wiring.socket) as listener:
        assert wiring.run("-f", "", "--", *recipients)[0] == 0
    assert listener.session.commands[1:6] == [
        "MAIL FROM:<> BODY=8BITMIME SMTPUTF8",
        "RCPT TO:<ü@y.example>",
        'RCPT TO:<"a b"@y.example>',
        'RCPT TO:<"\\"$(id)\\" `id`"@y.example>',
        "RCPT TO:<-f@y.example>",
    ]


def test_works_without_the_usual_folders(wiring: Wiring) -> None:
    """A Python whose packages are elsewhere than in its environment hands over all the same."""
    wiring.package.unlink()
    with ScriptedListener(wiring.socket) as listener:
        assert wiring.run() == (0, b"2.6.0 stored\n")
    assert listener.session.complete


def test_time_limit_of_the_listener(wiring: Wiring) -> None:
    """A listener that says nothing within the launcher's limit defers the message."""
    wiring.write(TIMEOUT="1")
    with ScriptedListener(wiring.socket, {"DATA": SILENCE}):
        assert wiring.run() == (75, b"4.4.2 the message was not handed over in time\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_hand_over(wiring: Wiring, number: signal.Signals) -> None:
    """A signal to the launcher ends the client too, and defers the message."""
    with ScriptedListener(wiring.socket, {"DATA": SILENCE}) as listener:
        process = wiring.start()
        assert listener.begun.wait(30)
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
        assert (process.returncode, said) == (75, b"4.3.0 delivery was interrupted\n")
        assert listener.ended.wait(30)


def test_killed_client(wiring: Wiring) -> None:
    """A client that is killed defers the message."""
    wiring.stub("kill -9 $$")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(wiring.socket))
        assert wiring.run() == (75, LATER)


@pytest.mark.parametrize("status", [1, 2, 64, 66, 70, 71, 74, 76, 78, 110, 112, 126, 127, 255])
def test_unknown_status_of_the_client(wiring: Wiring, status: int) -> None:
    """A status of the client that means nothing defers the message, and no other way is tried."""
    wiring.stub(f"exit {status}")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(wiring.socket))
        assert wiring.run() == (75, LATER)
    assert wiring.noted("arguments").startswith(b"-I\n-S\n-c\n")
    assert wiring.noted("arguments").count(b"-f\n") == 1


# -- the second way, as the launcher goes it -------------------------------------------------------


SECOND_WAY = """#!/bin/sh
[ "$1" = -I ] && exec {python} "$@"
printf '%s\\n' "$@" > {folder}/arguments
cat > {folder}/message
"""


def test_second_way(wiring: Wiring) -> None:
    """Without a socket the command is called with the same arguments and the whole message."""
    wiring.stub()
    assert wiring.run("-f", "", "--", "a b@y.example", "ü@y.example") == (0, b"")
    assert wiring.noted("message") == MAIL
    assert wiring.noted("arguments").decode().splitlines() == [
        *("-P", "-m", "postoffice.cli", "-C", str(wiring.config), "deliver"),
        *("-f", "", "--", "a b@y.example", "ü@y.example"),
    ]


def test_second_way_after_the_first(wiring: Wiring) -> None:
    """Where a listener was killed and left its socket, the command gets the whole message."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(wiring.socket))
    wiring.use(SECOND_WAY.format(python=sys.executable, folder=wiring.folder))
    assert wiring.run() == (0, b"")
    assert wiring.noted("message") == MAIL
    assert wiring.noted("arguments").decode().splitlines()[-4:] == list(TO)


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("echo 2.6.0 stored; exit 0", 0, b"2.6.0 stored\n"),
        ("echo 5.6.0 no; exit 65", 65, b"5.6.0 no\n"),
        ("echo 5.1.1 no; exit 67", 67, b"5.1.1 no\n"),
        ("echo 5.7.1 no; exit 69", 69, b"5.7.1 no\n"),
        ("echo 4.3.1 full; exit 75", 75, b"4.3.1 full\n"),
        ("exit 1", 75, LATER),
        ("exit 2", 75, LATER),
        ("exit 64", 75, LATER),
        ("exit 70", 75, LATER),
        ("exit 71", 75, LATER),
        ("exit 77", 75, LATER),
        ("exit 78", 75, LATER),
        ("exit 111", 75, LATER),
        ("exit 126", 75, LATER),
        ("exit 127", 75, LATER),
        ("exit 255", 75, LATER),
        ("kill -9 $$", 75, LATER),
        ("kill -SEGV $$", 75, LATER),
        ("kill -PIPE $$", 75, LATER),
    ],
)
def test_status_of_the_second_way(wiring: Wiring, end: str, status: int, said: bytes) -> None:
    """Five statuses are passed on, all others defer; a traceback reaches no sender."""
    wiring.stub(end)
    assert wiring.run() == (status, said)


def test_signal_ends_the_second_way(wiring: Wiring) -> None:
    """A signal to the launcher ends what it runs, and defers the message."""
    pid = wiring.folder / "pid"
    wiring.use(f"#!/bin/sh\necho $$ > {pid}.new && mv {pid}.new {pid}\nexec sleep 100\n")
    process = wiring.start()
    wait_until(pid.exists)
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (75, b"4.3.0 delivery was interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("child", ["echo 2.6.0 stored; exit 0", "echo 4.3.2 stopped; exit 75"])
def test_signal_to_a_child_that_has_a_verdict(wiring: Wiring, child: str) -> None:
    """What a child says to a signal is all that is said, and its verdict counts."""
    pid = wiring.folder / "pid"
    wiring.use(
        f"#!/bin/sh\ntrap '{child}' TERM\necho $$ > {pid}.new && mv {pid}.new {pid}\n"
        "while :; do sleep 0.05; done\n"
    )
    process = wiring.start()
    wait_until(pid.exists)
    process.terminate()
    said, _ = process.communicate(timeout=30)
    word, _, status = child.rpartition("; exit ")
    assert (process.returncode, said) == (int(status), word[5:].encode() + b"\n")


@pytest.mark.parametrize("limit", ["0", "soon", "-5", "99999999999"])
def test_wrong_time_limit(wiring: Wiring, limit: str) -> None:
    """A launcher whose TIMEOUT is none defers the message, and says what is wrong."""
    wiring.write(TIMEOUT=limit)
    with ScriptedListener(wiring.socket):
        status, said = wiring.run()
    assert (status, said) == (75, b"4.3.5 TIMEOUT is not a number of seconds from 1 to 86400\n")


# -- a broken installation -------------------------------------------------------------------------


def test_missing_python(wiring: Wiring) -> None:
    """A Python that is not there, or not to be run, defers the message, listener or not."""
    wiring.python.chmod(0o644)
    assert wiring.run() == (75, LATER)
    with ScriptedListener(wiring.socket) as listener:
        assert wiring.run() == (75, LATER)
        wiring.python.unlink()
        assert wiring.run() == (75, LATER)
    assert listener.sessions == []


@pytest.mark.parametrize("python", ["#!/no/such/interpreter\n", "\x7fELF broken"])
def test_python_that_cannot_run(wiring: Wiring, python: str) -> None:
    """A file that is no interpreter defers the message."""
    wiring.use(python)
    assert wiring.run() == (75, LATER)


def test_python_without_postoffice(wiring: Wiring) -> None:
    """An installation without the package defers the message."""
    wiring.use(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    assert wiring.run() == (75, LATER)


@pytest.mark.parametrize(
    "value", ['"/opt/python', "'/opt/python", "$(", "(", "a b", "`", "${", "; exit 0", "<<END"]
)
@pytest.mark.parametrize("name", ["PYTHON", "CONFIG", "SOCKET", "TIMEOUT"])
def test_launcher_with_a_mistake(wiring: Wiring, name: str, value: str) -> None:
    """A slip in one of the launcher's values, even one that breaks its syntax, loses no mail."""
    wiring.write(**{name: value})
    status, _ = wiring.run()
    assert status == 75


def test_launcher_that_was_cut_off(wiring: Wiring) -> None:
    """A launcher that was copied in part defers, once its first command is there."""
    wiring.stub()
    text = wiring.launcher.read_text()
    start = text.index("' EXIT\n") + len("' EXIT\n")
    for end in range(start, len(text), 97):
        wiring.launcher.write_text(text[:end])
        assert wiring.run()[0] == 75


@pytest.mark.parametrize("words", [["-x"], ["-f"], ["-f", "a@x.example"], ["--", "b@y.example"]])
@pytest.mark.parametrize("listening", [True, False])
def test_wrong_arguments(wiring: Wiring, site: Site, words: list[str], listening: bool) -> None:
    """Arguments that are wrong defer the message, listener or not."""
    assert site.ini.exists()
    if not listening:
        status, said = wiring.run(*words)
    else:
        with ScriptedListener(wiring.socket):
            status, said = wiring.run(*words)
    assert status == 75
    assert said.startswith(b"4.3.")


def test_no_standard_input(wiring: Wiring, site: Site) -> None:
    """Without standard input the launcher defers, and so does the command; each says so."""
    said = b"there is no standard input to read a message from\n"
    command = [sys.executable, "-m", "postoffice.cli", "-C", str(site.ini), "deliver"]
    for words, status in (([str(wiring.launcher)], b"4.3.0 "), (command, b"4.3.5 ")):
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *words, *TO],
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (75, status + said, b"")


# -- the second way, to its end --------------------------------------------------------------------


def stored(site: Site, queue: str = "billing") -> list[tuple[str | None, tuple[str, ...], bytes]]:
    """Return sender, recipients and bytes of the messages in a queue."""
    found = []
    with open_queue(site.uri, queue) as opened:
        while opened:
            message = opened.pop_next()
            assert message.envelope is not None
            envelope = message.envelope
            found.append((envelope.sender, envelope.recipients, bytes(message.raw)))
        transaction.abort()
    return found


def test_stores(wiring: Wiring, site: Site) -> None:
    """Without a listener the command opens the storage itself, and the message is in its queue."""
    status, said = wiring.run()
    assert status == 0, said
    assert said.startswith(b"2.")
    ((sender, recipients, raw),) = stored(site)
    assert (sender, recipients) == ("a@x.example", ("b@billing.example.com",))
    assert raw.endswith(MAIL)


def test_stores_lines_as_the_listener_does(wiring: Wiring, site: Site) -> None:
    """CRLF becomes LF, dots stay, and a last line without an end gets one."""
    raw = MAIL.replace(b"\n", b"\r\n") + b".\r\n..\r\nno end"
    assert wiring.run(raw=raw)[0] == 0
    ((_, _, found),) = stored(site)
    assert found.endswith(MAIL + b".\n..\nno end\n")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("", ""), ("MAILER-DAEMON", ""), ("jörg@x.example", "jörg@x.example"), ("a b@x", '"a b"@x')],
)
def test_stores_sender(wiring: Wiring, site: Site, given: str, kept: str) -> None:
    """The envelope's sender is kept as the listener would keep it."""
    assert wiring.run("-f", given, "--", '"b"@billing.example.com')[0] == 0
    ((sender, recipients, _),) = stored(site)
    assert (sender, recipients) == (kept, ("b@billing.example.com",))


def test_stores_a_large_message(wiring: Wiring, site: Site) -> None:
    """A message of 20 MB arrives whole."""
    raw = MAIL + b"0123456789abcdef\n" * 1_250_000
    assert wiring.run(raw=raw)[0] == 0
    ((_, _, found),) = stored(site)
    assert found.endswith(raw)


def test_several_recipients(wiring: Wiring, site: Site) -> None:
    """Each of several recipients has an entry."""
    recipients = ["b@billing.example.com", "c@billing.example.com", "b@billing.example.com"]
    assert wiring.run("-f", "", "--", *recipients)[0] == 0
    assert {found[1] for found in stored(site)} == {(one,) for one in recipients}


@pytest.mark.parametrize(
    ("raw", "status", "line"),
    [
        (MAIL + b"a\rb\n", 65, b"5.6.0 CR stands alone in the message (RFC 5321, 2.3.8)\n"),
        (b"", 75, b"4.6.0 there is no message on standard input\n"),
    ],
)
def test_message_that_is_not_taken(
    wiring: Wiring, site: Site, raw: bytes, status: int, line: bytes
) -> None:
    """A lone CR and an empty standard input have the same status and text as by hand-over."""
    assert wiring.run(raw=raw) == (status, line)
    with ScriptedListener(wiring.socket):
        assert wiring.run(raw=raw) == (status, line)
    assert "there is no database" in site.run("queues").stderr


@pytest.mark.parametrize("recipient", ["nobody", "a\nb@x.example", "a@x.example>", "a@.example"])
def test_wrong_recipient(wiring: Wiring, site: Site, recipient: str) -> None:
    """A recipient that is no address is refused for good, and nothing is made."""
    status, said = wiring.run("-f", "", "--", recipient)
    assert status == 69
    assert said.startswith(b"5.1.3 ")
    assert "there is no database" in site.run("queues").stderr


def break_ini(text: str) -> Callable[[Site], None]:
    """Return what writes a configuration that cannot be used."""

    def damage(site: Site) -> None:
        site.ini.write_text(text)

    return damage


def remove_ini(site: Site) -> None:
    """Take the configuration away."""
    site.ini.unlink()


def hide_ini(site: Site) -> None:
    """Put something that cannot be read where the configuration was."""
    site.ini.unlink()
    site.ini.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        break_ini(""),
        break_ini("\x00\xff[[["),
        break_ini("[post office]\nzodb_uri = file:///no/such/folder/depot.fs\nmaildir = Maildir\n"),
        break_ini("[post office]\nzodb_uri = nosuch://x\nmaildir = Maildir\n"),
        remove_ini,
        hide_ini,
    ],
    ids=["empty", "garbage", "no database", "no such database", "missing", "unreadable"],
)
def test_broken_configuration(wiring: Wiring, site: Site, damage: Callable[[Site], None]) -> None:
    """A configuration that cannot be used defers the message, and no path is shown."""
    damage(site)
    status, said = wiring.run()
    assert status == 75
    assert said.startswith(b"4.3.")
    assert said.count(b"\n") == 1
    assert b"/" not in said


def test_locked_database(wiring: Wiring, site: Site) -> None:
    """A database that another process has open defers the message; afterwards it is taken."""
    assert wiring.run()[0] == 0
    with open_queue(site.uri, "billing"):
        status, said = wiring.run("-f", "", "--", "other@billing.example.com")
        assert status == 75
        assert said.startswith(b"4.")
    assert wiring.run("-f", "", "--", "other@billing.example.com")[0] == 0
    assert len(stored(site)) == 2


def test_full_disk(wiring: Wiring, site: Site) -> None:
    """A disk that takes no more defers the message, wherever it was needed."""
    assert wiring.run()[0] == 0
    for size in (200, 3_000_000):
        done = subprocess.run(
            [wiring.launcher, "-f", "", "--", "full@billing.example.com"],
            input=MAIL + b"x\n" * size,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
        )
        assert done.returncode == 75
        assert done.stdout.startswith(b"4.")
    assert len(stored(site)) == 1


def test_time_limit_of_the_command(wiring: Wiring, site: Site) -> None:
    """Standard input that never ends defers the message after ``deliver_timeout``."""
    site.configure("deliver_timeout = 1")
    process = wiring.start()
    assert process.wait(60) == 75
    assert process.stdout is not None
    assert process.stdout.read() == b"4.3.0 delivery took too long\n"
    process.communicate()


def test_command_that_is_told_to_end(site: Site) -> None:
    """SIGTERM ends the command itself with 75, and nothing is stored."""
    process = site.process("deliver", *TO, stdin=subprocess.PIPE)
    try:
        # It reads only once it heeds signals.
        wait_until(lambda: is_reading(process.pid))
        process.terminate()
        said, complaint = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, said, complaint) == (75, b"4.3.2 delivery was interrupted\n", b"")


def is_reading(pid: int) -> bool:
    """Tell whether a process waits for its standard input to be written to."""
    try:
        return Path(f"/proc/{pid}/syscall").read_text().startswith("0 0x0 ")
    except OSError:
        return False
