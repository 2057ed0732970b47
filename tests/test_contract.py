"""What holds between any two processes that use one depot, whatever the storage.

Each test takes two seats, makes two changes, commits both in either order, and looks at the
outcome.  Whoever is refused gets a transient error, and nothing else; nothing is lost, and nothing
is there twice.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from transaction.interfaces import TransientError

from postoffice.claimed import ClaimedMessage
from postoffice.claims import Claims
from postoffice.depot.entry import Body, Entry
from postoffice.depot.ids import new_id
from postoffice.depot.lane import FIRST, SEGMENT_SIZE, Place, claim_of
from postoffice.exceptions import MessageTaken, QueueMissing, QueueNotEmpty
from postoffice.queue import BLOB_SIZE
from tests.depots import QUEUE, STORAGES, Depot, Seat, mail, one, postgresql_depot, subjects, two

__all__ = ["one", "two"]

CONTRACTORS = STORAGES | {
    "PostgreSQL-without-history": functools.partial(postgresql_depot, keep_history="false")
}
ORDERS = pytest.mark.parametrize("first", ["one first", "two first"])


@pytest.fixture(params=CONTRACTORS)
def depot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Depot]:
    """A depot in each kind of storage."""
    with CONTRACTORS[request.param](tmp_path) as opened:
        yield opened


def commits(seat: Seat) -> bool:
    """Commit, and tell whether that went well; a failure is a transient error."""
    try:
        seat.commit()
    except TransientError:
        seat.abort()
        return False
    return True


def commit_both(first: str, one: Seat, two: Seat) -> tuple[bool, bool]:
    """Commit both seats in this order; return whether that of `one` and that of `two` went well."""
    if first == "one first":
        went = commits(one)
        return went, commits(two)
    went = commits(two)
    return commits(one), went


def exactly_one(first: str, one: Seat, two: Seat) -> None:
    """Commit both, and see that the first did and the other did not."""
    assert commit_both(first, one, two) == (first == "one first", first == "two first")


def take(seat: Seat) -> str:
    """Take the next message, without committing; return its subject."""
    return str(seat.queue.pop_next()["Subject"])


def take_all(seat: Seat) -> list[str]:
    """Take and commit all that there is; return the subjects."""
    seat.begin()
    taken = []
    while seat.queue:
        taken.append(take(seat))
        seat.commit()
    return taken


def look(seat: Seat) -> tuple[list[str], list[str]]:
    """Return the subjects in the queue and in quarantine, as a new transaction sees them."""
    seat.begin()
    waiting = subjects(seat.queue)
    quarantined = subjects(message for message, _ in seat.queue.get_quarantined_messages())
    assert (len(seat.queue), seat.queue.count_quarantined_messages()) == (
        len(waiting),
        len(quarantined),
    )
    return waiting, quarantined


def quarantined(seat: Seat, name: str) -> int:
    """Add a message and put it into quarantine; return its id."""
    seat.add(name)
    seat.begin()
    id = seat.queue.quarantine(seat.queue.pop_next(), "error")
    seat.commit()
    return id


def claimed(seat: Seat) -> ClaimedMessage:
    """Claim one message, and begin a transaction."""
    (held,) = seat.queue.claim()
    seat.begin()
    return held


def let_leases_end(seat: Seat) -> None:
    """Write into all claims that their time is over."""
    seat.begin()
    for lane in seat.record.all_lanes:
        for position, row in lane.claims.items(FIRST):
            lane.claims[position] = tuple(claim_of(row)._replace(until=1))
    seat.commit()


def entry_of(name: str) -> Entry:
    """Return a new entry, as a producer makes it."""
    return Entry({"id": new_id(), "arrived": 1, "size": 1, "digest": b"", "body": Body(mail(name))})


# -- adding, and what removes what is added to -----------------------------------------------------


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
    exactly_one(first, one, two)
    added = first == "two first"
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
    assert commit_both(first, one, two) == (True, True)
    assert take_all(one) == ["late"]


def test_what_one_adds_the_other_sees(one: Seat, two: Seat) -> None:
    """A message is there for others once it is committed, and from their next transaction on."""
    two.begin()
    assert look(two) == ([], [])
    one.begin()
    one.queue.add(mail("new"))
    assert look(two) == ([], [])
    one.commit()
    assert (subjects(two.queue), len(two.queue)) == ([], 0)
    assert look(two) == (["new"], [])
    assert two.queue.pop_next().raw == mail("new")


@ORDERS
def test_two_producers_in_one_lane_both_commit(one: Seat, two: Seat, first: str) -> None:
    """Producers that share a lane's segment do not meet: their additions are merged."""
    one.add("old")
    one.begin()
    two.begin()
    places = [one.record.append(entry_of("a")), two.record.append(entry_of("b"))]
    assert len({(place.lane, place.segment) for place in places}) == 1
    assert commit_both(first, one, two) == (True, True)
    waiting, _ = look(one)
    assert sorted(waiting) == ["a", "b", "old"]


@ORDERS
def test_two_producers_of_one_history_lose_nothing(one: Seat, two: Seat, first: str) -> None:
    """Of two that append to the same part of a history one has to try again; both are found."""
    one.add("old")
    adding = {"a": one, "b": two}
    for name, seat in adding.items():
        seat.begin()
        seat.queue.add(mail(name))
    exactly_one(first, one, two)
    again = "b" if first == "one first" else "a"
    adding[again].add(again)
    for seat in (one, two):
        waiting, _ = look(seat)
        assert sorted(waiting) == ["a", "b", "old"]
        assert all(seat.queue.is_duplicate(message) for message in seat.queue)


@ORDERS
def test_a_consumer_and_a_producer_both_commit(one: Seat, two: Seat, first: str) -> None:
    """A consumer that claims, takes and sweeps does not meet a producer."""
    one.add("a", "b", "c")
    one.begin()
    one.queue.pop_next()
    one.commit()
    two.begin()
    two.queue.add(mail("late"))
    one.begin()
    assert take(one) == "b"
    assert commit_both(first, one, two) == (True, True)
    assert look(one) == (["c", "late"], [])


@ORDERS
def test_two_that_have_one_id_do_not_both_commit(one: Seat, two: Seat, first: str) -> None:
    """Two processes that came to the same id: the second tries again, and nothing is replaced."""
    one.add("old")
    entries = [entry_of("a"), entry_of("b")]
    entries[1].id = entries[0].id
    for seat, entry in zip((one, two), entries, strict=True):
        seat.begin()
        seat.record.append(entry)
    exactly_one(first, one, two)
    assert look(one) == (["old", "a" if first == "one first" else "b"], [])


# -- taking ----------------------------------------------------------------------------------------


@ORDERS
def test_consumers_of_neighbours_both_commit(one: Seat, two: Seat, first: str) -> None:
    """Consumers take different messages, and their transactions do not meet."""
    one.add(*"abcd")
    one.begin()
    two.begin()
    assert [take(one), take(two), take(one), take(two)] == ["a", "b", "c", "d"]
    assert commit_both(first, one, two) == (True, True)
    assert look(one) == ([], [])
    assert take_all(two) == []


def test_of_two_claims_at_once_each_gets_its_own(one: Seat, two: Seat) -> None:
    """A claim that meets another one, made while it was looking, takes what is left."""
    one.add("a", "b")
    places = [place for place, _ in one.record.walk()]
    faster = Claims(two.connection, two.record._p_oid)
    slower = Claims(one.connection, one.record._p_oid)
    got: list[list[Place]] = []

    def look_at(place: Place) -> bool:
        if not got:
            got.append(faster.take(1))
        return True

    assert slower.take(2, look_at) == places[1:]
    assert got == [places[:1]]
    assert list(faster.held) == places[:1]


@ORDERS
def test_what_is_claimed_twice_is_a_conflict(one: Seat, two: Seat, first: str) -> None:
    """Of two that write a claim on one message one commits; on two messages, both do."""
    one.add("a", "b", "c")
    places = [place for place, _ in one.record.walk()]

    def claim(seat: Seat, place: Place, holder: str) -> None:
        row = (place.segment, holder, 1, 2, 0, 0)
        seat.record.lanes[place.lane].claims[place.position] = row

    one.begin()
    two.begin()
    claim(one, places[0], "one")
    claim(two, places[1], "two")
    assert commit_both(first, one, two) == (True, True)
    one.begin()
    two.begin()
    claim(one, places[2], "one")
    claim(two, places[2], "two")
    exactly_one(first, one, two)
    two.begin()
    rows = two.record.lanes[places[2].lane].claims
    assert rows[places[2].position][1] == first.removesuffix(" first")


@ORDERS
def test_two_holders_of_one_lease_pop_once(one: Seat, two: Seat, first: str) -> None:
    """When a lease ends while its holder still works, one of both holders commits."""
    one.add("a")
    one.begin()
    assert take(one) == "a"
    let_leases_end(two)
    two.begin()
    assert take(two) == "a"
    exactly_one(first, one, two)
    assert look(one) == ([], [])
    assert take_all(two) == []


@ORDERS
def test_two_holders_of_one_lease_acknowledge_once(one: Seat, two: Seat, first: str) -> None:
    """When a lease ends and another claims the message, one of both acknowledgements commits."""
    one.add("a")
    held = {one: claimed(one)}
    let_leases_end(two)
    held[two] = claimed(two)
    one.begin()
    assert held[one].id == held[two].id
    for seat, message in held.items():
        message.ack()
        assert len(seat.queue) == 0
    exactly_one(first, one, two)
    assert look(one) == ([], [])
    assert one.queue.claim() == two.queue.claim() == []


@ORDERS
def test_two_holders_of_one_lease_decide_once(one: Seat, two: Seat, first: str) -> None:
    """When one holder acknowledges and the other puts into quarantine, one of both commits."""
    one.add("a")
    held = claimed(one)
    let_leases_end(two)
    claimed(two).quarantine("no use")
    one.begin()
    held.ack()
    exactly_one(first, one, two)
    assert look(one) == (([], []) if first == "one first" else ([], ["a"]))


def test_a_lease_that_ended_is_not_given_back_twice(one: Seat, two: Seat) -> None:
    """Who lost a claim to another can neither defer nor hold it, and its release frees nothing."""
    one.add("a")
    held = claimed(one)
    let_leases_end(two)
    other = claimed(two)
    with pytest.raises(MessageTaken):
        held.defer(0)
    with pytest.raises(MessageTaken):
        held.renew()
    held.release()
    assert one.queue.claim() == []
    assert other.attempts == 1
    other.ack()
    assert commits(two)
    assert look(one) == ([], [])


@ORDERS
def test_acknowledging_and_claiming_at_once_both_work(one: Seat, two: Seat, first: str) -> None:
    """An acknowledgement writes the entry alone, so the claims of others do not meet it."""
    one.add(*"abc")
    held = claimed(one)
    held.ack()
    if first == "one first":
        assert commits(one)
    other = claimed(two)
    other.ack()
    if first != "one first":
        assert commits(one)
    assert commits(two)
    assert (held.message["Subject"], other.message["Subject"]) == ("a", "b")
    assert look(one) == (["c"], [])


@ORDERS
def test_deferring_and_adding_at_once_lose_nothing(one: Seat, two: Seat, first: str) -> None:
    """A message that is deferred leaves its segment while a producer adds to it."""
    one.add("a")
    held = claimed(one)
    two.begin()
    two.queue.add(mail("late"))
    if first == "one first":
        held.defer(0)
        assert commits(two)
    else:
        assert commits(two)
        held.defer(0)
    assert look(one) == (["a", "late"], [])
    assert take_all(two) == ["a", "late"]


@ORDERS
def test_what_is_deferred_meanwhile_is_not_taken(one: Seat, two: Seat, first: str) -> None:
    """Of a holder that lost its lease and one that defers the message, one has its way."""
    one.add("a")
    one.begin()
    assert take(one) == "a"
    let_leases_end(two)
    (held,) = two.queue.claim()
    if first == "one first":
        assert commits(one)
        with pytest.raises(MessageTaken):
            held.defer(0)
        assert look(two) == ([], [])
    else:
        held.defer(0)
        assert not commits(one)
        assert look(two) == (["a"], [])
        assert take_all(two) == ["a"]


def test_an_abort_gives_back_at_once(one: Seat, two: Seat) -> None:
    """A message whose taking is aborted is the next one that another consumer gets."""
    one.add("a", "b")
    one.begin()
    assert take(one) == "a"
    two.begin()
    assert take(two) == "b"
    one.abort()
    two.commit()
    two.begin()
    assert take(two) == "a"
    two.commit()
    assert look(one) == ([], [])


def test_a_release_gives_back_at_once(one: Seat, two: Seat) -> None:
    """A claimed message that is released is in its place, for anybody."""
    one.add("a", "b")
    held = claimed(one)
    two.begin()
    assert take(two) == "b"
    two.abort()
    held.release()
    assert take_all(two) == ["a", "b"]


# -- quarantine ------------------------------------------------------------------------------------


@ORDERS
def test_a_pop_and_a_quarantine_at_once_are_one(one: Seat, two: Seat, first: str) -> None:
    """Of a consumer that takes a message and one that puts it into quarantine, one commits."""
    one.add("a")
    one.begin()
    two.begin()
    (message,) = two.queue
    assert take(one) == "a"
    two.queue.quarantine(message, "no use")
    exactly_one(first, one, two)
    assert look(one) == (([], []) if first == "one first" else ([], ["a"]))
    assert take_all(two) == []


@ORDERS
def test_two_quarantines_at_once_both_commit(one: Seat, two: Seat, first: str) -> None:
    """Consumers whose messages fail at the same time do not meet."""
    quarantined(one, "old")
    one.add("a", "b")
    for seat in (one, two):
        seat.begin()
        seat.queue.quarantine(seat.queue.pop_next(), "error")
    assert commit_both(first, one, two) == (True, True)
    waiting, kept = look(two)
    assert (waiting, sorted(kept)) == ([], ["a", "b", "old"])


@ORDERS
def test_a_message_is_requeued_once(one: Seat, two: Seat, first: str) -> None:
    """Of two administrators that requeue one message, one commits."""
    id = quarantined(one, "a")
    for seat in (one, two):
        seat.begin()
        seat.queue.requeue(id)
    exactly_one(first, one, two)
    assert look(one) == (["a"], [])
    assert take_all(two) == ["a"]


@ORDERS
def test_requeueing_and_adding_at_once_both_commit(one: Seat, two: Seat, first: str) -> None:
    """What is requeued is added like any other message."""
    id = quarantined(one, "a")
    one.begin()
    two.begin()
    one.queue.requeue(id)
    two.record.append(entry_of("b"))
    assert commit_both(first, one, two) == (True, True)
    assert sorted(take_all(two)) == ["a", "b"]


# -- removing a queue ------------------------------------------------------------------------------


@pytest.mark.parametrize("used", ["new", "used"])
@ORDERS
def test_removing_a_queue_never_loses_an_addition(
    one: Seat, two: Seat, first: str, used: str
) -> None:
    """Of a removal and an addition at once, one commits; what was added is reachable."""
    if used == "used":
        one.add("old")
        assert take_all(one) == ["old"]
    two.begin()
    two.queue.add(mail("late"))
    one.begin()
    one.folder.remove(QUEUE)
    exactly_one(first, one, two)
    one.begin()
    if first == "two first":
        assert subjects(one.queue) == ["late"]
        with pytest.raises(QueueNotEmpty, match="1 waiting and 0 quarantined"):
            one.folder.remove(QUEUE)
    else:
        assert one.folder.names() == []


@ORDERS
def test_removing_a_queue_never_loses_a_quarantined_message(
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
    exactly_one(first, one, two)
    one.begin()
    if first == "two first":
        assert subjects(found for found, _ in one.queue.get_quarantined_messages()) == ["bad"]
        with pytest.raises(QueueNotEmpty, match="0 waiting and 1 quarantined"):
            one.folder.remove(QUEUE)
    else:
        assert one.folder.names() == []


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
def test_a_queue_that_is_being_taken_from_is_not_removed(one: Seat, two: Seat, first: str) -> None:
    """A queue from which a message is being taken, uncommitted, is not empty."""
    one.add("held")
    two.begin()
    assert take(two) == "held"
    one.begin()
    with pytest.raises(QueueNotEmpty):
        one.folder.remove(QUEUE)
    one.abort()
    if first == "two first":
        two.commit()
        one.begin()
        one.folder.remove(QUEUE)
        one.commit()
    else:
        two.abort()
        one.begin()
        with pytest.raises(QueueNotEmpty):
            one.folder.remove(QUEUE)


def test_a_queue_with_a_claimed_or_deferred_message_is_not_removed(one: Seat, two: Seat) -> None:
    """What somebody holds, or is not due yet, is in the queue."""
    one.add("held")
    held = claimed(one)
    two.begin()
    with pytest.raises(QueueNotEmpty, match="1 waiting and 0 quarantined"):
        two.folder.remove(QUEUE)
    two.abort()
    held.defer(3600)
    two.begin()
    with pytest.raises(QueueNotEmpty, match="1 waiting and 0 quarantined"):
        two.folder.remove(QUEUE)


# -- blobs -----------------------------------------------------------------------------------------


def test_a_large_body_is_the_same_for_all(depot: Depot, one: Seat, two: Seat) -> None:
    """A message of the size of a blob is the same for each client, byte for byte, to the end."""
    body = random.Random(1).randbytes(BLOB_SIZE).hex()
    raw = mail("large", body=body)
    one.begin()
    id = one.queue.add(raw)
    one.queue.add(mail("small"))
    one.commit()
    two.begin()
    entry = two.queue.find(id)
    assert not isinstance(entry.body, Body)
    assert (entry.size, entry.digest) == (len(raw), hashlib.sha256(raw).digest())
    assert entry.read_raw() == raw
    message = two.queue.pop_next()
    assert message.raw == raw
    two.commit()
    two.begin()
    two.queue.quarantine(message, "error")
    two.commit()
    one.begin()
    one.queue.requeue(id)
    one.commit()
    assert take(one) == "small"
    one.commit()
    later = depot.seat()
    (held,) = later.queue.claim()
    assert held.message.raw == raw
    later.begin()
    held.ack()
    later.commit()
    assert look(one) == ([], [])
    assert message.raw == raw
