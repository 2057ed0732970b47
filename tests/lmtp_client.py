"""An LMTP client that does as it is told: raw sockets, nothing checked, nothing mended."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from types import TracebackType


class Client:
    """One connection; no call waits longer than ten seconds."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        """Connect to a unix socket's path, or to a host and port."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(10.0)
        try:
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise
        self._input = b""

    def __enter__(self) -> Client:
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Hang up."""
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send all of these bytes."""
        self.socket.sendall(data)

    def line(self) -> bytes:
        """Return the next line without its end; ``b""`` when the server has hung up."""
        while b"\r\n" not in self._input:
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return b""
            self._input += data
        line, _, self._input = self._input.partition(b"\r\n")
        return line

    def reply(self) -> bytes:
        """Return the last line of the next reply."""
        line = self.line()
        while line[3:4] == b"-":
            line = self.line()
        return line

    def codes(self, count: int) -> list[str]:
        """Return code and enhanced code of the next replies."""
        return [self.reply()[:9].decode().strip() for _ in range(count)]

    def command(self, line: bytes) -> str:
        """Send a line; return code and enhanced code of its reply."""
        self.send(line + b"\r\n")
        return self.codes(1)[0]

    def greet(self) -> None:
        """Read the greeting and say LHLO."""
        assert self.reply()[:3] == b"220"
        assert self.command(b"LHLO client.example")[:3] == "250"

    def begin(self, sender: str, recipients: Sequence[str], parameters: str = "") -> list[str]:
        """Send an envelope and DATA at once; return codes of the replies, DATA's three digits."""
        lines = [f"MAIL FROM:<{sender}>{parameters}"]
        lines += [f"RCPT TO:<{recipient}>" for recipient in recipients]
        self.send("".join(line + "\r\n" for line in [*lines, "DATA"]).encode())
        codes = self.codes(len(lines) + 1)
        return [*codes[:-1], codes[-1][:3]]

    def deliver(self, sender: str, recipients: Sequence[str], body: bytes) -> list[str]:
        """Send a message whose recipients are all accepted; return codes, one for each.

        :param body: with CRLF, with dots made transparent, and without the final dot.
        """
        assert self.begin(sender, recipients)[-1] == "354"
        self.send(body + b".\r\n")
        return self.codes(len(recipients))
