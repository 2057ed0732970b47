"""Which rule decides, and how a decision explains itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zope.interface import implementer

from postoffice.exceptions import LimitExceeded
from postoffice.filters import (
    BodyRegexpFilter,
    EnvelopeToFilter,
    HeaderRegexpFilter,
    ToHostnameFilter,
)
from postoffice.interfaces import IFilter
from postoffice.loops import LoopRule
from postoffice.message import Envelope, Message
from postoffice.routing import (
    AUTO_RESPONSE,
    MARKS,
    OVERSIZE,
    REASONS,
    THROTTLED,
    Decision,
    QueueRule,
    Routing,
    Step,
    Verdict,
    as_duplicate,
    as_throttled,
    explain,
    route,
)

OWN = (("X-Postoffice-Date", "1700000000"),)
PASSED = (
    Step("no-sender", "", None),
    Step("from-is-to", "", None),
    Step("ricochet", "", None),
)


def mail(*fields: str, body: str = "Hello.\n", envelope: Envelope | None = None) -> Message:
    """Make a message as an intake does: with a field of ours in front."""
    raw = "".join(f"{field}\n" for field in fields) + "\n" + body
    return Message.from_bytes(raw.encode(), OWN, envelope)


def sent(sender: str | None) -> Envelope:
    """Make an envelope with this sender."""
    return Envelope(sender, ("a@example.com",), 0)


@implementer(IFilter)
class GivesUp:
    """A filter that no message gets an answer from."""

    description = "gives_up: always"

    def __call__(self, message: object) -> str | None:
        """Exceed the limit."""
        raise LimitExceeded("too much")


@implementer(IFilter)
class Counts:
    """A filter that counts how often it is asked, and matches nothing."""

    description = "counts: calls"

    def __init__(self) -> None:
        """Begin with none."""
        self.calls = 0

    def __call__(self, message: object) -> str | None:
        """Count the call."""
        self.calls += 1
        return None


def queue(name: str, *filters: IFilter) -> QueueRule:
    """Make a queue's rule."""
    return QueueRule(name, filters)


EXAMPLE = ToHostnameFilter(".example.com")
PARTY = HeaderRegexpFilter("Subject:.*[Pp]arty")
SPAM = BodyRegexpFilter("(?i)buy now")
ROUTING = Routing(
    (SPAM,),
    (
        queue("parties", EXAMPLE, PARTY),
        queue("nothing"),
        queue("all of example", EXAMPLE),
        queue("support", EnvelopeToFilter("support@*")),
    ),
)
USUAL = ("From: x@y.example", "To: a@example.com")


def names(decision: Decision) -> list[tuple[str, bool]]:
    """Return the rules asked, each with whether it matched."""
    return [(step.rule, step.answer is not None) for step in decision.trail]


def test_first_queue_whose_filters_all_match_gets_the_message() -> None:
    """Queues are tried in order; one filter that does not match passes a queue over."""
    assert route(ROUTING, mail(*USUAL, "Subject: party")).queue == "parties"
    assert route(ROUTING, mail(*USUAL, "Subject: work")).queue == "all of example"
    other = mail("From: x@y.example", envelope=Envelope("x@y.example", ("support@z.example",), 0))
    assert route(ROUTING, other).queue == "support"


def test_a_decision_explains_itself() -> None:
    """The trail holds what each rule answered up to the one that decided, the detail why."""
    decision = route(ROUTING, mail(*USUAL, "Subject: work"))
    matched = "to_hostname: .example.com matches example.com in To"
    assert decision == Decision(
        Verdict.QUEUE,
        "matched",
        "all of example",
        matched,
        (
            *PASSED,
            Step("reject_filters", "body_regexp: (?i)buy now", None),
            Step("queue:parties", "to_hostname: .example.com", matched),
            Step("queue:parties", "header_regexp: Subject:.*[Pp]arty", None),
            Step("queue:all of example", "to_hostname: .example.com", matched),
        ),
        (),
    )


def test_detail_names_every_filter_of_the_queue() -> None:
    """All the answers that brought a message to its queue are in one line."""
    detail = route(ROUTING, mail(*USUAL, "Subject: party")).detail
    assert detail == (
        "to_hostname: .example.com matches example.com in To; "
        "header_regexp: Subject:.*[Pp]arty matches a header"
    )


def test_what_no_queue_takes_is_discarded() -> None:
    """Without a matching queue the message is discarded, and a queue without filters has none."""
    decision = route(ROUTING, mail("From: x@y.example", "To: a@other.example"))
    assert (decision.verdict, decision.reason) == (Verdict.DISCARD, "no-queue")
    assert decision.queue is None
    assert route(Routing((), (queue("empty"),)), mail(*USUAL)).reason == "no-queue"


def test_a_reject_filter_goes_before_every_queue() -> None:
    """What a reject filter matches is rejected, and the detail names filter and expression."""
    decision = route(ROUTING, mail(*USUAL, body="please BUY NOW\n"))
    assert (decision.verdict, decision.reason) == (Verdict.REJECT, "reject-filter")
    assert decision.queue is None
    assert decision.detail == "body_regexp: (?i)buy now matches a text part"
    assert names(decision)[-1] == ("reject_filters", True)


@pytest.mark.parametrize(
    ("fields", "envelope", "reason"),
    [
        (["To: a@example.com"], None, "no-sender"),
        (["From:", "To: a@example.com"], None, "no-sender"),
        (["To: a@example.com"], sent(None), "no-sender"),
        (["To: a@example.com"], sent(""), "no-sender"),
        (["To: a@example.com"], sent("x@y.example"), "matched"),
        (["To: a@example.com", "Return-Path: <x@y.example>"], None, "matched"),
        (["To: a@example.com", "Return-Path: <>"], None, "no-sender"),
        (["To: a@example.com", "Return-Path: <>", "Return-Path: <x@y.example>"], None, "no-sender"),
        (["From: nonsense", "To: a@example.com"], None, "matched"),
        (["From: ", "From: x@y.example", "To: a@example.com"], None, "matched"),
    ],
)
def test_mail_of_nobody_is_discarded(
    fields: list[str], envelope: Envelope | None, reason: str
) -> None:
    """Mail with neither From nor envelope sender is discarded; one of them will do."""
    assert route(ROUTING, mail(*fields, envelope=envelope)).reason == reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (["From: a@example.com", "To: a@example.com"], "from-is-to"),
        (["From: A <a@example.com>", "To: A <a@example.com>"], "from-is-to"),
        (["From: A <a@example.com>", "To: a@example.com"], "matched"),
        (["From: a@example.com", "To: a@example.com, b@example.com"], "matched"),
        (["From: a@example.com", "To: a@example.com", "To: b@example.com"], "matched"),
        (["From: a@example.com", "Cc: a@example.com"], "matched"),
    ],
)
def test_mail_from_its_own_recipient_is_discarded(fields: list[str], reason: str) -> None:
    """Mail whose From is exactly its To is discarded, and only such."""
    assert route(ROUTING, mail(*fields)).reason == reason


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("X-Postoffice: Bounced", "ricochet"),
        ("x-postoffice:  bounced ", "ricochet"),
        ("X-Postoffice: other\nX-Postoffice: Bounced", "ricochet"),
        ("X-Postoffice:\n Bounced", "ricochet"),
        ("X-Postoffice: other", "matched"),
        ("X-Postoffice-Date: Bounced", "matched"),
        ("Subject: X-Postoffice: Bounced", "matched"),
    ],
)
def test_notices_that_come_back_are_discarded(field: str, reason: str) -> None:
    """A notice is known by the field that its sender wrote, though no filter sees that field."""
    message = mail(*USUAL, field)
    assert route(ROUTING, message).reason == reason
    raw = Message.from_bytes(message.raw, own_headers=None)
    assert route(ROUTING, raw).reason == reason


def test_what_looks_like_a_notice_in_the_body_is_none() -> None:
    """Only the header tells that a notice came back, not what a body quotes."""
    assert route(ROUTING, mail(*USUAL, body="X-Postoffice: Bounced\n")).reason == "matched"


def test_own_rules_come_first_and_in_order() -> None:
    """No sender goes before From being To, that before a ricochet, and all before filters."""
    spam = "buy now\n"
    bounced = "X-Postoffice: Bounced"
    assert route(ROUTING, mail(bounced, body=spam)).reason == "no-sender"
    own = mail("From: a@b.example", "To: a@b.example", bounced, body=spam)
    assert route(ROUTING, own).reason == "from-is-to"
    assert route(ROUTING, mail(*USUAL, bounced, body=spam)).reason == "ricochet"


def test_filters_see_our_fields_and_no_forged_ones() -> None:
    """A filter can test the arrival time, and the sender cannot write it."""
    rules = Routing((), (queue("then", HeaderRegexpFilter("X-Postoffice-Date: 1700000000$")),))
    assert route(rules, mail(*USUAL)).queue == "then"
    forged = Routing((HeaderRegexpFilter("X-Postoffice-Date: 666"),), rules.queues)
    assert route(forged, mail("X-Postoffice-Date: 666", *USUAL)).queue == "then"


@pytest.mark.parametrize(
    ("fields", "oversize", "marks"),
    [
        ([], False, ()),
        (["Precedence: bulk"], False, (AUTO_RESPONSE,)),
        (["Auto-Submitted: auto-replied"], False, (AUTO_RESPONSE,)),
        ([], True, (OVERSIZE,)),
        (["Precedence: list"], True, (OVERSIZE, AUTO_RESPONSE)),
    ],
)
def test_marked_messages_are_queued_all_the_same(
    fields: list[str], oversize: bool, marks: tuple[str, ...]
) -> None:
    """Automatic and oversize mail bears marks and goes to its queue."""
    message = mail(*USUAL, *fields)
    message.oversize = oversize
    decision = route(ROUTING, message)
    assert decision.queue == "all of example"
    assert decision.marks == marks


def test_body_filters_do_not_run_on_oversize_mail() -> None:
    """What stands in place of an oversize body is neither rejected nor matched."""
    message = mail(*USUAL, body="buy now\n")
    message.oversize = True
    assert route(ROUTING, message).verdict is Verdict.QUEUE


def test_size_is_compared_with_the_limit() -> None:
    """A message as large as the limit is not oversize; without a limit none is."""
    assert not Routing(max_message_size=10).is_oversize(10)
    assert Routing(max_message_size=10).is_oversize(11)
    assert not Routing().is_oversize(10**12)


def test_the_intake_turns_a_decision_into_duplicate_or_throttled() -> None:
    """A duplicate is discarded and keeps its queue's name; a throttled message gets a mark."""
    decision = route(ROUTING, mail(*USUAL, "Precedence: bulk"))
    duplicate = as_duplicate(decision)
    assert (duplicate.verdict, duplicate.reason) == (Verdict.DISCARD, "duplicate")
    assert duplicate.queue == decision.queue
    assert duplicate.trail == decision.trail
    throttled = as_throttled(decision)
    assert throttled.verdict is Verdict.QUEUE
    assert throttled.marks == (AUTO_RESPONSE, THROTTLED)


def test_no_filter_is_asked_after_the_decision() -> None:
    """Routing stops at the first match, and at a queue's first filter that does not match."""
    late, after = Counts(), Counts()
    rules = Routing((), (queue("one", PARTY, late), queue("two", EXAMPLE), queue("three", after)))
    assert route(rules, mail(*USUAL)).queue == "two"
    assert (late.calls, after.calls) == (0, 0)


def test_explaining_asks_every_filter() -> None:
    """The explanation has an answer of each rule and filter, the decision's own unchanged."""
    message = mail(*USUAL, "Subject: work")
    decision, told = route(ROUTING, message), explain(ROUTING, message)
    assert told.queue == decision.queue
    assert (told.verdict, told.reason, told.detail) == (
        decision.verdict,
        decision.reason,
        decision.detail,
    )
    assert names(told) == [
        ("no-sender", False),
        ("from-is-to", False),
        ("ricochet", False),
        ("reject_filters", False),
        ("queue:parties", True),
        ("queue:parties", False),
        ("queue:nothing", False),
        ("queue:all of example", True),
        ("queue:support", False),
    ]


def test_explaining_goes_on_after_a_rejection() -> None:
    """What the queues would have answered is told of discarded mail as well."""
    told = explain(ROUTING, mail("X-Postoffice: Bounced", "To: a@example.com", body="buy now\n"))
    assert told.reason == "no-sender"
    answered = [rule for rule, matched in names(told) if matched]
    assert answered == [
        "no-sender",
        "ricochet",
        "reject_filters",
        "queue:parties",
        "queue:all of example",
    ]


def test_a_filter_that_gives_up_stops_routing_but_not_the_explanation() -> None:
    """Before the decision the message is set aside; after it the explanation names the fault."""
    with pytest.raises(LimitExceeded):
        route(Routing((GivesUp(),), ROUTING.queues), mail(*USUAL))
    with pytest.raises(LimitExceeded):
        explain(Routing((GivesUp(),), ROUTING.queues), mail(*USUAL))
    rules = Routing((), (queue("one", EXAMPLE), queue("two", GivesUp())))
    told = explain(rules, mail(*USUAL))
    assert told.queue == "one"
    assert told.trail[-1] == Step("queue:two", "gives_up: always", None, "too much")


def test_values_are_frozen() -> None:
    """Rules and decisions cannot be changed."""
    decision = route(ROUTING, mail(*USUAL))
    for value in (decision, decision.trail[0], ROUTING, ROUTING.queues[0], LoopRule(1.0)):
        with pytest.raises(AttributeError):
            value.__setattr__(next(iter(value.__slots__)), None)


def test_names_are_documented() -> None:
    """Each reason and each mark that a decision can have has its sentence."""
    assert set(REASONS) == {
        "matched",
        "no-sender",
        "from-is-to",
        "ricochet",
        "reject-filter",
        "no-queue",
        "duplicate",
    }
    assert set(MARKS) == {AUTO_RESPONSE, THROTTLED, OVERSIZE}
    assert [str(verdict) for verdict in Verdict] == ["queued", "rejected", "discarded"]


@given(st.binary(max_size=300))
def test_any_bytes_get_a_decision(raw: bytes) -> None:
    """Whatever bytes a message is made of, there is one decision, the same each time."""
    for start in (b"", b"From: ", b"From: a\nTo: ", b"X-Postoffice: "):
        decision = route(ROUTING, Message.from_bytes(start + raw, OWN))
        assert decision.reason in REASONS
        assert decision == route(ROUTING, Message.from_bytes(start + raw, OWN))
        told = explain(ROUTING, Message.from_bytes(start + raw, OWN))
        assert (told.verdict, told.queue) == (decision.verdict, decision.queue)
