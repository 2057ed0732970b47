"""Listening sockets: on a path or a port of this machine, and on nobody else's."""

from __future__ import annotations

import errno
import fcntl
import grp
import ipaddress
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass

from postoffice.exceptions import PermanentError, TemporaryError

__all__ = ["Listening", "TCPAddress", "UnixAddress", "listen"]

# As asyncio has it.
_BACKLOG = 100


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket.

    :ivar path: of the socket, in a folder that the process may write to.
    :ivar mode: its permission bits: who may write to it may deliver.
    :ivar group: number of its group; ``None`` leaves the process's own.
    """

    path: str
    mode: int = 0o660
    group: int | None = None


@dataclass(frozen=True, slots=True)
class TCPAddress:
    """A port of this machine.

    LMTP knows no passwords, and a queue is no place for the world's mail: only an address of the
    loopback interface is one.

    :ivar host: as digits, ``127.0.0.1`` or ``::1``.
    :ivar port: 0 for any that is free.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        """Refuse what other machines can reach.

        :raises ValueError: it is no address of the loopback interface.
        """
        if not ipaddress.ip_address(self.host).is_loopback:
            raise ValueError(f"{self.host} is no address of the loopback interface")


class Listening:
    """A socket that listens, and the file it has."""

    def __init__(self, opened: socket.socket, path: str | None) -> None:
        """Note which file is the socket's.

        :param path: of the socket; ``None`` for a port.
        """
        self.socket = opened
        self.port: int = 0 if path is not None else opened.getsockname()[1]
        self._path = path
        self._file = None if path is None else _identity(path)

    def remove(self) -> None:
        """Remove the socket's file, unless another process has put its own there by now."""
        if self._path is None:
            return
        with suppress(FileNotFoundError):
            if _identity(self._path) == self._file:
                os.unlink(self._path)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def listen(address: UnixAddress | TCPAddress) -> Listening:
    """Listen at an address.

    A unix socket that a dead process left is replaced; the new one has its mode and its group
    before any client can find it.

    :raises postoffice.exceptions.TemporaryError: another process listens there.
    :raises postoffice.exceptions.PermanentError: something that is no socket is in its place.
    :raises OSError: the address cannot be had.
    """
    if isinstance(address, UnixAddress):
        return Listening(_open_unix(address), address.path)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        opened = socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise TemporaryError(
            f"another process listens on {address.host} port {address.port}"
        ) from error
    return Listening(opened, None)


def _open_unix(address: UnixAddress) -> socket.socket:
    """Return a socket that listens at an address which nobody else listens at."""
    path = address.path
    fresh = path + ".new"
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            # Of two that start at once the second must see what the first has put there.
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TemporaryError(f"another process is about to listen on {path}") from error
        _refuse_taken(path)
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Linux gives the file the socket's own mode: the umask, which all threads share, is
            # left alone, and nobody gets in before mode and group are right.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(fresh)
            if address.group is not None:
                _give(fresh, address.group)
            os.chmod(fresh, address.mode)
            sock.listen(_BACKLOG)
            os.rename(fresh, path)
        except BaseException:
            sock.close()
            with suppress(FileNotFoundError):
                os.unlink(fresh)
            raise
        return sock
    finally:
        os.close(folder)


def _give(path: str, group: int) -> None:
    """Give a file to a group.

    :raises postoffice.exceptions.PermanentError: this user may not.
    """
    try:
        os.chown(path, -1, group)
    except PermissionError as error:
        try:
            name = grp.getgrgid(group).gr_name
        except KeyError:
            name = str(group)
        raise PermanentError(
            f"the socket cannot be given to the group {name}: this user is not in it"
        ) from error


def _refuse_taken(path: str) -> None:
    """Raise an error unless there is nothing at the path, or a socket that nobody listens on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise PermanentError(f"{path} is no socket, and is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            # It listens, and is busy.
            pass
    raise TemporaryError(f"another process listens on {path}")
