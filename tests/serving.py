"""``postoffice serve`` in processes of its own: started, told, looked into, stopped and killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from postoffice import config
from postoffice.daemon.state import DaemonState, PartState, read_state, state_place
from tests.lmtp_client import Client
from tests.lmtp_service import crlf, is_alive, wait_until

__all__ = ["Serving", "children", "drop"]

_ROOT = Path(__file__).resolve().parent.parent


class Serving:
    """A running daemon.

    :ivar ini: its configuration.
    :ivar process: its first process.
    """

    def __init__(
        self,
        ini: Path,
        *,
        words: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Start it.

        :param words: the command, instead of ``postoffice -v serve``.
        :param environment: what is added to that of this process.
        """
        self.ini = ini
        self._said = ini.parent / "said"
        # Later the configuration may be broken.
        self._place = state_place(config.load(ini))
        self._notes = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # An abstract name needs no folder, and no file is left behind.
        self._notes.bind(f"\0postoffice-{os.getpid()}-{time.monotonic_ns()}")
        self._notes.setblocking(False)
        self.told: list[str] = []
        address = self._notes.getsockname().decode().replace("\0", "@", 1)
        words = words or ("-m", "postoffice.cli", "-C", str(ini), "-v", "serve")
        with open(self._said, "ab") as said:
            self.process = subprocess.Popen(
                [*options.pop("python", [sys.executable]), *words],
                stdout=said,
                stderr=said,
                cwd=_ROOT,
                env=os.environ | {"NOTIFY_SOCKET": address, **(environment or {})},
                **options,
            )
        self._known: set[int] = set()

    # -- what it tells -----------------------------------------------------------------------------

    def notes(self) -> list[str]:
        """Return all that it has told who started it."""
        try:
            while True:
                self.told.append(self._notes.recv(65536).decode())
        except BlockingIOError:
            return self.told

    def wait_ready(self, times: int = 1) -> Serving:
        """Wait until it has been ready so many times; return itself."""
        wait_until(
            lambda: (
                sum(note.startswith("READY=1\n") for note in self.notes()) >= times
                or self.process.poll() is not None
            )
        )
        assert self.process.poll() is None, self.said
        return self

    @property
    def said(self) -> str:
        """What it has logged, with all its predecessors."""
        return self._said.read_text()

    @property
    def state(self) -> DaemonState:
        """How it says that it is."""
        found = read_state(self._place)
        assert found is not None, self.said
        return found

    def part(self, name: str) -> PartState:
        """Return how a part is."""
        (part,) = [one for one in self.state.parts if one.name == name]
        return part

    def wait_until(self, name: str, state: str) -> PartState:
        """Wait until a part is in this state; return it."""
        wait_until(lambda: self.part(name).state == state)
        return self.part(name)

    # -- what is done to it ------------------------------------------------------------------------

    def strike(self, name: str, how: signal.Signals = signal.SIGKILL) -> int:
        """Send the process of a part that is at work a signal; return its number."""
        pid = self.wait_until(name, "running").process
        # Without a process it would be 0, which is all that run these tests.
        assert pid > 0
        os.kill(pid, how)
        return pid

    def kill(self, name: str) -> None:
        """Kill a part; return when another process does its work."""
        self.wait_for_another(name, self.strike(name))
        self.wait_until(name, "running")

    def wait_for_another(self, name: str, pid: int) -> None:
        """Wait until another process than this one does the work of a part."""
        wait_until(lambda: self.part(name).process not in (0, pid))

    def reload(self) -> None:
        """Have it read the configuration again; return when that is done."""
        ready = sum(note.startswith("READY=1\n") for note in self.notes())
        self.process.send_signal(signal.SIGHUP)
        self.wait_ready(ready + 1)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Stop it; return its status, or minus the signal, when all its processes have ended."""
        pids = self.processes()
        self.process.send_signal(how)
        status = self.process.wait(90)
        wait_until(lambda: not any(map(is_alive, pids)))
        return status

    def processes(self) -> list[int]:
        """Return the numbers of all its processes."""
        found = [self.process.pid]
        for pid in found:
            found += children(pid)
        self._known.update(found)
        return found

    def __enter__(self) -> Serving:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Kill what is left of it."""
        self.processes()
        for pid in self._known:
            if is_alive(pid) and _is_ours(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not any(is_alive(pid) and _is_ours(pid) for pid in self._known))
        self._notes.close()

    # -- mail --------------------------------------------------------------------------------------

    def deliver(self, address: str, raw: bytes, *recipients: str) -> list[str]:
        """Deliver a message by LMTP; return a code for each recipient."""
        with Client(address) as client:
            client.greet()
            return client.deliver("ann@example.org", recipients, crlf(raw))

    def is_stored(self, address: str, raw: bytes, *recipients: str) -> bool:
        """Try to deliver a message, in a session that may break off; tell whether it is stored."""
        try:
            codes = self.deliver(address, raw, *recipients)
        except (BrokenPipeError, ConnectionResetError, AssertionError):
            return False
        return codes == ["250 2.0.0"] * len(recipients)


def drop(maildir: Path, name: str, raw: bytes) -> None:
    """Deliver into a Maildir, as mail servers do."""
    path = maildir / "tmp" / name
    path.write_bytes(raw)
    path.chmod(0o600)
    path.rename(maildir / "new" / name)


def children(pid: int) -> list[int]:
    """Return the numbers of a process's children."""
    try:
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _is_ours(pid: int) -> bool:
    """Say whether a process is one of Python's, and no stranger who has the number by now."""
    try:
        return b"postoffice" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
