"""Ids: growing, unlike those of other processes, and within 63 bits."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from postoffice.depot import ids
from postoffice.depot.ids import ID_BITS, IdGenerator, new_id, producer_number


@given(st.integers(0, 2**20), st.lists(st.integers(0, 4 * 10**18), min_size=1, max_size=50))
def test_ids_grow_whatever_the_clock_does(producer: int, times: list[int]) -> None:
    """Each id is greater than the one before, has at most 63 bits, and carries its producer."""
    generator = IdGenerator(producer)
    last = -1
    for now in times:
        id = generator.next(now)
        assert last < id < 1 << ID_BITS
        assert id >> 10 & 0x3FFF == producer & 0x3FFF
        last = id


def test_ids_follow_the_clock() -> None:
    """Ids made later are greater, also those of other producers, 10 ms apart or more."""
    first, second = IdGenerator(0x3FFF), IdGenerator(0)
    now = time.time_ns()
    assert first.next(now) < second.next(now + 10_000_000)


def test_more_ids_than_a_tick_has_room_for_run_ahead() -> None:
    """When a tick is used up, the next one's ids are used; none comes twice."""
    generator = IdGenerator(5)
    made = [generator.next(0) for _ in range(5000)]
    assert made == sorted(set(made))


def test_threads_share_a_generator() -> None:
    """No id comes twice, however many threads ask."""
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: new_id(), range(4000)))
    assert len(set(made)) == 4000


def test_a_forked_process_is_another_producer() -> None:
    """After a fork the child does not go on with its parent's sequence."""
    before = ids._generator
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"other" if ids._generator is not before else b"same")
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"other"
    assert ids._generator is before
    assert producer_number() == before.producer
