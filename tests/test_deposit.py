"""Deposits: what came over connections is in the depot, or kept, when it is acknowledged."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ZEO.Exceptions import ClientDisconnected
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError, POSError, ReadConflictError
from zope.interface import implementer

from postoffice.exceptions import DepotDisconnected
from postoffice.filters import EnvelopeToFilter
from postoffice.interfaces import Event, IEventSink, IFilter
from postoffice.message import Message
from postoffice.queue import Queue
from postoffice.routing import OVERSIZE, THROTTLED
from tests.deposits import ANN, BILLING, QUEUES, SALES, SECOND, Counter
from tests.spools import EPOCH, Spool, large, mail

QUEUED = "250 2.0.0 queued"
LATER = "451 4.3.0 try again later"
NOBODY = "550 5.1.1 nobody here takes mail for this recipient"
KEPT = "250 2.0.0 kept for the administrator"
BEFORE = "250 2.0.0 received before"
SPAM = "reject_filters =\n    header_regexp: ^Subject: spam\n"
STRANGER = "in@elsewhere.example"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """A site whose queues go by the recipient's domain."""
    return Spool(tmp_path / "site", SPAM, queues=QUEUES)


@pytest.fixture
def counter(spool: Spool) -> Iterator[Counter]:
    """Where messages for that site are deposited."""
    with Counter(spool) as found:
        yield found


def traced(recipient: str, raw: bytes, sender: str = ANN) -> bytes:
    """Return what the archive has of a message."""
    return f"Return-Path: <{sender}>\nDelivered-To: {recipient}\n".encode() + raw


# -- into the queues -------------------------------------------------------------------------------


def test_a_message_is_in_its_queue(counter: Counter) -> None:
    """A message is stored with its envelope, arrival and way, and there is no copy elsewhere."""
    one = counter.consignment(mail("one"), BILLING, arrived=EPOCH + 5)
    assert counter.told(one) == [[QUEUED]]
    (held,) = counter.held("billing")
    assert held.raw == mail("one")
    assert (held.sender, held.recipients) == (ANN, (BILLING,))
    assert (held.way, held.source, held.arrived) == ("lmtp", one.name(0), EPOCH + 5)
    assert (held.size, held.archive, held.in_file) == (len(mail("one")), "", False)
    assert counter.archived() == []


def test_the_reply_names_the_id(counter: Counter) -> None:
    """The client is told the id by which the message is found here."""
    ((reply,),) = counter.deposit.store([counter.consignment(mail("one"))])
    id = int(reply.text.removeprefix("queued as "))
    with counter.office.connection() as connection:
        queue = Queue(counter.office.folder(connection).get("billing"))
        assert [entry.id for entry in queue.entries()] == [id]


@pytest.mark.parametrize("size", ["small", "large", "in a file"])
def test_two_queues_share_one_body(counter: Counter, size: str, tmp_path: Path) -> None:
    """A message for recipients of two queues is an entry in each, and its bytes are stored once."""
    recipients = (BILLING, SALES, "too@billing.example.com")
    raw = mail("one") if size == "small" else large("one", 2_000_000)
    if size == "in a file":
        with counter.filed(raw, *recipients) as one:
            assert counter.told(one) == [[QUEUED] * 3]
    else:
        assert counter.told(counter.consignment(raw, *recipients)) == [[QUEUED] * 3]
    held = [*counter.held("billing"), *counter.held("sales")]
    assert [one.recipients for one in held] == [(one,) for one in recipients[::2] + recipients[1:2]]
    assert len({one.body for one in held}) == 1
    assert [one.raw for one in held] == [raw] * 3
    assert [one.in_file for one in held] == [size != "small"] * 3
    blobs = list((counter.spool.folder / "blobs").rglob("*.blob"))
    assert len(blobs) == (size != "small")


@pytest.mark.parametrize("raw", [mail("one"), large("one")])
def test_the_same_mail_in_two_sessions(counter: Counter, raw: bytes) -> None:
    """Two deliveries of the same bytes for two recipients, in one commit, share a body too."""
    one, two = counter.consignment(raw, BILLING), counter.consignment(raw, SALES)
    assert counter.told(one, two) == [[QUEUED], [QUEUED]]
    assert counter.held("billing")[0].body == counter.held("sales")[0].body


def test_a_file_on_another_file_system_is_copied(counter: Counter, tmp_path: Path) -> None:
    """Where a file cannot be linked to, its bytes are copied; it is no different otherwise."""
    place = Path("/dev/shm")  # noqa: S108  # the one that Linux always has
    if place.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    raw = large("one", 1_500_000)
    with counter.filed(raw, folder=place) as one:
        assert counter.told(one) == [[QUEUED]]
    assert counter.raws() == [raw]
    assert os.listdir(counter.spool.folder / "blobs" / "tmp") == []


def test_a_blob_outlives_its_arrival(counter: Counter) -> None:
    """What was linked from a file without a name is whole, and its own, when that is gone."""
    raw = large("one", 1_500_000)
    with counter.filed(raw) as one:
        assert counter.told(one) == [[QUEUED]]
    (blob,) = (counter.spool.folder / "blobs").rglob("*.blob")
    assert blob.read_bytes() == raw
    assert blob.stat().st_nlink == 1


def test_order_is_kept(counter: Counter) -> None:
    """Messages of one commit are in the queue in the order in which they came."""
    raws = [mail(f"mail {number}") for number in range(120)]
    assert counter.told(*map(counter.consignment, raws)) == [[QUEUED]] * 120
    assert counter.raws() == raws


def test_one_transaction_for_all(counter: Counter) -> None:
    """However many messages there are, with however many recipients, they are one transaction."""
    before = counter.transactions()
    counter.told(*(counter.consignment(mail(f"mail {n}"), BILLING, SALES) for n in range(20)))
    assert counter.transactions() == before + 1


# -- what is not queued ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize(
    ("raw", "recipient", "reason"),
    [
        (mail("spam"), BILLING, "reject-filter"),
        (mail("one", From=BILLING, To=BILLING), BILLING, "from-is-to"),
        (mail("one", X_Postoffice="Bounced"), BILLING, "ricochet"),
        (mail("one"), STRANGER, "no-queue"),
    ],
)
def test_what_is_not_queued_is_archived(
    counter: Counter, raw: bytes, recipient: str, reason: str, place: str
) -> None:
    """Mail that is rejected or discarded is acknowledged, and its bytes are in the archive."""
    if place == "file":
        with counter.filed(raw, recipient) as one:
            told = counter.told(one)
    else:
        one = counter.consignment(raw, recipient)
        told = counter.told(one)
    assert told == [[f"250 2.0.0 not queued: {reason}"]]
    assert counter.archived() == [(one.name(0), traced(recipient, raw))]
    assert counter.raws("billing") == counter.raws("sales") == []


def test_a_duplicate_is_archived(counter: Counter) -> None:
    """A duplicate, by Message-ID, recipient and body, is archived, even if its sender differs."""
    two = counter.consignment(mail("one"), sender="other@example.org")
    assert counter.told(counter.consignment(mail("one")), two) == [
        [QUEUED],
        ["250 2.0.0 not queued: duplicate"],
    ]
    assert counter.raws() == [mail("one")]
    assert counter.archived() == [(two.name(0), traced(BILLING, mail("one"), "other@example.org"))]


def test_each_recipient_is_archived_apart(counter: Counter) -> None:
    """Of a message whose recipients fare differently, the archive has one file a refused one."""
    one = counter.consignment(mail("one"), STRANGER, BILLING, "x" + STRANGER, sender="")
    assert counter.told(one) == [
        ["250 2.0.0 not queued: no-queue", QUEUED, "250 2.0.0 not queued: no-queue"]
    ]
    assert dict(counter.archived()) == {
        one.name(0): traced(STRANGER, mail("one"), ""),
        one.name(2): traced("x" + STRANGER, mail("one"), ""),
    }


def test_an_archive_of_its_own(tmp_path: Path) -> None:
    """The archive is where the configuration says, a folder a day, for its owner alone."""
    spool = Spool(tmp_path / "site", SPAM, queues=QUEUES, archive=tmp_path / "archive")
    with Counter(spool) as counter:
        counter.told(counter.consignment(mail("spam")))
        counter.now += 24 * 60 * 60 * SECOND
        counter.told(counter.consignment(mail("spam too")))
    days = sorted(path.name for path in (tmp_path / "archive").iterdir())
    assert days == ["2023.11.14", "2023.11.15"] or days == ["2023.11.15", "2023.11.16"]
    assert {path.stat().st_mode & 0o777 for path in spool.archived()} == {0o600}
    assert len(spool.archived()) == 2


def test_without_an_archive(tmp_path: Path) -> None:
    """With ``archive = none`` what is not queued is gone; what was set aside is not."""
    with Counter(Spool(tmp_path / "site", f"{SPAM}archive = none\n", queues=QUEUES)) as counter:
        assert counter.told(
            counter.consignment(mail("spam")), counter.consignment(mail("hopeless"))
        ) == [["250 2.0.0 not queued: reject-filter"], [KEPT]]
        assert [raw for _, raw in counter.archived()] == [traced(BILLING, mail("hopeless"))]


def test_the_log_has_a_line_for_each(counter: Counter, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever becomes of a message is logged, with its name, the reason, and who and what."""
    with caplog.at_level(logging.INFO):
        counter.told(
            counter.consignment(mail("one"), BILLING, STRANGER), counter.consignment(mail("spam"))
        )
    one, two, three = (line for line in caplog.messages if "Subject:" in line)
    assert "to queue 'billing': matched" in one
    assert ".lmtp discarded: no-queue" in two
    assert "rejected: reject-filter: header_regexp: ^Subject: spam" in three
    assert "From: ann@example.org To: bob@example.com Subject: spam" in three


# -- oversize --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "size"), [(10_000, 20_000), (1_500_000, 2_000_000)])
def test_oversize(tmp_path: Path, limit: int, size: int) -> None:
    """Of a message over the limit a notice is queued, and the original archived; where, it says."""
    spool = Spool(tmp_path / "site", f"max_message_size = {limit}\n", queues=QUEUES)
    raw = large("one", size)
    with Counter(spool) as counter:
        if size > 1 << 20:
            with counter.filed(raw, BILLING, SALES) as one:
                assert counter.told(one) == [[QUEUED] * 2]
        else:
            assert counter.told(counter.consignment(raw, BILLING, SALES)) == [[QUEUED] * 2]
        for queue, recipient in (("billing", BILLING), ("sales", SALES)):
            (held,) = counter.held(queue)
            assert (held.marks, held.size) == ((OVERSIZE,), size)
            assert f"limit of {limit} bytes".encode() in held.raw
            assert len(held.raw) < 1000
            path = Path(counter.office.archive().path(held.archive))
            assert path.read_bytes() == traced(recipient, raw)
        assert len(counter.archived()) == 2


def test_oversize_duplicates_are_known_by_their_bodies(tmp_path: Path) -> None:
    """Two large messages that differ in their bodies alone are two, and the same twice is one."""
    spool = Spool(tmp_path / "site", "max_message_size = 10k\n", queues=QUEUES)
    with Counter(spool) as counter:
        raws = [large("one", 20_000), large("one", 20_001), large("one", 20_000)]
        senders = [ANN, ANN, "other@example.org"]
        assert counter.told(
            *(
                counter.consignment(raw, sender=sender)
                for raw, sender in zip(raws, senders, strict=True)
            )
        ) == [[QUEUED], [QUEUED], ["250 2.0.0 not queued: duplicate"]]


# -- throttled senders -----------------------------------------------------------------------------


def test_who_writes_too_often_is_throttled(tmp_path: Path) -> None:
    """Mail of one sender that comes too fast is marked, in one commit and across several."""
    spool = Spool(tmp_path / "site", "ooo_loop_frequency = 1\n", queues=QUEUES)
    with Counter(spool) as counter:
        for number in range(0, 4, 2):
            pair = (
                counter.consignment(mail(f"mail {n}", To=BILLING), arrived=EPOCH + n * SECOND)
                for n in (number, number + 1)
            )
            assert counter.told(*pair) == [[QUEUED]] * 2
        later = counter.consignment(mail("later", To=BILLING), arrived=EPOCH + 1000 * SECOND)
        assert counter.told(later) == [[QUEUED]]
        assert [one.marks for one in counter.held("billing")] == [
            (),
            *[(THROTTLED,)] * 3,
            (),
        ]


# -- set aside -------------------------------------------------------------------------------------


@implementer(IFilter)
class Defective:
    """Raises what no filter may, for one subject."""

    description = "defective"

    def __call__(self, message: object) -> str | None:
        """Match nothing."""
        assert isinstance(message, Message)
        if message["Subject"] == "defect":
            raise ZeroDivisionError("of all\x1b things")
        return None


def failing(counter: Counter) -> None:
    """Give the rules a filter with a defect."""
    rules = counter.routing
    counter.routing = replace(rules, reject_filters=(*rules.reject_filters, Defective()))


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        ("hopeless", "limit exceeded: hopeless"),
        ("defect", "ZeroDivisionError in test_deposit.py:"),
    ],
)
def test_what_cannot_be_processed_is_set_aside(
    counter: Counter, caplog: pytest.LogCaptureFixture, subject: str, reason: str, place: str
) -> None:
    """A message that a filter fails on is kept, with the reason; others are not harmed by it."""
    failing(counter)
    raw = mail(subject)
    others = [counter.consignment(mail("before")), counter.consignment(mail("after"))]
    if place == "file":
        with counter.filed(raw, BILLING, SALES) as one:
            told = counter.told(others[0], one, others[1])
    else:
        one = counter.consignment(raw, BILLING, SALES)
        told = counter.told(others[0], one, others[1])
    assert told == [[QUEUED], [KEPT] * 2, [QUEUED]]
    assert counter.raws() == [mail("before"), mail("after")]
    names = [one.name(0), one.name(1)]
    assert counter.spool.set_aside() == sorted(names)
    for name, recipient in zip(names, (BILLING, SALES), strict=True):
        assert (counter.spool.failed / name).read_bytes() == traced(recipient, raw)
        note = json.loads((counter.spool.failed / f"{name}.reason").read_text())
        assert note["reason"].startswith(reason)
        assert note["fingerprint"] == counter.office.fingerprint
    assert all(line.isprintable() for line in caplog.messages)
    assert f"{one.parcel.source} is set aside: {reason}" in caplog.text
    assert f"it is {names[1]} in {counter.spool.failed}" in caplog.text


def test_what_was_set_aside_can_be_imported(counter: Counter) -> None:
    """Moved into the Maildir, a file that was set aside is imported, with its envelope."""
    counter.told(counter.consignment(mail("hopeless"), SALES, sender=""))
    (name,) = counter.spool.set_aside()
    target = counter.spool.maildir / "new" / name
    (counter.spool.failed / name).rename(target)
    target.write_bytes(target.read_bytes().replace(b"hopeless", b"hopeful"))
    counter.close()
    counter.spool.run()
    with Counter(counter.spool) as again:
        (held,) = again.held("sales")
        assert (held.sender, held.recipients) == ("", (SALES,))


# -- unrouted = reject -----------------------------------------------------------------------------


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Counter]:
    """A deposit that refuses what no queue takes."""
    with Counter(Spool(tmp_path / "strict", f"{SPAM}unrouted = reject\n", queues=QUEUES)) as found:
        yield found


def test_unrouted_mail_is_refused(strict: Counter) -> None:
    """With ``unrouted = reject`` what no queue takes is refused, and nothing else of a message."""
    one = strict.consignment(mail("one"), STRANGER, BILLING)
    assert strict.told(one, strict.consignment(mail("spam"))) == [
        [NOBODY, QUEUED],
        ["250 2.0.0 not queued: reject-filter"],
    ]
    assert strict.raws() == [mail("one")]


def test_a_refusal_has_no_receipt(strict: Counter) -> None:
    """A message that was refused and comes again is refused again."""
    for _ in range(2):
        assert strict.told(strict.consignment(mail("one"), STRANGER)) == [[NOBODY]]


def test_two_refusals_in_one_commit(strict: Counter) -> None:
    """The same refused message twice in one commit is refused twice: nobody has it."""
    pair = [strict.consignment(mail("one"), STRANGER) for _ in range(2)]
    assert strict.told(*pair) == [[NOBODY], [NOBODY]]


def test_a_queue_that_is_new_takes_what_was_refused(strict: Counter) -> None:
    """Once a queue takes it, a message that was refused before is queued."""
    assert strict.told(strict.consignment(mail("one"), STRANGER)) == [[NOBODY]]
    rules = strict.routing
    wider = replace(rules.queues[0], filters=(EnvelopeToFilter("@elsewhere.example"),))
    strict.routing = replace(rules, queues=(wider,))
    assert strict.told(strict.consignment(mail("one"), STRANGER)) == [[QUEUED]]


# -- when it fails ---------------------------------------------------------------------------------


class Storage(FileStorage):  # type: ignore[misc]  # it has no types
    """A FileStorage whose commits fail when a test says so.

    :ivar voting: errors of the next votes.
    :ivar finishing: errors of the next commits, once they are on the disk.
    """

    def __init__(self, path: str, **options: Any) -> None:
        """Open it."""
        self.voting: list[Exception] = []
        self.finishing: list[Exception] = []
        super().__init__(path, **options)

    def tpc_vote(self, *args: Any) -> Any:
        """Vote, or fail."""
        done = super().tpc_vote(*args)
        if self.voting:
            raise self.voting.pop(0)
        return done

    def tpc_finish(self, *args: Any) -> Any:
        """Finish, and fail then."""
        done = super().tpc_finish(*args)
        if self.finishing:
            raise self.finishing.pop(0)
        return done


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A storage whose commits can fail."""
    (tmp_path / "site").mkdir()
    return Storage(str(tmp_path / "site" / "depot.fs"), blob_dir=str(tmp_path / "site" / "blobs"))


@pytest.fixture
def frail(storage: Storage, spool: Spool) -> Iterator[Counter]:
    """A deposit in that storage."""
    with Counter(spool, lambda uri: DB(storage)) as found:
        yield found


FAILURES = [
    OSError(28, "No space left on device"),
    ClientDisconnected("gone"),
    POSError("damaged"),
    DepotDisconnected("gone"),
    AssertionError("no folder for a blob"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("raw", [mail("one"), large("one")], ids=["small", "large"])
def test_a_failure_is_temporary(
    frail: Counter, storage: Storage, error: Exception, raw: bytes
) -> None:
    """While the database fails, all are told to try again, and nothing of theirs stays."""
    frail.told(frail.consignment(mail("before")))
    storage.voting = [error]
    messages = [frail.consignment(raw, BILLING, SALES), frail.consignment(mail("two"))]
    assert frail.told(*messages) == [[LATER] * 2, [LATER]]
    assert frail.deposit.failed
    assert frail.raws() == [mail("before")]
    assert blobs(frail) == []
    assert frail.told(*messages) == [[QUEUED] * 2, [QUEUED]]
    assert not frail.deposit.failed
    assert frail.raws() == [mail("before"), raw, mail("two")]
    assert frail.raws("sales") == [raw]


def test_a_rehearsal(frail: Counter, storage: Storage) -> None:
    """A rehearsal shows whether a commit would go well, and leaves nothing behind."""
    frail.told(frail.consignment(mail("before")))
    size, last = storage.getSize(), storage.lastTransaction()
    frail.deposit.rehearse()
    storage.voting = [OSError(28, "No space left on device")]
    with pytest.raises(OSError, match="No space left"):
        frail.deposit.rehearse()
    frail.deposit.rehearse()
    assert (storage.getSize(), storage.lastTransaction()) == (size, last)
    assert frail.told(frail.consignment(mail("after"))) == [[QUEUED]]
    assert frail.raws() == [mail("before"), mail("after")]


def blobs(counter: Counter) -> list[str]:
    """Return the paths of the files in the folder of blobs, but for its marker."""
    folder = counter.spool.folder / "blobs"
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return [path for path in paths if not path.startswith(".")]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_commit_in_doubt_is_done_once(frail: Counter, storage: Storage, error: Exception) -> None:
    """A commit that happened and seemed to fail is not acknowledged, and not done again."""
    storage.finishing = [error]
    raws = [large("one"), mail("two")]
    first = [frail.consignment(raws[0], BILLING, SALES), frail.consignment(raws[1])]
    assert frail.told(*first) == [[LATER] * 2, [LATER]]
    again = [frail.consignment(raws[0], BILLING, SALES), frail.consignment(raws[1])]
    assert frail.told(*again) == [[BEFORE] * 2, [BEFORE]]
    assert (frail.raws(), frail.raws("sales")) == (raws, raws[:1])
    assert frail.archived() == []
    assert frail.told(frail.consignment(mail("three"))) == [[QUEUED]]


def test_a_conflict_is_no_failure(frail: Counter, storage: Storage) -> None:
    """A commit that met another one is tried again, and the client hears nothing of it."""
    storage.voting = [ConflictError(), ReadConflictError()]
    with frail.filed(large("one", 1_500_000), BILLING, SALES) as one:
        two, three = frail.consignment(mail("two")), frail.consignment(mail("spam"))
        assert frail.told(one, two, three) == [
            [QUEUED] * 2,
            [QUEUED],
            ["250 2.0.0 not queued: reject-filter"],
        ]
    assert frail.raws() == [large("one", 1_500_000), mail("two")]
    assert frail.raws("sales") == [large("one", 1_500_000)]
    assert [name for name, _ in frail.archived()] == [three.name(0)]
    assert len(blobs(frail)) == 1


def test_conflicts_without_end(frail: Counter, storage: Storage) -> None:
    """Where every attempt meets another commit, the client is told to try again, in time."""
    storage.voting = [ConflictError() for _ in range(100)]
    assert frail.told(frail.consignment(mail("one"))) == [[LATER]]
    assert frail.deposit.failed
    assert "the database refuses" in frail.deposit.reason
    storage.voting = []
    assert frail.told(frail.consignment(mail("one"))) == [[QUEUED]]


def test_what_was_archived_twice_is_one_file(frail: Counter, storage: Storage) -> None:
    """What went to the archive before its commit met another one is there once."""
    storage.voting = [ConflictError()]
    one, two = frail.consignment(mail("spam")), frail.consignment(mail("hopeless"))
    assert frail.told(one, two) == [["250 2.0.0 not queued: reject-filter"], [KEPT]]
    assert [name for name, _ in frail.archived()] == [one.name(0), two.name(0)]


def test_an_archive_that_fails(counter: Counter) -> None:
    """What cannot be archived is not acknowledged; nor is what shares its commit."""
    counter.spool.maildir.rename(counter.spool.folder / "away")
    counter.spool.maildir.touch()
    pair = [counter.consignment(mail("one")), counter.consignment(mail("spam"))]
    assert counter.told(*pair) == [[LATER], [LATER]]
    assert counter.raws() == []
    counter.spool.maildir.unlink()
    (counter.spool.folder / "away").rename(counter.spool.maildir)
    assert counter.told(*pair) == [[QUEUED], ["250 2.0.0 not queued: reject-filter"]]


def test_a_file_that_is_gone(counter: Counter) -> None:
    """A large message whose process died meanwhile comes again; what it came with does, too."""
    with counter.filed(large("one", 1_500_000)) as one:
        pass
    two = counter.consignment(mail("two"))
    assert counter.told(one, two) == [[LATER], [LATER]]
    assert counter.told(two) == [[QUEUED]]
    assert os.listdir(counter.spool.folder / "blobs" / "tmp") == []


def test_a_queue_that_was_removed(counter: Counter) -> None:
    """Mail for a queue that is gone waits with the mail server, and holds up no other mail."""
    with counter.office.connection() as connection:
        counter.office.folder(connection).remove("sales")
        connection.transaction_manager.commit()
    messages = [counter.consignment(mail("one")), counter.consignment(mail("two"), SALES)]
    assert counter.told(*messages) == [[QUEUED], [LATER]]
    assert not counter.deposit.failed
    assert counter.raws() == [mail("one")]


@implementer(IEventSink)
class FailingSink:
    """Has a defect that the second of three messages brings out, alone too."""

    def __init__(self) -> None:
        """Begin to count."""
        self._events = 0

    def record(self, event: Event) -> None:
        """Fail at the second message, whose second attempt comes after the first message's."""
        self._events += 1
        if self._events in (2, 4):
            raise ZeroDivisionError("of all things")


def test_a_defect_in_storing_costs_one_message(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    """A message that cannot be stored, for whatever reason, comes again; the others are stored."""
    with Counter(spool, event_sink=FailingSink()) as counter:
        messages = [
            counter.consignment(mail("one")),
            counter.consignment(mail("two")),
            counter.consignment(mail("three")),
        ]
        assert counter.told(*messages) == [[QUEUED], [LATER], [QUEUED]]
        assert counter.raws() == [mail("one"), mail("three")]
    assert "ZeroDivisionError" in caplog.text
    assert f"{messages[1].parcel.source} could not be stored" in caplog.text


# -- what is durable when --------------------------------------------------------------------------

DEPOSITS = """
import os, sys
from pathlib import Path
from tests.deposits import BILLING, SALES, Counter
from tests.spools import Spool, large, mail
spool = object.__new__(Spool)
spool.folder = Path(sys.argv[1])
spool.archive, spool.ini = None, spool.folder / "postoffice.ini"
spool.maildir = spool.folder / "Maildir"
with Counter(spool) as counter:
    counter.told(counter.consignment(mail("first")))
    with counter.filed(large("large", 1_500_000), BILLING, SALES) as one:
        messages = [counter.consignment(mail(name)) for name in ("one", "spam", "hopeless")]
        sys.stderr.write("from here\\n")
        sys.stderr.flush()
        told = counter.told(*messages, one)
        sys.stderr.write("to here\\n")
        sys.stderr.flush()
    print(told)
"""


def test_all_is_durable_before_it_is_acknowledged(spool: Spool, tmp_path: Path) -> None:
    """Files, and the folders that name them, are on the disk before the commit that needs them."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: what is written when cannot be seen")
    log = tmp_path / "calls"
    done = subprocess.run(
        [
            *("strace", "-f", "-y", "-s", "16", "-o", str(log)),
            *("-e", "trace=openat,write,writev,pwrite64,fsync,rename,linkat,mkdir"),
            *(sys.executable, "-c", DEPOSITS, str(spool.folder)),
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("250 2.0.0") == 5
    calls = log.read_text()
    calls = calls[calls.index('"from here') : calls.index('"to here')]
    dirty: set[str] = set()
    finished = named = 0
    for line in calls.splitlines():
        if found := re.search(r"(?:write|writev|pwrite64)\(\d+<(/.*?)>", line):
            dirty.add(found[1])
        elif found := re.search(r"fsync\(\d+<(.*?)>", line):
            dirty.discard(found[1])
            if found[1].endswith("/depot.fs"):
                finished += 1
                assert not needed(dirty), line
        elif found := re.search(r'rename\("(.*?)", "(.*?)"\) = 0', line):
            named += 1
            assert found[1] not in dirty, f"{line}: before its bytes were written to the disk"
            dirty.add(os.path.dirname(found[2]))
        elif found := re.search(r'mkdir\("(.*?)", .*\) = 0', line):
            dirty.add(os.path.dirname(found[1]))
    assert (finished, named) == (1, 4)
    assert not needed(dirty)


def needed(paths: set[str]) -> set[str]:
    """Return those of the site's paths in which something is to be found again."""
    return {one for one in paths if "/site/" in one and "/blobs/tmp" not in one}
