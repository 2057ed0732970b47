"""``postoffice lmtp`` in processes of its own: started, looked into, stopped and killed.

Called as ``python -m tests.lmtp_service INI`` it is the same with more filters: messages of some
subjects sleep, stop the process that reads them, or bring out a defect.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from zope.interface import implementer

from postoffice.api import PostOffice
from postoffice.interfaces import IFilter
from postoffice.message import Message
from postoffice.queue import Queue
from tests.lmtp_client import Client
from tests.spools import Spool, post_office

__all__ = ["NAP_SECONDS", "Running", "crlf", "is_alive", "wait_until"]

NAP_SECONDS = 1.0
_ROOT = Path(__file__).resolve().parent.parent


@implementer(IFilter)
class Hazard:
    """Does what the subject says."""

    description = "hazard"

    def __call__(self, message: object) -> str | None:
        """Match nothing, if it comes to that."""
        assert isinstance(message, Message)
        subject = message["Subject"]
        if subject == "slow":
            time.sleep(NAP_SECONDS)
        elif subject == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        elif subject == "defect":
            raise ZeroDivisionError("of all things")
        return None


def wait_until(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def crlf(raw: bytes) -> bytes:
    """Return a message as a client sends it."""
    assert b"\n." not in raw
    assert raw.endswith(b"\n")
    return raw.replace(b"\n", b"\r\n")


class Running:
    """The service of a spool's configuration, which listens on a unix socket.

    :ivar address: where clients connect: a path, or a host and port.
    """

    def __init__(
        self,
        spool: Spool,
        address: str | tuple[str, int],
        *,
        hazards: bool = False,
        quiet: bool = False,
        new_session: bool = False,
    ) -> None:
        """Start it, and wait until clients can connect.

        :param hazards: with the filters of this module.
        :param quiet: without a line for each message.
        :param new_session: as a group of processes of its own.
        """
        self.spool = spool
        self.address = address
        self._said = spool.folder / "said"
        words = ["tests.lmtp_service", str(spool.ini)]
        if not hazards:
            words = ["postoffice.cli", "-C", str(spool.ini), *([] if quiet else ["-v"]), "lmtp"]
        with open(self._said, "ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                stdout=said,
                stderr=said,
                cwd=_ROOT,
                start_new_session=new_session,
            )
        wait_until(lambda: self.accepts() or self.process.poll() is not None)

    def accepts(self) -> bool:
        """Tell whether it listens."""
        unix = isinstance(self.address, str)
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as one:
            return one.connect_ex(self.address) == 0

    @property
    def said(self) -> str:
        """What it has logged."""
        return self._said.read_text()

    def client(self) -> Client:
        """Return a client that has said LHLO."""
        client = Client(self.address)
        try:
            client.greet()
        except BaseException:
            client.socket.close()
            raise
        return client

    def deliver(self, raw: bytes, *recipients: str, sender: str = "ann@example.org") -> list[str]:
        """Deliver a message in a session of its own; return a code for each recipient."""
        with self.client() as client:
            return client.deliver(sender, recipients, crlf(raw))

    def children(self) -> list[int]:
        """Return the numbers of its child processes."""
        pid = self.process.pid
        try:
            return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        except FileNotFoundError:
            return []

    @property
    def receiver(self) -> int:
        """The number of the process that talks to clients."""
        (pid,) = self.children()
        return pid

    def kill_receiver(self) -> None:
        """Kill the process that talks to clients; return when another one does."""
        pid = self.receiver
        os.kill(pid, signal.SIGKILL)
        self.wait_for_another(pid)

    def wait_for_another(self, pid: int) -> None:
        """Wait until another process than this one talks to clients."""
        wait_until(lambda: self.children() not in ([], [pid]) and self.accepts())

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Stop it; return its status, or minus the signal."""
        self.process.send_signal(how)
        return self.process.wait(60)

    def __enter__(self) -> Running:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Kill it, with its children, if it runs yet."""
        children = self.children()
        self.process.kill()
        self.process.wait()
        for pid in children:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)

    # -- looking -----------------------------------------------------------------------------------

    def raws(self, queue: str = "billing") -> list[bytes]:
        """Return what waits in a queue of a database that another process may open."""
        with PostOffice(self.spool.ini) as office, office.connection() as connection:
            return [bytes(one.raw) for one in Queue(office.folder(connection).get(queue))]


def is_alive(pid: int) -> bool:
    """Tell whether a process is there, and no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def main() -> None:
    """Serve with hazards."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    settings = post_office(sys.argv[1]).settings
    filters = (Hazard(), *settings.routing.reject_filters)
    routing = replace(settings.routing, reject_filters=filters)
    with PostOffice(replace(settings, routing=routing)) as office:
        office.serve_lmtp()


if __name__ == "__main__":
    main()
