"""The state: a small file in which the daemon says how it is, and by whose lock one sees it lives.

The file is written in place and never larger than before, which needs no room on a full disk, and
in one piece, so that a reader who meets the middle of a writing reads once more.  The lock on it is
the kernel's: it ends with the process, whatever that dies of.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from postoffice.config import Settings
from postoffice.database import database_file
from postoffice.exceptions import TemporaryError

__all__ = ["DaemonRuns", "DaemonState", "PartState", "StateFile", "read_state", "state_place"]

_SIZE = 8192
_LONGEST_CAUSE = 200
_ATTEMPTS = 20
_ATTEMPT_SECONDS = 0.01


class DaemonRuns(TemporaryError):
    """Another daemon serves this configuration."""


@dataclass(frozen=True, slots=True)
class PartState:
    """How a part is.

    :ivar name: ``storage``, ``lmtp`` or ``spool``.
    :ivar state: ``starting``; ``running``; ``failing``, while its work cannot be done; ``down``,
        until it is started again; or ``stopping``.
    :ivar since: when it came to be so, in seconds since the epoch.
    :ivar process: its process's id; 0 while there is none.
    :ivar restarts: how often it was started again since the daemon began.
    :ivar error: why its work could not be done the last time; ``""`` if nothing was wrong yet.
    :ivar next_try: when it is started again, in seconds since the epoch; ``None`` if it is there.
    """

    name: str
    state: str
    since: float
    process: int
    restarts: int
    error: str
    next_try: float | None


@dataclass(frozen=True, slots=True)
class DaemonState:
    """How the daemon is.

    :ivar process: its id.
    :ivar version: of postoffice.
    :ivar since: when it began, in seconds since the epoch.
    :ivar configuration: the file, in which it found what it does.
    :ivar reload_error: why the configuration could not be read again; ``""`` if it could.
    :ivar parts: its parts.
    """

    process: int
    version: str
    since: float
    configuration: str
    reload_error: str
    parts: tuple[PartState, ...]


class StateFile:
    """The daemon's end of it: holds the lock as long as it is open."""

    def __init__(self, path: Path) -> None:
        """Prepare; nothing is opened yet."""
        self.path = path
        self._descriptor = -1

    @property
    def descriptors(self) -> list[int]:
        """What a child process must not keep: the lock is the daemon's alone."""
        return [] if self._descriptor < 0 else [self._descriptor]

    def open(self) -> None:
        """Take the lock, and keep it.

        :raises DaemonRuns: another process has it.
        :raises OSError: the file cannot be made or opened.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o640)
        try:
            _lock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            other = _parsed(self.path)
            who = f"process {other.process}" if other is not None else "another process"
            raise DaemonRuns(f"`postoffice serve` runs already: {who} holds {self.path}") from None
        except BaseException:
            os.close(descriptor)
            raise
        self.close()
        self._descriptor = descriptor

    def is_in_place(self) -> bool:
        """Say whether the file is open, and still the one that the path names."""
        if self._descriptor < 0:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self.path))
        except OSError:
            return False

    def write(self, state: DaemonState) -> None:
        """Write how the daemon is.

        :raises OSError: it cannot be written now.
        """
        value = asdict(state)
        for part in value["parts"]:
            part["error"] = part["error"][:_LONGEST_CAUSE]
        value["reload_error"] = value["reload_error"][:_LONGEST_CAUSE]
        os.pwrite(self._descriptor, json.dumps(value).encode("ascii").ljust(_SIZE), 0)

    def close(self) -> None:
        """Let go of the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def state_place(settings: Settings) -> Path:
    """Return where the daemon of a configuration says how it is.

    Beside the database's file, or else in the Maildir.
    """
    file = database_file(settings.zodb_uri)
    return Path(f"{file}.serve") if file is not None else settings.maildir / ".postoffice.serve"


def read_state(path: Path) -> DaemonState | None:
    """Return how the daemon is that holds this file; ``None`` if none does.

    :raises OSError: this user may not read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _parsed(path)
    finally:
        os.close(descriptor)
    return None


def _lock(descriptor: int) -> None:
    for _ in range(_ATTEMPTS):
        with suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Somebody may just be looking whether it is locked.
        time.sleep(_ATTEMPT_SECONDS)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _parsed(path: Path) -> DaemonState | None:
    for _ in range(_ATTEMPTS):
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            value = json.loads(path.read_bytes())
            parts = tuple(PartState(**part) for part in value.pop("parts"))
            return DaemonState(**value, parts=parts)
        time.sleep(_ATTEMPT_SECONDS)
    return None
