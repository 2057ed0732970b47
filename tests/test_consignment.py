"""What came over a connection is read and decided on, for each recipient, without any database."""

from __future__ import annotations

import marshal
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from zope.interface import implementer

from postoffice.intake.arrival import Arrival
from postoffice.intake.consignment import Consignment, Parcel, consign, parcel_of
from postoffice.intake.receiving import LENGTH, _to_wire, consignment_of, frame
from postoffice.interfaces import IFilter
from postoffice.loops import LoopRule
from postoffice.message import Envelope, Message
from postoffice.routing import OVERSIZE, Routing, Verdict
from tests.deposits import ANN, BILLING, QUEUES, SALES
from tests.spools import EPOCH, Spool, large, mail, post_office

MAILS = sorted((Path(__file__).parent / "mail").glob("*.eml"))


@pytest.fixture
def routing(tmp_path: Path) -> Routing:
    """Return rules by which each domain has a queue."""
    return post_office(Spool(tmp_path, queues=QUEUES).ini).settings.routing


@contextmanager
def filed(folder: Path, parcel: Parcel) -> Iterator[Parcel]:
    """Give the same parcel with its bytes in a file."""
    assert parcel.raw is not None
    path = folder / "filed"
    path.write_bytes(parcel.raw)
    yield replace(parcel, raw=None, path=str(path))
    path.unlink()


def parcel(raw: bytes, *recipients: str, sender: str = ANN) -> Parcel:
    """Return a message that arrived in memory."""
    arrival = Arrival(sender, recipients or (BILLING,), False, raw, None, len(raw))
    return parcel_of(arrival, EPOCH, 1, "lmtp")


def queues(consignment: Consignment) -> list[str | None]:
    """Return the queue of each recipient."""
    return [one.decision.queue for one in consignment.prepared]


def test_each_recipient_is_decided_on(routing: Routing) -> None:
    """Each recipient's queue is found by that recipient alone, and so is its entry's envelope."""
    found = consign(routing, None, parcel(mail("one"), BILLING, "x@elsewhere.example", SALES))
    assert queues(found) == ["billing", None, "sales"]
    recipients = [one.values["recipients"] for one in found.prepared]
    assert recipients == [(BILLING,), ("x@elsewhere.example",), (SALES,)]
    assert {one.values["sender"] for one in found.prepared} == {ANN}
    assert found.prepared[1].decision.reason == "no-queue"


def test_the_envelope_is_not_the_headers(routing: Routing) -> None:
    """Trace lines and To in the message itself, which anybody can write, decide nothing."""
    raw = b"Return-Path: <forged@example.net>\nX-Original-To: in@sales.example.com\n" + mail(
        "one", To=SALES
    )
    (prepared,) = consign(routing, None, parcel(raw)).prepared
    assert prepared.decision.queue == "billing"
    assert (prepared.values["sender"], prepared.values["recipients"]) == (ANN, (BILLING,))


def test_the_null_sender_is_a_sender(routing: Routing) -> None:
    """A bounce has the sender "", which is not the same as none that is known."""
    (prepared,) = consign(routing, None, parcel(mail("bounce"), sender="")).prepared
    assert prepared.values["sender"] == ""


def test_the_queue_id_of_the_mail_server(routing: Routing) -> None:
    """The topmost Received, which our mail server wrote, tells the id in its own queue."""
    raw = (
        b"Received: from relay.example.net (relay.example.net [192.0.2.1])\n"
        b"\tby mail.example.com (Postfix) with ESMTP id 4XyZ12abcd\n"
        b"\tfor <in@billing.example.com>; Tue, 14 Nov 2023 22:13:20 +0000 (UTC)\n"
    ) + mail("one")
    (prepared,) = consign(routing, None, parcel(raw)).prepared
    assert prepared.values["mta_queue_id"] == "4XyZ12abcd"


def test_names(routing: Routing) -> None:
    """Each arrival has a name of its own; what is kept is named alike whenever it comes again."""
    arrival = Arrival(ANN, (BILLING, SALES), False, mail("one"), None, 10)
    parcels = [parcel_of(arrival, EPOCH + 123_456_789, number, "lmtp") for number in (1, 2)]
    assert parcels[0].source == f"1700000000.M123456P{os.getpid()}Q1.lmtp"
    assert parcels[1].source == f"1700000000.M123456P{os.getpid()}Q2.lmtp"
    first, second = (consign(routing, None, one) for one in parcels)
    names = [first.name(0), first.name(1)]
    assert names == [f"{receipt.hex()}.lmtp" for receipt in first.receipts]
    assert [second.name(0), second.name(1)] == names
    assert [one.source for one in second.prepared] == names
    assert {one.values["way"] for one in second.prepared} == {"lmtp"}


@pytest.mark.parametrize("sender", [ANN, ""])
def test_trace_lines_tell_the_envelope(sender: str) -> None:
    """What goes to the archive is, put into a Maildir, a message with the same envelope."""
    one = parcel(mail("one"), BILLING, "jörg@example.com", sender=sender)
    for number, recipient in enumerate(one.recipients):
        raw = b"".join(one.pieces(number))
        assert raw.endswith(mail("one"))
        found = Envelope.from_trace(Message.from_bytes(raw), EPOCH)
        assert (found.sender, found.recipients) == (sender, (recipient,))


POSTFIX = "Return-Path: <{}>\nX-Original-To: alias@example.com\nDelivered-To: {}\n"


def written(one: Parcel, folder: Path) -> bytes:
    """Return what is kept of a parcel, which is the same from memory and from a file."""
    raw = b"".join(one.pieces(0))
    with filed(folder, one) as there:
        assert b"".join(there.pieces(0)) == raw
    return raw


@pytest.mark.parametrize("sender", [ANN, ""])
def test_trace_lines_are_there_once(tmp_path: Path, sender: str) -> None:
    """What pipe(8) has written in front of a message is not written again."""
    raw = POSTFIX.format(sender, BILLING).encode() + mail("one")
    assert written(parcel(raw, sender=sender), tmp_path) == raw
    without = raw.replace(b"Delivered-To: " + BILLING.encode() + b"\n", b"")
    line = f"Delivered-To: {BILLING}\n".encode()
    assert written(parcel(without, sender=sender), tmp_path) == line + without


@pytest.mark.parametrize(
    "start",
    [
        POSTFIX.format("other@example.org", SALES),
        f"Return-Path: <{ANN}>\n folded\nDelivered-To: {BILLING}\n\tfolded\n",
        f"Delivered-To: {SALES}\nReturn-Path: <o@x.example>\n" + POSTFIX.format(ANN, BILLING),
        f"Received: x\nReturn-Path: <{ANN}>\nDelivered-To: {BILLING}\n",
    ],
    ids=["others", "folded", "not topmost", "not in front"],
)
def test_trace_lines_of_others_are_not_believed(tmp_path: Path, start: str) -> None:
    """Trace fields that say something else, or stand elsewhere, have ours in front of them."""
    raw = start.encode() + mail("one")
    ours = f"Return-Path: <{ANN}>\nDelivered-To: {BILLING}\n".encode()
    assert written(parcel(raw), tmp_path) == ours + raw


def test_a_file_is_read_like_memory(routing: Routing, tmp_path: Path) -> None:
    """A message in a file has the decision, the digests and the pieces of one in memory."""
    here = parcel(large("one"), BILLING, SALES)
    with filed(tmp_path, here) as there:
        found, other = consign(routing, None, here), consign(routing, None, there)
        assert found.receipts == other.receipts
        for one, two in zip(found.prepared, other.prepared, strict=True):
            assert (one.decision, one.values, one.duplicate) == (
                two.decision,
                two.values,
                two.duplicate,
            )
        assert b"".join(here.pieces(1)) == b"".join(there.pieces(1))
        assert {one.raw for one in other.prepared} == {None}


def test_recipients_share_the_bytes(routing: Routing) -> None:
    """However many recipients a message has, its bytes are in memory once."""
    one = parcel(mail("one"), *(f"a{number}@billing.example.com" for number in range(50)))
    assert {id(prepared.raw) for prepared in consign(routing, None, one).prepared} == {id(one.raw)}


@pytest.mark.parametrize("place", ["memory", "file"])
def test_oversize(routing: Routing, tmp_path: Path, place: str) -> None:
    """An oversize message is header and notice, marked, and known by its own body's digest."""
    small = replace(routing, max_message_size=10_000)

    def prepared(raw: bytes) -> tuple[bytes, bytes]:
        one = parcel(raw)
        if place == "memory":
            (found,) = consign(small, None, one).prepared
        else:
            with filed(tmp_path, one) as other:
                (found,) = consign(small, None, other).prepared
        assert found.values["oversize"] is True
        assert found.decision.marks == (OVERSIZE,)
        assert found.values["size"] == len(raw)
        assert found.raw is not None
        return found.raw, found.duplicate

    raw, duplicate = prepared(large("one", 20_000))
    assert raw.startswith(mail("one", "").rstrip(b"\n"))
    assert b"limit of 10000 bytes" in raw
    assert len(raw) < 1000
    assert prepared(large("one", 20_001))[1] != duplicate
    assert prepared(large("one", 20_000)) == (raw, duplicate)


def test_a_receipt_is_of_sender_recipient_and_content(routing: Routing) -> None:
    """Digests agree where sender, recipient and bytes do, whatever else is about a delivery."""

    def receipts(raw: bytes, *recipients: str, sender: str = ANN) -> tuple[bytes, ...]:
        return consign(routing, None, parcel(raw, *recipients, sender=sender)).receipts

    one, two = receipts(mail("one"), BILLING, SALES)
    assert receipts(mail("one"), SALES, "other@example.com", BILLING)[::2] == (two, one)
    others = {
        *receipts(mail("two"), BILLING),
        *receipts(mail("one"), BILLING, sender=""),
        *receipts(mail("one"), "In@billing.example.com"),
        *receipts(mail("one") + b"\n", BILLING),
        one,
        two,
    }
    assert len(others) == 6
    assert consign(Routing((), ()), None, parcel(mail("one"))).receipts == (one,)


@implementer(IFilter)
class Defective:
    """Raises what no filter may."""

    description = "defective"

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __call__(self, message: object) -> str | None:
        """Raise it for one recipient."""
        assert isinstance(message, Message)
        assert message.envelope is not None
        if message.envelope.recipients == (SALES,):
            raise self._error
        return None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("one\ntwo"), "ValueError in test_consignment.py:"),
        (RecursionError("too deep"), "RecursionError in test_consignment.py:"),
        (MemoryError(), "it needs more memory than there is"),
    ],
)
def test_a_defect_costs_one_message(routing: Routing, error: Exception, reason: str) -> None:
    """What a message brings out is the reason, in one line, why none of its recipients has it."""
    rules = replace(routing, reject_filters=(Defective(error),))
    found = consign(rules, None, parcel(mail("one"), BILLING, SALES))
    assert found.reason.startswith(reason)
    assert "\n" not in found.reason
    assert (found.prepared, len(found.receipts)) == ((), 2)


def test_a_limit_is_the_reason(routing: Routing) -> None:
    """A message that a filter gave up on says so."""
    found = consign(routing, None, parcel(mail("hopeless")))
    assert (found.reason, found.prepared) == ("limit exceeded: hopeless", ())


def test_a_file_that_is_gone_is_the_machines_fault(routing: Routing, tmp_path: Path) -> None:
    """A message whose file cannot be read is not set aside: it comes again."""
    with filed(tmp_path, parcel(mail("one"))) as one:
        pass
    with pytest.raises(FileNotFoundError):
        consign(routing, None, one)


@pytest.mark.parametrize("path", MAILS, ids=lambda path: path.stem)
def test_every_mail_crosses_the_channel(routing: Routing, path: Path) -> None:
    """Whatever a mail holds, it is decided on, and is the same on the other side of the channel."""
    loop = LoopRule(frequency=60.0)
    raw = path.read_bytes().replace(b"\r\n", b"\n")
    found = consign(routing, loop, parcel(raw, BILLING, SALES))
    assert found.reason == ""
    assert [one.decision.verdict in Verdict for one in found.prepared] == [True, True]
    wire = marshalled(found)
    assert wire.parcel == found.parcel
    assert wire.receipts == found.receipts
    assert [one.to_wire() for one in wire.prepared] == [one.to_wire() for one in found.prepared]


def marshalled(consignment: Consignment) -> Consignment:
    """Return what the process that commits makes of a consignment."""
    data = frame(_to_wire(consignment))
    (length,) = LENGTH.unpack_from(data)
    assert len(data) == LENGTH.size + length
    return consignment_of(marshal.loads(data[LENGTH.size :]))  # noqa: S302  # made a line above
