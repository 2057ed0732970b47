"""Health: how work that goes on for long says that it goes on, and what it cannot do meanwhile."""

from __future__ import annotations

from typing import Protocol

__all__ = ["UNOBSERVED", "Health"]


class Health(Protocol):
    """Takes signs of life.  All of its methods are quick, and none raises."""

    def alive(self) -> None:
        """Note that the work goes on; to be called every second or so, and more often at will."""

    def well(self) -> None:
        """Note that the work is done as it should be; the first time, that it has begun."""

    def ill(self, why: str) -> None:
        """Note that the work cannot be done for a while.

        :param why: the cause, in one line.
        """


class _Unobserved:
    """Takes no notice."""

    def alive(self) -> None:
        """See :meth:`Health.alive`."""

    def well(self) -> None:
        """See :meth:`Health.well`."""

    def ill(self, why: str) -> None:
        """See :meth:`Health.ill`."""


#: For work that nobody watches over.
UNOBSERVED: Health = _Unobserved()
