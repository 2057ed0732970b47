"""Looking messages up, by one property after another."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime

import pytest

from postoffice.postfix import Mail, MailSelector, PostqueueStore, Recipient


def at(hour: int) -> datetime:
    """Return a time of one day, as listings have it."""
    return datetime(2026, 11, 21, hour)  # noqa: DTZ001  # local and naive


REFUSED = "connect to mx.one.example[192.0.2.1]:25: Connection refused"


@pytest.fixture
def store() -> PostqueueStore:
    """A store of four messages."""
    made = PostqueueStore()
    made.mails = [
        Mail(
            "A1",
            100,
            at(1),
            "Ann@Paper.example",
            status="deferred",
            recipients=[Recipient("bo@one.example", REFUSED), Recipient("cy@two.example")],
        ),
        Mail("A2", 2000, at(2), "", status="hold", recipients=[Recipient("bo@one.example")]),
        Mail(
            "A3",
            30000,
            at(3),
            "bulk+ann@paper.example",
            status="active",
            recipients=[Recipient("di@one.example", "host said: 451 (busy)")],
        ),
        Mail("A4", 0, None, '"a b"@paper.example', status="deferred"),
    ]
    made.mails[0].read_headers(b"Subject: Bill 42\nReceived: one\nReceived: from two\n")
    made.mails[2].read_headers(b"subject: bill 4242\n")
    return made


Step = Callable[[MailSelector], MailSelector]


@pytest.mark.parametrize(
    ("lookup", "expected"),
    [
        (lambda one: one.lookup_qids(["A2", "A4", "A9"]), "A2 A4"),
        (lambda one: one.lookup_qids("A2"), "A2"),
        (lambda one: one.lookup_status(["hold", "active"]), "A2 A3"),
        (lambda one: one.lookup_status("deferred"), "A1 A4"),
        (lambda one: one.lookup_sender("ann@paper.example"), "A1"),
        (lambda one: one.lookup_sender("ANN@", exact=False), "A1 A3"),
        (lambda one: one.lookup_sender(""), "A2"),
        (lambda one: one.lookup_recipient("bo@one.example"), "A1 A2"),
        (lambda one: one.lookup_recipient("@one.", exact=False), "A1 A2 A3"),
        (lambda one: one.lookup_error(REFUSED), "A1"),
        (lambda one: one.lookup_error("(BUSY)", exact=False), "A3"),
        (lambda one: one.lookup_error("busy"), ""),
        (lambda one: one.lookup_header("Subject", "bill 42"), "A1"),
        (lambda one: one.lookup_header("SUBJECT", "42", exact=False), "A1 A3"),
        (lambda one: one.lookup_header("Received", "from two"), "A1"),
        (lambda one: one.lookup_date(start=at(2)), "A2 A3"),
        (lambda one: one.lookup_date(stop=at(2)), "A1 A2"),
        (lambda one: one.lookup_date(at(2), at(2)), "A2"),
        (lambda one: one.lookup_size(smin=100), "A1 A2 A3"),
        (lambda one: one.lookup_size(smax=100), "A1 A4"),
        (lambda one: one.lookup_size(101, 2000), "A2"),
    ],
)
def test_each_lookup(store: PostqueueStore, lookup: Step, expected: str) -> None:
    """Each lookup selects the messages that have what was sought, as a whole or in part."""
    selector = MailSelector(store)
    assert lookup(selector) is selector
    assert " ".join(mail.qid for mail in selector.mails) == expected
    assert len(selector) == len(expected.split())
    assert list(selector) == selector.mails


def test_lookups_are_chained(store: PostqueueStore) -> None:
    """Each further lookup narrows down what the ones before have left."""
    selector = MailSelector(store)
    selector.lookup_recipient("one.example", exact=False).lookup_size(smin=1000)
    assert [mail.qid for mail in selector] == ["A2", "A3"]
    selector.lookup_status("hold")
    assert [mail.qid for mail in selector] == ["A2"]
    assert [one.name for one in selector.filters] == ["recipient", "size", "status"]
    assert repr(selector) == (
        "<MailSelector: 1 of 4; recipient 'one.example' and size 1000.. and status hold>"
    )
    assert selector[0].qid == "A2"
    assert [mail.qid for mail in selector[:1]] == ["A2"]


def test_lookups_are_replayed(store: PostqueueStore) -> None:
    """The same lookups select anew from what the store has now, and can be forgotten."""
    selector = MailSelector(store).lookup_status("deferred").lookup_size(smin=1)
    store.mails = [
        Mail("B1", 5, status="deferred"),
        Mail("B2", 5, status="hold"),
        Mail("B3", 0, status="deferred"),
    ]
    assert [mail.qid for mail in selector] == ["A1"]
    assert [mail.qid for mail in selector.replay()] == ["B1"]
    assert [mail.qid for mail in selector.reset()] == ["B1", "B2", "B3"]
    assert selector.filters == []
    assert repr(selector) == "<MailSelector: 3 of 3; all>"


def test_a_date_is_a_whole_day(store: PostqueueStore) -> None:
    """A date without a time of day begins with its day, and ends with it."""
    day, other = date(2026, 11, 21), date(2026, 11, 22)
    assert len(MailSelector(store).lookup_date(day, day)) == 3
    assert len(MailSelector(store).lookup_date(stop=date(2026, 11, 20))) == 0
    assert len(MailSelector(store).lookup_date(other)) == 0


def test_a_lookup_that_raises_is_none(store: PostqueueStore) -> None:
    """What cannot be compared raises, and the selector is as it was."""
    selector = MailSelector(store).lookup_sender("ann", exact=False)
    before = list(selector)
    with pytest.raises(TypeError):
        selector.lookup_date(datetime(2026, 11, 21, tzinfo=UTC))
    assert list(selector) == before
    assert list(selector.replay()) == before
