"""Claimed messages: held across transactions, given back, deferred, and lost with their holders."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transaction
from transaction.interfaces import NoTransaction, TransientError
from ZODB.POSException import ConflictError
from zope.interface.verify import verifyObject

from postoffice.claimed import ClaimedMessage
from postoffice.claims import Claims
from postoffice.depot.policy import Policy
from postoffice.exceptions import MessageMissing, MessageTaken
from postoffice.interfaces import Event, IClaimedMessage, IEventSink
from postoffice.queue import BLOB_SIZE, open_queue
from tests.depots import QUEUE, Depot, Seat, depot, local_depot, mail, one, seat, subjects, two

__all__ = ["depot", "local_depot", "one", "seat", "two"]

ROOT = Path(__file__).resolve().parent.parent


def claimed(seat: Seat) -> ClaimedMessage:
    """Claim one message, and begin a transaction."""
    (held,) = seat.queue.claim()
    seat.begin()
    return held


def waiting(seat: Seat) -> list[str]:
    """Return the subjects of what waits, held and deferred included."""
    seat.begin()
    return subjects(seat.queue)


def commits(seat: Seat) -> bool:
    """Commit, and tell whether that went well; only a transient error may come in between."""
    try:
        seat.commit()
    except TransientError:
        seat.abort()
        return False
    return True


def test_it_implements_the_interface(seat: Seat) -> None:
    """A claimed message keeps the contract's names and signatures."""
    seat.add("a")
    verifyObject(IClaimedMessage, claimed(seat))


def test_ack_joins_the_transaction(one: Seat, two: Seat) -> None:
    """An acknowledged message leaves with the commit; after an abort it is still claimed."""
    one.add("a", "b")
    held = claimed(one)
    assert held.message["Subject"] == "a"
    assert subjects(item.message for item in two.queue.claim(5)) == ["b"]
    one.connection.root()["work"] = "undone"
    held.ack()
    assert len(one.queue) == 1
    one.abort()
    assert "work" not in one.connection.root()
    assert waiting(two) == ["a", "b"]
    assert two.queue.claim() == []
    one.begin()
    one.connection.root()["work"] = "done"
    held.ack()
    one.commit()
    assert waiting(two) == ["b"]
    assert two.connection.root()["work"] == "done"
    one.begin()
    with pytest.raises(MessageTaken):
        held.ack()


def test_a_rollback_takes_an_ack_back(seat: Seat) -> None:
    """What is acknowledged behind a savepoint that is rolled back is claimed, and waits."""
    seat.add("a")
    held = claimed(seat)
    point = seat.transactions.savepoint()
    held.ack()
    point.rollback()
    assert len(seat.queue) == 1
    seat.commit()
    assert waiting(seat) == ["a"]
    held.ack()
    seat.commit()
    assert waiting(seat) == []


def test_a_claim_needs_no_transaction(depot: Depot) -> None:
    """With an explicit manager, claims are made, read and given back between transactions."""
    manager = transaction.TransactionManager(explicit=True)
    depot.seat().add("a")
    database = depot.seat().database
    with open_queue(database, QUEUE, transaction_manager=manager) as queue:
        (held,) = queue.claim()
        assert held.message.raw == mail("a")
        held.release()
        (held,) = queue.claim()
        with pytest.raises(NoTransaction):
            manager.get()
        manager.begin()
        held.ack()
        manager.commit()
        assert queue.claim() == []


def test_a_claim_is_seen(one: Seat, two: Seat) -> None:
    """Administrators see who holds what, since when and until when."""
    ids = one.add("a", "b")
    before = time.time_ns()
    (held,) = one.queue.claim(lease=7)
    two.begin()
    (status,) = two.queue.claims()
    assert (status.id, status.pid) == (ids[0], os.getpid())
    assert status.host
    assert before <= status.since == held.since <= time.time_ns()
    assert status.until - status.since == 7 * 10**9
    assert len(two.queue) == 2
    assert bool(two.queue) is True
    held.renew(100)
    two.begin()
    assert two.queue.claims()[0].until == held.until >= before + 100 * 10**9


def test_truth_is_what_can_be_taken(one: Seat, two: Seat) -> None:
    """The length counts what others hold; the truth does not."""
    one.add("a")
    held = claimed(one)
    two.begin()
    assert len(two.queue) == 1
    assert not two.queue
    two.abort()
    held.release()
    two.begin()
    assert two.queue


def test_given_back_it_is_at_its_place(one: Seat, two: Seat) -> None:
    """A released message is the first again, for anybody, and no attempt is counted."""
    one.add("a", "b")
    held = claimed(one)
    held.release()
    held.release()
    again = claimed(two)
    assert (again.message["Subject"], again.attempts, again.last_error) == ("a", 0, None)
    with pytest.raises(MessageTaken):
        held.ack()
    with pytest.raises(MessageTaken):
        held.defer(1)
    with pytest.raises(MessageTaken):
        held.renew()


def test_deferred_it_comes_when_it_is_due(one: Seat, two: Seat) -> None:
    """A deferred message is not to be had before its time, and then comes first."""
    ids = one.add("a", "b", "c")
    claimed(one).defer(3600)
    assert waiting(two) == ["a", "b", "c"]
    assert len(two.queue) == 3
    claimed(one).defer(-1)
    assert subjects(held.message for held in two.queue.claim(5)) == ["b", "c"]
    two.queue.release_claims()
    two.begin()
    assert two.queue.find(ids[0]).not_before > time.time_ns()
    assert two.queue.give_back(ids[0])
    two.commit()
    assert subjects(held.message for held in two.queue.claim(5)) == ["b", "a", "c"]


def test_deferred_messages_are_popped_too(one: Seat, two: Seat) -> None:
    """pop_next takes what is due again, and passes what is not."""
    one.add("a", "b", "c")
    claimed(one).defer(3600)
    claimed(one).defer(0)
    two.begin()
    assert two.queue.peek()["Subject"] == "b"
    assert [two.queue.pop_next()["Subject"] for _ in range(2)] == ["b", "c"]
    assert not two.queue
    assert len(two.queue) == 1
    two.commit()
    assert waiting(one) == ["a"]
    one.begin()
    assert not one.queue
    one.begin()
    one.queue.give_all_back()
    one.commit()
    two.begin()
    assert two.queue.pop_next()["Subject"] == "a"
    two.abort()
    two.begin()
    assert two.queue.pop_next()["Subject"] == "a"
    two.commit()
    assert waiting(one) == []
    one.begin()
    deferred = one.record.deferred
    assert deferred is not None
    two.queue.release()
    one.begin()
    assert not two.queue
    one.begin()
    assert [len(tree) for tree in (deferred.waiting, deferred.due, deferred.times)] == [1, 1, 1]


def test_failures_are_counted_and_told(one: Seat, two: Seat) -> None:
    """A deferral with an error counts an attempt and keeps the error; a requeue forgives them."""
    (id,) = one.add("a")
    claimed(one).defer(0, ValueError("no use"))
    held = claimed(two)
    assert held.attempts == 1
    assert held.last_error is not None
    assert held.last_error[:2] == ("ValueError", "no use")
    held.quarantine("given up")
    two.commit()
    one.begin()
    assert one.queue.find(id).attempts == 2
    one.queue.requeue(id)
    one.commit()
    assert claimed(one).attempts == 0
    assert one.queue.find(id).attempts == 2


def test_quarantine_joins_the_transaction(one: Seat, two: Seat) -> None:
    """A claimed message goes to quarantine with the commit; after an abort it is still claimed."""
    one.add("a")
    held = claimed(one)
    held.quarantine("bad")
    one.abort()
    assert waiting(two) == ["a"]
    one.begin()
    held.quarantine("bad")
    one.commit()
    assert waiting(two) == []
    ((message, error),) = two.queue.get_quarantined_messages()
    assert (message["Subject"], error.message) == ("a", "bad")
    assert two.queue.claim() == []


def test_the_queue_can_quarantine_it_too(one: Seat, two: Seat) -> None:
    """The quarantine method of the queue takes a claimed message, its claim or not."""
    one.add("a", "b")
    held = claimed(one)
    one.queue.quarantine(held.message, "bad")
    one.commit()
    other = claimed(one)
    two.begin()
    two.queue.quarantine(next(iter(two.queue)), "worse")
    two.commit()
    one.begin()
    with pytest.raises(MessageTaken):
        other.ack()
    with pytest.raises(MessageTaken):
        one.queue.quarantine(other.message, "late")
    assert waiting(two) == []
    assert two.queue.count_quarantined_messages() == 2


@pytest.mark.parametrize("first", ["one", "two"])
def test_of_two_holders_of_one_lease_one_commits(one: Seat, two: Seat, first: str) -> None:
    """When a lease has ended and another consumer holds the message, only one of both commits."""
    one.add("a")
    (held,) = one.queue.claim(lease=0.001)
    time.sleep(0.002)
    other = claimed(two)
    one.begin()
    held.ack()
    other.ack()
    order = [one, two] if first == "one" else [two, one]
    assert [commits(seat) for seat in order] == [True, False]
    assert waiting(one) == []


def test_an_ended_lease_returns_it_by_itself(one: Seat, two: Seat) -> None:
    """When a lease has ended the message is free, and counts one attempt for the lost holder."""
    one.add("a", "b")
    one.queue.claim(2, lease=0.001)
    time.sleep(0.002)
    first, second = two.queue.claim(5)
    assert (first.message["Subject"], first.attempts) == ("a", 1)
    assert (second.message["Subject"], second.attempts) == ("b", 0)
    first.release()
    assert claimed(one).attempts == 1


def test_what_a_dead_process_held_is_free_at_once(tmp_path: Path) -> None:
    """A killed process holds nothing; what it had in hand counts an attempt, and keeps counting."""
    from tests.depots import zeo_depot

    program = (
        "import os, sys, transaction\n"
        "from postoffice import open_queue\n"
        "queue, close = open_queue(sys.argv[1], 'app')\n"
        "held = queue.claim(3)\n"
        "transaction.begin()\n"
        "held[0].ack()\n"
        "if sys.argv[2] == 'first': transaction.commit()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with zeo_depot(tmp_path) as depot:
        seat = depot.seat()
        seat.add("a", "b", "c")
        for which in ("first", "none"):
            ended = subprocess.run(
                [sys.executable, "-c", program, depot.uri, which], cwd=ROOT, check=False
            )
            assert ended.returncode == -9
        seat.begin()
        assert len(seat.queue) == 2
        assert seat.queue.claims() == []
        held = seat.queue.claim(5)
        assert [(one.message["Subject"], one.attempts) for one in held] == [("b", 2), ("c", 0)]
        seat.begin()
        held[0].defer(0, "failed too")
        assert claimed(seat).attempts == 3


def test_closing_gives_back(depot: Depot, one: Seat) -> None:
    """What is claimed in a connection is free when that is closed."""
    one.add("a")
    other = depot.seat()
    held = claimed(other)
    assert one.queue.claim() == []
    other.close()
    assert len(one.queue.claim()) == 1
    assert held.message["Subject"] == "a"


def test_a_large_body_stays_readable(depot: Depot, one: Seat) -> None:
    """A claimed message of the size of a blob is read whenever that is asked for."""
    one.begin()
    raw = mail("large", body="x" * BLOB_SIZE)
    one.queue.add(raw)
    one.commit()
    other = depot.seat()
    held = claimed(other)
    held.ack()
    other.commit()
    other.close()
    assert held.message.raw == raw


def test_a_lost_body_stops_nobody(seat: Seat, tmp_path: Path) -> None:
    """A message whose body is gone is claimed with the others, and can go to quarantine."""
    seat.begin()
    seat.queue.add(mail("large", body="x" * BLOB_SIZE))
    seat.commit()
    seat.add("b")
    for path in tmp_path.rglob("*.blob"):
        path.unlink()
    lost, other = seat.queue.claim(5)
    assert other.message["Subject"] == "b"
    with pytest.raises((KeyError, OSError)):
        _ = lost.message
    seat.begin()
    lost.quarantine("its body is gone")
    seat.commit()
    assert waiting(seat) == ["b"]


def test_what_came_after_the_transaction_began_is_not_acknowledged(one: Seat, two: Seat) -> None:
    """An ack in a transaction that began before the message came is refused; it stays claimed."""
    one.begin()
    two.add("late")
    (held,) = one.queue.claim()
    with pytest.raises(MessageTaken):
        held.ack()
    one.begin()
    held.ack()
    one.commit()
    assert waiting(two) == []


def test_an_administrator_gives_back(one: Seat, two: Seat) -> None:
    """give_back frees what somebody holds, and that one cannot do anything with it any more."""
    ids = one.add("a", "b")
    held = claimed(one)
    two.begin()
    assert two.queue.give_back(str(ids[0]))
    assert not two.queue.give_back(ids[1])
    with pytest.raises(MessageMissing):
        two.queue.give_back(1)
    two.commit()
    assert claimed(two).message["Subject"] == "a"
    with pytest.raises(MessageTaken):
        held.defer(1)


def test_events_tell_of_acks_and_quarantines(seat: Seat) -> None:
    """The event sink is told of a message that was acknowledged or put into quarantine."""
    from zope.interface import implementer

    told: list[tuple[str, str]] = []

    @implementer(IEventSink)
    class Sink:
        def record(self, event: Event) -> None:
            told.append((event.kind, event.reason))

    seat.add("a", "b")
    seat.queue.event_sink = Sink()
    claimed(seat).ack()
    seat.commit()
    claimed(seat).quarantine("bad")
    seat.commit()
    assert told == [("taken", "taken"), ("quarantined", "application-error")]


@pytest.mark.parametrize(("limit", "lease"), [(0, None), (1, 0), (1, -1)])
def test_impossible_claims_are_refused(seat: Seat, limit: int, lease: float | None) -> None:
    """A limit below one, and a lease of no time, are programming errors."""
    with pytest.raises(ValueError, match="limit"):
        seat.queue.claim(limit, lease)


def test_the_policy_says_how_long_a_claim_holds(seat: Seat) -> None:
    """Without a lease of its own, a claim holds as long as the queue's policy says."""
    seat.record.set_policy(Policy(lease=42))
    seat.commit()
    seat.add("a")
    (held,) = seat.queue.claim()
    assert held.until - held.since == 42 * 10**9


def test_delays_grow_and_end() -> None:
    """Each delay is twice the one before, up to an hour, or to a longer one that was asked for."""
    policy = Policy(retry_delay=60)
    assert [policy.delay(failures) for failures in (1, 2, 3, 7, 5000)] == [60, 120, 240, 3600, 3600]
    assert Policy(retry_delay=7200).delay(3) == 7200
    assert Policy(retry_delay=0).delay(9) == 0


def test_many_deferred_cost_a_claim_nothing(seat: Seat) -> None:
    """With hundreds of messages deferred, a claim looks at those that can be taken alone."""
    seat.add(*(f"{number:04}" for number in range(600)))
    for held in seat.queue.claim(590):
        held.defer(3600)
    seat.begin()
    ready = list(seat.record.ready(time.time_ns()))
    assert len(ready) == 10
    assert len(seat.queue) == 600
    assert seat.record.count_deferred(time.time_ns()) == 590
    assert len(list(seat.queue.entries(limit=1000))) == 600
    assert sum(len(lane.segments) for lane in seat.record.lanes) < 10


def test_what_was_claimed_and_not_read_is_claimed_again(
    one: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the storage fails between the claim and the reading, the same consumer has the next."""
    one.add("a", "b")

    def fail(claims: Claims, work: object) -> None:
        raise ConflictError("the storage went away")

    with monkeypatch.context() as broken:
        broken.setattr(Claims, "read", fail)
        with pytest.raises(ConflictError):
            one.queue.claim(5)
    one.begin()
    assert len(one.queue.claims()) == 2
    assert subjects(held.message for held in one.queue.claim(5)) == ["a", "b"]
    assert one.queue.claim(5) == []


def test_a_claim_that_seemed_to_fail_is_taken_up(
    one: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the storage fails right after the claim's commit, the next claim has its messages."""
    one.add("a", "b")

    def fail(claims: Claims, places: object) -> None:
        raise ConflictError("the storage went away")

    with monkeypatch.context() as broken:
        broken.setattr(Claims, "_swept", fail)
        with pytest.raises(ConflictError):
            one.queue.claim(5)
    one.begin()
    assert len(one.queue.claims()) == 2
    assert subjects(held.message for held in one.queue.claim(5)) == ["a", "b"]
