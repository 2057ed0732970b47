"""Where the server of a database file is found: a socket beside the file, and what it says.

``postoffice serve`` serves the file of a ``file://`` URI at ``<file>.zeo``, which is the socket
itself, or a symbolic link to it.  So whoever knows the URI finds the server.

Who holds the lock of the file decides about that name.  A server puts a socket there before it
takes the lock, and answers on it after, so that a file which is locked by a server has one at any
time; and who has the lock and finds a socket on which nobody answers may remove it.
"""

from __future__ import annotations

import enum
import fcntl
import grp
import logging
import os
import pwd
import socket
import stat
import time
from contextlib import suppress

from postoffice.display import printable
from postoffice.exceptions import DepotUnavailable

__all__ = [
    "LONGEST_ADDRESS",
    "Presence",
    "await_server",
    "holder",
    "is_locked",
    "is_there",
    "look",
    "name_beside",
    "remove_dead",
]

log = logging.getLogger("postoffice")

#: Bytes of the longest path that is the address of a socket (unix(7), less the final NUL).
LONGEST_ADDRESS = 107

_POLL_SECONDS = 0.05


class Presence(enum.Enum):
    """What is at a server's name."""

    ABSENT = "nothing, or something that is none of ours"
    SILENT = "a socket on which nobody answers: its server is starting, or has died"
    LISTENING = "a server"


def name_beside(path: str) -> str:
    """Return the name at which the server of a database file is found."""
    return f"{path}.zeo"


def _address(name: str) -> str:
    """Return what to connect to: the name, or where a link leads if the name is too long."""
    return name if len(os.fsencode(name)) <= LONGEST_ADDRESS else os.path.realpath(name)


def is_there(path: str) -> bool:
    """Say whether a database file has a server, be it one that is just being restarted."""
    try:
        return look(name_beside(path)) is not Presence.ABSENT
    except PermissionError:
        return True


def look(name: str) -> Presence:
    """Say what is at a server's name.

    :raises PermissionError: this user may not connect to it.
    """
    try:
        mode = os.lstat(name).st_mode
        if not (stat.S_ISSOCK(mode) or stat.S_ISLNK(mode)):
            return Presence.ABSENT
        if len(os.fsencode(_address(name))) > LONGEST_ADDRESS:
            # A link of somebody else's: no server can be there.
            return Presence.ABSENT
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(_address(name))
    except BlockingIOError:
        # Its backlog is full: it listens.
        return Presence.LISTENING
    except ConnectionRefusedError:
        return Presence.SILENT
    except FileNotFoundError:
        return Presence.SILENT if os.path.lexists(name) else Presence.ABSENT
    except NotADirectoryError:
        return Presence.ABSENT
    return Presence.LISTENING


def await_server(path: str, seconds: float) -> str | None:
    """Return the address of the server of a database file; ``None``: it has none.

    One that is being restarted is waited for, and the log told so; one that is starting has not
    answered yet.

    :param seconds: how long to wait for one whose socket is there.
    :raises DepotUnavailable: this user may not connect to it; or it holds the file, and does not
        answer in time.
    """
    name = name_beside(path)
    deadline = time.monotonic() + seconds
    told = False
    while True:
        try:
            presence = look(name)
        except PermissionError as error:
            raise DepotUnavailable(f"database {path}: {_who_may(name)}") from error
        except OSError as error:
            raise DepotUnavailable(f"database {path}: {name}: {error.strerror or error}") from error
        if presence is Presence.LISTENING:
            return _address(name)
        if presence is Presence.ABSENT:
            return None
        if time.monotonic() >= deadline:
            break
        if not told:
            told = True
            log.warning(
                "database %s: its server does not answer; waiting %.0f s for it at most",
                path,
                seconds,
            )
        time.sleep(_POLL_SECONDS)
    if is_locked(path):
        raise DepotUnavailable(
            f"database {path} is locked by {holder(path)}, and nobody answers at {name}; if that "
            "process is `postoffice serve`, it is still starting: try again in a moment"
        )
    return None


def _who_may(name: str) -> str:
    """Return who may connect to a socket, for somebody who may not."""
    try:
        status = os.stat(name)
    except OSError as error:
        return (
            f"this user may not look into {os.path.dirname(os.path.realpath(name))} "
            f"({error.strerror}); join the group that may"
        )
    group = _group(status.st_gid)
    if not status.st_mode & stat.S_IWGRP:
        mend = f"run as {_user(status.st_uid)}, or set zeo_mode and zeo_group"
    else:
        mend = f"run `usermod --append --groups {group} {_user(os.geteuid())}`, or set zeo_group"
    return (
        f"its server's socket {name} is for user {_user(status.st_uid)} and group {group} "
        f"(mode {stat.S_IMODE(status.st_mode):04o}); {mend}"
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def remove_dead(path: str) -> None:
    """Remove the socket of a server that is no more; its file's lock is held by this process."""
    name = name_beside(path)
    with suppress(OSError):
        if look(name) is Presence.SILENT:
            os.unlink(name)
            log.info("%s was left by a server that has died, and is removed", name)


def is_locked(path: str) -> bool:
    """Say whether a process has a database file open for writing."""
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holder(path: str) -> str:
    """Return who has a database file locked, in words: the process and its command."""
    try:
        with open(f"{path}.lock", encoding="ascii", errors="replace") as file:
            pid = file.read(64).split()[0]
    except (OSError, IndexError):
        return "another process"
    if not pid.isdigit():
        return "another process"
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return f"process {pid}"
    shown = printable(words.strip()[:80])
    return f"process {pid} ({shown})" if shown else f"process {pid}"
