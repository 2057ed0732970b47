"""Readiness: what systemd wants to be told, by datagrams on the socket that it names.

See sd_notify(3) and the section on ``Type=notify`` in systemd.service(5).  Where no socket is named
nobody is told.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

__all__ = ["Notifier"]


class Notifier:
    """Tells the process that started this one how far it is.  Never waits, and never raises."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take the address, and how often a sign of life is wanted, from the environment."""
        address = environment.get("NOTIFY_SOCKET", "")
        # An abstract socket begins with a NUL, which no environment can hold.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address.startswith(("@", "/")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self._interval = _interval(environment)
        self._due = 0.0

    @property
    def descriptors(self) -> list[int]:
        """What a child process does not need."""
        return [] if self._socket is None else [self._socket.fileno()]

    def ready(self, status: str) -> None:
        """Say that the start, or a reload, is done."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        """Say in one line how things are."""
        self._send(f"STATUS={status}")

    def reloading(self) -> None:
        """Say that the configuration is read again."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1")

    def alive(self, now: float) -> None:
        """Give a sign of life, if one is wanted and due.

        :param now: monotonic, in seconds.
        """
        if self._interval and now >= self._due:
            self._due = now + self._interval / 2
            self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(text.encode("utf-8", "backslashreplace"), self._address)
        except OSError:
            # Whoever was to listen is gone or busy, and the mail matters more.
            return


def _interval(environment: Mapping[str, str]) -> float:
    """Return within how many seconds a sign of life is wanted; 0: never."""
    wanted = environment.get("WATCHDOG_USEC", "")
    pid = environment.get("WATCHDOG_PID", str(os.getpid()))
    if not wanted.isdecimal() or pid != str(os.getpid()):
        return 0.0
    return int(wanted) / 1_000_000
