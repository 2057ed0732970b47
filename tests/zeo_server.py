"""A ZEO server in a process of its own, to be stopped or killed and started again."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["ZeoServer", "free_port"]

_CONFIGURATION = """\
<zeo>
  address {address}
  pid-filename {folder}/zeo.pid
</zeo>
<filestorage>
  path {folder}/depot.fs
  blob-dir {folder}/blobs
</filestorage>
"""
_LONGEST_SECONDS = 30
_LINGER_SECONDS = 10


def free_port() -> int:
    """Return a TCP port that nobody listens on, and that no outgoing connection will be given."""
    while True:
        port = random.randint(20_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


class ZeoServer:
    """The server of one FileStorage; its address stays the same however often it is started.

    :ivar folder: has the database, the blobs, and what the server says.
    :cvar how: the signals with which :meth:`stop` can stop it.
    """

    how = ("SIGKILL", "SIGTERM")

    def __init__(
        self,
        folder: Path,
        address: Path | int,
        python: Sequence[str] = (sys.executable,),
        **process: Any,
    ) -> None:
        """Prepare a server.

        :param address: a unix socket's path, or a port of the loopback interface.
        :param python: the words of the command that runs Python.
        :param process: how :class:`subprocess.Popen` starts it: ``user`` and the like.
        """
        self.folder = folder
        self._address = address
        self._python = python
        self._options = process
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        where = address if isinstance(address, Path) else f"127.0.0.1:{address}"
        self._configuration = folder / "zeo.conf"
        self._configuration.write_text(_CONFIGURATION.format(address=where, folder=folder))

    def uri(self, wait_seconds: int = 30) -> str:
        """Return what a client opens; its calls wait so long for a server that is away."""
        where = self._address if isinstance(self._address, Path) else f"127.0.0.1:{self._address}"
        return (
            f"zeo://{where}?blob_dir={self.folder}/blobs&shared_blob_dir=true"
            f"&wait_timeout={wait_seconds}"
        )

    def start(self) -> None:
        """Start it, and wait until it listens."""
        said = self.folder / "zeo.out"
        with open(said, "ab") as output:
            self._process = subprocess.Popen(
                [*self._python, "-W", "ignore", "-m", "ZEO.runzeo", "-C", self._configuration],
                stdout=output,
                stderr=output,
                **self._options,
            )
        until = time.monotonic() + _LONGEST_SECONDS
        while not self._listens():
            assert self._process.poll() is None, said.read_text()
            assert time.monotonic() < until, said.read_text()
            time.sleep(0.02)

    def _listens(self) -> bool:
        unix = isinstance(self._address, Path)
        where = str(self._address) if unix else ("127.0.0.1", self._address)
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as one:
            return one.connect_ex(where) == 0

    def stop(self, how: str = "SIGTERM") -> None:
        """Send it this signal, and wait for its end; one that lingers is killed, as by systemd."""
        if self._process is None:
            return
        self._process.send_signal(signal.Signals[how])
        try:
            self._process.wait(_LINGER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> ZeoServer:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop it for good."""
        self.stop("SIGKILL")
