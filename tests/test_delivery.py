"""The intake transaction: what is decided before it, and what in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ZODB
from transaction import TransactionManager
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage
from zope.interface import implementer

from postoffice.delivery import Intake, Prepared, Result, oversize_message, prepare
from postoffice.depot.folder import QueuesFolder, make_folder
from postoffice.exceptions import QueueMissing
from postoffice.filters import HeaderRegexpFilter
from postoffice.interfaces import EVENT_KINDS, Event, IEventSink
from postoffice.loops import LoopRule
from postoffice.message import Envelope, Message
from postoffice.queue import Queue
from postoffice.routing import AUTO_RESPONSE, THROTTLED, QueueRule, Routing, Verdict
from tests.spools import EPOCH, large, mail

SECOND = 1_000_000_000


def header(expression: str) -> HeaderRegexpFilter:
    """Return a filter on headers."""
    made = HeaderRegexpFilter.from_option(expression, "/")
    assert isinstance(made, HeaderRegexpFilter)
    return made


ROUTING = Routing(
    reject_filters=(header("^Subject: spam"),),
    queues=(QueueRule("all", (header("^Subject:"),)),),
    max_message_size=10_000_000,
)


def prepared(
    raw: bytes, second: int = 0, loop: LoopRule | None = None, recipients: tuple[str, ...] = ()
) -> Prepared:
    """Return a message that was read and decided on."""
    arrived = EPOCH + second * SECOND
    message = Message.from_bytes(raw, (("X-Postoffice-Date", str(arrived // SECOND)),))
    message.envelope = Envelope("ann@example.org", recipients, arrived, "")
    return prepare(ROUTING, loop, message, f"name{second}", "maildir", len(raw))


class Depot:
    """A depot in a FileStorage."""

    def __init__(self, folder: Path) -> None:
        self.manager = TransactionManager(explicit=True)
        self.database = ZODB.DB(
            FileStorage(str(folder / "depot.fs"), blob_dir=str(folder / "blobs"))
        )
        self.connection: Any = self.database.open(self.manager)
        with self.manager:
            make_folder(self.connection.root(), "postoffice").make("all")

    @property
    def folder(self) -> QueuesFolder:
        """The folder of queues."""
        return make_folder(self.connection.root(), "postoffice")

    def found_folder(self) -> QueuesFolder:
        """Return the folder of queues, outside a transaction."""
        with self.manager:
            return self.folder

    @contextmanager
    def queue(self) -> Iterator[Queue]:
        """Give the queue, in a transaction."""
        with self.manager:
            yield Queue(self.folder.get("all"))

    def raws(self) -> list[bytes]:
        """Return what waits."""
        with self.queue() as queue:
            return [message.raw for message in queue]

    def deliver(self, intake: Intake, *messages: Prepared) -> list[Result]:
        """Store messages in a transaction."""
        with self.manager:
            return intake.deliver(messages, EPOCH, lambda one: f"day/{one.source}", fill_with(b""))


def fill_with(raw: bytes) -> Any:
    """Return a function that fills a blob with these bytes."""

    def fill(message: Prepared, blob: Blob) -> None:
        with blob.open("w") as file:
            file.write(raw)

    return fill


@pytest.fixture
def depot(tmp_path: Path) -> Iterator[Depot]:
    """An empty depot with one queue."""
    made = Depot(tmp_path)
    yield made
    made.connection.close()
    made.database.close()


def test_preparing_changes_nothing_and_repeats() -> None:
    """The same message gives the same answer, with the values of its entry."""
    one, other = prepared(mail("one")), prepared(mail("one"))
    assert one == other
    assert one.decision.verdict is Verdict.QUEUE
    assert one.raw == mail("one")
    assert one.values["sender"] == "ann@example.org"
    assert one.values["arrived"] == EPOCH
    assert "recipients" not in one.values


def test_what_is_not_queued_needs_no_bytes() -> None:
    """A rejected message is prepared with its line for the log and without its bytes."""
    one = prepared(mail("spam"))
    assert (one.decision.verdict, one.raw, one.duplicate) == (Verdict.REJECT, None, b"")
    assert one.values["message_id"].startswith("<")


def test_a_message_without_envelope_is_refused() -> None:
    """Preparing a message of which nobody says when it came is an error of the caller."""
    with pytest.raises(ValueError, match="envelope"):
        prepare(ROUTING, None, Message.from_bytes(b"From: a@b\n\n"), "name", "maildir", 11)


@pytest.mark.parametrize("raw", [mail("one"), mail("spam"), b"", large("two")])
def test_it_survives_the_wire(raw: bytes) -> None:
    """What another process prepared is what it sent, but for the trail of the decision."""
    one = prepared(raw)
    copy = Prepared.from_wire(one.to_wire())
    assert copy.to_wire() == one.to_wire()
    assert copy.decision.trail == ()


@pytest.mark.parametrize("linesep", [b"\n", b"\r\n"])
def test_an_oversize_message_keeps_its_header(linesep: bytes) -> None:
    """Header fields stay, folds included, but for those of the body; a notice is the body."""
    lines = [
        b"Subject: big",
        b"Content-Type: multipart/mixed;",
        b"\tboundary=x",
        b"MIME-Version: 1.0",
        b"To: a@example.org,",
        b" b@example.org",
        b"",
    ]
    raw = oversize_message(linesep.join(lines), 5000, 1000)
    head, _, body = raw.partition(linesep * 2)
    assert head == linesep.join([lines[0], *lines[4:6]])
    assert b"limit of 1000 bytes" in body
    assert b"had 5000 bytes" in body
    assert raw.count(b"\r\n") == (raw.count(b"\n") if linesep == b"\r\n" else 0)


def test_messages_are_stored_in_order(depot: Depot) -> None:
    """What is to be queued is stored in order, with what is known of it, and gets an id."""
    intake = Intake(depot.found_folder(), None)
    one, two = prepared(mail("one"), 1), prepared(mail("two"), 2, recipients=("bob@example.com",))
    results = depot.deliver(intake, one, two)
    assert [result.id is not None for result in results] == [True, True]
    assert depot.raws() == [mail("one"), mail("two")]
    with depot.queue() as queue:
        first, second = queue.entries()
    assert (first.id, first.source, first.way) == (results[0].id, "name1", "maildir")
    assert (first.archive, first.sender, first.reason) == (
        "day/name1",
        "ann@example.org",
        "matched",
    )
    assert second.recipients == ("bob@example.com",)
    assert second.arrived == EPOCH + 2 * SECOND


def test_each_message_is_for_itself(depot: Depot) -> None:
    """Between those that are queued, others are rejected, discarded and known as duplicates."""
    intake = Intake(depot.found_folder(), None)
    results = depot.deliver(
        intake,
        prepared(mail("one"), 1),
        prepared(mail("spam"), 2),
        prepared(mail("one"), 3),
        prepared(b"From: ann@example.org\n\nno subject\n", 4),
        prepared(mail("two"), 5),
    )
    assert [result.decision.reason for result in results] == [
        "matched",
        "reject-filter",
        "duplicate",
        "no-queue",
        "matched",
    ]
    assert depot.raws() == [mail("one"), mail("two")]


def test_duplicates_have_the_same_recipient(depot: Depot) -> None:
    """The same message for another recipient is another message."""
    intake = Intake(depot.found_folder(), None)
    results = depot.deliver(
        intake, *(prepared(mail("one"), recipients=(name,)) for name in ("a@x", "b@x", "A@X"))
    )
    assert [result.decision.reason for result in results] == ["matched", "matched", "duplicate"]


def test_an_abort_forgets_everything(depot: Depot) -> None:
    """After an abort the same messages are stored, and none is taken for a duplicate."""
    intake = Intake(depot.found_folder(), sixty_a_minute())
    messages = [
        prepared(mail(f"mail {number}"), 60 * number, sixty_a_minute()) for number in range(3)
    ]
    for _ in range(2):
        depot.manager.begin()
        results = intake.deliver(messages, EPOCH, lambda one: "", fill_with(b""))
        assert [result.decision.marks for result in results] == [()] * 3
        depot.manager.abort()
        intake.forget_queues()
    depot.deliver(intake, *messages)
    assert depot.raws() == [mail(f"mail {number}") for number in range(3)]


def sixty_a_minute() -> LoopRule:
    """Return a rule of sixty messages a minute."""
    return LoopRule(frequency=60.0)


def test_who_writes_too_often_is_throttled(depot: Depot) -> None:
    """A message that comes at once after another of its sender is marked, and so are the next."""
    loop = sixty_a_minute()
    intake = Intake(depot.found_folder(), loop)
    seconds = [0, 100, 100, 200, 500]
    raws = [mail(f"mail {number}") for number in range(5)]
    results = depot.deliver(
        intake, *(prepared(raw, second, loop) for raw, second in zip(raws, seconds, strict=True))
    )
    assert [result.decision.marks for result in results] == [
        (),
        (),
        (THROTTLED,),
        (THROTTLED,),
        (),
    ]
    with depot.queue() as queue:
        assert [entry.marks for entry in queue.entries()][2] == (THROTTLED,)


def test_automatic_mail_is_marked_once_more(depot: Depot) -> None:
    """A throttled message keeps the marks that it had."""
    loop = sixty_a_minute()
    intake = Intake(depot.found_folder(), loop)
    results = depot.deliver(
        intake,
        *(prepared(mail(f"mail {number}", Precedence="bulk"), 0, loop) for number in range(2)),
    )
    assert [result.decision.marks for result in results] == [
        (AUTO_RESPONSE,),
        (AUTO_RESPONSE, THROTTLED),
    ]


def test_bytes_that_are_not_in_memory_are_filled_in(depot: Depot) -> None:
    """A message without its bytes gets them from the caller, into a blob."""
    one = prepared(large("blob"))
    bare = Prepared(one.source, one.decision, one.values, None, one.duplicate)
    intake = Intake(depot.found_folder(), None)
    with depot.manager:
        intake.deliver([bare], EPOCH, lambda message: "", fill_with(large("blob")))
    intake.forget_bodies()
    assert depot.raws() == [large("blob")]


def test_a_queue_that_is_gone_is_an_error(depot: Depot) -> None:
    """A queue that was removed meanwhile is named, and nothing is stored."""
    intake = Intake(depot.found_folder(), None)
    with depot.manager:
        depot.folder.remove("all")
    with pytest.raises(QueueMissing, match="all"):
        depot.deliver(intake, prepared(mail("one")))


@implementer(IEventSink)
class Sink:
    """Remembers events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        """Remember one."""
        self.events.append(event)


def test_the_event_sink_is_told(depot: Depot) -> None:
    """Each message that is queued is an event with the stable name of its reason."""
    sink = Sink()
    intake = Intake(depot.found_folder(), None, sink)
    results = depot.deliver(intake, prepared(mail("one"), 1), prepared(mail("spam"), 2))
    (event,) = sink.events
    assert (event.id, event.kind, event.reason) == (results[0].id, "added", "matched")
    assert event.kind in EVENT_KINDS
