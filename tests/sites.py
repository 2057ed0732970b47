"""A site for tests: a folder as ``postoffice init`` lays it out, and the command run in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import transaction
from click.testing import CliRunner, Result

from postoffice.cli.group import postoffice
from postoffice.queue import open_queue

__all__ = ["HOSTILE", "Site", "mail"]

URI = "zodb_uri = file://%(here)s/var/depot.fs?blobstorage_dir=%(here)s/var/blobs"
MAIN = f"[post office]\n{URI}\nmaildir = %(here)s/Maildir\n"
QUEUES = """
[queue:billing]
filters =
    to_hostname: billing.example.com
[queue:rest]
filters =
    header_regexp: To:
"""

# What a terminal obeys: CSI, OSC, the C1 form of CSI, an order of writing, a carriage return.
HOSTILE = "\x1b[2J\x1b]0;own\x07\x9b31m\u202ertl [red]x[/red] [link=http://e]y[/link] :smile:\r"


def mail(subject: str, to: str = "in@billing.example.com", body: str = "Hello.\n") -> bytes:
    """Compose a message."""
    text = f"From: Ann <ann@paper.example>\nTo: {to}\nSubject: {subject}\n\n{body}"
    return text.encode()


class Site:
    """A folder with postoffice.ini, a Maildir and a database."""

    def __init__(self, folder: Path) -> None:
        """Lay it out."""
        self.folder = folder
        self.ini = folder / "postoffice.ini"
        self.maildir = folder / "Maildir"
        done = self.run_alone("init", str(folder))
        assert done.exit_code == 0, done.output
        self.configure()
        self._delivered = 0

    def configure(self, *lines: str, queues: str = QUEUES, main: str = MAIN) -> None:
        """Write the configuration, with these lines at the end of its main section."""
        self.ini.write_text(main + "".join(f"{line}\n" for line in lines) + queues)

    @property
    def uri(self) -> str:
        """The URI of the database, as an application opens it."""
        return f"file://{self.folder}/var/depot.fs?blobstorage_dir={self.folder}/var/blobs"

    def deliver(self, *raws: bytes) -> None:
        """Put messages into the Maildir, a second apart."""
        for raw in raws:
            self._delivered += 1
            path = self.maildir / "new" / f"{self._delivered:04}.M1.test"
            path.write_bytes(raw)
            os.utime(path, (1_750_000_000 + self._delivered,) * 2)

    @staticmethod
    def run_alone(*arguments: str, input: str | bytes | None = None) -> Result:
        """Run the command without naming a configuration."""
        return CliRunner().invoke(postoffice, arguments, input=input)

    def run(self, *arguments: str, input: str | bytes | None = None) -> Result:
        """Run the command on the site's configuration."""
        return self.run_alone("-C", str(self.ini), *arguments, input=input)

    def done(self, *arguments: str, input: str | bytes | None = None) -> str:
        """Run the command, which is to succeed silently but for what it returns."""
        result = self.run(*arguments, input=input)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """Run the command for JSON, and read it."""
        return json.loads(self.done(*arguments, "--json"))

    def process(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start the command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "postoffice.cli", "-C", str(self.ini), *arguments],
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=options.pop("stderr", subprocess.PIPE),
            **options,
        )

    def ids(self, queue: str, *options: str) -> list[str]:
        """Return the ids of the messages that the command lists."""
        return [one["id"] for one in self.json("messages", queue, *options)["messages"]]

    def quarantine(self, count: int, queue: str = "billing") -> list[str]:
        """Have an application fail on the first messages of a queue; return their ids."""
        ids = []
        with open_queue(self.uri, queue) as found:
            for number in range(count):
                message = found.pop_next()
                try:
                    raise ValueError(f"no. {number}: {HOSTILE}")
                except ValueError as error:
                    ids.append(str(found.quarantine(message, error)))
                transaction.commit()
        return ids
