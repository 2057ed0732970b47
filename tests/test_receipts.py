"""Receipts: what comes again, because its acknowledgement was lost, is known, and stored once."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest
from transaction import TransactionManager
from ZODB.POSException import ConflictError
from zope.interface import implementer

from postoffice.depot.history import CHUNK_BYTES
from postoffice.depot.lane import LANES
from postoffice.depot.receipts import RECEIPT_SECONDS, ReceiptIndex, Receipts
from postoffice.interfaces import Event, IEventSink
from postoffice.queue import Queue
from tests.deposits import ANN, BILLING, QUEUES, SALES, SECOND, Counter
from tests.depots import STORAGES, Depot, Seat, local_depot
from tests.spools import EPOCH, Spool, large, mail
from tests.zeo_server import ZeoServer

__all__ = ["local_depot"]

QUEUED = "250 2.0.0 queued"
BEFORE = "250 2.0.0 received before"
NOW = EPOCH // SECOND
DAY = 24 * 60 * 60


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """A site whose queues go by the recipient's domain."""
    rules = "reject_filters =\n    header_regexp: ^Subject: spam\n"
    return Spool(tmp_path / "site", rules, queues=QUEUES)


@pytest.fixture
def counter(spool: Spool) -> Iterator[Counter]:
    """Where messages for that site are deposited."""
    with Counter(spool) as found:
        yield found


# -- what is the same ------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [mail("one"), large("one")], ids=["small", "large"])
def test_the_same_delivery_again(counter: Counter, raw: bytes) -> None:
    """A message that was stored and comes again is acknowledged, and stored once."""
    for told in (QUEUED, BEFORE, BEFORE):
        assert counter.told(counter.consignment(raw)) == [[told]]
    assert counter.raws() == [raw]
    assert counter.archived() == []


def test_the_same_delivery_in_a_file(counter: Counter) -> None:
    """Whether it was in memory or in a file, a message that comes again is the same."""
    raw = large("one", 1_500_000)
    assert counter.told(counter.consignment(raw)) == [[QUEUED]]
    with counter.filed(raw) as again:
        assert counter.told(again) == [[BEFORE]]


def test_the_same_delivery_twice_in_a_commit(counter: Counter) -> None:
    """Of two deliveries of a message in one commit the second is known by the first."""
    pair = [counter.consignment(mail("one"), BILLING, SALES) for _ in range(2)]
    assert counter.told(*pair) == [[QUEUED] * 2, [BEFORE] * 2]
    assert (len(counter.raws()), len(counter.raws("sales"))) == (1, 1)


@pytest.mark.parametrize("subject", ["spam", "hopeless"])
def test_what_was_not_queued_is_kept_once(counter: Counter, subject: str) -> None:
    """What was archived or set aside, and comes again, is not kept a second time."""
    for again in (False, True):
        ((told,),) = counter.told(counter.consignment(mail(subject)))
        assert (told == BEFORE) is again
    assert len(counter.archived()) == 1


def test_other_deliveries_are_others(counter: Counter) -> None:
    """Another sender, recipient or content is another delivery."""
    raw = mail("one", Message_ID="")
    others = [
        counter.consignment(raw),
        counter.consignment(raw, sender="other@example.org"),
        counter.consignment(raw, sender=""),
        counter.consignment(raw, "In@billing.example.com"),
        counter.consignment(raw + b"\n"),
    ]
    assert counter.told(others[0]) == [[QUEUED]]
    for one in others[1:]:
        ((told,),) = counter.told(one)
        assert told != BEFORE
    assert len(counter.raws()) + len(counter.archived()) == 5


def test_recipients_are_known_apart(counter: Counter) -> None:
    """Of a message that comes again for other recipients too, these are stored."""
    assert counter.told(counter.consignment(mail("one"), SALES)) == [[QUEUED]]
    again = counter.consignment(mail("one"), BILLING, SALES, "two@billing.example.com")
    assert counter.told(again) == [[QUEUED, BEFORE, QUEUED]]
    held = counter.held("billing")
    assert [one.recipients for one in held] == [(BILLING,), ("two@billing.example.com",)]
    assert [one.source for one in held] == [again.name(0), again.name(2)]


def test_what_was_consumed_is_known(counter: Counter) -> None:
    """A message that an application has taken by then does not come to it again."""
    assert counter.told(counter.consignment(mail("one"))) == [[QUEUED]]
    with counter.office.connection() as connection:
        record = counter.office.folder(connection).get("billing")
        queue = Queue(record)
        assert queue.pop_next().raw == mail("one")
        connection.transaction_manager.commit()
    assert counter.told(counter.consignment(mail("one"))) == [[BEFORE]]
    assert counter.raws() == []


# -- for how long ----------------------------------------------------------------------------------


@pytest.mark.parametrize("traffic", ["none", "every hour"])
def test_seven_days(counter: Counter, traffic: str) -> None:
    """A receipt is kept for seven days, and a day later at most it is forgotten."""
    counter.told(counter.consignment(mail("one")))
    for hour in range(1, 8 * 24 + 2):
        counter.now = EPOCH + hour * 3600 * SECOND
        if traffic == "every hour":
            counter.told(counter.consignment(mail(f"hour {hour}"), SALES))
        if hour == 7 * 24:
            assert counter.told(counter.consignment(mail("one"))) == [[BEFORE]]
    assert counter.told(counter.consignment(mail("one"))) == [[QUEUED]]
    assert len(counter.raws()) == 2


def test_a_clock_that_was_wrong(counter: Counter) -> None:
    """Receipts of a time that a wrong clock told are known as well, and go when it is over."""
    counter.now = EPOCH + 3 * DAY * SECOND
    assert counter.told(counter.consignment(mail("one"))) == [[QUEUED]]
    counter.now = EPOCH
    assert counter.told(counter.consignment(mail("one"))) == [[BEFORE]]
    assert counter.told(counter.consignment(mail("two"))) == [[QUEUED]]
    counter.now = EPOCH + 12 * DAY * SECOND
    assert counter.told(counter.consignment(mail("two"))) == [[QUEUED]]
    assert counter.told(counter.consignment(mail("one"))) == [[QUEUED]]


def test_a_restart_remembers(spool: Spool) -> None:
    """Receipts are in the database: another process, or the next one, knows them."""
    with Counter(spool) as one:
        assert one.told(one.consignment(mail("one"))) == [[QUEUED]]
    with Counter(spool) as two:
        assert two.told(two.consignment(mail("one"))) == [[BEFORE]]


def test_receipts_are_dropped(counter: Counter) -> None:
    """Days that are over are dropped from the database, a whole day at a time."""
    for day in range(30):
        counter.now = EPOCH + day * DAY * SECOND
        counter.told(*(counter.consignment(mail(f"mail {day} {number}")) for number in range(5)))
    with counter.office.connection() as connection:
        receipts = counter.office.folder(connection).receipts
        assert receipts is not None
        assert len(receipts) in (40, 45)
        assert len(receipts.numbers()) in (8, 9)


# -- several at once -------------------------------------------------------------------------------


def test_two_listeners_on_one_depot(tmp_path: Path) -> None:
    """What one listener has received, another one of the same depot knows."""
    with ExitStack() as stack:
        server = stack.enter_context(ZeoServer(tmp_path / "zeo", tmp_path / "s"))
        spool = Spool(tmp_path / "site", queues=QUEUES, uri=server.uri())
        one, two = (stack.enter_context(Counter(spool)) for _ in range(2))
        for number in range(6):
            first, second = (one, two) if number % 2 else (two, one)
            messages = [mail(f"mail {number}"), large(f"large {number}")]
            assert first.told(*map(first.consignment, messages)) == [[QUEUED]] * 2
            second.connection.sync()
            assert second.told(*map(second.consignment, messages)) == [[BEFORE]] * 2
        assert len(one.raws()) == 12


# -- the index -------------------------------------------------------------------------------------


def digest(number: int) -> bytes:
    """Return the digest of a delivery."""
    return sha256(b"%d" % number).digest()[:16]


def test_an_index_of_its_own_additions() -> None:
    """Within a transaction the index knows what it has added, and nothing else."""
    index = ReceiptIndex(Receipts(), LANES)
    index.begin()
    assert not index.seen(digest(1), NOW)
    index.add(digest(1), NOW)
    assert index.seen(digest(1), NOW)
    assert not index.seen(digest(2), NOW)


@pytest.mark.parametrize("seed", range(3))
def test_the_index_is_the_log(local: Depot, seed: int) -> None:
    """After commits of several connections, aborts and rollbacks, it knows what was committed."""
    chance = random.Random(seed)
    places = []
    for _ in range(3):
        manager = TransactionManager(explicit=True)
        connection = local.seat().database.open(manager)
        places.append((manager, connection))
    manager, connection = places[0]
    with manager:
        connection.root()["receipts"] = Receipts()
    indexes: list[ReceiptIndex | None] = [None] * 3
    committed: set[int] = set()
    number = 0
    for _ in range(120):
        which = chance.randrange(3)
        manager, connection = places[which]
        manager.begin()
        index = indexes[which]
        if index is None:
            index = indexes[which] = ReceiptIndex(connection.root()["receipts"], LANES)
        index.begin()
        mine = set()
        for _ in range(chance.choice([1, 3, 40, 700])):
            number += 1
            index.add(digest(number), NOW + number)
            mine.add(number)
        if chance.random() < 0.2:
            savepoint = manager.savepoint()
            index.add(digest(-number), NOW + number)
            savepoint.rollback()
            assert not index.seen(digest(-number), NOW)
        asked = chance.sample(range(1, number + 20), k=min(20, number))
        known = committed | mine
        assert [index.seen(digest(one), NOW) for one in asked] == [one in known for one in asked]
        if chance.random() < 0.3:
            manager.abort()
        else:
            manager.commit()
            committed |= mine
    for (manager, connection), found in zip(places, indexes, strict=True):
        manager.begin()
        fresh = ReceiptIndex(connection.root()["receipts"], LANES)
        for index in (found or fresh, fresh):
            index.begin()
            assert all(index.seen(digest(one), NOW) is (one in committed) for one in range(number))
        manager.abort()
        connection.close()


# The days on which each of two producers adds, by its own clock.
DAYS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("days", DAYS, ids=str)
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("count", [1, CHUNK_BYTES // 16], ids=["begun", "full"])
def test_two_who_add_at_once(local: Depot, days: tuple[int, int], last: int, count: int) -> None:
    """Of two transactions that overlap, the second meets a conflict, and then knows the first."""
    one, two = local.seat(), local.seat()
    one.begin()
    one.folder.receipts = Receipts()
    for day in range(last + 1):
        for number in range(count):
            one.folder.receipts.append(digest(-number), NOW + day * DAY, 0, RECEIPT_SECONDS)
    one.commit()

    def begun(seat: Seat) -> ReceiptIndex:
        seat.begin()
        receipts = seat.folder.receipts
        assert receipts is not None
        index = ReceiptIndex(receipts, LANES)
        index.begin()
        return index

    indexes = [begun(seat) for seat in (one, two)]
    for index, day in zip(indexes, days, strict=True):
        assert not index.seen(digest(1), NOW)
        index.add(digest(1), NOW + day * DAY)
    one.commit()
    with pytest.raises(ConflictError):
        two.commit()
    two.abort()
    assert begun(two).seen(digest(1), NOW)


@implementer(IEventSink)
class Meanwhile:
    """Has another process deliver the same message while a transaction stores it."""

    def __init__(self, spool: Spool, raw: bytes) -> None:
        """Prepare to."""
        self._spool = spool
        self._raw = raw
        self.done: list[str] = []

    def record(self, event: Event) -> None:
        """Deliver it, the first time."""
        if not self.done:
            words = ["-C", str(self._spool.ini), "deliver", "-f", ANN, "--", BILLING]
            ended = subprocess.run(
                [sys.executable, "-m", "postoffice.cli", *words],
                input=self._raw,
                capture_output=True,
                check=False,
            )
            self.done.append(f"{ended.returncode} {ended.stderr.decode()}")


def test_the_same_message_by_two_processes_at_once(tmp_path: Path) -> None:
    """A message that two processes store at the same time is there once, and both say so."""
    with ZeoServer(tmp_path / "zeo", tmp_path / "z") as server:
        spool = Spool(tmp_path / "site", queues=QUEUES, uri=server.uri(0))
        raws = [mail(f"number {number}") for number in range(4)]
        with Counter(spool) as first:
            first.told(first.consignment(mail("before")))
        for raw in raws:
            meanwhile = Meanwhile(spool, raw)
            with Counter(spool, now=time.time_ns(), event_sink=meanwhile) as counter:
                told = counter.told(counter.consignment(raw))
                assert meanwhile.done == ["0 "]
                assert told == [[BEFORE]]
        with Counter(spool) as last:
            assert last.raws() == [mail("before"), *raws]


def test_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the most receipts the oldest day goes early, with a warning, from the index too."""
    receipts = Receipts()
    receipts.limit = 3000
    index = ReceiptIndex(receipts, LANES)
    for day in range(4):
        index.begin()
        for number in range(1100):
            index.add(digest(day * 10_000 + number), NOW + day * DAY)
    index.begin()
    assert "of the oldest go early" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    assert not index.seen(digest(5), NOW)
    assert index.seen(digest(30_005), NOW)
    assert len(receipts) <= 3300


def test_it_takes_little_memory() -> None:
    """A receipt takes some ten bytes of an index, whether it was read or added."""
    receipts = Receipts()
    for number in range(20_000):
        receipts.append(digest(number), NOW + number * 30, number % LANES, RECEIPT_SECONDS)
    tracemalloc.start()
    try:
        index = ReceiptIndex(receipts, LANES)
        index.begin()
        read = tracemalloc.get_traced_memory()[0]
        for number in range(20_000, 30_000):
            index.add(digest(number), NOW + 600_000)
            if number % 50 == 0:
                index.begin()
        index.begin()
        grown = tracemalloc.get_traced_memory()[0] - read
    finally:
        tracemalloc.stop()
    assert read < 20_000 * 12 + 50_000
    # The log itself has 16 bytes of each, and up to 4,096 of them are in a set for a while.
    assert grown < 10_000 * (12 + 16) + 4096 * 100
    assert all(index.seen(digest(number), NOW) for number in range(0, 30_000, 999))


@pytest.mark.parametrize("name", STORAGES)
def test_every_storage_keeps_receipts(tmp_path: Path, name: str) -> None:
    """Receipts that one connection commits another one finds, whatever the storage."""
    with STORAGES[name](tmp_path) as opened:
        one, two = opened.seat(), opened.seat()
        one.begin()
        one.folder.receipts = receipts = Receipts()
        index = ReceiptIndex(receipts, LANES)
        index.begin()
        index.add(digest(1), NOW)
        one.commit()
        two.begin()
        other = two.folder.receipts
        assert other is not None
        found = ReceiptIndex(other, LANES)
        found.begin()
        assert found.seen(digest(1), NOW)
        assert not found.seen(digest(2), NOW)
