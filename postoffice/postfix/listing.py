"""What ``postqueue -j`` and ``postqueue -p`` print, read: lines in, values out.

Nothing is taken on trust: a listing holds what senders and other servers wrote, and may be a file
from another machine.  Reading it takes linear time, and raises nothing but
:exc:`~postoffice.postfix.errors.OutputCut`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time, timedelta
from itertools import chain
from typing import Any, NamedTuple

from postoffice.postfix.errors import OutputCut
from postoffice.postfix.ids import is_queue_id
from postoffice.postfix.mail import Recipient

__all__ = ["Listed", "latest", "read_json", "read_listing", "read_text"]

_NULL_SENDER = "MAILER-DAEMON"
# What -p prints above recipients without a reason that follow others with one.
_NO_REASON = "reason unavailable"

_MONTHS = {
    name: number
    for number, name in enumerate(
        ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"), 1
    )
}
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
# In so many years each date has fallen on each day of the week, 29 February too, 2100 or not.
_YEARS = 40
_MAXIMUM = (1 << 63) - 1

# No two neighbours in it can match the same character, so it never tries anything twice.
_ENTRY = re.compile(
    r"([A-Za-z0-9]{5,64})([*!#]{0,2}) +([0-9]{1,18}) +"
    r"([A-Z][a-z]{2} +[A-Z][a-z]{2} +[0-9]{1,2}) ([0-9]{2}:[0-9]{2}:[0-9]{2}) ([^\n]*)"
)
_HEADING = re.compile(r"-+Queue ID-+ ")
_SUMMARY = re.compile(r"-- [0-9]+ Kbytes in [0-9]+ Requests?\.")
_EMPTY = "Mail queue is empty"
# Recorded together with a listing where both outputs went into one file.
_REMARKS = ("postqueue: ", "mailq: ", "sendmail: ")


class Listed(NamedTuple):
    """One message as a listing tells of it.

    :ivar qid: its id in the queue.
    :ivar size: bytes.
    :ivar date: when it arrived, in local time and naive.
    :ivar sender: the envelope's sender; the null sender is the empty string.
    :ivar status: the queue in which it is; of ``-p``, ``deferred`` is all but ``active`` and
        ``hold``.
    :ivar forced_expire: whether ``postsuper -e`` was asked to expire it.
    :ivar recipients: to whom it has still to be delivered.
    """

    qid: str
    size: int
    date: datetime
    sender: str
    status: str
    forced_expire: bool
    recipients: list[Recipient]


def latest(listed: Iterable[Listed]) -> list[Listed]:
    """Return each message once, as it was last seen.

    A message that moves from one queue to another while they are listed is seen twice, or never.
    The same id with another time of arrival is another message: short ids are used again.
    """
    return list({(one.qid, one.date): one for one in listed}.values())


def read_listing(lines: Iterable[str], now: datetime) -> Iterator[Listed]:
    """Read what either option printed, told by the first line that says anything.

    :param lines: without their ends.
    :param now: local time, naive; for ``-p``, which prints no year.
    :raises OutputCut: as :func:`read_json` and :func:`read_text`.
    """
    rest = iter(lines)
    for skipped, line in enumerate(rest):
        if line.strip() and not line.startswith(_REMARKS):
            # The lines above count, for the errors that name one.
            whole = chain([""] * skipped, [line], rest)
            return read_json(whole) if line.startswith("{") else read_text(whole, now)
    return iter(())


# -- postqueue -j ----------------------------------------------------------------------------------


def read_json(lines: Iterable[str]) -> Iterator[Listed]:
    """Read what ``postqueue -j`` printed; members that are not known here are passed over.

    :param lines: without their ends.
    :raises OutputCut: a line is cut off, or none of Postfix's.
    """
    decode = json.JSONDecoder().raw_decode
    for number, line in enumerate(lines, 1):
        text = line.strip(" \t\r")
        if not text or text.startswith(_REMARKS):
            continue
        try:
            found, end = decode(text)
            if end != len(text):
                raise ValueError
            yield _from_json(found)
        # A number can be too long to be read, or too large for a date; an object too deep.
        except (ValueError, TypeError, KeyError, OverflowError, OSError, RecursionError) as error:
            raise OutputCut(
                f"line {number} of the listing is cut off or is not from postqueue -j;"
                " list the queue again"
            ) from error


def _from_json(found: Any) -> Listed:
    qid = found["queue_id"]
    sender = found["sender"]
    status = found["queue_name"]
    size = found["message_size"]
    arrival = found["arrival_time"]
    recipients = []
    for one in found["recipients"]:
        address = one["address"]
        reason = one.get("delay_reason", "")
        if type(address) is not str or type(reason) is not str:
            raise TypeError
        recipients.append(Recipient(address, reason))
    if not (
        type(qid) is type(sender) is type(status) is str
        and type(size) is type(arrival) is int
        and is_queue_id(qid)
        and 0 <= size <= _MAXIMUM
    ):
        raise TypeError
    return Listed(
        qid,
        size,
        datetime.fromtimestamp(arrival),  # noqa: DTZ006 - local and naive, as documented
        "" if sender == _NULL_SENDER else sender,
        status,
        found.get("forced_expire") is True,
        recipients,
    )


# -- postqueue -p ----------------------------------------------------------------------------------


def read_text(lines: Iterable[str], now: datetime) -> Iterator[Listed]:
    """Read what ``postqueue -p`` or ``mailq`` printed.

    The year of a date, which is not printed, is the newest that agrees with the day of the week
    and does not lie more than a day in the future.  A recipient's reason stands above it and those
    that share it; a line of a message that is neither a reason nor the next message is a recipient.

    A listing that begins with its heading has to end with its last line, which counts the
    requests.  One without the heading is an excerpt, and may end after any line.

    :param lines: without their ends.
    :param now: local time, naive.
    :raises OutputCut: the end is missing, or a line is none of Postfix's.
    """
    dates = _Dates(now)
    entry: Listed | None = None
    reason = ""
    headed = False
    number = 0
    for number, raw in enumerate(lines, 1):
        line = raw.removesuffix("\r")
        text = line.lstrip(" \t")
        if not text:
            if entry is not None:
                yield entry
                entry = None
            continue
        if entry is not None and line[0] in " \t":
            if text[0] == "(":
                reason = _reason(text)
            else:
                entry.recipients.append(Recipient(text, reason))
            continue
        found = _ENTRY.fullmatch(line)
        if found is not None:
            if entry is not None:
                yield entry
            entry, reason = _from_text(found, dates, number), ""
        elif entry is not None and text[0] == "(":
            reason = _reason(text)
        elif _HEADING.match(line):
            if headed:
                raise OutputCut(_cut(number))
            headed = True
        elif _SUMMARY.fullmatch(text) or text == _EMPTY:
            headed = False
        elif text.startswith(_REMARKS):
            continue
        elif entry is not None:
            entry.recipients.append(Recipient(text, reason))
        else:
            raise OutputCut(
                f"line {number} of the listing is not from postqueue -p; list the queue again"
            )
    if headed:
        raise OutputCut(_cut(number))
    if entry is not None:
        yield entry


def _cut(number: int) -> str:
    return (
        f"the listing is cut off after {number} lines, without the line that counts the requests;"
        " list the queue again"
    )


def _reason(text: str) -> str:
    reason = text[1:].removesuffix(")")
    return "" if reason == _NO_REASON else reason


def _from_text(found: re.Match[str], dates: _Dates, number: int) -> Listed:
    qid, marks, size, day, clock, sender = found.groups()
    sender = sender.lstrip(" ")
    if clock.endswith(":60"):
        # A leap second, which is the one before it to us.
        clock = clock[:-2] + "59"
    try:
        when = datetime.combine(dates.day(day), time.fromisoformat(clock))
    except ValueError as error:
        raise OutputCut(
            f"line {number} of the listing has no date of Postfix's; list the queue again"
        ) from error
    return Listed(
        qid,
        int(size),
        when,
        "" if sender == _NULL_SENDER else sender,
        "active" if "*" in marks else "hold" if "!" in marks else "deferred",
        "#" in marks,
        [],
    )


class _Dates:
    """Finds the years of dates without one."""

    def __init__(self, now: datetime) -> None:
        try:
            self._last = (now + timedelta(days=1)).date()
        except OverflowError:
            self._last = now.date()
        self._known: dict[str, date] = {}

    def day(self, printed: str) -> date:
        """Return the newest such day that is not in the future.

        :param printed: the days of the week and the month, as ``Sat Nov 21``.
        :raises ValueError: there is no such day.
        """
        found = self._known.get(printed)
        if found is None:
            found = self._known[printed] = self._find(*printed.split())
        return found

    def _find(self, weekday: str, month: str, day: str) -> date:
        if month not in _MONTHS or weekday not in _WEEKDAYS:
            raise ValueError
        newest = None
        for year in range(self._last.year, max(self._last.year - _YEARS, 0), -1):
            try:
                tried = date(year, _MONTHS[month], int(day))
            except ValueError:
                continue
            if tried > self._last:
                continue
            if _WEEKDAYS[tried.weekday()] == weekday:
                return tried
            newest = newest or tried
        if newest is None:
            raise ValueError
        return newest
