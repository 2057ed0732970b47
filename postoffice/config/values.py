"""Values of options that are no plain text: sizes, durations, frequencies, names."""

from __future__ import annotations

import math
import re

__all__ = [
    "NUMBER_COMMENT",
    "Fault",
    "attempts",
    "deliver_timeout",
    "duration",
    "frequency",
    "header_names",
    "lease",
    "path_names",
    "rejects_unrouted",
    "retry_delay",
    "size",
]

#: The comment that may stand behind a number.
NUMBER_COMMENT = re.compile(r"(?:^|\s)[#;].*", re.DOTALL)

_SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

_SIZE = re.compile(r"([0-9]{1,15})\s*(b|[kmg]b?|)", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]{1,12})\s*([smhdw]?)", re.IGNORECASE)
_FREQUENCY = re.compile(
    r"(?:[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})(?:e[+-]?[0-9]{1,3})?", re.I
)
_ATTEMPTS = re.compile(r"[0-9]{1,4}")
_MOST_ATTEMPTS = 1000
# The depot has 63 bits for a time in nanoseconds, which end in 2262.
_LONGEST = 52 * 604800
# Postfix ends a pipe's command after 1,000 seconds, and bounces the mail.
_LONGEST_DELIVERY = 15 * 60
_HEADER_NAME = re.compile(r"[!-9;-~]+")


class Fault(Exception):
    """What is wrong with a value, and what would be right."""

    def __init__(self, fault: str, mend: str) -> None:
        super().__init__(fault, mend)
        self.fault = fault
        self.mend = mend


def size(text: str) -> int | None:
    """Return bytes; ``None`` for 0, which is no limit.

    :raises Fault: it is something else.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise Fault(f"{text!r} is no size", "write bytes, or 500k, 10m, 1g")
    return int(found[1]) * _SIZE_UNITS[found[2].lower().removesuffix("b") or ""] or None


def duration(text: str) -> int:
    """Return seconds.

    :raises Fault: it is something else.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise Fault(f"{text!r} is no duration", "write seconds, or 5m, 2h, 7d, 4w")
    return int(found[1]) * _SECONDS[found[2].lower()]


def attempts(text: str) -> int:
    """Return a number of attempts, from 1 to 1,000.

    :raises Fault: it is something else.
    """
    number = int(text) if _ATTEMPTS.fullmatch(text) else 0
    if not 1 <= number <= _MOST_ATTEMPTS:
        raise Fault(
            f"{text!r} is no number of attempts", f"write a number from 1 to {_MOST_ATTEMPTS}"
        )
    return number


def retry_delay(text: str) -> float:
    """Return seconds, of a year at most.

    :raises Fault: it is something else.
    """
    seconds = duration(text)
    if seconds > _LONGEST:
        raise Fault(f"{text!r} is longer than a year", "write 52w or less")
    return float(seconds)


def lease(text: str) -> float:
    """Return seconds, one at least and of a year at most.

    :raises Fault: it is something else.
    """
    seconds = retry_delay(text)
    if seconds < 1:
        raise Fault(f"{text!r} would end at once", "write 1s or more")
    return seconds


def deliver_timeout(text: str) -> float:
    """Return seconds, from 1 to 900.

    :raises Fault: it is something else.
    """
    seconds = duration(text)
    if not 1 <= seconds <= _LONGEST_DELIVERY:
        raise Fault(
            f"{text!r} is no time that a delivery may take",
            "write 1s to 15m: Postfix itself ends a delivery after 1000s, and bounces the mail",
        )
    return float(seconds)


def rejects_unrouted(text: str) -> bool:
    """Return whether the word, ``discard`` or ``reject``, is the latter.

    :raises Fault: it is something else.
    """
    words = ("discard", "reject")
    if text.lower() not in words:
        raise Fault(f"{text!r} is nothing to do with mail", f"write {' or '.join(words)}")
    return text.lower() == "reject"


def frequency(text: str) -> float:
    """Return messages a minute.

    :raises Fault: it is something else.
    """
    found = _FREQUENCY.fullmatch(text)
    per_minute = float(text) if found else math.inf
    if not math.isfinite(per_minute):
        raise Fault(
            f"{text!r} is no frequency", "write messages a minute, such as 60 or 0.5; 0 is off"
        )
    return per_minute


def header_names(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas.

    :raises Fault: it is something else.
    """
    names = tuple(name for item in text.split(",") if (name := item.strip()))
    for name in names:
        if not _HEADER_NAME.fullmatch(name):
            raise Fault(f"{name!r} is no name of a header", "write names like To,Subject")
    return names


def path_names(text: str) -> tuple[str, ...]:
    """Return the names of a path's folders, one at least.

    :raises Fault: it is something else.
    """
    names = tuple(name for item in text.split("/") if (name := item.strip()))
    if not names:
        raise Fault(f"{text!r} names no folder", "write a path such as /postoffice")
    return names
