"""Where processes listen: for LMTP on a unix socket or a port, for the database on a socket."""

from __future__ import annotations

import grp
import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from postoffice.config.values import Fault

__all__ = ["DEFAULT_MODE", "TCPPlace", "UnixPlace", "group", "mode", "place", "socket_place"]

DEFAULT_MODE = 0o660

# What an address of a unix socket holds (unix(7)), less its final NUL.
_LONGEST_SOCKET = 107
_FORMS = "write unix:PATH, 127.0.0.1:PORT or [::1]:PORT"
_PORT_AT_END = re.compile(r"(?P<host>[^\[\]]*|\[(?P<bracketed>[^\[\]]*)\]):(?P<port>[0-9]{1,5})")
_HIGHEST_PORT = 65535
_LOOPBACK_4 = ipaddress.IPv4Network("127.0.0.0/8")
_LOOPBACK_6 = ipaddress.IPv6Address("::1")
_MODE = re.compile(r"0?[0-7]{3}")
_GROUP_NUMBER = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class UnixPlace:
    """A unix socket.

    :ivar path: of the socket, absolute; its folder exists, as far as the reader can see.
    :ivar mode: its permission bits; who may write to it may connect.
    :ivar group: the number of its group; ``None``: the group of the process that listens.
    """

    path: Path
    mode: int = DEFAULT_MODE
    group: int | None = None

    def __str__(self) -> str:
        """Return it as the configuration has it."""
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TCPPlace:
    """A port that no other machine can reach.

    :ivar host: a loopback address in digits, without brackets: ``127.0.0.1``, ``::1``.
    :ivar port: from 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        """Return it as the configuration has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def place(text: str, here: str) -> UnixPlace | TCPPlace:
    """Return the place that ``unix:PATH``, ``127.0.0.1:PORT`` or ``[::1]:PORT`` names.

    Other addresses are refused: LMTP knows no passwords.

    :param here: the folder that a relative path is relative to.
    :raises Fault: it is something else, or no socket can be there.
    """
    if text.startswith("unix:"):
        return socket_place(text, here)
    if text.startswith("/"):
        raise Fault(f"{text!r} is no address of a listener", "write unix: before the path")
    found = _PORT_AT_END.fullmatch(text)
    if found is None:
        raise Fault(f"{text!r} is no address of a listener", _FORMS)
    bracketed, port = found["bracketed"], int(found["port"])
    host = found["host"] if bracketed is None else bracketed
    if not 1 <= port <= _HIGHEST_PORT:
        raise Fault(f"{port} is no port", f"write one from 1 to {_HIGHEST_PORT}")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise Fault(f"{host!r} is no address in digits", _FORMS) from None
    if isinstance(address, ipaddress.IPv6Address) and bracketed is None:
        raise Fault(f"{text!r} may be an address without a port", f"write [{host}]:{port} for one")
    # One with a zone, or one of IPv4 within IPv6, is not worth its riddles.
    if address != _LOOPBACK_6 and address not in _LOOPBACK_4:
        raise Fault(
            f"{host} is no loopback address, and LMTP knows no passwords",
            f"write 127.0.0.1:{port}, [::1]:{port} or unix:PATH",
        )
    return TCPPlace(str(address), port)


def socket_place(text: str, here: str) -> UnixPlace:
    """Return the unix socket that ``unix:PATH``, or a path, names.

    :param here: the folder that a relative path is relative to.
    :raises Fault: it is a port, or no socket can be there.
    """
    if text.isdigit() or _PORT_AT_END.fullmatch(text):
        raise Fault(f"{text!r} is a port, and only a unix socket will do", "write unix:PATH")
    return UnixPlace(_socket_path(text.removeprefix("unix:").strip(), here))


def _socket_path(value: str, here: str) -> Path:
    if not value:
        raise Fault("there is no path behind unix:", "write one, such as unix:%(here)s/lmtp")
    path = Path(os.path.normpath(os.path.join(here, value)))
    length = len(str(path).encode("utf-8", "surrogateescape"))
    if length > _LONGEST_SOCKET:
        raise Fault(
            f"{path} has {length} bytes, too many for a socket's address",
            f"write a path of {_LONGEST_SOCKET} bytes or less",
        )
    if _is_missing(path.parent):
        raise Fault(
            f"there is no folder {path.parent}",
            f"make it, or correct the path; {path.name!r} itself is made when needed",
        )
    if _is_taken(path):
        raise Fault(f"{path} is there and no socket", "name a path where nothing is")
    return path


def _is_missing(folder: Path) -> bool:
    try:
        return not stat.S_ISDIR(folder.stat().st_mode)
    except PermissionError:
        # A consumer reads the file too, and need not see what is for the mail server.
        return False
    # A name may be too long, or beyond what the locale can write.
    except (OSError, ValueError):
        return True


def _is_taken(path: Path) -> bool:
    """Say whether something that is no socket is seen there."""
    try:
        return not stat.S_ISSOCK(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def mode(text: str) -> int:
    """Return permission bits.

    :raises Fault: it is something else, or they would let nobody in.
    """
    if not _MODE.fullmatch(text):
        raise Fault(f"{text!r} is no mode", "write three octal digits, such as 0660 or 0600")
    bits = int(text, 8)
    if not bits & 0o222:
        raise Fault(f"{text} lets nobody connect, which takes the w", "write 0660 or 0600")
    return bits


def group(text: str) -> int:
    """Return the number of a group, given by its name or its number.

    :raises Fault: there is no such group.
    """
    try:
        if _GROUP_NUMBER.fullmatch(text):
            return grp.getgrgid(int(text)).gr_gid
        return grp.getgrnam(text).gr_gid
    # A number may be too large for a group, and a name beyond what the locale can write.
    except (KeyError, OverflowError, ValueError):
        raise Fault(
            f"there is no group {text!r}", "write the name or the number of one that exists"
        ) from None
