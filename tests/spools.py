"""A Maildir with its configuration in a folder of its own: filled, imported, and read back."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from zope.interface import implementer

from postoffice import config
from postoffice.api import PostOffice
from postoffice.exceptions import LimitExceeded
from postoffice.intake.maildir import Outcome
from postoffice.interfaces import IFilter
from postoffice.message import Message
from postoffice.queue import BLOB_SIZE, Queue

FILE_STORAGE = "file://{folder}/depot.fs?blobstorage_dir={folder}/blobs"

QUEUES = """\
[queue:list]
filters =
    header_regexp: ^List-Id:
[queue:all]
filters =
    header_regexp: ^(?:From|Subject):
"""

# Each file system of these is another than that of the temporary folder, if any is.
OTHER_FILE_SYSTEMS = ("/dev/shm", "/run", "/var/tmp", "/tmp", str(Path.home()))  # noqa: S108

# A second from this one, in nanoseconds, is the first mail's arrival.
EPOCH = 1_700_000_000_000_000_000


def other_file_system(than: Path) -> Path:
    """Return a folder that can be written on another file system."""
    for name in OTHER_FILE_SYSTEMS:
        path = Path(name)
        if path.is_dir() and os.access(path, os.W_OK) and path.stat().st_dev != than.stat().st_dev:
            return path
    pytest.skip("there is no second file system that this user can write to")


def digest(raw: bytes) -> str:
    """Return what stands for a message in comparisons."""
    return f"{len(raw)}:{hashlib.sha256(raw).hexdigest()[:16]}"


def mail(subject: str, body: str = "Hello.\n", **headers: str) -> bytes:
    """Return a message with a Message-ID made of its subject."""
    fields = {
        "From": "ann@example.org",
        "To": "bob@example.com",
        "Subject": subject,
        "Message-ID": f"<{hashlib.sha256(subject.encode()).hexdigest()[:12]}@example.org>",
    }
    fields.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = "".join(f"{name}: {value}\n" for name, value in fields.items() if value)
    return f"{head}\n{body}".encode()


def large(subject: str, size: int = BLOB_SIZE + 1000) -> bytes:
    """Return a message of exactly so many bytes."""
    head = mail(subject, "")
    line = b"0123456789abcdef" * 4 + b"\n"
    return (head + line * (size // len(line) + 1))[:size]


@implementer(IFilter)
class GivesUp:
    """Gives up at once on messages of one subject, as a slow expression does after its time."""

    description = "gives_up"

    def __call__(self, message: object) -> str | None:
        """Match nothing."""
        assert isinstance(message, Message)
        if message["Subject"] == "hopeless":
            raise LimitExceeded("hopeless")
        return None


def post_office(ini: Path | str) -> PostOffice:
    """Return the post office of a configuration, with :class:`GivesUp` among its filters."""
    settings = config.load(Path(ini))
    routing = settings.routing
    routing = replace(routing, reject_filters=(GivesUp(), *routing.reject_filters))
    return PostOffice(replace(settings, routing=routing))


@dataclass(frozen=True, slots=True)
class Stored:
    """What the depot and the archive hold.

    :ivar queues: how often each queue has each message, by :func:`digest`.
    :ivar archived: how often the archive has each original, ``failed`` included.
    :ivar left: what is still in the spool.
    """

    queues: dict[str, Counter[str]]
    archived: Counter[str]
    left: list[str]


class Spool:
    """A Maildir, its ``postoffice.ini`` and, by default, its FileStorage, in one folder."""

    def __init__(
        self,
        folder: Path,
        options: str = "",
        *,
        queues: str = QUEUES,
        uri: str = FILE_STORAGE,
        archive: Path | None = None,
    ) -> None:
        self.folder = folder
        self.archive = archive
        self.maildir = folder / "Maildir"
        self.ini = folder / "postoffice.ini"
        self.uri = uri
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("new", "cur", "tmp"):
            (self.maildir / name).mkdir(parents=True, exist_ok=True)
        self.configure(options, queues)

    def configure(self, options: str = "", queues: str = QUEUES) -> None:
        """Write the configuration."""
        if self.archive is not None:
            options = f"archive = {self.archive}\n{options}"
        uri = self.uri.format(folder=self.folder)
        self.ini.write_text(
            f"[post office]\nzodb_uri = {uri}\nmaildir = {self.maildir}\n{options}\n{queues}"
        )

    def put(self, raw: bytes, name: str = "", place: str = "new", second: int = -1) -> Path:
        """Put a file into the spool, as arrived so many seconds after :data:`EPOCH`."""
        count = len(list((self.maildir / "new").iterdir())) + len(
            list((self.maildir / "cur").iterdir())
        )
        path = self.maildir / place / (name or f"{1_700_000_000 + count}.M{count}P1.host")
        path.write_bytes(raw)
        path.chmod(0o600)
        arrived = EPOCH + (count if second < 0 else second) * 1_000_000_000
        os.utime(path, ns=(arrived, arrived))
        return path

    def run(self) -> Outcome:
        """Import what waits."""
        with post_office(self.ini) as office:
            return office.import_messages()

    def run_failed(self) -> Outcome:
        """Import what waits, and what was set aside."""
        with post_office(self.ini) as office:
            return office.import_messages(retry=lambda failure: True)

    def raws(self, queue: str = "all") -> list[bytes]:
        """Return what waits in a queue, in order."""
        with post_office(self.ini) as office, office.connection() as connection:
            folder = office.folder(connection)
            return [message.raw for message in Queue(folder.get(queue))]

    def waiting(self) -> list[str]:
        """Return what is in ``new`` and ``cur``."""
        return sorted(
            f"{place}/{name}"
            for place in ("new", "cur")
            for name in os.listdir(self.maildir / place)
        )

    @property
    def failed(self) -> Path:
        """The folder of what was set aside."""
        return self.maildir / ".failed" if self.archive is None else self.archive / "failed"

    def set_aside(self) -> list[str]:
        """Return the names of what was set aside."""
        if not self.failed.exists():
            return []
        return sorted(name for name in os.listdir(self.failed) if not name.endswith(".reason"))

    def archived(self) -> list[Path]:
        """Return the files of the archive, those that were set aside included."""
        days = (
            self.maildir.glob(".????.??.??/cur/*")
            if self.archive is None
            else self.archive.glob("????.??.??/*")
        )
        failed = [self.failed / name for name in self.set_aside()]
        return sorted(path for path in [*days, *failed] if path.is_file())

    def stored(self) -> Stored:
        """Return all that is to be compared."""
        queues = {}
        with post_office(self.ini) as office, office.connection() as connection:
            folder = office.folder(connection)
            for name in folder.names():
                queues[name] = Counter(digest(one.raw) for one in Queue(folder.get(name)))
        archived = Counter(digest(path.read_bytes()) for path in self.archived())
        return Stored(queues, archived, self.waiting())

    def copy_to(self, folder: Path, archive: Path | None = None) -> Spool:
        """Return a copy that knows nothing of this one; to be made before the first import."""
        shutil.copytree(self.folder, folder, copy_function=shutil.copy2)
        text = self.ini.read_text().replace(str(self.folder), str(folder))
        if self.archive is not None and archive is not None:
            text = text.replace(str(self.archive), str(archive))
        (folder / "postoffice.ini").write_text(text)
        other = object.__new__(Spool)
        other.folder, other.archive, other.uri = folder, archive, self.uri
        other.maildir, other.ini = folder / "Maildir", folder / "postoffice.ini"
        return other
