"""Signs of life: how a part tells the daemon how it is, over a pipe.

A sign is a line of JSON: ``{}`` for being alive, ``{"well": true}``, or ``{"ill": "why"}``.  Each
is short enough that the kernel writes it in one piece.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

__all__ = ["Sign", "SignReader", "SignWriter"]

_EVERY_SECONDS = 1.0
_LONGEST_CAUSE = 500
_PIECE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Sign:
    """What a part has said.

    :ivar well: whether its work is done as it should be; ``None``: it just lives.
    :ivar cause: why its work cannot be done.
    """

    well: bool | None = None
    cause: str = ""


class SignWriter:
    """The part's end; see :class:`postoffice.health.Health`.  Belongs to one thread."""

    def __init__(self, descriptor: int) -> None:
        """Write to a pipe, of which this is the only end."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._told: Sign | None = None
        self._due = 0.0

    def alive(self) -> None:
        """See :meth:`postoffice.health.Health.alive`."""
        now = time.monotonic()
        if now >= self._due and self._write({}):
            self._due = now + _EVERY_SECONDS

    def well(self) -> None:
        """See :meth:`postoffice.health.Health.well`."""
        self._tell(Sign(True))

    def ill(self, why: str) -> None:
        """See :meth:`postoffice.health.Health.ill`."""
        self._tell(Sign(False, why[:_LONGEST_CAUSE]))

    def _tell(self, sign: Sign) -> None:
        if sign == self._told:
            self.alive()
        elif self._write({"well": True} if sign.well else {"ill": sign.cause}):
            self._told = sign

    def _write(self, value: object) -> bool:
        try:
            os.write(self._descriptor, json.dumps(value).encode("ascii") + b"\n")
        except (BlockingIOError, BrokenPipeError):
            # The daemon reads too slowly, or is dead; the kernel tells us of the latter.
            return False
        return True


class SignReader:
    """The daemon's end."""

    def __init__(self, descriptor: int) -> None:
        """Read from a pipe."""
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._rest = b""

    def read(self) -> list[Sign]:
        """Return the signs that have come, without waiting."""
        try:
            data = os.read(self.descriptor, _PIECE)
        except BlockingIOError:
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [_sign(json.loads(line)) for line in lines]

    def close(self) -> None:
        """Close this end."""
        os.close(self.descriptor)


def _sign(value: dict[str, object]) -> Sign:
    if "ill" in value:
        return Sign(False, str(value["ill"]))
    return Sign(True if "well" in value else None)
