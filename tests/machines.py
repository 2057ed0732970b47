"""Machines: a Maildir, a configuration, and the importers that run there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["Machine", "Run"]

ROOT = Path(__file__).resolve().parent.parent


class Run:
    """One process under test: a Python module with its arguments.

    :ivar process: leads a process group of its own, whose members are all that it has forked.
    :ivar started: when, by the monotonic clock.
    """

    def __init__(self, log: Path, *words: str) -> None:
        """Start it.

        :param log: the file that gets what it says.
        """
        self.log = log
        self.started = time.monotonic()
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )

    @property
    def said(self) -> str:
        """All that it has said so far."""
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        """Return what it said last."""
        return (self.said.strip().splitlines() or [""])[-1][:300]

    def kill(self) -> bool:
        """Kill the process, and nothing that it has forked; return whether it still ran."""
        running = self.process.poll() is None
        if running:
            self.process.kill()
            self.process.wait()
        return running


class Machine:
    """A machine with a Maildir and a configuration of its own."""

    def __init__(self, folder: Path, uri: str, queues: str) -> None:
        """Lay it out in a new folder.

        :param queues: the sections ``[queue:NAME]``.
        """
        self.maildir = folder / "Maildir"
        self.ini = folder / "postoffice.ini"
        folder.mkdir(parents=True)
        for place in ("new", "cur", "tmp"):
            (self.maildir / place).mkdir(parents=True)
        self.ini.write_text(
            f"[post office]\nzodb_uri = {uri}\nmaildir = %(here)s/Maildir\n"
            f"ooo_loop_frequency = 1000000\n\n{queues}"
        )

    def deliver(self, name: str, raw: bytes) -> None:
        """Deliver a message as an MTA does, into a file of this name."""
        path = self.maildir / "tmp" / name
        path.write_bytes(raw)
        path.rename(self.maildir / "new" / name)

    def start_import(self, log: Path) -> Run:
        """Start the command that imports what waits."""
        return Run(log, "postoffice.cli", "-C", str(self.ini), "import")

    def start_wordy_import(self, log: Path) -> Run:
        """Start the command, to say a line for each message when it is stored."""
        return Run(log, "postoffice.cli", "-C", str(self.ini), "import", "-v")

    def waiting(self) -> int:
        """Return how many messages the spool has."""
        return sum(len(os.listdir(self.maildir / place)) for place in ("new", "cur"))

    def archived(self) -> list[str]:
        """Return the names of the files in the archive."""
        return [path.name for path in self.maildir.glob(".????.??.??/cur/*")]

    def set_aside(self) -> list[str]:
        """Return the reasons why messages were set aside."""
        reasons = sorted((self.maildir / ".failed").glob("*.reason"))
        return [path.read_text(errors="replace") for path in reasons]
