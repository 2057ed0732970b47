"""Lanes and segments: what producers, consumers and sweepers do to them at once.

Each test takes two seats, makes two changes, commits both in either order, and looks at the
outcome, on a FileStorage and on ZEO.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import ConflictError

from postoffice.depot.entry import Body, Entry
from postoffice.depot.ids import new_id
from postoffice.depot.lane import SEGMENT_SIZE, Lane, Place
from postoffice.exceptions import QueueMissing, QueueNotEmpty
from tests.depots import QUEUE, Seat, depot, local_depot, mail, one, seat, subjects, two

__all__ = ["depot", "local_depot", "one", "seat", "two"]

ORDERS = pytest.mark.parametrize("first", ["producer first", "other first"])


def commit_both(first: str, producer: Seat, other: Seat) -> tuple[bool, bool]:
    """Commit both seats in this order; return whether the producer's and the other's went well."""
    went = {}
    order = [producer, other] if first == "producer first" else [other, producer]
    for committing in order:
        try:
            committing.commit()
            went[committing] = True
        except ConflictError:
            committing.abort()
            went[committing] = False
    return went[producer], went[other]


def take_all(seat: Seat) -> list[str]:
    """Take and commit all that there is; return the subjects."""
    seat.begin()
    taken = []
    while seat.queue:
        taken.append(str(seat.queue.pop_next()["Subject"]))
        seat.commit()
    return taken


def entry_of(name: str) -> Entry:
    """Return a new entry, as a producer makes it."""
    return Entry({"id": new_id(), "arrived": 1, "size": 1, "digest": b"", "body": Body(mail(name))})


@ORDERS
def test_unlinking_a_segment_never_loses_what_is_added_to_it(
    one: Seat, two: Seat, first: str
) -> None:
    """A drained segment that is unlinked while a producer adds to it: never do both commit."""
    one.add(*(f"old {number}" for number in range(SEGMENT_SIZE - 1)))
    two.begin()
    place = two.record.append(entry_of("late"))
    one.add("last of the first segment", "first of the second segment")
    places = [place for place, _ in one.record.walk()]
    for gone in places[: SEGMENT_SIZE - 1]:
        one.record.sweep(gone)
    one.commit()
    one.begin()
    assert places[SEGMENT_SIZE - 1].segment == place.segment != places[-1].segment
    one.record.sweep(places[SEGMENT_SIZE - 1])
    assert place.segment not in one.record.lanes[place.lane].segments
    added, swept = commit_both(first, two, one)
    assert (added, swept) == ((True, False) if first == "producer first" else (False, True))
    one.begin()
    assert ("late" in subjects(one.queue)) == added
    assert len(one.queue) == len(list(one.queue))
    assert ("late" in take_all(one)) == added


@ORDERS
def test_sweeping_the_last_segment_never_loses_what_is_added(
    one: Seat, two: Seat, first: str
) -> None:
    """The only segment stays linked when it is drained, so an addition meanwhile is found."""
    one.add("old")
    two.begin()
    two.queue.add(mail("late"))
    one.begin()
    (place, _entry) = next(one.record.walk())
    one.record.sweep(place)
    added, swept = commit_both(first, two, one)
    assert added or swept
    one.begin()
    assert ("late" in take_all(one)) == added


def test_a_drained_segment_is_unlinked_by_a_later_claim(one: Seat) -> None:
    """A segment that was the last when it was drained goes once it is not the last any more."""
    one.add("old")
    place, _ = next(one.record.walk())
    lane = one.record.lanes[place.lane]
    one.record.sweep(place)
    one.commit()
    lane.segments[place.position + 1] = type(lane.segments)({0: None})
    one.commit()
    assert len(lane.segments) == 3
    one.add("new")
    assert take_all(one) == ["new"]
    one.begin()
    assert len(one.record.lanes[place.lane].segments) == 2


@ORDERS
def test_removing_an_empty_queue_never_loses_an_addition(one: Seat, two: Seat, first: str) -> None:
    """Of a removal and an addition at once, one commits; what was added is reachable."""
    two.begin()
    two.queue.add(mail("late"))
    one.begin()
    one.folder.remove(QUEUE)
    added, removed = commit_both(first, two, one)
    assert (added, removed) == ((True, False) if first == "producer first" else (False, True))
    one.begin()
    if added:
        assert subjects(one.queue) == ["late"]
        with pytest.raises(QueueNotEmpty, match="1 waiting and 0 quarantined"):
            one.folder.remove(QUEUE)
    else:
        assert one.folder.names() == []


@ORDERS
def test_removing_a_used_queue_never_loses_an_addition(one: Seat, two: Seat, first: str) -> None:
    """The same in a queue that was used and drained: its segment is there already."""
    one.add("old")
    take_all(one)
    two.begin()
    two.queue.add(mail("late"))
    one.begin()
    one.folder.remove(QUEUE)
    added, removed = commit_both(first, two, one)
    assert (added, removed) == ((True, False) if first == "producer first" else (False, True))


@ORDERS
def test_removing_an_empty_queue_never_loses_a_quarantined_message(
    one: Seat, two: Seat, first: str
) -> None:
    """Of a removal and a quarantine at once, one commits; what is in quarantine is reachable."""
    one.add("bad")
    two.begin()
    message = two.queue.pop_next()
    two.commit()
    two.begin()
    two.queue.quarantine(message, "no use")
    one.begin()
    one.folder.remove(QUEUE)
    kept, removed = commit_both(first, two, one)
    assert (kept, removed) == ((True, False) if first == "producer first" else (False, True))
    one.begin()
    if kept:
        assert subjects(found for found, _ in one.queue.get_quarantined_messages()) == ["bad"]
        with pytest.raises(QueueNotEmpty, match="0 waiting and 1 quarantined"):
            one.folder.remove(QUEUE)


def test_a_removed_queue_takes_nothing_more(one: Seat, two: Seat) -> None:
    """Who still has a queue that was removed is told so on adding, and loses nothing."""
    two.begin()
    assert len(two.queue) == 0
    one.begin()
    one.folder.remove(QUEUE)
    one.commit()
    two.begin()
    with pytest.raises(QueueMissing):
        two.queue.add(mail("late"))
    two.abort()
    with pytest.raises(QueueMissing):
        two.queue.quarantine(two.queue.message(entry_of("x")), "error")


@ORDERS
def test_removal_and_a_pop_at_once_lose_nothing(one: Seat, two: Seat, first: str) -> None:
    """A queue from which a message is being taken, uncommitted, is not empty."""
    one.add("held")
    two.begin()
    assert two.queue.pop_next()["Subject"] == "held"
    one.begin()
    with pytest.raises(QueueNotEmpty):
        one.folder.remove(QUEUE)
    one.abort()
    if first == "producer first":
        two.commit()
        one.begin()
        one.folder.remove(QUEUE)
        one.commit()
    else:
        two.abort()
        one.begin()
        with pytest.raises(QueueNotEmpty):
            one.folder.remove(QUEUE)


@ORDERS
def test_two_producers_in_one_lane_both_commit(one: Seat, two: Seat, first: str) -> None:
    """Producers that share a lane's segment do not meet: their additions are merged."""
    one.add("old")
    one.begin()
    two.begin()
    one.record.append(entry_of("a"))
    two.record.append(entry_of("b"))
    assert commit_both(first, two, one) == (True, True)
    one.begin()
    assert sorted(subjects(one.queue)) == ["a", "b", "old"]
    assert len(one.queue) == 3


@ORDERS
def test_a_claim_and_an_addition_at_once_both_commit(one: Seat, two: Seat, first: str) -> None:
    """A consumer that claims, takes and sweeps does not meet a producer."""
    one.add("a", "b", "c")
    one.begin()
    one.queue.pop_next()
    one.commit()
    two.begin()
    two.record.append(entry_of("late"))
    one.begin()
    one.queue.pop_next()
    assert commit_both(first, two, one) == (True, True)
    one.begin()
    assert subjects(one.queue) == ["c", "late"]


@given(st.lists(st.tuples(st.integers(1, 400), st.booleans()), max_size=200))
def test_a_lane_is_a_sorted_list(changes: list[tuple[int, bool]]) -> None:
    """Whatever is added and swept, a lane holds what a sorted list would, in order."""
    lane = Lane()
    segments: dict[int, int] = {}
    last = 0
    for step, added in changes:
        if added or not segments:
            last += step
            segments[last] = lane.add(last, Entry({"id": last, "position": last}))
        else:
            position = sorted(segments)[step % len(segments)]
            lane.sweep(Place(0, segments.pop(position), position))
            lane.drop_drained_head()
    walked = [position for _, position, _ in lane.walk()]
    assert walked == sorted(segments)
    assert int(lane.length()) == len(segments)
    assert all(lane.find(position) == key for position, key in segments.items())
    middle = last // 2
    assert [position for _, position, _ in lane.walk(middle)] == [
        position for position in sorted(segments) if position > middle
    ]
    keys = [key for key in lane.segments if key]
    assert all(one < other for one, other in pairwise(keys))
    assert all(len(lane.segments[key]) <= SEGMENT_SIZE + 1 for key in keys)


def test_a_position_that_is_taken_is_a_conflict(one: Seat, two: Seat) -> None:
    """Two processes that had the same idea of an id: the second tries again, and both are there."""
    one.begin()
    one.add("first")
    one.commit()
    two.begin()
    position = next(iter(two.queue.entries())).position
    lane = next(lane for lane in two.queue.record.lanes if lane.find(position) is not None)
    with pytest.raises(ConflictError):
        lane.add(position, next(iter(two.queue.entries())))
    two.abort()
    assert [message["Subject"] for message in one.queue] == ["first"]
