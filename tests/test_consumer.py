"""The consumer: done, tried again, deferred, quarantined, stopped, and outliving a server."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import transaction
from persistent.mapping import PersistentMapping
from transaction.interfaces import NoTransaction
from ZODB.POSException import ConflictError

from postoffice import PermanentError, QueueMissing
from postoffice.consumer import Counts, consume, drain
from postoffice.database import open_database
from postoffice.depot.policy import Policy
from postoffice.exceptions import DepotUnavailable, HandlerError
from postoffice.message import Message
from postoffice.queue import BLOB_SIZE
from tests.depots import (
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
    zeo_depot,
)
from tests.zeo_server import ZeoServer

__all__ = ["depot", "local_depot", "one", "seat"]

ROOT = Path(__file__).resolve().parent.parent
WAIT_SECONDS = 20


def in_quarantine(seat: Seat) -> list[tuple[str, int, str]]:
    """Return subject, attempts and error of what is in quarantine."""
    seat.begin()
    return [
        (entry.subject, entry.attempts, (entry.last_error or ("", "", ""))[1])
        for entry in seat.queue.entries(state="quarantined")
    ]


def left(seat: Seat) -> list[str]:
    """Return the subjects of what waits."""
    seat.begin()
    return subjects(seat.queue)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread or process."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_message_has_its_transaction(depot: Depot, one: Seat) -> None:
    """The handler's work and the message's leaving commit together, one by one, in order."""
    one.add(*"abcde")
    one.connection.root()["done"] = PersistentMapping()
    one.commit()
    serials = []

    def handle(message: Message, connection: Any) -> None:
        done = connection.root()["done"]
        serials.append(done._p_serial)
        done[message["Subject"]] = len(done)

    assert drain(depot.seat().database, QUEUE, handle) == Counts(done=5)
    one.begin()
    assert dict(one.connection.root()["done"]) == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    assert len(set(serials)) == 5
    assert left(one) == []
    assert one.queue.claims() == []


def test_nothing_is_left_behind(depot: Depot, one: Seat) -> None:
    """A queue that is worked off holds no entries, no claims and one segment a lane at most."""
    one.add(*(str(number) for number in range(120)))
    drain(depot.seat().database, QUEUE, lambda message: None)
    one.begin()
    for lane in one.record.all_lanes:
        assert int(lane.length()) == 0
        assert len(lane.claims) == 1
    assert all(len(lane.segments) <= 2 for lane in one.record.lanes)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_given_manager_is_used(seat: Seat, explicit: bool) -> None:
    """The transactions are those of the manager that was given, explicit or not."""
    seat.add("a")
    manager = transaction.TransactionManager(explicit=explicit)
    seen = []

    def handle(message: Message) -> None:
        seen.append(manager.get())

    assert drain(seat.database, QUEUE, handle, transaction_manager=manager) == Counts(done=1)
    assert len(seen) == 1
    if explicit:
        with pytest.raises(NoTransaction):
            manager.get()


def test_a_failing_message_is_deferred_and_then_quarantined(seat: Seat) -> None:
    """Each failure defers for longer; after max_attempts it is in quarantine, with its error."""
    ids = seat.add("good", "bad", "fine")
    seen = []

    def handle(message: Message) -> None:
        seen.append(message["Subject"])
        seat_root = message
        if seat_root["Subject"] == "bad":
            raise ValueError("no use")

    def again() -> Counts:
        return drain(seat.database, QUEUE, handle, max_attempts=3, retry_delay=100)

    assert again() == Counts(done=2, deferred=1)
    assert seen == ["good", "bad", "fine"]
    delays = []
    for _ in range(2):
        seat.begin()
        delays.append(round((seat.queue.find(ids[1]).not_before - time.time_ns()) / 1e9, -1))
        seat.queue.give_all_back()
        seat.commit()
        last = again()
    assert delays == [100, 200]
    assert last == Counts(quarantined=1)
    assert in_quarantine(seat) == [("bad", 3, "no use")]
    seat.queue.requeue(ids[1])
    seat.commit()
    assert again() == Counts(deferred=1)


def test_the_queue_s_policy_holds_unless_told_otherwise(seat: Seat) -> None:
    """What the depot says of attempts is followed by whoever consumes."""
    seat.record.set_policy(Policy(max_attempts=1))
    seat.commit()
    seat.add("a")

    def handle(message: Message) -> None:
        raise OSError("disk")

    assert drain(seat.database, QUEUE, handle) == Counts(quarantined=1)


def test_a_permanent_error_is_not_tried_again(seat: Seat) -> None:
    """A handler that raises a PermanentError sends the message to quarantine at once."""
    seat.add("a")

    def handle(message: Message) -> None:
        raise PermanentError("such a customer never was")

    assert drain(seat.database, QUEUE, handle) == Counts(quarantined=1)
    assert in_quarantine(seat) == [("a", 1, "such a customer never was")]


def test_a_failed_handler_leaves_nothing_behind(seat: Seat) -> None:
    """What a handler has written before it failed is undone, for whatever comes next, too."""
    seat.add("a", "b")
    seat.connection.root()["written"] = PersistentMapping()
    seat.commit()

    def handle(message: Message, connection: Any) -> None:
        connection.root()["written"][message["Subject"]] = True
        if message["Subject"] == "a":
            raise ValueError("no")

    drain(seat.database, QUEUE, handle)
    seat.begin()
    assert list(seat.connection.root()["written"]) == ["b"]


def test_conflicts_are_tried_again_at_once(depot: Depot, one: Seat) -> None:
    """A conflict over the application's data runs the message again, and is no failed attempt."""
    one.add("a")
    one.connection.root()["count"] = 0
    one.commit()
    tries = []

    def handle(message: Message, connection: Any) -> None:
        root = connection.root()
        root["count"] = root["count"] + 1
        tries.append(message["Subject"])
        if len(tries) < 4:
            one.begin()
            one.connection.root()["count"] += 100
            one.commit()

    assert drain(depot.seat().database, QUEUE, handle) == Counts(done=1)
    assert len(tries) == 4
    one.begin()
    assert one.connection.root()["count"] == 301


def test_conflicts_without_end_are_a_failure(seat: Seat) -> None:
    """A message that meets conflicts time after time is deferred, and the next goes through."""
    seat.add("a", "b")

    def handle(message: Message) -> None:
        if message["Subject"] == "a":
            raise ConflictError("again")

    assert drain(seat.database, QUEUE, handle) == Counts(done=1, deferred=1)


def test_a_lost_body_ends_in_quarantine(seat: Seat, tmp_path: Path) -> None:
    """A message that cannot be read stops nobody, and ends in quarantine."""
    seat.begin()
    seat.queue.add(mail("large", body="x" * BLOB_SIZE))
    seat.commit()
    seat.add("b")
    for path in tmp_path.rglob("*.blob"):
        path.unlink()
    counts = drain(seat.database, QUEUE, lambda message: None, max_attempts=1)
    assert counts == Counts(done=1, quarantined=1)


def test_what_cannot_be_caught_gives_everything_back(seat: Seat) -> None:
    """A handler that ends the program leaves the messages to be taken at once."""
    seat.add("a", "b")

    def handle(message: Message) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        drain(seat.database, QUEUE, handle)
    seat.begin()
    assert seat.queue.claims() == []
    assert left(seat) == ["a", "b"]


def test_no_such_queue(local: Depot) -> None:
    """A queue that is not there, or was removed, is an error and not waited for."""
    seat = local.seat()
    with pytest.raises(QueueMissing):
        drain(seat.database, "none", print)

    def stop() -> bool:
        seat.begin()
        seat.folder.remove(QUEUE)
        seat.commit()
        return False

    with pytest.raises(QueueMissing, match="was removed"):
        consume(seat.database, QUEUE, print, stop=stop)


async def forgetful(message: Message) -> None:
    """Nobody would await this."""


def test_a_coroutine_is_no_handler(seat: Seat) -> None:
    """A handler that nobody would await is refused, and one that returns such does not consume."""
    seat.add("a")
    for wrong in (forgetful, None):
        with pytest.raises(HandlerError):
            drain(seat.database, QUEUE, wrong)  # type: ignore[arg-type]  # that is the mistake
    assert left(seat) == ["a"]
    assert drain(seat.database, QUEUE, lambda message: forgetful(message)).quarantined == 1


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"max_attempts": 0}, ValueError),
        ({"retry_delay": "1m"}, TypeError),
        ({"lease": 0}, ValueError),
    ],
)
def test_impossible_policies_are_refused(
    seat: Seat, wrong: dict[str, Any], kind: type[Exception]
) -> None:
    """A number that no message could be treated by is an error, and no message is touched."""
    seat.add("a")
    with pytest.raises(kind):
        drain(seat.database, QUEUE, print, **wrong)
    assert left(seat) == ["a"]


def test_a_handler_without_room_for_a_message_is_refused(seat: Seat) -> None:
    """A function that takes no message, or wants more, is refused before it is called."""
    for wrong in (lambda: None, lambda message, other: None):
        with pytest.raises(HandlerError, match="cannot be called with a message"):
            drain(seat.database, QUEUE, wrong)


def test_a_handler_may_be_written_in_c(seat: Seat) -> None:
    """A function that does not tell its parameters is called with the message."""
    seat.add("a")
    assert drain(seat.database, QUEUE, type) == Counts(done=1)


def test_a_failure_is_logged_with_what_comes_next(
    seat: Seat, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure's line names queue, message, attempt, error and what comes, in printable text."""
    (id,) = seat.add("a")

    def handle(message: Message) -> None:
        raise ValueError("red \x1b[31m alert")

    with caplog.at_level(logging.WARNING, "postoffice"):
        drain(seat.database, QUEUE, handle)
    (record,) = caplog.records
    text = record.getMessage()
    assert f"queue 'app': message {id} (Message-ID <a@example.com>) failed" in text
    assert "attempt 1 of 5: ValueError: red" in text
    assert text.endswith("it is tried again in 60 s")
    assert "\x1b" not in text


def test_new_mail_is_noticed_within_a_second(depot: Depot, one: Seat) -> None:
    """An idle consumer has a message within a second of its commit, and ends when told to."""
    arrived = threading.Event()
    stopping = threading.Event()
    database = depot.seat().database

    def run() -> None:
        manager = transaction.TransactionManager(explicit=True)
        consume(
            database,
            QUEUE,
            lambda message: arrived.set(),
            transaction_manager=manager,
            stop=stopping.is_set,
        )

    thread = threading.Thread(target=run)
    thread.start()
    try:
        time.sleep(0.3)
        one.add("a")
        # It looks twice a second; the rest is for machines that have other things to do.
        assert arrived.wait(WAIT_SECONDS)
    finally:
        stopping.set()
        thread.join(WAIT_SECONDS)
    assert not thread.is_alive()
    assert left(one) == []


PROGRAM = """
import os, sys, time
from pathlib import Path
from postoffice.consumer import consume

notes = Path(sys.argv[2])

def handle(message):
    subject = message["Subject"]
    if subject == "killer":
        os.kill(os.getpid(), 9)
    with notes.open("a") as file:
        file.write(f"begun {subject}\\n")
    time.sleep(1 if subject == "slow" else 0.02)
    with notes.open("a") as file:
        file.write(f"done {subject}\\n")

print(consume(sys.argv[1], "app", handle, max_attempts=3))
"""


def start(uri: str, notes: Path) -> subprocess.Popen[str]:
    """Start a consumer in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, uri, str(notes)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_message_in_hand_be_finished(
    tmp_path: Path, number: signal.Signals
) -> None:
    """On SIGTERM or SIGINT the message in hand is committed, and the rest is left, unclaimed."""
    notes = tmp_path / "notes"
    notes.touch()
    with zeo_depot(tmp_path) as depot:
        seat = depot.seat()
        seat.add("a", "slow", "b")
        process = start(depot.uri, notes)
        eventually(lambda: "begun slow" in notes.read_text())
        process.send_signal(number)
        said, _ = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0, said
        assert "Counts(done=2, deferred=0, quarantined=0)" in said
        assert notes.read_text().split("\n")[-2] == "done slow"
        assert left(seat) == ["b"]
        assert seat.queue.claims() == []


def test_a_message_that_kills_its_consumer_ends_in_quarantine(tmp_path: Path) -> None:
    """One that takes its consumer with it counts an attempt each time; the others go through."""
    notes = tmp_path / "notes"
    notes.touch()
    with zeo_depot(tmp_path) as depot:
        seat = depot.seat()
        seat.add("a", "killer", "b", "c")
        for _ in range(3):
            process = start(depot.uri, notes)
            process.communicate(timeout=WAIT_SECONDS)
            assert process.returncode == -9
        process = start(depot.uri, notes)
        eventually(lambda: left(seat) == [])
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_SECONDS)
        ((subject, attempts, error),) = in_quarantine(seat)
        assert (subject, attempts) == ("killer", 3)
        assert "ended" in error
        assert [line for line in notes.read_text().split("\n") if line.startswith("done")] == [
            "done a",
            "done b",
            "done c",
        ]


def test_the_storage_may_go_and_come_back(tmp_path: Path) -> None:
    """A consumer waits for a server that is killed, and works on when it is there again, once."""
    notes = tmp_path / "notes"
    notes.touch()
    with ZeoServer(tmp_path / "server", tmp_path / "zeo.sock") as server:
        database = open_database(server.uri())
        try:
            seat = Depot(lambda: database, server.uri()).seat()
            seat.add(*(f"m{number}" for number in range(40)))
            process = start(server.uri(), notes)
            eventually(lambda: notes.read_text().count("done") > 5)
            server.stop("SIGKILL")
            time.sleep(0.5)
            server.start()
            eventually(lambda: notes.read_text().count("done") >= 40)
            eventually(lambda: left(seat) == [])
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=WAIT_SECONDS)
            assert process.returncode == 0, said
            assert in_quarantine(seat) == []
            seat.close()
        finally:
            database.close()


def test_a_storage_that_has_closed_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is opened anew by its URI; that counts against no message, and each is done once."""
    with file_depot(tmp_path) as opened:
        opened.seat().add("a", "b", "c", "d")
    seen: list[str] = []

    def handle(message: Message, connection: Any) -> None:
        seen.append(message["Subject"])
        if seen.count("b") == 1 and seen[-1] == "b":
            # As a FileStorage does when the disk fails while it commits.
            connection.db().storage.close()

    assert drain(opened.uri, QUEUE, handle, max_attempts=1) == Counts(done=4)
    assert seen == ["a", "b", "b", "c", "d"]
    assert "the database had closed itself, and is open again" in caplog.text
    with closing(open_database(opened.uri)) as database, closing(Seat(database)) as seat:
        assert (left(seat), in_quarantine(seat), seat.queue.claims()) == ([], [], [])


def test_a_storage_that_was_given_open_and_has_closed_itself(local: Depot) -> None:
    """Who has opened it is told, instead of waiting for ever."""
    seat = local.seat()
    seat.add("a", "b")

    def handle(message: Message, connection: Any) -> None:
        connection.db().storage.close()

    with pytest.raises(DepotUnavailable, match="closed itself"):
        drain(seat.database, QUEUE, handle)


def test_it_ends_when_told_to_while_the_storage_is_away(tmp_path: Path) -> None:
    """On SIGTERM it ends though its server is away, having said so, and leaves the message."""
    notes = tmp_path / "notes"
    notes.touch()
    with ZeoServer(tmp_path / "server", tmp_path / "zeo.sock") as server:
        with closing(open_database(server.uri())) as database:
            seat = Depot(lambda: database, server.uri()).seat()
            seat.add("slow", "a")
            seat.close()
        process = start(server.uri(wait_seconds=1), notes)
        eventually(lambda: "begun slow" in notes.read_text())
        server.stop("SIGKILL")
        eventually(lambda: "done slow" in notes.read_text())
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0, said
        assert said.count("the database does not answer") == 1
        server.start()
        with closing(open_database(server.uri())) as database:
            seat = Seat(database)
            assert left(seat) == ["slow", "a"]
            seat.begin()
            assert seat.queue.claims() == []
            seat.close()


def test_idle_it_costs_next_to_nothing(local: Depot) -> None:
    """A consumer with nothing to do asks twice a second, and writes nothing to the database."""
    seat = local.seat()
    path = Path(seat.database.storage.getName())
    size = path.stat().st_size
    looks = []

    def stop() -> bool:
        looks.append(time.monotonic())
        return len(looks) == 4

    consume(seat.database, QUEUE, print, stop=stop)
    assert path.stat().st_size == size
    assert looks[-1] - looks[0] >= 1.4


def test_a_thread_has_no_signals(seat: Seat) -> None:
    """In a thread the signals of the process are left alone."""
    before = signal.getsignal(signal.SIGTERM)
    seat.add("a")
    found: list[Any] = []

    def handle(message: Message) -> None:
        found.append(signal.getsignal(signal.SIGTERM))

    def run() -> None:
        manager = transaction.TransactionManager()
        drain(seat.database, QUEUE, handle, transaction_manager=manager)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(WAIT_SECONDS)
    assert found == [before]
    seat.add("b")
    drain(seat.database, QUEUE, handle)
    assert found[1] is not before
    assert signal.getsignal(signal.SIGTERM) == before
    assert os.getpid()
