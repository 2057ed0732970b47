"""The report: one line of the log for each message that was taken in, whatever its way."""

from __future__ import annotations

import logging

from postoffice.delivery import Result
from postoffice.display import printable

__all__ = ["report"]

log = logging.getLogger("postoffice")


def report(result: Result, refused: str = "") -> None:
    """Log, at level INFO, what became of a message, and why.

    :param refused: what the client was told instead of that it was taken; ``""`` if it was.
    """
    if not log.isEnabledFor(logging.INFO):
        return
    decision, values = result.decision, result.prepared.values
    where = f"to queue {decision.queue!r}" if result.id is not None else decision.verdict.value
    sender = values.get("sender")
    marks = "".join(f" [{mark}]" for mark in decision.marks)
    log.info(
        "%s %s: %s%s: %s From: %s To: %s Subject: %s Message-ID: %s Envelope: %s -> %s %s",
        printable(result.prepared.source),
        printable(refused or where),
        decision.reason,
        marks,
        printable(decision.detail),
        printable(values["header_from"]),
        printable(values["header_to"]),
        printable(values["subject"]),
        printable(values["message_id"]),
        "unknown" if sender is None else f"<{printable(sender)}>",
        printable(", ".join(values.get("recipients", ())) or "unknown"),
        printable(values.get("mta_queue_id", "")),
    )
