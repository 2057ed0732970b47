"""How fast mail is taken by LMTP, beside Dovecot and beside a server that throws it away.

The client is Postfix's smtp-source.  ``postoffice lmtp`` sorts into three queues of a FileStorage,
Dovecot's LMTP with Sieve into three Maildirs by the like rules, and both answer when a message is
on the disk; Postfix's smtp-sink keeps nothing, and shows what the client can do, and the floor what
one process can that stores messages in a ZODB and does nothing else with them.  All run in turn,
with 1 and 10 sessions, 3 KB and 100 KB, on connections that stay and on a new one for each message.
In the end the queues are counted: each message once, or the run fails.

    python benchmarks/lmtp.py                                    # 4 minutes; as root, for Dovecot
    python benchmarks/lmtp.py --only "10 x 3 KB" --rounds 9
    python benchmarks/lmtp.py --only stalled --only deliver

The columns: messages a second, and the least and the most of the rounds; ours in relation to the
row's; milliseconds of processor time a message; memory of all its processes in MB at the highest,
what they share counted once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from dovecot import Dovecot
from servers import tree_memory, tree_seconds

from postoffice.queue import open_queue

_ROOT = Path(__file__).resolve().parents[1]
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PATIENCE = 30.0
_SAMPLE_SECONDS = 0.2

_CONFIGURATION = """\
[post office]
zodb_uri = {uri}
maildir = {folder}/Maildir
lmtp = unix:{folder}/lmtp
lmtp_mode = 0666

[queue:Support]
filters =
    envelope_to: support@example.com

[queue:Billing]
filters =
    header_regexp: (?i)Subject:.*(invoice|bill)

[queue:Rest]
filters =
    header_regexp: From:
"""

# One message in three for each rule, the recipient and what else makes it match.
_KINDS = (
    ("Support", "support@example.com", "a question"),
    ("Billing", "office@example.com", "your invoice"),
    ("Rest", "office@example.com", "a letter"),
)


class Load(NamedTuple):
    """What the client does.

    :ivar sessions: at a time.
    :ivar size: bytes of a message.
    :ivar stays: whether a connection is used for more than one message.
    """

    sessions: int
    size: int
    stays: bool

    def __str__(self) -> str:
        """Return it for a person."""
        kept = "" if self.stays else ", a connection a message"
        return f"{self.sessions} x {self.size // 1000} KB{kept}"

    def send(self, address: str, count: int, recipient: str, subject: str) -> list[str]:
        """Return the words of the command that sends so many messages."""
        words = ["smtp-source", "-L", *(["-d"] if self.stays else [])]
        words += ["-s", str(min(self.sessions, count)), "-m", str(count), "-l", str(self.size)]
        words += ["-f", "ann@example.org", "-t", recipient, "-S", subject]
        return [*words, f"unix:{address}"]


LOADS = [
    Load(sessions, size, stays)
    for sessions in (10, 1)
    for size in (3_000, 100_000)
    for stays in (True, False)
]
STALLED, DELIVER = "stalled", "deliver"


class Run(NamedTuple):
    """What one run of one server gave.

    :ivar rate: messages a second.
    :ivar cpu: seconds of the server's processors a message.
    :ivar memory: of the server, MB.
    """

    rate: float
    cpu: float
    memory: float


class Server(Protocol):
    """A server that takes mail by LMTP.

    :ivar name: for a person.
    :ivar address: the path of its unix socket.
    :ivar pid: its first process.
    """

    name: str
    address: Path
    pid: int


class Ours:
    """``postoffice lmtp`` on a database of its own; see :class:`Server`."""

    name = "postoffice"

    def __init__(self, folder: Path) -> None:
        """Start it, and wait until it listens."""
        folder.mkdir()
        self.address = folder / "lmtp"
        self.uri = f"file://{folder}/depot.fs?blobstorage_dir={folder}/blobs"
        self.configuration = folder / "postoffice.ini"
        self.configuration.write_text(_CONFIGURATION.format(uri=self.uri, folder=folder))
        (folder / "Maildir").mkdir()
        for name in ("new", "cur", "tmp"):
            (folder / "Maildir" / name).mkdir()
        self._log = folder / "log"
        words = ["-m", "postoffice.cli", "-C", str(self.configuration), "lmtp"]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen([sys.executable, *words], stderr=log)
        self.pid = self._process.pid
        _wait_for(self.address, self._process)
        self.sent = Counter[str]()

    def stop(self) -> None:
        """Stop it, and compare what is in the queues with what was sent."""
        self._process.terminate()
        self._process.wait(_PATIENCE)
        found = Counter[str]()
        for name, _, _ in _KINDS:
            with open_queue(self.uri, name) as queue:
                found[name] = len(queue)
        if found != self.sent:
            raise RuntimeError(f"sent {self.sent}, found {found}: {self._log.read_text()[-500:]}")
        print(f"\nin the queues, as sent: {dict(found)}")


class Sink:
    """smtp-sink; see :class:`Server`."""

    name = "smtp-sink"

    def __init__(self, folder: Path) -> None:
        """Start it, and wait until it listens."""
        folder.mkdir()
        self.address = folder / "lmtp"
        words = ["smtp-sink", "-L", *(["-u", "nobody"] if os.geteuid() == 0 else [])]
        self._process = subprocess.Popen(
            [*words, f"unix:{self.address}", "100"], env={"PATH": _PATH}
        )
        self.pid = self._process.pid
        _wait_for(self.address, self._process)

    def stop(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait(_PATIENCE)


class Floor:
    """What a server of our shape needs at the least: see ``lmtp_floor.py`` and :class:`Server`."""

    name = "floor"

    def __init__(self, folder: Path) -> None:
        """Start it, and wait until it listens."""
        folder.mkdir()
        self.address = folder / "lmtp"
        words = [str(_ROOT / "benchmarks" / "lmtp_floor.py"), str(self.address), str(folder)]
        self._process = subprocess.Popen([sys.executable, *words])
        self.pid = self._process.pid
        _wait_for(self.address, self._process)

    def stop(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.wait(_PATIENCE)


class Sieve:
    """Dovecot; see :class:`Server`."""

    name = "Dovecot"

    def __init__(self, folder: Path) -> None:
        """Start it, with a process for each session from the beginning."""
        folder.mkdir()
        folder.chmod(0o755)
        self._dovecot = Dovecot(folder)
        self._dovecot.start()
        self.address = self._dovecot.path
        self.pid = _process_of(self.address)

    def stop(self) -> None:
        """Stop it, and tell what it has."""
        self._dovecot.stop()
        print(f"in Dovecot's Maildirs: {self._dovecot.delivered()}")


def _wait_for(address: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        with socket.socket(socket.AF_UNIX) as one:
            if one.connect_ex(str(address)) == 0:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"nothing listens at {address}")
        time.sleep(0.02)


def _process_of(address: Path) -> int:
    """Return the child of this process whose command line names the folder of an address."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
            line = Path(f"/proc/{name}/cmdline").read_bytes()
            if int(parent) == os.getpid() and os.fsencode(address.parent) in line:
                return int(name)
    raise RuntimeError(f"nobody serves {address}")


def run(server: Server, load: Load, count: int) -> Run:
    """Send `count` messages, a third of each kind, and measure."""
    os.sync()
    before, memory = tree_seconds(server.pid), 0.0
    seconds = 0.0
    share = max(1, count // len(_KINDS))
    for queue, recipient, subject in _KINDS:
        words = load.send(str(server.address), share, recipient, subject)
        begun = time.perf_counter()
        client = subprocess.Popen(words, env={"PATH": _PATH})
        while client.poll() is None:
            memory = max(memory, tree_memory(server.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(_SAMPLE_SECONDS)
        seconds += time.perf_counter() - begun
        if client.returncode:
            raise RuntimeError(f"smtp-source ended with status {client.returncode}")
        if isinstance(server, Ours):
            server.sent[queue] += share
    sent = share * len(_KINDS)
    return Run(sent / seconds, (tree_seconds(server.pid) - before) / sent, memory)


def counts(servers: list[Server], load: Load, seconds: float) -> dict[str, int]:
    """Return how many messages each server takes in about so many seconds."""
    found = {}
    for server in servers:
        # The first messages make mailboxes, compile the script and fill the caches.
        run(server, load, 30)
        found[server.name] = max(30, int(run(server, load, 60).rate * seconds))
    return found


def compare(servers: list[Server], load: Load, options: argparse.Namespace) -> None:
    """Measure all servers in turn, and print the medians."""
    many = counts(servers, load, options.seconds)
    found: dict[str, list[Run]] = {server.name: [] for server in servers}
    for number in range(options.rounds):
        for place in range(len(servers)):
            server = servers[(number + place) % len(servers)]
            found[server.name].append(run(server, load, many[server.name]))
    print(f"\n{load}")
    for name, runs in found.items():
        pairs = zip(found[Ours.name], runs, strict=True)
        ratio = statistics.median(ours.rate / other.rate for ours, other in pairs)
        print(f"  {name:12}{_figures(runs)}  ours {ratio:5.2f} times", flush=True)


def stalled(ours: Ours, load: Load, options: argparse.Namespace) -> None:
    """Measure with and without one more session, that has stopped in the middle of a message."""
    many = counts([ours], load, options.seconds)[ours.name]
    alone, beside = [], []
    for number in range(options.rounds):
        for stalls in (False, True) if number % 2 else (True, False):
            if stalls:
                with _stalling(ours.address):
                    beside.append(run(ours, load, many))
            else:
                alone.append(run(ours, load, many))
    print(f"\n{load}, and one more that stalls")
    print(f"  {'without':12}{_figures(alone)}")
    ratio = statistics.median(
        one.rate / other.rate for one, other in zip(beside, alone, strict=True)
    )
    print(f"  {'with':12}{_figures(beside)}  {ratio:.2f} times", flush=True)


@contextlib.contextmanager
def _stalling(address: Path) -> Iterator[None]:
    """Send half a message, and nothing more."""
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as replies:
        client.connect(str(address))
        replies.readline()
        client.sendall(b"LHLO me\r\n")
        while replies.readline()[3:4] == b"-":
            pass
        client.sendall(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<support@example.com>\r\nDATA\r\n")
        for _ in range(3):
            replies.readline()
        client.sendall(b"Subject: half\r\n\r\n" + b"and then\r\n" * 150)
        yield


def _figures(runs: list[Run]) -> str:
    rates = [one.rate for one in runs]
    cpu = statistics.median(one.cpu for one in runs)
    memory = max(one.memory for one in runs)
    return (
        f"{statistics.median(rates):7.0f}/s ({min(rates):5.0f} to {max(rates):5.0f})"
        f"{cpu * 1000:7.2f} ms{memory:6.0f} MB"
    )


def deliver(ours: Ours, folder: Path, options: argparse.Namespace) -> None:
    """Time a hand-over by what Postfix runs, beside the start of a Python that does nothing."""
    launcher = _launcher(ours, folder)
    python = [str(folder / "bin" / "python"), "-I", "-S", "-c", "pass"]
    command = [str(launcher), "-f", "ann@example.org", "--", "support@example.com"]
    taken: dict[str, list[float]] = {"python": [], "deliver": []}
    for number in range(options.rounds * 20):
        body = "1234567890 1234567890\n" * 130
        mail = f"From: ann@example.org\nMessage-ID: <{number}@deliver>\n\n{body}".encode()
        for name, words in (("python", python), ("deliver", command)):
            begun = time.perf_counter()
            subprocess.run(words, input=mail, check=True, stdout=subprocess.PIPE)
            taken[name].append(time.perf_counter() - begun)
        ours.sent["Support"] += 1
    least, median = (statistics.median(taken[name]) * 1000 for name in ("python", "deliver"))
    print("\ndeliver, handed over")
    print(f"  python -I -S -c pass {least:6.1f} ms")
    print(f"  postoffice-deliver   {median:6.1f} ms, {median / least:.2f} times", flush=True)


def _launcher(ours: Ours, folder: Path) -> Path:
    """Write the launcher, for an interpreter with postoffice where pip puts it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "postoffice").symlink_to(_ROOT / "postoffice")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    values = {
        "PYTHON": folder / "bin" / "python",
        "CONFIG": ours.configuration,
        "SOCKET": ours.address,
    }
    lines = (_ROOT / "etc" / "postoffice-deliver").read_text().splitlines(keepends=True)
    for place, line in enumerate(lines):
        name = line.partition("=")[0]
        if name in values:
            lines[place] = f"{name}={values[name]}\n"
    launcher = folder / "postoffice-deliver"
    launcher.write_text("".join(lines))
    launcher.chmod(0o755)
    return launcher


def measure(scratch: Path, options: argparse.Namespace) -> None:
    """Start the servers, and measure what was asked for."""
    loads = [load for load in LOADS if _is_wanted(str(load), options.only)]
    with contextlib.ExitStack() as stack:
        ours = Ours(scratch / "ours")
        stack.callback(ours.stop)
        servers: list[Server] = [ours]
        if loads:
            floor, sink = Floor(scratch / "floor"), Sink(scratch / "sink")
            stack.callback(floor.stop)
            stack.callback(sink.stop)
            servers += floor, sink
            try:
                dovecot = Sieve(scratch / "sieve")
            except (OSError, RuntimeError) as error:
                print(f"without Dovecot: {error}", file=sys.stderr)
            else:
                stack.callback(dovecot.stop)
                servers.append(dovecot)
        for load in loads:
            compare(servers, load, options)
        if _is_wanted(STALLED, options.only):
            stalled(ours, Load(10, 3_000, stays=True), options)
            stalled(ours, Load(1, 3_000, stays=True), options)
        if _is_wanted(DELIVER, options.only):
            deliver(ours, scratch / "deliver", options)


def _is_wanted(name: str, wanted: list[str]) -> bool:
    return not wanted or name.partition(",")[0] in wanted


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*dict.fromkeys(str(load).partition(",")[0] for load in LOADS), STALLED, DELIVER]
    parser.add_argument("--only", action="append", default=[], choices=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a server's turn takes")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; on a real disk")
    options = parser.parse_args()
    # Deleting between rounds would slow the next ones down; all goes at the end.
    scratch = Path(tempfile.mkdtemp(prefix="postoffice-", dir=options.folder))
    scratch.chmod(0o755)
    try:
        measure(scratch, options)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
