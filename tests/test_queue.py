"""The queue as applications use it: taking, giving back, quarantine, requeueing, opening."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
import transaction
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from transaction.interfaces import TransientError
from ZODB.DB import DB
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from zope.interface import implementer
from zope.interface.verify import verifyClass, verifyObject

from postoffice.depot.folder import make_folder
from postoffice.depot.policy import Policy
from postoffice.exceptions import FolderMissing, MessageMissing, MessageTaken, QueueMissing
from postoffice.interfaces import Event, IEventSink, IQueue
from postoffice.message import Envelope, Message
from postoffice.queue import BLOB_SIZE, Queue, QueueEmpty, find_queue, open_queue
from tests.depots import (
    MAILS,
    QUEUE,
    Depot,
    Seat,
    depot,
    file_depot,
    local_depot,
    mail,
    one,
    seat,
    subjects,
    two,
)

__all__ = ["depot", "local_depot", "one", "seat", "two"]

LARGE = mail("large", body="x" * BLOB_SIZE)


def commits(seat: Seat) -> bool:
    """Commit; return whether there was no conflict."""
    try:
        seat.commit()
    except TransientError:
        seat.abort()
        return False
    return True


def take(seat: Seat) -> str:
    """Take the next message, without committing; return its subject."""
    return str(seat.queue.pop_next()["Subject"])


def look(seat: Seat) -> tuple[list[str], list[str]]:
    """Return the subjects in the queue and in quarantine, as a new transaction sees them."""
    seat.begin()
    queue = seat.queue
    waiting = subjects(queue)
    quarantined = subjects(message for message, _ in queue.get_quarantined_messages())
    assert len(queue) == len(waiting)
    assert queue.count_quarantined_messages() == len(quarantined)
    return waiting, quarantined


def failing(message: Message) -> Any:
    """Handle a message and fail; return what ``sys.exc_info()`` says of it."""
    try:
        raise ZeroDivisionError(f"no use for {message['Subject']}")
    except ZeroDivisionError:
        return sys.exc_info()


def test_it_keeps_its_contract(seat: Seat) -> None:
    """The queue provides IQueue."""
    assert verifyClass(IQueue, Queue)
    assert verifyObject(IQueue, seat.queue)


# -- two consumers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["one two", "two one"])
def test_consumers_get_different_messages(one: Seat, two: Seat, order: str) -> None:
    """Two consumers that take at the same time get different messages, and both commit."""
    one.add("a", "b")
    one.begin()
    two.begin()
    assert [take(one), take(two)] == ["a", "b"]
    first, second = (one, two) if order == "one two" else (two, one)
    assert commits(first)
    assert commits(second)
    assert look(one) == ([], [])
    with pytest.raises(QueueEmpty):
        one.queue.pop_next()


def test_an_abort_gives_back_at_once(one: Seat, two: Seat) -> None:
    """A message whose taking is aborted is the next one that another consumer gets."""
    one.add("a", "b")
    one.begin()
    assert take(one) == "a"
    one.abort()
    two.begin()
    assert take(two) == "a"
    one.begin()
    assert take(one) == "b"
    assert commits(two)
    assert commits(one)


def test_a_held_message_is_nobody_elses(one: Seat, two: Seat) -> None:
    """What one consumer has taken and not committed, another does not get."""
    one.add("a")
    one.begin()
    take(one)
    two.begin()
    with pytest.raises(QueueEmpty, match="no message to take from queue 'app' now"):
        two.queue.pop_next()
    assert not two.queue
    assert (len(two.queue), subjects(two.queue)) == (1, ["a"])
    one.commit()
    two.begin()
    assert len(two.queue) == 0


def test_a_failed_commit_gives_back_too(one: Seat, two: Seat) -> None:
    """After a conflict elsewhere in its transaction, the consumer holds nothing any more."""
    one.add("a")
    one.connection.root()["x"] = 0
    one.commit()
    one.begin()
    two.begin()
    one.connection.root()["x"] = 1
    two.connection.root()["x"] = 2
    assert take(one) == "a"
    two.commit()
    with pytest.raises(ConflictError):
        one.commit()
    one.abort()
    two.begin()
    assert take(two) == "a"


@pytest.mark.parametrize("order", ["one two", "two one"])
def test_an_expired_lease_is_taken_over_once(one: Seat, two: Seat, order: str) -> None:
    """Of two holders of one expired lease, the first to commit has it; the other conflicts."""
    one.add("a")
    one.record.set_policy(Policy(lease=0))
    one.commit()
    one.begin()
    two.begin()
    assert [take(one), take(two)] == ["a", "a"]
    first, second = (one, two) if order == "one two" else (two, one)
    assert commits(first)
    assert not commits(second)
    assert look(one) == ([], [])


def test_a_holder_that_is_gone_holds_nothing(depot: Depot, one: Seat) -> None:
    """What a consumer held that no longer exists is free at once, and the length right."""
    one.add("a", "b", "c")
    lost = depot.seat()
    lost.begin()
    queue = lost.queue
    assert take(lost) == "a"
    lost.commit()
    assert queue.pop_next()["Subject"] == "b"
    # As after a crash: nobody gave anything back.
    assert queue.taking.claims is not None
    queue.taking.claims.abandon()
    assert look(one) == (["b", "c"], [])
    one.begin()
    assert [take(one), take(one)] == ["b", "c"]
    one.commit()
    assert look(one) == ([], [])
    with pytest.raises(QueueEmpty):
        one.queue.pop_next()
    one.begin()
    assert sum(int(lane.length()) for lane in one.record.lanes) == 0


def test_a_transaction_may_drain_its_queue(one: Seat, caplog: pytest.LogCaptureFixture) -> None:
    """One transaction that takes all there is, and asks for more, ends as any other does."""
    one.add("a", "b", "c")
    one.begin()
    assert [take(one) for _ in range(3)] == ["a", "b", "c"]
    assert not one.queue
    one.commit()
    one.add("d")
    one.begin()
    assert take(one) == "d"
    one.commit()
    assert look(one) == ([], [])
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_truth_is_a_promise_among_consumers(one: Seat, two: Seat) -> None:
    """Once a queue said that it has a message to take, no other consumer takes that one."""
    one.add("a")
    one.begin()
    two.begin()
    assert one.queue
    assert not two.queue
    with pytest.raises(QueueEmpty):
        two.queue.pop_next()
    assert take(one) == "a"
    assert commits(one)


def test_a_look_holds_nothing_after_its_transaction(one: Seat, two: Seat) -> None:
    """A transaction that only asked whether there is a message holds none after its commit."""
    one.add("a")
    one.begin()
    assert one.queue
    one.commit()
    two.begin()
    assert take(two) == "a"


def test_an_old_snapshot_takes_what_it_knows(one: Seat, two: Seat) -> None:
    """Messages newer than the transaction are left to others, until the next one begins."""
    two.begin()
    assert not two.queue
    one.add("a")
    assert not two.queue
    with pytest.raises(QueueEmpty):
        two.queue.pop_next()
    one.begin()
    assert take(one) == "a"
    one.abort()
    two.begin()
    assert two.queue
    assert take(two) == "a"


def test_one_consumer_gets_them_in_order(one: Seat, two: Seat) -> None:
    """One consumer alone gets all messages in the order in which they came, whoever added them."""
    names = [f"{number:03}" for number in range(120)]
    for index, name in enumerate(names):
        (one if index % 2 else two).add(name)
    taken = []
    attempts = 0
    one.begin()
    while one.queue:
        taken.append(take(one))
        attempts += 1
        if attempts % 7 == 0:
            one.abort()
            del taken[-1]
        else:
            one.commit()
        one.begin()
        assert len(one.queue) == 120 - len(taken)
    assert taken == names


# -- one transaction -------------------------------------------------------------------------------


def test_taking_sees_its_own_additions(seat: Seat) -> None:
    """What was added comes behind what was there, may be taken at once, and is counted."""
    seat.add("a")
    seat.begin()
    seat.queue.add(mail("b"))
    assert (len(seat.queue), subjects(seat.queue), bool(seat.queue)) == (2, ["a", "b"], True)
    assert [take(seat), take(seat)] == ["a", "b"]
    assert (len(seat.queue), subjects(seat.queue), bool(seat.queue)) == (0, [], False)
    with pytest.raises(QueueEmpty):
        seat.queue.pop_next()
    with pytest.raises(QueueEmpty):
        seat.queue.peek()
    seat.commit()
    assert look(seat) == ([], [])
    assert [len(segment) for lane in seat.record.lanes for segment in lane.segments.values(1)] in (
        [1],
        [2],
    )


def test_an_abort_keeps_the_order(seat: Seat) -> None:
    """Several messages that were taken and aborted are back in their places."""
    seat.add("a", "b", "c", "d")
    seat.begin()
    assert [take(seat), take(seat), take(seat)] == ["a", "b", "c"]
    assert seat.queue.peek()["Subject"] == "d"
    assert subjects(seat.queue) == ["d"]
    seat.abort()
    assert look(seat) == (["a", "b", "c", "d"], [])
    assert seat.queue.peek()["Subject"] == "a"


def test_a_look_takes_nothing(seat: Seat) -> None:
    """Looking at the head, iterating, counting and asking for truth leave everything in place."""
    seat.add("a", "b")
    for _ in range(3):
        seat.begin()
        assert seat.queue.peek()["Subject"] == "a"
        assert (subjects(seat.queue), len(seat.queue), bool(seat.queue)) == (["a", "b"], 2, True)
        seat.commit()


def test_a_savepoint_gives_back_what_was_taken_after_it(seat: Seat) -> None:
    """A rollback puts back what was taken since, and commits keep it, in order."""
    seat.add("a", "b", "c", "d")
    seat.begin()
    assert take(seat) == "a"
    savepoint = seat.transactions.savepoint()
    assert [take(seat), take(seat)] == ["b", "c"]
    savepoint.rollback()
    assert subjects(seat.queue) == ["b", "c", "d"]
    assert len(seat.queue) == 3
    seat.commit()
    assert look(seat) == (["b", "c", "d"], [])
    assert [take(seat), take(seat), take(seat)] == ["b", "c", "d"]


def test_a_message_that_a_rollback_put_back_stays_there(one: Seat, two: Seat) -> None:
    """Taken, rolled back, committed: the message is neither lost nor held, whoever comes next."""
    one.add("a", "b")
    one.begin()
    take(one)
    savepoint = one.transactions.savepoint()
    message = one.queue.pop_next()
    savepoint.rollback()
    one.commit()
    one.begin()
    assert not one.queue.is_duplicate(mail_message("never seen"))
    one.commit()
    two.begin()
    assert take(two) == "b"
    two.commit()
    one.begin()
    with pytest.raises(MessageTaken):
        one.queue.quarantine(message, "late")


def mail_message(name: str) -> Message:
    """Return a small message, with an envelope."""
    return Message.from_bytes(mail(name), envelope=Envelope("a@example.com", ("b@example.org",), 1))


def test_a_savepoint_takes_back_what_was_added_after_it(seat: Seat) -> None:
    """A rollback undoes additions, also those that were taken already."""
    seat.begin()
    seat.queue.add(mail("a"))
    savepoint = seat.transactions.savepoint()
    seat.queue.add(mail("b"))
    assert [take(seat), take(seat)] == ["a", "b"]
    savepoint.rollback()
    assert (subjects(seat.queue), len(seat.queue)) == (["a"], 1)
    seat.queue.add(mail("c"))
    assert [take(seat), take(seat)] == ["a", "c"]
    savepoint.rollback()
    seat.commit()
    assert look(seat) == (["a"], [])
    assert take(seat) == "a"
    seat.commit()
    assert look(seat) == ([], [])


def test_a_quarantine_that_is_undone_keeps_the_message_in_its_place(seat: Seat) -> None:
    """Put to quarantine without being taken, then aborted: the message is at the head again."""
    ids = seat.add("a", "b")
    seat.begin()
    assert seat.queue
    (message,) = (message for message in seat.queue if message.id == ids[0])
    seat.queue.quarantine(message, "error")
    assert take(seat) == "b"
    with pytest.raises(QueueEmpty):
        seat.queue.pop_next()
    seat.abort()
    assert look(seat) == (["a", "b"], [])
    assert [take(seat), take(seat)] == ["a", "b"]


def test_a_queue_can_be_used_in_the_transaction_that_makes_it(local: Depot) -> None:
    """A queue just made can be added to, taken from and aborted before its first commit."""
    seat = local.seat()
    seat.begin()
    seat.folder.make("new")
    queue = seat.named("new")
    queue.add(mail("a"))
    queue.add(mail("b"))
    assert queue.pop_next()["Subject"] == "a"
    seat.commit()
    seat.begin()
    assert subjects(queue) == ["b"]
    assert queue.pop_next()["Subject"] == "b"


def test_a_queue_is_not_made_twice(seat: Seat) -> None:
    """Making a queue that there is already is refused, and what it holds stays."""
    seat.add("a")
    seat.begin()
    with pytest.raises(ValueError, match="'app'"):
        seat.folder.make(QUEUE)
    assert look(seat) == (["a"], [])


# -- quarantine ------------------------------------------------------------------------------------


def test_the_documented_loop(one: Seat, two: Seat) -> None:
    """Taken, failed, aborted, put to quarantine, committed: it is in quarantine alone."""
    ids = one.add("bad", "good")
    one.begin()
    message = one.queue.pop_next()
    error = failing(message)
    one.abort()
    one.queue.quarantine(message, error)
    one.commit()
    assert look(two) == (["good"], ["bad"])
    ((kept, said),) = two.queue.get_quarantined_messages()
    assert (kept.id, kept.raw) == (ids[0], mail("bad"))
    assert said[:2] == ("ZeroDivisionError", "no use for bad")
    assert "in failing" in said.traceback
    assert said.type == "ZeroDivisionError"
    assert two.queue.find(ids[0]).attempts == 1
    assert [take(two)] == ["good"]


def test_the_documented_loop_meets_another_consumer(one: Seat, two: Seat) -> None:
    """The message was taken elsewhere, and committed, after the abort: it is not quarantined."""
    one.add("bad")
    one.begin()
    message = one.queue.pop_next()
    one.abort()
    two.begin()
    assert take(two) == "bad"
    two.commit()
    one.begin()
    with pytest.raises(MessageTaken) as caught:
        one.queue.quarantine(message, failing(message))
    assert isinstance(caught.value, TransientError)
    one.abort()
    assert look(one) == ([], [])


@pytest.mark.parametrize("order", ["one two", "two one"])
def test_quarantine_and_a_pop_at_once_conflict(one: Seat, two: Seat, order: str) -> None:
    """Another consumer takes the message while it goes to quarantine: only one of both commits."""
    one.add("bad")
    one.begin()
    message = one.queue.pop_next()
    one.abort()
    two.begin()
    one.begin()
    one.queue.quarantine(message, "error")
    assert take(two) == "bad"
    first, second = (one, two) if order == "one two" else (two, one)
    assert commits(first)
    assert not commits(second)
    assert look(one) == ([], ["bad"] if first is one else [])
    assert look(two) == look(one)
    two.begin()
    with pytest.raises(QueueEmpty):
        two.queue.pop_next()


def test_quarantine_with_the_taking(seat: Seat) -> None:
    """Taken and put to quarantine in one transaction: an abort undoes both, a commit does both."""
    seat.add("bad")
    for end in (seat.abort, seat.commit):
        seat.begin()
        message = seat.queue.pop_next()
        seat.queue.quarantine(message, ValueError("bad"))
        assert len(seat.queue) == 0
        assert seat.queue.count_quarantined_messages() == 1
        end()
        waiting, quarantined = look(seat)
        assert [*waiting, *quarantined] == ["bad"]
    assert look(seat) == ([], ["bad"])


def test_quarantine_after_a_committed_taking(seat: Seat) -> None:
    """Taken, committed, then put to quarantine: it comes there with its id and its history."""
    seat.begin()
    raw = LARGE
    id = seat.queue.add_entry(
        {
            "arrived": 5,
            "way": "maildir",
            "source": "1.M1.host",
            "size": len(raw),
            "digest": b"",
            "marks": ("Throttled",),
            "sender": "x@example.com",
            "archive": "place",
        },
        raw,
    ).id
    seat.commit()
    for attempt in range(2):
        seat.begin()
        message = seat.queue.pop_next()
        seat.commit()
        seat.begin()
        seat.queue.quarantine(message, "error")
        seat.commit()
        entry = seat.queue.find(id)
        assert (entry.way, entry.source, entry.archive, entry.marks, entry.attempts) == (
            "maildir",
            "1.M1.host",
            "place",
            ("Throttled",),
            attempt + 1,
        )
        assert look(seat) == ([], ["large"])
        (kept,) = (found for found, _ in seat.queue.get_quarantined_messages())
        assert (kept.id, kept.raw) == (id, raw)
        assert kept.envelope == Envelope("x@example.com", (), 5)
        seat.queue.requeue(id)
        seat.commit()


def test_quarantine_of_a_message_from_elsewhere(seat: Seat) -> None:
    """A message that never was in a queue gets an id and is kept; so is one of the stdlib's."""
    seat.begin()
    own = Message.from_bytes(mail("ours"))
    other = EmailMessage()
    other["Subject"] = "theirs"
    ids = [seat.queue.quarantine(message, "error") for message in (own, other)]
    assert own.id == ids[0]
    seat.commit()
    assert look(seat) == ([], ["ours", "theirs"])
    assert seat.queue.get_quarantined_message(str(ids[1]))["Subject"] == "theirs"
    seat.queue.remove_from_quarantine(own)
    seat.queue.remove_from_quarantine(seat.queue.get_quarantined_message(ids[1]))
    with pytest.raises(ValueError, match="not in the quarantine"):
        seat.queue.remove_from_quarantine(own)
    seat.commit()
    assert look(seat) == ([], [])


def test_quarantine_twice(one: Seat, two: Seat) -> None:
    """A message that is in quarantine is not put there again, in whatever transaction."""
    one.add("bad")
    one.begin()
    message = one.queue.pop_next()
    one.queue.quarantine(message, "first")
    with pytest.raises(MessageTaken, match="in quarantine already"):
        one.queue.quarantine(message, "second")
    one.commit()
    one.begin()
    with pytest.raises(MessageTaken, match="in quarantine already"):
        one.queue.quarantine(message, "third")
    one.abort()
    ((_, error),) = one.queue.get_quarantined_messages()
    assert error == ("", "first", "")
    one.queue.remove_from_quarantine(message)
    one.commit()
    one.begin()
    with pytest.raises(MessageTaken):
        one.queue.quarantine(message, "after its end")
    assert look(two) == ([], [])


def test_errors_are_text(seat: Seat) -> None:
    """Whatever the application's error is, what is kept is plain text of bounded length."""

    class Rude(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    def raised(error: Exception) -> Any:
        try:
            raise error
        except type(error):
            return sys.exc_info()

    seat.begin()
    errors = [
        raised(Rude()),
        (None, None, None),
        None,
        "x" * 10**6,
        raised(ValueError("y" * 10**6)),
    ]
    for number, error in enumerate(errors):
        seat.queue.quarantine(Message.from_bytes(mail(str(number))), error)
    seat.commit()
    kept = [error for _, error in seat.queue.get_quarantined_messages()]
    assert kept[0].type.endswith("Rude")
    assert kept[0].message == "(unprintable: RuntimeError)"
    assert kept[1] == kept[2] == ("", "", "")
    assert max(len(text) for error in kept for text in error) <= 64 * 1024
    assert pickle.loads(pickle.dumps([tuple(error) for error in kept])) == kept


# -- requeueing ------------------------------------------------------------------------------------


def quarantine_all(seat: Seat, *names: str) -> list[int]:
    """Put messages of these subjects to quarantine, and commit; return their ids."""
    ids = seat.add(*names)
    for _ in names:
        seat.begin()
        message = seat.queue.pop_next()
        seat.queue.quarantine(message, "error")
        seat.commit()
    return ids


def test_requeueing_goes_behind_the_tail(one: Seat, two: Seat) -> None:
    """What is requeued comes behind the present tail, in order of arrival, with the same ids."""
    ids = quarantine_all(one, "a", "b", "c")
    one.begin()
    for id, arrived in zip(ids, (3, 1, 2), strict=True):
        one.queue.find(id).arrived = arrived
    one.queue.add(mail("tail"))
    one.commit()
    one.begin()
    assert one.queue.requeue_quarantined_messages() == 3
    assert one.queue.requeue_quarantined_messages() == 0
    one.commit()
    assert look(two) == (["tail", "b", "c", "a"], [])
    assert [entry.id for entry in two.queue.entries()][1:] == [ids[1], ids[2], ids[0]]
    assert two.queue.find(ids[1]).state == "queued"
    pages = list(two.queue.entries(limit=2))
    pages += two.queue.entries(pages[-1].id, 2)
    assert [entry.subject for entry in pages] == ["tail", "b", "c", "a"]
    assert [take(two) for _ in range(4)] == ["tail", "b", "c", "a"]
    two.commit()
    assert look(one) == ([], [])
    with pytest.raises(MessageMissing, match=str(ids[1])):
        one.queue.find(ids[1])


def test_requeueing_twice(seat: Seat) -> None:
    """What is not in quarantine any more cannot be requeued or discarded."""
    (id,) = quarantine_all(seat, "a")
    seat.begin()
    message = seat.queue.get_quarantined_message(id)
    seat.queue.requeue(str(id))
    for wrong in (id, 0, -1, 1 << 70, "nonsense"):
        with pytest.raises(MessageMissing):
            seat.queue.requeue(wrong)
        with pytest.raises(KeyError):
            seat.queue.get_quarantined_message(wrong)
    with pytest.raises(MessageMissing):
        seat.queue.remove_from_quarantine(message)
    seat.commit()
    assert look(seat) == (["a"], [])


def test_a_message_can_fail_again_and_again(one: Seat, two: Seat) -> None:
    """Taken, quarantined and requeued many times, a message keeps its id and counts attempts."""
    (id,) = one.add("a")
    for attempt in range(1, 6):
        one.begin()
        message = one.queue.pop_next()
        one.abort()
        one.begin()
        assert one.queue.quarantine(message, "error") == id
        one.commit()
        two.begin()
        assert two.queue.find(id).attempts == attempt
        two.queue.requeue(id)
        two.commit()
        assert look(one) == (["a"], [])
    one.begin()
    assert (one.queue.pop_next().id, len(one.record.moved)) == (id, 2)
    one.commit()
    one.begin()
    assert not one.queue
    one.commit()
    one.begin()
    assert (len(one.record.moved), len(one.record.moved_ids)) == (1, 1)


@pytest.mark.parametrize("order", ["one two", "two one"])
def test_requeueing_while_others_consume(one: Seat, two: Seat, order: str) -> None:
    """Requeueing does not meet a consumer."""
    quarantine_all(one, "a")
    one.add("b", "c")
    two.begin()
    assert take(two) == "b"
    one.begin()
    assert one.queue.requeue_quarantined_messages() == 1
    first, second = (one, two) if order == "one two" else (two, one)
    assert commits(first)
    assert commits(second)
    assert look(one) == (["c", "a"], [])


@pytest.mark.parametrize("order", ["one two", "two one"])
def test_requeueing_and_discarding_at_once_conflict(one: Seat, two: Seat, order: str) -> None:
    """Of a requeueing and a discarding of one message, one commits."""
    (id,) = quarantine_all(one, "a")
    one.begin()
    two.begin()
    one.queue.requeue(id)
    two.queue.remove_from_quarantine(two.queue.get_quarantined_message(id))
    first, second = (one, two) if order == "one two" else (two, one)
    assert commits(first)
    assert not commits(second)
    assert look(one) == ((["a"], []) if first is one else ([], []))


# -- listings --------------------------------------------------------------------------------------


def test_listings_page_by_id(seat: Seat) -> None:
    """A page begins behind the id at which the one before ended, in either state."""
    names = [f"{number:03}" for number in range(130)]
    seat.add(*names)
    listed: list[str] = []
    after = None
    while page := list(seat.queue.entries(after, 40)):
        assert len(page) <= 40
        listed += [entry.subject for entry in page]
        after = page[-1].id
    assert listed == names
    for _ in range(3):
        seat.begin()
        seat.queue.quarantine(seat.queue.pop_next(), "error")
        seat.commit()
    first = list(seat.queue.entries(None, 2, "quarantined"))
    rest = list(seat.queue.entries(first[-1].id, 2, "quarantined"))
    assert [entry.subject for entry in [*first, *rest]] == names[:3]
    assert list(seat.queue.entries(limit=0)) == []


def test_listings_read_no_bodies(local: Depot) -> None:
    """Listing entries loads no body from the database."""
    local.seat().add("a", "b")
    seat = local.seat()
    seat.begin()
    bodies = [entry.body for entry in seat.queue.entries() if entry.subject]
    assert [body._p_changed for body in bodies] == [None, None]


# -- events ----------------------------------------------------------------------------------------


@implementer(IEventSink)
class Sink:
    """Keeps the events in the database, and so in the transaction that makes the change."""

    def __init__(self, root: Any) -> None:
        self.root = root

    def record(self, event: Event) -> None:
        self.root["events"] = [*self.root.get("events", []), (event.id, event.kind, event.reason)]


def test_every_change_of_state_is_an_event(seat: Seat) -> None:
    """A sink is told of each change in the transaction that makes it, and of no undone one."""
    sink = Sink(seat.connection.root())
    assert verifyObject(IEventSink, sink)
    queue = seat.queue
    queue.event_sink = sink
    id = queue.add(mail("a"))
    seat.commit()
    queue.pop_next()
    seat.abort()
    message = queue.pop_next()
    queue.quarantine(message, "error")
    seat.commit()
    queue.requeue(id)
    seat.commit()
    queue.quarantine(queue.pop_next(), "error")
    queue.remove_from_quarantine(message)
    seat.commit()
    assert sink.root["events"] == [
        (id, "added", "added-by-application"),
        (id, "taken", "taken"),
        (id, "quarantined", "application-error"),
        (id, "requeued", "requeued"),
        (id, "taken", "taken"),
        (id, "quarantined", "application-error"),
        (id, "discarded", "removed"),
    ]


# -- what is stored --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(MAILS.glob("*")), ids=lambda path: path.name)
def test_bytes_come_out_as_they_went_in(path: Path, plain: Queue) -> None:
    """What the application gets of a mail is its bytes, with our headers in front, readable."""
    raw = path.read_bytes()
    id = plain.add(raw)
    plain.record._p_jar.transaction_manager.commit()
    message = plain.pop_next()
    plain.record._p_jar.transaction_manager.commit()
    assert message.raw == raw
    assert (message.id, message.queue_name) == (id, QUEUE)
    assert message.get_all("X-Postoffice-Id") == [str(id)]
    assert message["X-Postoffice-Date"].isdigit()
    assert message.as_bytes().startswith(b"X-Postoffice-Id: %d" % id)
    assert isinstance(message.get_payload(), str | list)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    """A queue in a depot that the tests of a module share."""
    with file_depot(tmp_path_factory.mktemp("plain")) as depot:
        yield depot.seat().queue


def test_forged_headers_are_not_believed(seat: Seat) -> None:
    """Headers of ours that came with the mail are out of sight, and stay in its bytes."""
    raw = b"X-Postoffice-Id: 1\nX-postoffice-rejected: Throttled\n" + mail("a")
    seat.begin()
    id = seat.queue.add(raw)
    message = seat.queue.pop_next()
    assert message.get_all("X-Postoffice-Id") == [str(id)]
    assert message.get_all("X-Postoffice-Rejected") is None
    assert b"Throttled" not in message.as_bytes()
    assert message.raw == raw


@pytest.mark.parametrize("size", [BLOB_SIZE - 1, BLOB_SIZE, BLOB_SIZE + 1])
def test_large_bodies_are_blobs(local: Depot, size: int, tmp_path: Path) -> None:
    """From BLOB_SIZE bytes on a body is a blob; either way its bytes come out as they went in."""
    seat = local.seat()
    raw = mail("a").ljust(size, b"x")
    seat.begin()
    seat.queue.add(raw)
    seat.commit()
    blobs = list((tmp_path / "blobs").rglob("*.blob"))
    assert [path.stat().st_size for path in blobs] == ([size] if size >= BLOB_SIZE else [])
    other = local.seat()
    other.begin()
    assert other.queue.pop_next().raw == raw


def test_a_storage_without_blobs_keeps_large_bodies_in_records() -> None:
    """Where there is no place for blobs, a large body is a record."""
    database = DB(MappingStorage())
    manager = transaction.TransactionManager()
    connection = database.open(manager)
    make_folder(connection.root(), "postoffice").make(QUEUE)
    manager.commit()
    queue = find_queue(connection.root(), QUEUE)
    queue.add(LARGE)
    manager.commit()
    assert queue.pop_next().raw == LARGE
    manager.commit()
    connection.close()
    database.close()


# -- opening and closing ---------------------------------------------------------------------------


def test_open_queue_closes_only_what_it_opened(local: Depot) -> None:
    """Given a database it closes its connection, twice without harm, and not the database."""
    seat = local.seat()
    seat.add("a")
    queue, close = open_queue(seat.database, QUEUE)
    assert queue.pop_next()["Subject"] == "a"
    close()
    close()
    assert look(seat) == (["a"], [])
    with open_queue(seat.database, QUEUE, "/postoffice") as queue:
        assert queue.pop_next()["Subject"] == "a"
        transaction.commit()
    assert look(seat) == ([], [])


def test_leaving_the_block_aborts(local: Depot) -> None:
    """What is not committed at the end of a ``with`` block never was; an error comes through."""
    seat = local.seat()
    seat.add("a")

    def failing_application() -> None:
        with open_queue(seat.database, QUEUE) as queue:
            queue.add(mail("b"))
            queue.pop_next()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_application()
    assert look(seat) == (["a"], [])
    seat.begin()
    assert take(seat) == "a"


def test_open_queue_by_uri(tmp_path: Path) -> None:
    """Given a URI it opens the database and leaves no lock behind; names may hold spaces."""
    uri = f"file://{tmp_path}/depot.fs?blobstorage_dir={tmp_path}/blobs"
    with file_depot(tmp_path) as depot:
        seat = depot.seat()
        seat.folder.make("two words é")
        seat.commit()
    with open_queue(uri, "two words é") as queue:
        queue.add(mail("a"))
        transaction.commit()
    queue, close = open_queue(uri, "two words é")
    assert subjects(queue) == ["a"]
    close()
    for error, name, path, said in (
        (QueueMissing, "other", "postoffice", r"no queue 'other'; there are: 'app', 'two words é'"),
        (FolderMissing, QUEUE, "elsewhere", r"no depot at '/elsewhere'.* there are: 'postoffice'"),
    ):
        with pytest.raises(error, match=said):
            open_queue(uri, name, path)
    with open_queue(uri, QUEUE) as queue:
        assert len(queue) == 0


def test_open_queue_by_the_uri_of_a_server(depot: Depot) -> None:
    """With a server it opens a client, works, and leaves no connection behind, also on failure."""
    # SQLite keeps the descriptors of a file that this process has open elsewhere, for its locks.
    if depot.uri.startswith(("file:", "sqlite:")):
        return
    seat = depot.seat()
    seat.add("a", "b")
    before = set(os.listdir("/proc/self/fd"))
    with open_queue(depot.uri, QUEUE) as queue:
        message = queue.pop_next()
        transaction.commit()
    with pytest.raises(QueueMissing, match="there are: 'app'"):
        open_queue(depot.uri, "other")
    # The client's own thread closes the last of its descriptors.
    until = time.monotonic() + 10
    while not set(os.listdir("/proc/self/fd")) <= before and time.monotonic() < until:
        time.sleep(0.01)
    assert set(os.listdir("/proc/self/fd")) <= before
    assert message["Subject"] == "a"
    assert look(seat) == (["b"], [])


def test_a_database_can_be_closed_with_messages_taken(tmp_path: Path) -> None:
    """Closing the database under an open queue gives back what was taken."""
    uri = f"file://{tmp_path}/depot.fs?blobstorage_dir={tmp_path}/blobs"
    with file_depot(tmp_path) as depot:
        seat = depot.seat()
        seat.add("a")
        seat.begin()
        assert take(seat) == "a"
        seat.database.close()
        with contextlib.suppress(AttributeError):
            seat.connection.close()
        depot._seats.clear()
    with open_queue(uri, QUEUE) as queue:
        assert queue.pop_next()["Subject"] == "a"


@pytest.mark.parametrize("raw", [mail("small"), LARGE], ids=["small", "large"])
def test_a_message_outlives_its_connection(local: Depot, raw: bytes) -> None:
    """A message can be read after the connection is closed and the database packed."""
    seat = local.seat()
    seat.begin()
    seat.queue.add(raw)
    seat.commit()
    with open_queue(seat.database, QUEUE) as queue:
        message = queue.pop_next()
        transaction.commit()
        assert not queue
        transaction.commit()
    seat.database.pack()
    with open_queue(seat.database, QUEUE) as queue:
        assert len(queue) == 0
    assert message.raw == raw
    assert pickle.loads(pickle.dumps(message)).raw == raw


def test_find_queue_with_an_explicit_manager(local: Depot) -> None:
    """An application with an explicit transaction manager begins, takes and commits by itself."""
    seat = local.seat()
    seat.add("a")
    manager = transaction.TransactionManager(explicit=True)
    connection = seat.database.open(manager)
    for end in (manager.abort, manager.commit):
        manager.begin()
        queue = find_queue(connection.root(), QUEUE)
        assert queue.pop_next()["Subject"] == "a"
        end()
    connection.close()
    assert look(seat) == ([], [])


def test_find_queue_in_pyramid(tmp_path: Path) -> None:
    """A Pyramid application with pyramid_zodbconn takes messages request by request."""
    from pyramid.config import Configurator
    from pyramid.request import Request
    from pyramid.response import Response
    from pyramid_zodbconn import get_connection

    def view(request: Any) -> Any:
        queue = find_queue(get_connection(request).root(), QUEUE)
        try:
            with transaction.manager:
                subject = str(queue.pop_next()["Subject"])
                if "fail" in request.params:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            return Response("failed")
        return Response(subject)

    uri = f"file://{tmp_path}/depot.fs?blobstorage_dir={tmp_path}/blobs"
    with file_depot(tmp_path) as depot:
        depot.seat().add("a", "b")
    config = Configurator(settings={"zodbconn.uri": uri})
    config.include("pyramid_zodbconn")
    config.add_view(view)
    app = config.make_wsgi_app()
    paths = ["/?fail=1", "/", "/"]
    answers = [Request.blank(path).get_response(app).text for path in paths]
    assert answers == ["failed", "a", "b"]
    for database in config.registry._zodb_databases.values():
        database.close()


def test_a_pool_does_not_grow(seat: Seat) -> None:
    """A consumer that takes many messages from one connection leaves nothing behind in it."""
    seat.add(*(str(number) for number in range(200)))
    taken = 0
    seat.begin()
    while seat.queue:
        take(seat)
        seat.commit()
        taken += 1
    assert taken == 200
    callbacks = seat.connection._Connection__onCloseCallbacks
    assert callbacks is None or len(callbacks) <= 1


# -- anything, in any order ------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """A depot against plain lists: the committed ones, and those of one open transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.depot = self.stack.enter_context(file_depot(Path(folder)))
        self.seat = self.depot.seat()
        self.other: Seat | None = None
        self.count = 0
        self.waiting: list[str] = []
        self.quarantine: list[str] = []
        self.now = (self.waiting, self.quarantine)
        self.saved: tuple[Any, list[str], list[str]] | None = None
        self.held: list[Message] = []
        self.seat.begin()

    def teardown(self) -> None:
        self.stack.close()

    def changed(self, waiting: list[str], quarantine: list[str]) -> None:
        self.now = (waiting, quarantine)

    @rule(large=st.sampled_from([False, False, False, True]))
    def add(self, large: bool) -> None:
        self.count += 1
        name = f"m{self.count}"
        self.seat.queue.add(mail(name, body="x" * BLOB_SIZE if large else ""))
        self.changed([*self.now[0], name], self.now[1])

    @rule()
    def pop(self) -> None:
        waiting, quarantine = self.now
        if not waiting:
            assert not self.seat.queue
            with pytest.raises(QueueEmpty):
                self.seat.queue.pop_next()
            return
        assert self.seat.queue
        assert self.seat.queue.peek()["Subject"] == waiting[0]
        self.held.append(self.seat.queue.pop_next())
        assert self.held[-1]["Subject"] == waiting[0]
        self.changed(waiting[1:], quarantine)

    @precondition(lambda self: self.held)
    @rule()
    def put_to_quarantine(self) -> None:
        """Of the last message taken, whatever became of its transaction since."""
        message = self.held.pop()
        name = str(message["Subject"])
        waiting, quarantine = self.now
        if name in quarantine:
            with pytest.raises(MessageTaken):
                self.seat.queue.quarantine(message, "error")
            return
        self.seat.queue.quarantine(message, "error")
        self.changed([other for other in waiting if other != name], [*quarantine, name])

    @rule()
    def requeue(self) -> None:
        waiting, quarantine = self.now
        ordered = sorted(quarantine, key=lambda name: int(name[1:]))
        assert self.seat.queue.requeue_quarantined_messages() == len(quarantine)
        self.changed(waiting + ordered, [])

    @rule()
    def discard(self) -> None:
        waiting, quarantine = self.now
        for message, _ in self.seat.queue.get_quarantined_messages():
            self.seat.queue.remove_from_quarantine(message)
            name = str(message["Subject"])
            # It is at its end: what was held of it is not used again.
            self.held = [held for held in self.held if held["Subject"] != name]
            self.changed(waiting, [other for other in quarantine if other != name])
            break

    @rule()
    def commit(self) -> None:
        self.seat.commit()
        self.waiting, self.quarantine = self.now
        self.saved = None
        self.seat.begin()

    @rule()
    def abort(self) -> None:
        self.seat.abort()
        self.undone((self.waiting, self.quarantine))
        self.saved = None
        self.seat.begin()

    def undone(self, now: tuple[list[str], list[str]]) -> None:
        self.now = now
        # Only what was taken from the queue as it is now known may be put to quarantine.
        self.held = [held for held in self.held if str(held["Subject"]) in now[0]]

    @rule()
    def savepoint(self) -> None:
        self.saved = (self.seat.transactions.savepoint(), *self.now)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def rollback(self) -> None:
        assert self.saved is not None
        savepoint, waiting, quarantine = self.saved
        savepoint.rollback()
        self.undone((waiting, quarantine))

    @precondition(lambda self: self.now == (self.waiting, self.quarantine))
    @rule(commits=st.booleans())
    def another_consumer(self, commits: bool) -> None:
        """Takes what this one does not hold, after this one's transaction came to its end."""
        self.commit()
        other = self.other = self.other or self.depot.seat()
        other.begin()
        taken = other.queue.pop_next()["Subject"] if other.queue else None
        assert taken == (self.waiting[0] if self.waiting else None)
        if commits:
            other.commit()
            other.queue.release()
            self.waiting = self.waiting[1:]
            self.held = [held for held in self.held if held["Subject"] != taken]
        else:
            other.abort()
        self.seat.begin()
        self.now = (self.waiting, self.quarantine)

    @rule()
    def reopen(self) -> None:
        self.seat.close()
        self.seat = self.depot.seat()
        self.seat.begin()
        self.saved = None
        self.held.clear()
        self.now = (self.waiting, self.quarantine)

    @invariant()
    def both_agree(self) -> None:
        waiting, quarantine = self.now
        queue = self.seat.queue
        assert subjects(queue) == waiting
        assert len(queue) == len(waiting)
        assert [entry.subject for entry in queue.entries()] == waiting
        kept = subjects(message for message, _ in queue.get_quarantined_messages())
        assert sorted(kept) == sorted(quarantine)
        assert queue.count_quarantined_messages() == len(quarantine)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
