"""Expiry: the archive's older days removed by a process that has other things to do.

An import removes them at its end, all at once.  What runs for months calls :meth:`Expiry.work`
again and again, between two messages, and each call removes a little.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

from postoffice.intake.archive import Archive

__all__ = ["Expiry"]

log = logging.getLogger("postoffice")

# Files that one call removes: some milliseconds.  Many removed at once would make each that is
# written afterwards slow, for a minute.
_FILES = 50
_DAY_SECONDS = 24 * 60 * 60


class Expiry:
    """Removes what has expired, with the first call and then once a day.

    Belongs to one thread.  Others may remove the same at the same time.
    """

    def __init__(self, archive: Archive, keep: float) -> None:
        """Expire the days of an archive.

        :param keep: seconds for which a day is kept after its end.
        """
        self._archive = archive
        self._keep = keep
        self._under_way: Iterator[str] | None = None
        self._next = 0.0

    def work(self, now: float) -> bool:
        """Remove a little of what is due; return whether there is more.

        Costs nothing when nothing is due.  What cannot be removed is logged, and tried again the
        next day.

        :param now: seconds since the epoch.
        """
        if self._under_way is None:
            # A clock that was set back by more than a day is not waited for.
            if self._next - _DAY_SECONDS <= now < self._next:
                return False
            self._next = now + _DAY_SECONDS
            self._under_way = self._archive.expiring(self._keep, now)
        removed = 0
        for day in islice(self._under_way, _FILES):
            removed += 1
            if day:
                log.info("archive of %s has expired", day)
        if removed < _FILES:
            self._under_way = None
        return self._under_way is not None
