"""What the configuration says about a queue's failing messages and its claims."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Policy"]

_LONGEST_DELAY = 3600.0


class Policy(NamedTuple):
    """How often a failing message is tried, and how long a claim holds.

    :ivar max_attempts: with this many failed attempts a message goes to quarantine.
    :ivar retry_delay: seconds until a message is tried again that failed for the first time.
    :ivar lease: seconds that a claim holds unless its holder says otherwise.
    """

    max_attempts: int = 5
    retry_delay: float = 60.0
    lease: float = 300.0

    def delay(self, failures: int) -> float:
        """Return the seconds to wait after this many failures: twice as long each time.

        At most an hour, or ``retry_delay`` where that is longer.
        """
        # Beyond some doublings it is the longest anyway, and a float has an end.
        longest = max(self.retry_delay, _LONGEST_DELAY)
        return float(min(self.retry_delay * 2.0 ** min(failures - 1, 64), longest))
