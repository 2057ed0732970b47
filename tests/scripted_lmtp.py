"""An LMTP listener that answers as a test has written it, and keeps what it was told."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["CLOSE", "SILENCE", "ScriptedListener", "Session"]

CLOSE = "close"
"""Instead of a reply: close the connection."""
SILENCE = "silence"
"""Instead of a reply: say nothing until the client goes."""

_FEATURES = "250-here\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250 ENHANCEDSTATUSCODES"


@dataclass(slots=True)
class Session:
    """What one client said.

    :ivar commands: its command lines.
    :ivar ahead: those after which more had come before they were answered.
    :ivar message: the message as it was sent, without the line that ends it.
    :ivar complete: whether that line came.
    """

    commands: list[str] = field(default_factory=list)
    ahead: list[str] = field(default_factory=list)
    message: bytearray = field(default_factory=bytearray)
    complete: bool = False


class _End(Exception):
    """The session is over."""


class ScriptedListener:
    """Listens at a unix socket, in a thread, for one client at a time."""

    def __init__(
        self,
        path: Path,
        replies: Mapping[str, str] | None = None,
        fates: Sequence[str] = (),
    ) -> None:
        """Listen.

        :param replies: by ``greeting``, ``LHLO``, ``DATA`` or another command line, or by its first
            word; what is not there is answered as all went well.
        :param fates: the replies after the message; 250 for each further recipient.
        """
        self._replies = replies or {}
        self._fates = fates
        self.sessions: list[Session] = []
        self.begun = threading.Event()
        self.ended = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(os.fspath(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> ScriptedListener:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop listening."""
        # Unlike close, it wakes the thread that waits for a client.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._socket.close()

    @property
    def session(self) -> Session:
        """The only session that there was."""
        (session,) = self.sessions
        return session

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            session = Session()
            self.sessions.append(session)
            self.begun.set()
            with connection:
                connection.settimeout(30)
                try:
                    _Client(connection, session, self._replies, self._fates).serve()
                except (_End, OSError):
                    self.ended.set()
            self.ended.set()


class _Client:
    def __init__(
        self,
        connection: socket.socket,
        session: Session,
        replies: Mapping[str, str],
        fates: Sequence[str],
    ) -> None:
        self._connection = connection
        self._session = session
        self._replies = replies
        self._fates = fates
        self._received = bytearray()

    def serve(self) -> None:
        self._say(self._replies.get("greeting", "220 here LMTP"))
        taken = 0
        while True:
            command = self._line()
            self._session.commands.append(command)
            if self._received:
                self._session.ahead.append(command)
            word = command.split(" ")[0]
            usual = {"LHLO": _FEATURES, "DATA": "354 go on" if taken else "503 5.5.1 no recipient"}
            reply = self._replies.get(command, self._replies.get(word))
            reply = reply or usual.get(word, "250 2.0.0 fine")
            self._say(reply)
            if word == "RCPT" and reply.startswith("2"):
                taken += 1
            if reply.startswith("354"):
                self._take_message()
                for fate in [*self._fates, *["250 2.6.0 stored"] * taken][:taken]:
                    self._say(fate)
                taken = 0

    def _say(self, reply: str) -> None:
        if reply == CLOSE:
            raise _End
        if reply == SILENCE:
            while self._connection.recv(65536):
                pass
            raise _End
        self._connection.sendall(f"{reply}\r\n".encode())

    def _receive(self) -> None:
        data = self._connection.recv(1 << 20)
        if not data:
            raise _End
        self._received += data

    def _line(self) -> str:
        while (end := self._received.find(b"\r\n")) < 0:
            self._receive()
        line = self._received[:end].decode()
        del self._received[: end + 2]
        return line

    def _take_message(self) -> None:
        message = self._session.message
        message += b"\r\n"
        try:
            while True:
                seen = max(0, len(message) - 4)
                message += self._received
                self._received.clear()
                end = message.find(b"\r\n.\r\n", seen)
                if end >= 0:
                    self._received += message[end + 5 :]
                    del message[end + 2 :]
                    self._session.complete = True
                    return
                self._receive()
        finally:
            del message[:2]
