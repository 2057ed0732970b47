"""Mail loops: which mail was sent by a program, and which sender writes at no human rate.

Two programs that answer each other fill a depot within hours.  A message that says that it is
automatic is marked as such.  Some do not say it (the out-of-office replies of a few clients), so
a sender who writes faster than a given rate is throttled for a while: what comes from there
meanwhile is marked as well.  Marked messages are queued all the same: the application decides.

Everything here takes values and returns values.  Times are nanoseconds since the epoch, and the
present is passed in; a clock that was set back is no error.  All functions may be called from any
thread, need time linear in the size of the header, and do not raise on hostile input.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from postoffice.message import Message

__all__ = [
    "LoopRule",
    "auto_response",
    "average_frequency",
    "instantaneous_frequency",
    "is_bcc",
    "loop_headers",
    "recipients_of",
    "sender_of",
    "triggers",
]

NANOSECONDS_PER_MINUTE = 60 * 10**9

MAX_SENDER = 320
"""Characters of a sender that count: 64 and 255 and the ``@`` (RFC 5321 section 4.5.3.1)."""

MAX_VALUE = 998
"""Characters up to which a header's value is compared as it is; a longer one by its digest."""

# Four times the inverse of the frequency, in minutes, but no more than 30 years.
_INTERVALS = 4
_LONGEST_INTERVAL = 30 * 365 * 24 * 60 * NANOSECONDS_PER_MINUTE

_AUTOMATIC_PRECEDENCE = frozenset({"bulk", "junk", "list"})
_MAX_KEYWORD_FIELD = 1000
_COMMENT_MARK = re.compile(r"\\.|[()]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LoopRule:
    """When a sender is throttled, and for how long.

    :ivar frequency: messages a minute above which a sender is throttled; more than 0, finite.
    :ivar headers: names of headers; only messages with the same values in them count together.
    :ivar period: seconds for which the sender stays throttled.
    """

    frequency: float
    headers: tuple[str, ...] = ()
    period: float = 300.0

    @property
    def interval(self) -> int:
        """The time over which the mean is taken, in nanoseconds: four times 1/frequency."""
        if self.frequency * _LONGEST_INTERVAL <= _INTERVALS * NANOSECONDS_PER_MINUTE:
            return _LONGEST_INTERVAL
        return max(1, round(_INTERVALS / self.frequency * NANOSECONDS_PER_MINUTE))


def auto_response(message: Message) -> bool:
    """Say whether the message calls itself automatic.

    It does by a ``Precedence`` of ``bulk``, ``junk`` or ``list``, which no standard knows and many
    programs send, or by an ``Auto-Submitted`` whose keyword is other than ``no`` (RFC 3834
    section 5).  Every field counts, not only the first.
    """
    for value in message.get_all("Precedence", ()):
        if value.strip().lower() in _AUTOMATIC_PRECEDENCE:
            return True
    return any(_keyword(value) not in ("", "no") for value in message.get_all("Auto-Submitted", ()))


def _keyword(value: str) -> str:
    """Return what stands before the first ``;``, in lower case and without comments."""
    value = value[:_MAX_KEYWORD_FIELD]
    kept = []
    depth = at = 0
    for mark in _COMMENT_MARK.finditer(value):
        if mark[0] == "(":
            if depth == 0:
                kept.append(value[at : mark.start()])
            depth += 1
        elif mark[0] == ")" and depth:
            depth -= 1
            at = mark.end()
    if depth == 0:
        kept.append(value[at:])
    return " ".join("".join(kept).partition(";")[0].split()).lower()


def recipients_of(message: Message) -> tuple[str, ...]:
    """Return the addresses to which the message was delivered, as the mail server said.

    They are the envelope's; without them those of the topmost X-Original-To, or else of the
    topmost Delivered-To.  Empty when nothing is known.
    """
    if message.envelope is not None and message.envelope.recipients:
        return message.envelope.recipients
    return message.addresses("X-Original-To") or message.addresses("Delivered-To")


def is_bcc(message: Message) -> bool:
    """Say whether the message came to a recipient whom neither ``To`` nor ``Cc`` names.

    Such mail cannot be part of a loop of answers.  ``False`` when the recipient is not known.
    """
    recipients = recipients_of(message)
    if not recipients:
        return False
    named = {address.lower() for name in ("To", "Cc") for address in message.addresses(name)}
    return named.isdisjoint(address.lower() for address in recipients)


def sender_of(message: Message) -> str:
    """Return who the message's rate is counted for, in lower case; ``''`` if there is nobody.

    The first address in ``From``; if there is none, the envelope sender, or else whatever the
    first ``From`` says.  At most 320 characters.
    """
    addresses = message.addresses("From")
    if addresses:
        return addresses[0][:MAX_SENDER].lower()
    sender = message.envelope.sender if message.envelope is not None else None
    return (sender or message.topmost("From") or "").strip()[:MAX_SENDER].lower()


def loop_headers(message: Message, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the names in lower case, each with the decoded value of its topmost field.

    A header that is missing has the value ``''``.  A value of more than 998 characters is replaced
    by its SHA-256, so that what has to be remembered is bounded.
    """
    return tuple((name.lower(), _bounded(message.topmost(name) or "")) for name in names)


def _bounded(value: str) -> str:
    if len(value) <= MAX_VALUE:
        return value
    return "sha256:" + hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()


def instantaneous_frequency(times: Sequence[int], now: int) -> float:
    """Return messages a minute, by the time from the last of *times* until *now*.

    Infinite when that is no time at all, 0.0 when there was none.  Times later than *now*, which
    a clock that was set back leaves behind, do not count.
    """
    last = max((time for time in times if time <= now), default=None)
    if last is None:
        return 0.0
    return NANOSECONDS_PER_MINUTE / (now - last) if now > last else float("inf")


def average_frequency(times: Sequence[int], now: int, interval_ns: int) -> float:
    """Return messages a minute, by how many of *times* lie in the interval before *now*.

    The interval, of more than 0 nanoseconds, includes its beginning and excludes *now*, at which
    the message in question may have been counted already.
    """
    start = now - interval_ns
    count = sum(1 for time in times if start <= time < now)
    return count * NANOSECONDS_PER_MINUTE / interval_ns


def triggers(rule: LoopRule, times: Sequence[int], now: int) -> bool:
    """Say whether a message that arrives *now* has its sender throttled.

    :param times: when the sender's earlier messages with the same header values arrived, in any
        order; the last eight of them suffice.
    """
    return (
        instantaneous_frequency(times, now) > rule.frequency
        or average_frequency(times, now, rule.interval) > rule.frequency
    )
