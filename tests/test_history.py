"""The histories: duplicates within a day, senders' rates and throttles, all of bounded size."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postoffice.depot.history import (
    ARRIVAL_WIDTH,
    CHUNK_BYTES,
    DUPLICATE_SECONDS,
    DUPLICATE_WIDTH,
    ArrivalIndex,
    Arrivals,
    DuplicateIndex,
    HistoryLog,
    Throttles,
)
from postoffice.depot.lane import LANES
from postoffice.fingerprints import duplicate_digest, sender_digest, values_digest
from postoffice.message import Envelope, Message
from postoffice.queue import Queue
from tests.depots import Depot, Seat, depot, local_depot, mail, one, seat, two

__all__ = ["depot", "local_depot", "one", "seat", "two"]

NOW = 1_700_000_000
SECOND = 10**9


def message(
    *, id: str = "a", to: str = "b@example.org", body: str = "body", arrived: int = NOW * SECOND
) -> Message:
    """Return a message with an envelope."""
    raw = f"From: Harry <h@example.com>\nMessage-ID: <{id}@x>\nA: foo\nB: {id}\n\n{body}\n"
    return Message.from_bytes(raw.encode(), envelope=Envelope("h@example.com", (to,), arrived))


def at(seconds: int) -> datetime:
    """Return the time so many seconds after NOW."""
    return datetime.fromtimestamp(NOW + seconds, UTC)


# -- duplicates ------------------------------------------------------------------------------------


def test_the_same_message_is_a_duplicate_for_a_day(
    seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second before 24 hours have passed it is a duplicate; when they have, it is none."""
    clock = [float(NOW)]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "time_ns", lambda: int(clock[0] * SECOND))
    seat.begin()
    queue = seat.queue
    assert not queue.is_duplicate(message())
    queue.add(message())
    assert queue.is_duplicate(message())
    seat.commit()
    seat.begin()
    clock[0] = NOW + DUPLICATE_SECONDS - 1
    assert queue.is_duplicate(message())
    clock[0] = NOW + DUPLICATE_SECONDS
    assert not queue.is_duplicate(message())


def test_what_makes_a_duplicate(seat: Seat) -> None:
    """Another queue, recipient, body or Message-ID makes it another message; case does not."""
    seat.folder.make("other")
    seat.commit()
    seat.queue.add(message())
    seat.commit()
    seat.begin()
    assert seat.queue.is_duplicate(message())
    assert seat.queue.is_duplicate(message(to="B@Example.ORG"))
    assert not seat.named("other").is_duplicate(message())
    assert not seat.queue.is_duplicate(message(to="c@example.org"))
    assert not seat.queue.is_duplicate(message(body="other"))
    assert not seat.queue.is_duplicate(message(id="c"))


def test_an_abort_forgets(seat: Seat) -> None:
    """What was added and aborted, or rolled back, is no duplicate."""
    queue = seat.queue
    seat.begin()
    assert not queue.is_duplicate(message())
    queue.add(message())
    assert queue.is_duplicate(message())
    seat.abort()
    assert not queue.is_duplicate(message())
    savepoint = seat.transactions.savepoint()
    queue.add(message())
    savepoint.rollback()
    assert not queue.is_duplicate(message())
    queue.add(message(id="b"))
    assert queue.is_duplicate(message(id="b"))
    seat.commit()
    assert not queue.is_duplicate(message())
    assert queue.is_duplicate(message(id="b"))


def test_adding_first_and_asking_later_forgets_too(seat: Seat) -> None:
    """A queue that only added, without ever asking, gives right answers once it is asked."""
    seat.begin()
    seat.queue.add(message())
    assert seat.queue.is_duplicate(message())
    seat.abort()
    seat.begin()
    assert not seat.queue.is_duplicate(message())
    seat.queue.add(message(id="b"))
    seat.commit()
    assert seat.queue.is_duplicate(message(id="b"))
    assert not seat.queue.is_duplicate(message())


def test_importers_see_each_other(one: Seat, two: Seat) -> None:
    """What one producer has committed is a duplicate for the other from its next transaction on."""
    for round in range(3):
        for adding, other in ((one, two), (two, one)):
            new = message(id=f"{round} {adding is one}")
            adding.begin()
            other.begin()
            assert not other.queue.is_duplicate(new)
            assert not adding.queue.is_duplicate(new)
            adding.queue.add(new)
            adding.commit()
            other.begin()
            assert other.queue.is_duplicate(new)


def test_adding_reads_no_history(local: Depot) -> None:
    """An application that only adds reads no more than the end of the history."""
    first = local.seat()
    digests = [number.to_bytes(16, "big") for number in range(5000)]
    first.begin()
    for digest in digests:
        first.queue.histories.remember(digest, NOW)
    first.commit()
    chunks = [chunk for _, chunk in first.record.duplicates.chunks(NOW // 3600)]
    assert len(chunks) == -(-5000 * DUPLICATE_WIDTH // CHUNK_BYTES)
    second = local.seat()
    second.begin()
    second.queue.histories.remember(b"x" * 16, NOW)
    states = [chunk._p_changed for _, chunk in second.record.duplicates.chunks(NOW // 3600)]
    assert sum(state is not None for state in states) <= 2


def test_a_look_costs_the_same_however_long_the_history(seat: Seat) -> None:
    """After the first look, each transaction reads only what was appended since."""
    seat.begin()
    for number in range(20_000):
        seat.queue.histories.remember(number.to_bytes(16, "big"), NOW + number // 10)
    seat.commit()
    seat.begin()
    assert seat.queue.histories.seen((7).to_bytes(16, "big"), NOW)
    seat.commit()
    seat.connection.cacheMinimize()
    seat.begin()
    loads_before = seat.connection.getTransferCounts()[0]
    assert seat.queue.histories.seen((19_999).to_bytes(16, "big"), NOW)
    assert not seat.queue.histories.seen(b"x" * 16, NOW)
    # The record of the queue, the log, its tree of slots, and the ends of the last two slots.
    assert seat.connection.getTransferCounts()[0] - loads_before < 20


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # the producer
            st.integers(0, 40),  # the digest
            st.sampled_from([0, 1, 600, 3600, 9000]),  # seconds that pass
        ),
        max_size=120,
    )
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_an_index_answers_as_a_list_would(steps: list[tuple[int, int, int]]) -> None:
    """However additions are spread over producers and hours, each index knows all of the day."""
    history = HistoryLog(DUPLICATE_WIDTH, slot_seconds=3600, limit=10**6)
    indexes = [DuplicateIndex(history, LANES) for _ in range(3)]
    seen: dict[bytes, int] = {}
    now = NOW
    for producer, number, passed in steps:
        now += passed
        digest = number.to_bytes(16, "big")
        index = indexes[producer]
        index.begin()
        expected = digest in seen and now - seen[digest] < DUPLICATE_SECONDS
        assert index.seen(digest, now) == expected
        index.add(digest, now, producer)
        assert index.seen(digest, now)
        seen[digest] = now
    assert len(history) <= len(steps)
    assert len(history.numbers()) <= 26


def test_old_slots_go_as_a_whole() -> None:
    """A slot is dropped once all of it is older than a day, and the length says so."""
    history = HistoryLog(DUPLICATE_WIDTH, slot_seconds=3600, limit=10**6)
    index = DuplicateIndex(history, LANES)
    for hour in range(100):
        index.begin()
        index.add(hour.to_bytes(16, "big"), NOW + hour * 3600, 0)
    assert len(history.numbers()) <= 26
    assert len(history) == len(history.numbers())
    index.begin()
    assert len(index._seen) == len(history)


@pytest.mark.parametrize("hours", [1, 50], ids=["within an hour", "over many hours"])
def test_a_history_is_bounded(hours: int, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the limit the oldest records go early, with a warning, within one slot as well."""
    limit = 5000
    history = HistoryLog(DUPLICATE_WIDTH, slot_seconds=3600, limit=limit)
    index = DuplicateIndex(history, LANES)
    count = 40_000
    with caplog.at_level(logging.WARNING):
        for number in range(count):
            if number % 100 == 0:
                index.begin()
            seconds = NOW // 3600 * 3600 + number * hours * 3600 // count
            index.add(number.to_bytes(16, "big"), seconds, number % LANES)
            assert len(history) <= 2 * limit
        index.begin()
    assert index.seen((count - 1).to_bytes(16, "big"), seconds)
    assert not index.seen((0).to_bytes(16, "big"), seconds)
    assert len(index._seen) == len(history)
    stored = sum(len(c.data) for n in history.numbers() for _, c in history.chunks(n))
    assert stored == len(history) * DUPLICATE_WIDTH
    assert "of the oldest go early" in caplog.text


# -- rates -----------------------------------------------------------------------------------------


def test_instantaneous_frequency(seat: Seat) -> None:
    """It is the inverse of the time since the last message: 0 if none, infinite at once."""
    queue = seat.queue
    seat.begin()
    assert queue.get_instantaneous_frequency("Harry <h@example.com>", at(30)) == 0.0
    queue.collect_frequency_data(message())
    seat.commit()
    assert queue.get_instantaneous_frequency("Harry <h@example.com>", at(30)) == 2.0
    assert queue.get_instantaneous_frequency("H@Example.com", at(240)) == 0.25
    assert queue.get_instantaneous_frequency("h@example.com", at(0)) == float("inf")
    assert queue.get_instantaneous_frequency("other@example.com", at(30)) == 0.0


def test_instantaneous_frequency_by_headers(seat: Seat) -> None:
    """With values of headers, only messages that had these count."""
    queue = seat.queue
    seat.begin()
    queue.collect_frequency_data(message(id="bar"), headers=("A", "B"))
    queue.collect_frequency_data(message(id="baz", arrived=(NOW + 15) * SECOND), headers=("A", "B"))

    def asked(headers: dict[str, str] | None) -> float:
        return queue.get_instantaneous_frequency("h@example.com", at(30), headers)

    for _ in range(2):
        assert asked(None) == 4.0
        assert asked({"A": "foo", "B": "baz"}) == 4.0
        assert asked({"B": "bar", "a": "foo"}) == 2.0
        assert asked({"A": "mickey"}) == 0.0
        seat.commit()
    queue.collect_frequency_data(message(id="baz", arrived=(NOW + 20) * SECOND), headers=("A", "B"))
    assert asked({"A": "foo", "B": "baz"}) == 6.0
    seat.abort()
    assert asked({"A": "foo", "B": "baz"}) == 4.0


def test_average_frequency(seat: Seat) -> None:
    """It is the number of messages in the interval before now, the present one excluded."""
    queue = seat.queue
    seat.begin()
    for seconds in (0, 10, 60, 61):
        queue.collect_frequency_data(message(arrived=(NOW + seconds) * SECOND))
    seat.commit()

    def asked(now: int, minutes: int) -> float:
        return queue.get_average_frequency(
            "h@example.com", at(now), timedelta(minutes=minutes), headers=None
        )

    assert [asked(60, 1), asked(62, 2), asked(120, 2), asked(300, 1)] == [2.0, 2.0, 2.0, 0.0]


def test_rates_are_bounded(seat: Seat) -> None:
    """However many messages one sender sends, or senders there are, what is kept is bounded."""
    arrivals = Arrivals()
    index = ArrivalIndex(arrivals, LANES)
    for number in range(3000):
        if number % 50 == 0:
            index.begin()
        index.add(b"s" * 16, b"v" * 8, number * SECOND, NOW + number, 0, keep=600)
    index.begin()
    assert len(index.times(b"s" * 16, None)) <= 256
    assert index.times(b"s" * 16, b"v" * 8)[-1] == 2999 * SECOND
    assert len(arrivals.numbers()) <= 3
    assert len(arrivals) * ARRIVAL_WIDTH <= 3 * 600 * ARRIVAL_WIDTH


def test_slots_that_go_together_are_forgotten_together() -> None:
    """An index that slept while several slots went forgets them, and knows what came since."""
    arrivals = Arrivals()
    sleeper, other = ArrivalIndex(arrivals, LANES), ArrivalIndex(arrivals, LANES)
    for number in range(4):
        sleeper.begin()
        sleeper.add(b"s" * 16, b"v" * 8, number, NOW + number * 600, 0, keep=3600)
    sleeper.begin()
    assert len(sleeper.times(b"s" * 16, None)) == 4
    other.begin()
    other.add(b"s" * 16, b"v" * 8, 9, NOW + 100_000, 1, keep=3600)
    sleeper.begin()
    assert sleeper.times(b"s" * 16, None) == sleeper.times(b"s" * 16, b"v" * 8) == [9]


# -- throttles -------------------------------------------------------------------------------------


def test_a_throttle_ends(seat: Seat) -> None:
    """A sender is throttled up to the time given, whole, and not beyond; an abort undoes it."""
    queue = seat.queue
    seat.begin()
    later = datetime.now(UTC) + timedelta(minutes=5)
    for end in (seat.abort, seat.commit):
        assert not queue.is_throttled("Harry", later)
        queue.throttle("Harry", later)
        assert queue.is_throttled("harry", later)
        end()
    assert queue.is_throttled("Harry", later - timedelta(minutes=5))
    assert queue.is_throttled("Harry", later)
    assert not queue.is_throttled("Harry", later + timedelta(seconds=1))
    assert not queue.is_throttled("Sally", later)


def test_a_throttle_by_headers(seat: Seat) -> None:
    """A throttle with values of headers is one for these values alone."""
    queue = seat.queue
    seat.begin()
    later = datetime.now(UTC) + timedelta(minutes=5)
    headers = {"A": "foo", "B": "bar"}
    queue.throttle("Harry", later, headers)
    assert queue.is_throttled("Harry", later, {"b": "bar", "a": "foo"})
    assert not queue.is_throttled("Harry", later)
    assert not queue.is_throttled("Harry", later, {"A": "foo", "B": "baz"})


def test_throttles_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have ended go, and beyond the limit those that end first."""
    monkeypatch.setattr(Throttles, "limit", 100)
    throttles = Throttles()
    for number in range(1000):
        throttles.put(number.to_bytes(4, "big"), NOW + number, NOW)
        throttles.put(number.to_bytes(4, "big"), NOW + number, NOW)
    assert throttles.until((999).to_bytes(4, "big")) >= NOW + 999
    assert throttles.until((0).to_bytes(4, "big")) == 0
    assert len(throttles._until) == len(throttles._expiry) <= 100
    throttles.put(b"last", NOW + 5000, NOW + 4000)
    assert len(throttles._until) == len(throttles._expiry) == 1
    throttles.remove(b"last")
    throttles.remove(b"last")
    assert throttles.until(b"last") == 0


# -- fingerprints ----------------------------------------------------------------------------------


def test_fingerprints_tell_apart() -> None:
    """Values that run into each other when joined have different fingerprints."""
    pairs: list[tuple[Any, Any]] = [
        (values_digest([("a", "b")]), values_digest([("a", ""), ("b", "")])),
        (values_digest([("a", "bc")]), values_digest([("ab", "c")])),
        (sender_digest("a"), sender_digest("b")),
        (duplicate_digest(message(to="a")), duplicate_digest(message(to="b"))),
    ]
    assert all(left != right for left, right in pairs)
    assert values_digest([("A", "1"), ("b", "2")]) == values_digest([("B", "2"), ("a", "1")])


def test_without_an_envelope_the_topmost_recipient_counts() -> None:
    """Where the envelope is not known, X-Original-To and then Delivered-To stand for it."""
    tail = b"From: a@x\nMessage-ID: <1@x>\n\nbody\n"
    first = Message.from_bytes(b"X-Original-To: one@x\n" + tail)
    second = Message.from_bytes(b"X-Original-To: two@x\n" + tail)
    third = Message.from_bytes(b"Delivered-To: one@x\n" + tail)
    assert duplicate_digest(first) != duplicate_digest(second)
    assert duplicate_digest(first) == duplicate_digest(third)


def test_the_intake_and_the_application_count_the_same_senders(seat: Seat) -> None:
    """What is counted for a sender's address is found by the whole From header."""
    queue: Queue = seat.queue
    seat.begin()
    queue.histories.arrived(sender_digest("h@example.com"), b"v" * 8, NOW * SECOND, NOW, keep=3600)
    assert queue.get_instantaneous_frequency('"Harry" <H@example.com>', at(60)) == 1.0
    assert mail("a").startswith(b"Return-Path")
