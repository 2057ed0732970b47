"""Lanes and segments, as one process sees them; tests/test_contract.py has what several do."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import ConflictError

from postoffice.depot.entry import Entry
from postoffice.depot.lane import SEGMENT_SIZE, Lane, Place
from tests.depots import Seat, local_depot, seat, subjects

__all__ = ["local_depot", "seat"]


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


def test_a_drained_segment_is_unlinked_by_a_later_claim(seat: Seat) -> None:
    """A segment that was the last when it was drained goes once it is not the last any more."""
    seat.add("old")
    place, _ = next(seat.record.walk())
    lane = seat.record.lanes[place.lane]
    seat.record.sweep(place)
    seat.commit()
    lane.segments[place.position + 1] = type(lane.segments)({0: None})
    seat.commit()
    assert len(lane.segments) == 3
    seat.add("new")
    seat.begin()
    assert seat.queue.pop_next()["Subject"] == "new"
    seat.commit()
    seat.begin()
    assert not seat.queue
    assert len(seat.record.lanes[place.lane].segments) == 2


def test_a_position_that_is_taken_is_a_conflict(seat: Seat) -> None:
    """A process that comes to an id that another one has used meets a conflict, and tries again."""
    seat.add("first")
    seat.begin()
    place, entry = next(seat.record.walk())
    with pytest.raises(ConflictError):
        seat.record.lanes[place.lane].add(place.position, entry)
    seat.abort()
    assert subjects(seat.queue) == ["first"]
