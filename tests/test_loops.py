"""Which mail is automatic, and which sender is throttled."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postoffice.loops import (
    LoopRule,
    auto_response,
    average_frequency,
    instantaneous_frequency,
    is_bcc,
    loop_headers,
    recipients_of,
    sender_of,
    triggers,
)
from postoffice.message import Envelope, Message

SECOND = 10**9
MINUTE = 60 * SECOND
NOW = 1_700_000_000 * SECOND


def mail(*fields: str, sender: str | None = None, to: tuple[str, ...] = ()) -> Message:
    """Make a message of header fields, perhaps with an envelope."""
    raw = "".join(f"{field}\n" for field in fields) + "\n"
    envelope = Envelope(sender, to, NOW) if to or sender is not None else None
    return Message.from_bytes(raw.encode(), (), envelope)


@pytest.mark.parametrize(
    ("fields", "automatic"),
    [
        ([], False),
        (["Precedence: bulk"], True),
        (["Precedence: junk"], True),
        (["Precedence:  List "], True),
        (["precedence: BULK"], True),
        (["Precedence: first-class"], False),
        (["Precedence: bulky"], False),
        (["Precedence: first-class", "Precedence: bulk"], True),
        (["Auto-Submitted: auto-replied"], True),
        (["Auto-Submitted: auto-generated"], True),
        (["Auto-Submitted: no"], False),
        (["Auto-Submitted: No (a person)"], False),
        (["Auto-Submitted: (a (nested) note) no ; why=x"], False),
        (["Auto-Submitted: auto-notified; owner-email=x"], True),
        (["Auto-Submitted: (no) auto-replied"], True),
        (["Auto-Submitted: (never closed auto-replied"], False),
        (["Auto-Submitted: anything"], True),
        (["Auto-Submitted:"], False),
        (["Auto-Submitted: no", "Auto-Submitted: auto-replied"], True),
    ],
)
def test_auto_response(fields: list[str], automatic: bool) -> None:
    """Precedence bulk, junk or list, and Auto-Submitted other than no, in any field, tell."""
    assert auto_response(mail("From: a@b.example", *fields)) == automatic


def test_recipients_are_what_the_mail_server_said() -> None:
    """Recipients come from the envelope, else from trace headers, else they are unknown."""
    assert recipients_of(mail("X-Original-To: a@b.example", to=("c@d.example",))) == (
        "c@d.example",
    )
    assert recipients_of(mail("X-Original-To: a@b.example")) == ("a@b.example",)
    assert recipients_of(mail("To: a@b.example")) == ()


@pytest.mark.parametrize(
    ("fields", "to", "bcc"),
    [
        (["To: a@b.example"], ("a@b.example",), False),
        (["To: A@B.example"], ("a@b.EXAMPLE",), False),
        (["To: x@y.example", "Cc: Fred <a@b.example>"], ("a@b.example",), False),
        (["To: x@y.example", "To: a@b.example"], ("a@b.example",), False),
        (["To: x@y.example"], ("a@b.example",), True),
        (["To: xa@b.example"], ("a@b.example",), True),
        (['To: "a@b.example" <x@y.example>'], ("a@b.example",), True),
        ([], ("a@b.example",), True),
        (["To: x@y.example"], (), False),
        (["To: x@y.example", "X-Original-To: a@b.example"], (), True),
        (["To: a@b.example", "X-Original-To: a@b.example"], (), False),
        (["To: a@b.example"], ("c@d.example", "a@b.example"), False),
    ],
)
def test_is_bcc(fields: list[str], to: tuple[str, ...], bcc: bool) -> None:
    """Mail is by Bcc when its recipient is known and stands, as an address, in no To or Cc."""
    assert is_bcc(mail(*fields, to=to)) == bcc


@pytest.mark.parametrize(
    ("fields", "sender", "who"),
    [
        (["From: Fred <Fred@Example.com>"], "x@y.example", "fred@example.com"),
        (["From: a@b.example, c@d.example"], None, "a@b.example"),
        (["From: nonsense"], "X@y.example", "x@y.example"),
        (["From: Some Nonsense "], "", "some nonsense"),
        ([], None, ""),
        ([], "x@y.example", "x@y.example"),
    ],
)
def test_sender_of(fields: list[str], sender: str | None, who: str) -> None:
    """The first From address counts, else the envelope sender, else what From says."""
    assert sender_of(mail(*fields, sender=sender)) == who


def test_what_is_remembered_of_a_message_is_bounded() -> None:
    """Senders and header values are short whatever the message says, and long ones differ."""
    long = "x" * 100_000
    one = mail(f"From: {long}", f"Subject: {long}1")
    two = mail(f"From: {long}@b.example", f"Subject: {long}2")
    assert len(sender_of(one)) <= 320
    assert len(sender_of(two)) <= 320
    values = [loop_headers(message, ("Subject",))[0][1] for message in (one, two)]
    assert values[0] != values[1]
    assert max(map(len, values)) < 1000


def test_loop_headers() -> None:
    """Discriminators are the decoded values of the topmost fields, empty where there is none."""
    message = mail("Subject: =?utf-8?q?=C3=A4?=", "Subject: b", "To: a@b.example")
    expected = (("to", "a@b.example"), ("subject", "ä"), ("x-none", ""))
    assert loop_headers(message, ("To", "SUBJECT", "X-None")) == expected
    assert loop_headers(message, ()) == ()


@pytest.mark.parametrize(
    ("seconds_ago", "frequency"),
    [
        ([], 0.0),
        ([30], 2.0),
        ([240], 0.25),
        ([240, 30], 2.0),
        ([30, 240], 2.0),
        ([0], math.inf),
        ([-60], 0.0),
        ([-60, 30], 2.0),
    ],
)
def test_instantaneous_frequency(seconds_ago: list[int], frequency: float) -> None:
    """The rate is that of the last message before now, infinite when it came just now."""
    times = [NOW - seconds * SECOND for seconds in seconds_ago]
    assert instantaneous_frequency(times, NOW) == pytest.approx(frequency)


@pytest.mark.parametrize(
    ("seconds_ago", "minutes", "frequency"),
    [
        ([], 1, 0.0),
        ([30], 1, 1.0),
        ([60, 30], 1, 2.0),
        ([61, 30], 1, 1.0),
        ([120, 90, 60, 30], 4, 1.0),
        ([0, -30], 1, 0.0),
    ],
)
def test_average_frequency(seconds_ago: list[int], minutes: int, frequency: float) -> None:
    """The mean counts what came within the interval before now."""
    times = [NOW - seconds * SECOND for seconds in seconds_ago]
    assert average_frequency(times, NOW, minutes * MINUTE) == pytest.approx(frequency)


def test_a_sender_who_writes_once_is_not_throttled() -> None:
    """Without an earlier message nothing triggers."""
    assert not triggers(LoopRule(1.0), [], NOW)


@pytest.mark.parametrize(
    ("frequency", "seconds_ago", "throttled"),
    [
        (1.0, [59], True),
        (1.0, [60], False),
        (1.0, [61], False),
        (1.0, [0], True),
        (0.25, [239], True),
        (0.25, [241], False),
        # More than four within four minutes is more than one a minute, each a minute apart.
        (1.0, [240, 180, 120, 60], False),
        (1.0, [239, 200, 150, 100, 60], True),
    ],
)
def test_triggers(frequency: float, seconds_ago: list[int], throttled: bool) -> None:
    """A rate above the rule's, since the last message or in the mean, has a sender throttled."""
    times = [NOW - seconds * SECOND for seconds in seconds_ago]
    assert triggers(LoopRule(frequency), times, NOW) == throttled


def test_the_interval_is_four_times_the_inverse() -> None:
    """At a quarter of a message a minute the mean is taken over 16 minutes."""
    assert LoopRule(0.25).interval == 16 * MINUTE
    assert LoopRule(60.0).interval == 4 * SECOND


@given(
    st.floats(min_value=5e-324, max_value=1.7e308),
    st.lists(st.integers(0, 2**63), max_size=10),
    st.integers(0, 2**63),
)
def test_every_rate_and_clock_gets_an_answer(frequency: float, times: list[int], now: int) -> None:
    """Neither extreme frequencies nor a clock that jumps raise anything."""
    rule = LoopRule(frequency)
    assert triggers(rule, times, now) in (True, False)
    assert instantaneous_frequency(times, now) >= 0
    assert average_frequency(times, now, rule.interval) >= 0


@given(st.binary(max_size=200))
def test_any_bytes_get_an_answer_about_loops(raw: bytes) -> None:
    """Whatever bytes a message is made of, none of the questions raises."""
    for start in (b"", b"From: ", b"Auto-Submitted: ", b"To: a@b.example\nX-Original-To: "):
        message = Message.from_bytes(start + raw)
        assert auto_response(message) in (True, False)
        assert is_bcc(message) in (True, False)
        assert len(sender_of(message)) <= 320
        assert len(loop_headers(message, ("From", "To"))) == 2
