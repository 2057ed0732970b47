"""The server of a database file, as ``postoffice serve`` starts it, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

__all__ = ["FileServer"]

_LONGEST_SECONDS = 30

_PROGRAM = """
import logging, sys
from pathlib import Path
from postoffice.config import UnixPlace
from postoffice.exceptions import PostofficeError
from postoffice.storage_server import serve_storage
logging.basicConfig(level=logging.WARNING)
uri, path, mode, group = sys.argv[1:]
place = UnixPlace(Path(path), int(mode, 8), int(group) if group else None)
try:
    serve_storage(uri, place, lambda: print("ready", flush=True))
except PostofficeError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(error.exit_status)
"""


class FileServer:
    """The server of one file; its address stays the same however often it is started.

    :ivar file: the database.
    :ivar blobs: the folder of blobs.
    :ivar uri: what everybody opens.
    :ivar name: the name at which the server is found.
    :ivar address: the path of its socket.
    :cvar how: the signals with which :meth:`stop` can stop it.
    """

    how = ("SIGKILL", "SIGTERM")

    def __init__(
        self,
        folder: Path,
        address: Path | None = None,
        *,
        uri: str | None = None,
        mode: int = 0o660,
        group: int | None = None,
    ) -> None:
        """Prepare a server.

        :param address: of the socket; ``None``: beside the file.
        :param uri: of a file in the folder; ``None``: with blobs.
        """
        self.file = folder / "depot.fs"
        self.blobs = folder / "blobs"
        self.uri = uri or f"file://{self.file}?blobstorage_dir={self.blobs}"
        self.name = folder / "depot.fs.zeo"
        self.address = address or self.name
        self._words = [
            self.uri,
            str(self.address),
            f"{mode:o}",
            "" if group is None else f"{group}",
        ]
        self._errors = folder / "server.err"
        self.process: subprocess.Popen[str] | None = None

    @property
    def errors(self) -> str:
        """What the server has said on standard error, in all its lives."""
        return self._errors.read_text()

    def launch(self) -> subprocess.Popen[str]:
        """Start it, and return its process, whose first line says what became of it."""
        with open(self._errors, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *self._words],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        return self.process

    def start(self) -> None:
        """Start it, and wait until it listens."""
        said = self.said_by(self.launch())
        assert said == "ready", said + self.errors

    @staticmethod
    def said_by(process: subprocess.Popen[str]) -> str:
        """Return the first line that a process says."""
        assert process.stdout is not None
        return process.stdout.readline().rstrip("\n")

    def refused(self) -> tuple[str, int]:
        """Start it in vain, and return what it says and its exit status."""
        process = self.launch()
        said = process.communicate(timeout=_LONGEST_SECONDS)[0]
        self.process = None
        return said.rstrip("\n"), process.returncode

    def stop(self, how: str = "SIGTERM") -> int:
        """Send it this signal, wait for its end, and return its exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.Signals[how])
        try:
            status = self.process.wait(_LONGEST_SECONDS)
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()
        self.process = None
        return status

    def __enter__(self) -> FileServer:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop it for good."""
        self.stop("SIGKILL")
