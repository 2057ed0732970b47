"""Routing: ordered rules, a message, and the decision that they come to, with its reasons.

The rules of postoffice itself come first, then the filters that reject, then the queues in their
order; the first that holds decides.  A decision carries a trail: what each rule answered on the
way.  Nothing is written, sent or read here; the message alone decides, so that asking twice gives
the same answer.  Whether a message is a duplicate, and whether its sender is throttled, takes
memory: the intake knows it, and turns the decision with :func:`as_duplicate` and
:func:`as_throttled`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from postoffice.exceptions import LimitExceeded
from postoffice.filters import EnvelopeToFilter
from postoffice.interfaces import IFilter
from postoffice.loops import auto_response
from postoffice.message import Envelope, Message

__all__ = [
    "AUTO_RESPONSE",
    "MARKS",
    "OVERSIZE",
    "REASONS",
    "THROTTLED",
    "Decision",
    "QueueRule",
    "Routing",
    "Step",
    "Verdict",
    "as_duplicate",
    "as_throttled",
    "explain",
    "is_for_nobody",
    "route",
]

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "matched": "all filters of the queue match",
        "no-sender": "it has neither a From nor an envelope sender",
        "from-is-to": "its From is exactly its To",
        "ricochet": "it is a notice of postoffice that came back",
        "reject-filter": "a filter of reject_filters matches",
        "no-queue": "no queue's filters match",
        "duplicate": "the same message came to the queue within 24 hours",
    }
)
"""The stable names of why a message went where it did, each with its meaning."""

AUTO_RESPONSE = "Auto-response"
THROTTLED = "Throttled"
OVERSIZE = "Maximum Message Size Exceeded"

MARKS: Mapping[str, str] = MappingProxyType(
    {
        OVERSIZE: "larger than max_message_size; its body stayed in the archive",
        AUTO_RESPONSE: "it says of itself that a program sent it",
        THROTTLED: "its sender writes too often",
    }
)
"""The values of ``X-Postoffice-Rejected``, each with its meaning; a message may have several."""


class Verdict(enum.StrEnum):
    """Where a message goes."""

    QUEUE = "queued"
    REJECT = "rejected"
    DISCARD = "discarded"


@dataclass(frozen=True, slots=True)
class Step:
    """What one filter of one rule answered.

    :ivar rule: ``no-sender``, ``from-is-to``, ``ricochet``, ``reject_filters`` or ``queue:NAME``.
    :ivar filter: the filter's description; ``""`` for a rule of postoffice's own, and for a queue
        without filters.
    :ivar answer: what matched, or ``None``.
    :ivar fault: why a filter that :func:`explain` asked after the decision gave no answer.
    """

    rule: str
    filter: str
    answer: str | None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a message goes and why.

    :ivar verdict: queued, rejected or discarded.
    :ivar reason: one of :data:`REASONS`.
    :ivar queue: the queue's name; of a duplicate, the queue that has it already; else ``None``.
    :ivar detail: one line for a log: what matched.
    :ivar trail: what the rules answered, in order, up to the one that decided.
    :ivar marks: of those in :data:`MARKS`, the ones that the message bears.
    """

    verdict: Verdict
    reason: str
    queue: str | None
    detail: str
    trail: tuple[Step, ...]
    marks: tuple[str, ...] = ()


def _unmatched(rule: str, filters: tuple[IFilter, ...]) -> tuple[Step, ...]:
    return tuple(Step(rule, one.description, None) for one in filters)


@dataclass(frozen=True, slots=True)
class QueueRule:
    """A queue with the filters that must all match; without any it gets nothing.

    :ivar name: the queue's name.
    :ivar filters: in the order in which they are asked.
    :ivar unmatched: each filter's step for when it does not match; made once, as most do not.
    """

    name: str
    filters: tuple[IFilter, ...]
    unmatched: tuple[Step, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make the steps."""
        object.__setattr__(self, "unmatched", _unmatched(f"queue:{self.name}", self.filters))


@dataclass(frozen=True, slots=True)
class Routing:
    """The rules, in the order of ``postoffice.ini``.

    :ivar reject_filters: what any of these matches is rejected.
    :ivar queues: the first whose filters all match gets the message.
    :ivar max_message_size: bytes above which a message counts as oversize; ``None``: no limit.
    :ivar unmatched: each rejecting filter's step for when it does not match.
    """

    reject_filters: tuple[IFilter, ...] = ()
    queues: tuple[QueueRule, ...] = ()
    max_message_size: int | None = None
    unmatched: tuple[Step, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make the steps."""
        object.__setattr__(self, "unmatched", _unmatched("reject_filters", self.reject_filters))

    def is_oversize(self, size: int) -> bool:
        """Say whether a message of *size* bytes, as it arrived, is too large."""
        return self.max_message_size is not None and size > self.max_message_size


def route(routing: Routing, message: Message) -> Decision:
    """Decide where the message goes; the first rule that holds decides, and none is asked after it.

    The message is to be made with fields of its own (``X-Postoffice-Date``): no filter sees the
    ``X-Postoffice`` fields that its sender wrote, but a notice that came back is known by them.

    Same rules and message, same decision.  Raises nothing but what a filter raises.

    :raises postoffice.exceptions.LimitExceeded: a filter gave up on this message.
    """
    trail: list[Step] = []
    for rule, holds in _OWN_RULES:
        if holds(message):
            detail = REASONS[rule]
            trail.append(Step(rule, "", detail))
            return Decision(Verdict.DISCARD, rule, None, detail, tuple(trail))
        trail.append(_PASSED[rule])
    for one, step in zip(routing.reject_filters, routing.unmatched, strict=True):
        answer = one(message)
        if answer is not None:
            trail.append(Step(step.rule, step.filter, answer))
            return Decision(Verdict.REJECT, "reject-filter", None, answer, tuple(trail))
        trail.append(step)
    for queue in routing.queues:
        answers = []
        for one, step in zip(queue.filters, queue.unmatched, strict=True):
            answer = one(message)
            if answer is None:
                trail.append(step)
                break
            trail.append(Step(step.rule, step.filter, answer))
            answers.append(answer)
        else:
            if answers:
                detail = "; ".join(answers)
                return Decision(
                    Verdict.QUEUE, "matched", queue.name, detail, tuple(trail), _marks(message)
                )
    return Decision(Verdict.DISCARD, "no-queue", None, REASONS["no-queue"], tuple(trail))


def is_for_nobody(routing: Routing, recipient: str) -> bool:
    """Say whether no queue takes mail for this recipient, whatever the message.

    That is certain where each queue asks for an envelope (``envelope_to``) that is another's.
    """
    message = Message.from_bytes(b"", envelope=Envelope(None, (recipient,), 0))
    return all(
        not queue.filters
        or any(isinstance(one, EnvelopeToFilter) and one(message) is None for one in queue.filters)
        for queue in routing.queues
    )


def explain(routing: Routing, message: Message) -> Decision:
    """Decide as :func:`route` does, with a trail of what every rule and filter answers.

    That includes the filters that the decision did not need.  One of those that gives up on the
    message has a step with a fault.

    :raises postoffice.exceptions.LimitExceeded: a filter that the decision needs gave up.
    """
    decision = route(routing, message)
    trail = [
        Step(rule, "", REASONS[rule] if holds(message) else None) for rule, holds in _OWN_RULES
    ]
    trail += _answers(routing.reject_filters, routing.unmatched, message)
    for queue in routing.queues:
        if queue.filters:
            trail += _answers(queue.filters, queue.unmatched, message)
        else:
            trail.append(Step(f"queue:{queue.name}", "", None))
    return replace(decision, trail=tuple(trail))


def _answers(
    filters: Iterable[IFilter], unmatched: Iterable[Step], message: Message
) -> Iterator[Step]:
    for one, step in zip(filters, unmatched, strict=True):
        try:
            answer = one(message)
        except LimitExceeded as error:
            yield replace(step, fault=str(error))
        else:
            yield step if answer is None else replace(step, answer=answer)


def as_duplicate(decision: Decision) -> Decision:
    """Return the decision for a message that its queue has already had."""
    return replace(
        decision,
        verdict=Verdict.DISCARD,
        reason="duplicate",
        detail=f"the same message came to queue {decision.queue!r} within 24 hours",
        marks=(),
    )


def as_throttled(decision: Decision) -> Decision:
    """Return the decision for a message whose sender is throttled: queued, with one more mark."""
    return replace(decision, marks=(*decision.marks, THROTTLED))


def _marks(message: Message) -> tuple[str, ...]:
    automatic = auto_response(message)
    if message.oversize:
        return (OVERSIZE, AUTO_RESPONSE) if automatic else (OVERSIZE,)
    return (AUTO_RESPONSE,) if automatic else ()


def _has_no_sender(message: Message) -> bool:
    """Say whether nobody is named as sender; the null reverse-path names nobody either."""
    if (message.first_raw("From") or "").strip():
        return False
    if any(value.strip() for value in message.get_all("From", ())):
        return False
    envelope = message.envelope
    if envelope is not None and envelope.sender is not None:
        return not envelope.sender
    return not message.addresses("Return-Path")


def _is_from_its_recipient(message: Message) -> bool:
    sender = message.first_raw("From")
    # Most messages differ here; only the others are worth a look at repeated fields.
    if sender is None or sender != message.first_raw("To"):
        return False
    return bool(message.get_all("From") == message.get_all("To"))


def _has_come_back(message: Message) -> bool:
    # The field is not visible where the message shows ours: its sender may have written it.  As a
    # sign of a notice of ours it is believed, since nobody gains by having mail discarded.
    values = message.written("X-Postoffice")
    return any(value.strip().lower() == "bounced" for value in values)


_OWN_RULES: tuple[tuple[str, Callable[[Message], bool]], ...] = (
    ("no-sender", _has_no_sender),
    ("from-is-to", _is_from_its_recipient),
    ("ricochet", _has_come_back),
)
_PASSED = {rule: Step(rule, "", None) for rule, _ in _OWN_RULES}
