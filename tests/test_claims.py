"""Claims: who is gone, who is not, and what is taken, swept and given back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from postoffice import claims
from postoffice.claims import Claims, holder_is_gone
from postoffice.depot.lane import Place
from tests.depots import Depot, Seat, depot, local_depot, one, seat, two

__all__ = ["depot", "local_depot", "one", "seat", "two"]


@pytest.fixture
def mine(seat: Seat) -> Claims:
    """One consumer's claims on a queue of three."""
    seat.add("a", "b", "c")
    return Claims(seat.connection, seat.record._p_oid)


def claimed(seat: Seat) -> dict[int, str]:
    """Return the holders of claims, by position."""
    seat.begin()
    return {
        position: claim[1] for lane in seat.record.lanes for position, claim in lane.claims.items(1)
    }


def places(seat: Seat) -> list[Place]:
    seat.begin()
    return [place for place, _ in seat.record.walk()]


def test_claims_are_seen_at_once(seat: Seat, mine: Claims) -> None:
    """What one claims no other gets; given back, it does."""
    other = Claims(seat.connection, seat.record._p_oid)
    all_places = places(seat)
    assert mine.take(2) == all_places[:2]
    assert other.take(5) == all_places[2:]
    assert mine.take(5) == other.take(5) == []
    assert set(claimed(seat).values()) == {mine.holder, other.holder}
    mine.release()
    assert mine.held == {}
    assert other.take(1) == all_places[:1]
    other.release()
    other.release()
    assert claimed(seat) == {}


def test_an_expired_claim_is_free(seat: Seat, mine: Claims) -> None:
    """A claim is good for its lease; what another took over is not given back by the first."""
    other = Claims(seat.connection, seat.record._p_oid)
    assert len(mine.take(5, lease=0)) == 3
    assert len(other.take(5)) == 3
    mine.release()
    assert set(claimed(seat).values()) == {other.holder}
    assert mine.take(5) == []


def test_what_has_gone_is_swept(seat: Seat, mine: Claims) -> None:
    """A finished message is taken out of its segment with the next claim, or the release."""
    first, second, third = mine.take(5)
    seat.begin()
    for place in (first, second):
        entry = seat.record.lanes[place.lane].get(place)
        assert entry is not None
        entry.state = "done"
    seat.commit()
    mine.finish([first])
    mine.release()
    assert places(seat) == [third]
    assert claimed(seat) == {}
    assert seat.record.waiting() == 1


def test_only_what_the_caller_knows_of_is_claimed(seat: Seat, mine: Claims) -> None:
    """Messages that the caller's transaction does not see yet are left to others."""
    all_places = places(seat)
    assert mine.take(5, lambda place: place == all_places[1]) == [all_places[1]]


def holder(
    *, machine: str = claims._MACHINE, pid: int | None = None, start: str | None = None
) -> str:
    """Return the name of a holder, by default one in this process."""
    pid = os.getpid() if pid is None else pid
    return f"{machine}:{pid}:{claims._started(pid) if start is None else start}:0123456789ab"


def test_who_is_gone(mine: Claims) -> None:
    """Gone: a holder let go of, a process that ended or whose number another got, an old boot."""
    host, boot, space = claims._MACHINE.split("/", 2)
    parent = os.getppid()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended_holder = holder(pid=ended.pid)
    ended.wait()
    assert not holder_is_gone(mine.holder)
    assert holder_is_gone(holder())
    assert not holder_is_gone(holder(pid=parent))
    assert holder_is_gone(holder(pid=parent, start="1"))
    assert holder_is_gone(ended_holder)
    assert holder_is_gone(holder(pid=2**22 + 1, start=""))
    assert holder_is_gone(holder(machine=f"{host}/another boot/{space}"))
    assert not holder_is_gone(holder(machine=f"{host}/{boot}/another space"))
    assert not holder_is_gone(holder(machine=f"elsewhere/another boot/{space}"))


def test_a_holder_ends_with_its_claims(seat: Seat, mine: Claims) -> None:
    """Claims of a queue object that was let go of without closing are free in the same process."""
    other = Claims(seat.connection, seat.record._p_oid)
    assert len(other.take(5)) == 3
    assert mine.take(5) == []
    del other
    assert len(mine.take(5)) == 3


def test_claiming_at_once_is_retried(depot: Depot) -> None:
    """Two that claim the same message at the same time do not both get it."""
    one, two = depot.seat(), depot.seat()
    one.add("a", "b")
    first = Claims(one.connection, one.record._p_oid)
    second = Claims(two.connection, two.record._p_oid)
    rivals: Iterator[list[Place]] = (second.take(1) for _ in range(1))

    def meanwhile(place: Place) -> bool:
        # In the middle of the first one's claim, the second makes its own.
        next(rivals, None)
        return True

    (place,) = first.take(1, meanwhile)
    assert second.held
    assert place not in second.held


def test_what_was_swept_meanwhile_is_not_claimed(depot: Depot) -> None:
    """A message that another took and swept out while it was being claimed is not handed out."""
    one, two = depot.seat(), depot.seat()
    one.add("a", "b")
    first = Claims(one.connection, one.record._p_oid)

    def take_and_sweep() -> Iterator[None]:
        two.begin()
        assert two.queue.pop_next()["Subject"] == "a"
        two.commit()
        two.begin()
        assert two.queue
        two.abort()
        yield

    rival = take_and_sweep()

    def meanwhile(place: Place) -> bool:
        next(rival, None)
        return True

    one.begin()
    (place,) = [place for place, entry in one.record.walk() if entry.subject == "b"]
    assert first.take(1, meanwhile) == [place]
    assert set(first.held) == {place}
    first.release()
    assert claimed(one) == {}
