"""Processes that take mail by pipe and by LMTP on request, for strace to kill or to fail.

Run as a program: it takes requests as lines of JSON and answers each with one.  Each process is
forked from one that has taken mail before, so that it makes no system calls but those of its work,
and any process may trace it and its children.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from postoffice.api import PostOffice
from postoffice.cli.group import postoffice
from postoffice.intake.arrival import Arrival
from postoffice.queue import BLOB_SIZE
from tests.lmtp_client import Client
from tests.spools import GivesUp, large, mail

ROOT = Path(__file__).resolve().parent.parent
DEFECT = 70
#: That a process does not end.
HANGS = -999
_PR_SET_CHILD_SUBREAPER, _PR_SET_PTRACER = 36, 0x59616D61
_LONGEST_SECONDS = 60.0
_STEP = 0.005

#: The filter ``gives_up``, as a package of somebody else's would bring it.
PLUGIN = "[postoffice.filters]\ngives_up = tests.crash_delivery:gives_up\n"

CONFIGURATION = """\
[post office]
zodb_uri = {uri}
maildir = {folder}/Maildir
lmtp = unix:{folder}/lmtp
max_message_size = {largest}
reject_filters =
    gives_up: always
    header_regexp: ^Subject: spam
{options}
[queue:one]
filters =
    envelope_to: one@example.com
[queue:two]
filters =
    envelope_to: two@example.com
"""
#: What a queued message may have, in bytes.
LARGEST = 1_500_000
URI = "file://{folder}/depot.fs?blobstorage_dir={folder}/blobs"


def configure(folder: Path, uri: str = URI, options: str = "") -> Path:
    """Write a configuration for a folder, and make its Maildir; return the file's path."""
    for name in ("new", "cur", "tmp"):
        (folder / "Maildir" / name).mkdir(parents=True, exist_ok=True)
    ini = folder / "postoffice.ini"
    text = uri.format(folder=folder)
    ini.write_text(CONFIGURATION.format(folder=folder, uri=text, largest=LARGEST, options=options))
    return ini


def gives_up(value: str, folder: str) -> GivesUp:
    """Return a filter that gives up on messages of one subject."""
    return GivesUp()


def lines(subject: str, size: int) -> bytes:
    """Return a message of so many bytes whose last line has an end."""
    return large(subject, size - 1) + b"\n"


@dataclass(frozen=True, slots=True)
class Posted:
    """A message with its envelope.

    :ivar name: what it is called in failures.
    :ivar fates: what becomes of it for each recipient: the queue, or ``archive`` or ``failed``.
    """

    name: str
    recipients: tuple[str, ...]
    raw: bytes
    fates: tuple[str, ...]
    sender: str = "ann@example.org"

    @property
    def wire(self) -> bytes:
        """Return it as it is sent by LMTP, without the final dot."""
        return self.raw.replace(b"\n", b"\r\n")


ONE, TWO, NOBODY = "one@example.com", "two@example.com", "nobody@example.com"

#: One of everything.
POST = (
    Posted("small", (ONE,), mail("small"), ("one",)),
    Posted("two", (ONE, TWO), mail("two"), ("one", "two")),
    Posted("blob", (ONE,), lines("blob", BLOB_SIZE + 1000), ("one",)),
    # So large that it waits in a file.
    Posted("file", (ONE, TWO), lines("file", 1_200_000), ("one", "two")),
    Posted("oversize", (TWO,), lines("oversize", 1_700_000), ("two",)),
    Posted("rejected", (ONE, TWO), mail("spam"), ("archive", "archive")),
    Posted("unrouted", (NOBODY, ONE), mail("for one of two"), ("archive", "one")),
    Posted("set-aside", (ONE, TWO), mail("hopeless"), ("failed", "failed")),
    Posted("large-set-aside", (ONE,), lines("hopeless", 1_200_000), ("failed",)),
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    :ivar status: its exit status, or minus the signal that killed it.
    :ivar output: what it said.
    """

    status: int
    output: str


@contextmanager
def tracing(pid: int, strace: Sequence[str]) -> Iterator[None]:
    """Have strace at a process, with these options."""
    tracer = subprocess.Popen(
        ["strace", "-p", str(pid), *strace], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    try:
        said = tracer.stderr.readline()
        if "attached" not in said:
            raise RuntimeError(f"strace: {said}{tracer.stderr.read()}")
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


class DeliveryServer:
    """The program, from the side of the tests."""

    def __init__(self, folder: Path) -> None:
        """Start it.

        :param folder: for the package with the filter, and for what processes say.
        """
        information = folder / "gives-up-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: gives-up\nVersion: 1\n")
        (information / "entry_points.txt").write_text(PLUGIN)
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash_delivery"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, **request: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    def start(self, *arguments: str, raw: bytes | None = None) -> Process:
        """Start the command ``postoffice`` with these arguments; it waits for ``go``.

        :param raw: what it has on its standard input.
        """
        number = f"{time.monotonic_ns()}"
        output, stdin = self._folder / f"{number}.output", self._folder / f"{number}.input"
        output.touch()
        stdin.write_bytes(raw or b"")
        pid = self._ask(do="start", arguments=arguments, input=str(stdin), output=str(output))
        return Process(self, pid, output)

    def go(self, pid: int) -> None:
        """Let a process that was started begin."""
        self._ask(do="go", pid=pid)

    def end(self, pid: int) -> int:
        """Return the status of a process once it has ended, and all its children have."""
        return int(self._ask(do="end", pid=pid))

    def deliver(self, ini: Path, post: Posted, strace: Sequence[str] | None = None) -> Ended:
        """Run ``postoffice deliver`` on a message, under strace with these options."""
        arguments = ("-C", str(ini), "deliver", "-f", post.sender, "--", *post.recipients)
        process = self.start(*arguments, raw=post.raw)
        if strace is None:
            return process.wait()
        with tracing(process.pid, strace):
            return process.wait()

    def close(self) -> None:
        """End the program."""
        self._process.communicate(timeout=_LONGEST_SECONDS)


@dataclass(frozen=True, slots=True)
class Process:
    """A process that was started."""

    server: DeliveryServer
    pid: int
    output: Path

    def wait(self) -> Ended:
        """Let it begin, and wait for its end."""
        self.server.go(self.pid)
        return self.end()

    def end(self) -> Ended:
        """Wait for its end."""
        status = self.server.end(self.pid)
        return Ended(status, self.output.read_text("utf-8", "replace"))


class Service:
    """``postoffice lmtp``, ready for clients; as a context manager it ends with the block."""

    def __init__(self, server: DeliveryServer, ini: Path) -> None:
        self._process = server.start("-C", str(ini), "lmtp")
        self.address = str(ini.parent / "lmtp")
        self.pid = self._process.pid
        self._ended: Ended | None = None
        server.go(self.pid)
        until = time.monotonic() + _LONGEST_SECONDS
        while "listening at" not in self.said:
            if time.monotonic() > until or not is_alive(self.pid):
                raise RuntimeError(f"the service does not start: {self.end()}")
            time.sleep(_STEP)

    def __enter__(self) -> Service:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End it."""
        self.end()

    @property
    def said(self) -> str:
        """Return what it has said so far."""
        return self._process.output.read_text("utf-8", "replace")

    @property
    def receiver(self) -> int:
        """Return the process that talks to clients."""
        (pid,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(pid)

    @property
    def is_alive(self) -> bool:
        """Tell whether it runs."""
        return is_alive(self.pid)

    def end(self) -> Ended:
        """Tell it to end, if it has not ended, and wait until all of it has."""
        if self._ended is None:
            # A process that has ended waits, as a zombie, to be asked for its status.
            os.kill(self.pid, signal.SIGTERM)
            self._ended = self._process.end()
        return self._ended


def is_alive(pid: int) -> bool:
    """Tell whether a process has not ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] not in ("Z", "X")


# -- clients ---------------------------------------------------------------------------------------

Codes = dict[tuple[str, str], str]
"""Code and enhanced code for message and recipient; ``""`` where there was no answer."""


def unanswered(posts: Sequence[Posted]) -> Codes:
    """Return what is known before anything is sent."""
    return {(post.name, recipient): "" for post in posts for recipient in post.recipients}


def begin(client: Client, post: Posted) -> bool:
    """Send a message all but its final dot; return whether all of it is wanted."""
    if client.begin(post.sender, post.recipients)[-1] != "354":
        return False
    client.send(post.wire)
    return True


def greet(client: Client) -> bool:
    """Begin a session; return whether the server takes part in it."""
    return client.reply()[:3] == b"220" and client.command(b"LHLO client.example")[:3] == "250"


def send_in_turn(address: str, posts: Sequence[Posted]) -> Codes:
    """Send messages in one session, one after the other, for as long as it lasts."""
    codes = unanswered(posts)
    with suppress(ConnectionError, FileNotFoundError), Client(address) as client:
        if greet(client):
            for post in posts:
                if not begin(client, post):
                    break
                client.send(b".\r\n")
                _note(codes, client, post)
    return codes


def send_at_once(address: str, posts: Sequence[Posted]) -> Codes:
    """Send messages in sessions of their own, all of which end their message at the same time."""
    codes = unanswered(posts)
    clients: list[tuple[Client, Posted]] = []
    try:
        for post in posts:
            with suppress(ConnectionError, FileNotFoundError):
                client = Client(address)
                clients.append((client, post))
                if not (greet(client) and begin(client, post)):
                    clients.pop()
                    client.socket.close()
        for client, _ in clients:
            with suppress(ConnectionError):
                client.send(b".\r\n")
        for client, post in clients:
            _note(codes, client, post)
    finally:
        for client, _ in clients:
            client.socket.close()
    return codes


def _note(codes: Codes, client: Client, post: Posted) -> None:
    for recipient in post.recipients:
        codes[post.name, recipient] = client.reply()[:9].decode().strip()


# -- the program -----------------------------------------------------------------------------------


def _allow_tracing() -> None:
    # Where a security module lets only parents trace, strace is none of ours.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)


def _run(arguments: Sequence[str]) -> int:
    """Run the command as a process of its own would; return its status."""
    try:
        postoffice(arguments, prog_name="postoffice")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else DEFECT
    return DEFECT


def _child(request: dict[str, Any], ready: int, go: int) -> NoReturn:
    status = DEFECT
    try:
        for target, path, flags in (
            (0, request["input"], os.O_RDONLY),
            (1, request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        ):
            descriptor = os.open(path, flags, 0o600)
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.dup2(1, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # for as long as the process
        # By a call that is never disturbed: strace comes within it, and sees it or not.
        waiting = select.poll()
        waiting.register(go, 0)
        os.close(ready)
        waiting.poll()
        os.close(go)
        status = _run(request["arguments"])
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        # What strace fails last is what this program says of itself.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


class _Children:
    """The processes that this program has started."""

    def __init__(self) -> None:
        self._starts: dict[int, int] = {}

    def start(self, request: dict[str, Any]) -> int:
        """Fork a process; return when it waits for ``go``."""
        go, start = os.pipe()
        seen, ready = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(start)
            os.close(seen)
            _child(request, ready, go)
        os.close(go)
        os.close(ready)
        # What strace counts begins where the process does what it is for.
        os.read(seen, 1)
        os.close(seen)
        self._starts[pid] = start
        return pid

    def go(self, pid: int) -> int:
        """Let a process begin."""
        os.close(self._starts.pop(pid))
        return pid

    def end(self, pid: int) -> int:
        """Wait until nobody is left; return the status of the first of them."""
        until = time.monotonic() + _LONGEST_SECONDS
        status = HANGS
        while True:
            try:
                found, told = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return status
            if found == pid:
                status = os.waitstatus_to_exitcode(told)
            if not found:
                if time.monotonic() > until:
                    self._kill()
                    return HANGS
                time.sleep(_STEP)

    def _kill(self) -> None:
        """Kill all that is left, and what that leaves."""
        own = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
        while pids := Path(own).read_text().split():
            for pid in map(int, pids):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _warm_up() -> None:
    """Take one of everything in this process, so that every module is there."""
    for name in ("delivering", "receiving"):
        importlib.import_module(f"postoffice.cli.{name}")
    asyncio.run(asyncio.sleep(0))
    logging.disable()
    with tempfile.TemporaryDirectory() as folder, PostOffice(configure(Path(folder))) as office:
        for post in POST:
            with tempfile.TemporaryFile(buffering=0) as file:
                file.write(post.raw)
                sender, recipients, size = post.sender, post.recipients, len(post.raw)
                office.deliver(Arrival(sender, recipients, False, None, file, size))
    logging.disable(logging.NOTSET)


def main() -> None:
    """Serve until the end of the input."""
    # Its children's children, too, are this program's to wait for.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.register_at_fork(after_in_child=_allow_tracing)
    children = _Children()
    _warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            answer = children.start(request)
        elif request["do"] == "go":
            answer = children.go(request["pid"])
        else:
            answer = children.end(request["pid"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
