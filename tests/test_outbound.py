"""Notices: handed over once, with the transaction that they are about, whoever sends them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from repoze.sendmail.delivery import DirectMailDelivery, QueuedMailDelivery
from repoze.sendmail.interfaces import IMailer
from repoze.sendmail.queue import QueueProcessor
from transaction.interfaces import TransientError
from zope.interface import implementer

from postoffice.message import Envelope, Message
from tests.depots import Depot, Seat, depot, local_depot, mail, one, seat, two

__all__ = ["depot", "local_depot", "one", "seat", "two"]

FROM = "office@example.net"


@implementer(IMailer)
class Outbox:
    """A mailer that keeps what it is given; called, it is a plain callable that sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, list[str], Any]] = []

    def send(self, fromaddr: str, toaddrs: Any, message: Any) -> None:
        self.sent.append((fromaddr, list(toaddrs), message))

    __call__ = send


def bad_message() -> Message:
    """Return a message that a notice may be sent about."""
    envelope = Envelope("a@example.com", ("b@example.org",), 1)
    return Message.from_bytes(mail("bad"), envelope=envelope)


def quarantine(seat: Seat, send: Any) -> None:
    seat.queue.quarantine(bad_message(), "error", send, FROM)


def bounce(seat: Seat, send: Any) -> None:
    assert seat.queue.bounce(bad_message(), send, FROM, "no such thing")


NOTICES = pytest.mark.parametrize("notify", [quarantine, bounce])
Notify = Callable[[Seat, Any], None]


@NOTICES
def test_a_plain_callable_sends_after_the_commit(seat: Seat, notify: Notify) -> None:
    """It is called once after the commit, from the null sender, and never after an abort."""
    outbox = Outbox()
    seat.begin()
    notify(seat, outbox)
    seat.abort()
    seat.commit()
    assert outbox.sent == []
    notify(seat, outbox)
    assert outbox.sent == []
    seat.commit()
    seat.commit()
    ((sender, recipients, notice),) = outbox.sent
    assert (sender, recipients) == ("", ["a@example.com"])
    assert notice["X-Postoffice"] == "Bounced"
    assert notice["From"] == FROM


@NOTICES
def test_a_retried_transaction_sends_once(one: Seat, two: Seat, notify: Notify) -> None:
    """A transaction that conflicts and is run again has sent one notice when it is through."""
    one.connection.root()["x"] = 0
    one.commit()
    outbox = Outbox()
    two.begin()
    for attempt in range(2):
        one.begin()
        one.connection.root()["x"] = attempt
        notify(one, outbox)
        if attempt == 0:
            two.connection.root()["x"] = 9
            two.commit()
            with pytest.raises(TransientError):
                one.commit()
            one.abort()
            assert outbox.sent == []
    one.commit()
    assert len(outbox.sent) == 1


def test_an_error_in_sending_leaves_the_commit(
    seat: Seat, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain callable that raises is logged; what the notice is about stays committed."""

    def fails(fromaddr: str, toaddrs: list[str], message: Any) -> None:
        raise ConnectionRefusedError("no mail today")

    seat.begin()
    quarantine(seat, fails)
    seat.commit()
    seat.begin()
    assert seat.queue.count_quarantined_messages() == 1
    assert "was not sent" in caplog.text


@NOTICES
@pytest.mark.parametrize("bound", [False, True], ids=["the delivery", "its send"])
def test_a_delivery_joins_the_transaction(seat: Seat, notify: Notify, bound: bool) -> None:
    """repoze.sendmail's delivery, or its method, is called at once, and sends with the commit."""
    outbox = Outbox()
    delivery = DirectMailDelivery(outbox, transaction_manager=seat.transactions)
    send = delivery.send if bound else delivery
    seat.begin()
    notify(seat, send)
    seat.abort()
    assert outbox.sent == []
    seat.begin()
    notify(seat, send)
    assert outbox.sent == []
    assert any("Mail" in type(joined).__name__ for joined in seat.transactions.get()._resources)
    seat.commit()
    ((sender, recipients, _),) = outbox.sent
    assert (sender, recipients) == ("", ["a@example.com"])


def test_the_null_sender_survives_a_queued_delivery(seat: Seat, tmp_path: Path) -> None:
    """Through repoze.sendmail's Maildir and its queue processor the notice still comes from <>."""
    outbox = Outbox()
    path = tmp_path / "outgoing"
    delivery = QueuedMailDelivery(str(path), transaction_manager=seat.transactions)
    seat.begin()
    bounce(seat, delivery)
    seat.abort()
    assert list(path.glob("*/*")) == []
    seat.begin()
    bounce(seat, delivery)
    quarantine(seat, delivery.send)
    seat.commit()
    assert len(list(path.glob("new/*"))) == 2
    QueueProcessor(outbox, str(path)).send_messages()
    assert [(sender, recipients) for sender, recipients, _ in outbox.sent] == [
        ("", ["a@example.com"])
    ] * 2
    assert {notice["X-Postoffice"] for _, _, notice in outbox.sent} == {"Bounced"}


def test_no_notice_is_sent_to_automatic_mail(seat: Seat) -> None:
    """A message from the null sender is put to quarantine without a notice, and never bounced."""
    outbox = Outbox()
    message = Message.from_bytes(mail("x", sender=""), envelope=Envelope("", ("b@x",), 1))
    seat.begin()
    assert not seat.queue.bounce(message, outbox, FROM)
    seat.queue.quarantine(message, "error", outbox, FROM)
    seat.commit()
    assert outbox.sent == []
    assert seat.queue.count_quarantined_messages() == 1


def test_wrong_arguments_are_refused(seat: Seat) -> None:
    """A notice without its sender, or with both a reason and a message, changes nothing."""
    outbox = Outbox()
    seat.begin()
    with pytest.raises(ValueError, match="notice_from"):
        seat.queue.quarantine(bad_message(), "error", outbox)
    with pytest.raises(ValueError, match="reason"):
        seat.queue.bounce(bad_message(), outbox, FROM, "reason", bad_message())
    seat.commit()
    assert seat.queue.count_quarantined_messages() == 0
    assert outbox.sent == []


def test_a_bad_notice_address_undoes_nothing_halfway(local: Depot) -> None:
    """A notice_from that is no address is refused before anything is changed."""
    seat = local.seat()
    seat.add("bad")
    seat.begin()
    message = seat.queue.pop_next()
    seat.abort()
    with pytest.raises(ValueError, match="not one address"):
        seat.queue.quarantine(
            Message.from_bytes(message.raw, envelope=bad_message().envelope),
            "error",
            Outbox(),
            "nonsense",
        )
    seat.commit()
    assert seat.queue.count_quarantined_messages() == 0
