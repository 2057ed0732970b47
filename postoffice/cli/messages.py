"""``postoffice messages`` and ``postoffice show``: what a queue holds, by the entries it keeps."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import (
    Column,
    age,
    complain,
    count,
    iso_time,
    local_time,
    print_json,
    print_table,
    say,
    size,
)
from postoffice.cli.trail import print_trail

if TYPE_CHECKING:
    from postoffice.api import PostOffice
    from postoffice.depot.entry import Entry
    from postoffice.interfaces import ClaimStatus
    from postoffice.message import Message

__all__ = ["messages_command", "show_command"]

_COLUMNS = (
    Column("id"),
    Column("arrived"),
    Column("from", share=2),
    Column("to", share=2),
    Column("subject", share=3),
    Column("size", right=True),
)
_WAITING_COLUMNS = (*_COLUMNS, Column("marks"), Column("state"))
_QUARANTINE_COLUMNS = (*_COLUMNS, Column("tries", right=True), Column("error", share=3))

# Left out where no message has any.
_RARE = frozenset({"marks", "state"})

_LARGEST_ID = 2**63 - 2
_MOST_HEADERS = 200
_MOST_LINES = 100
_LONGEST_LINE = 1000
# As much as an entry has of a header.
_LONGEST_TO = 200


@click.command("messages", short_help="List what waits in a queue, or its quarantine.")
@click.argument("queue_name", metavar="QUEUE")
@click.option("--quarantined", is_flag=True, help="List the quarantine instead of what waits.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    metavar="N",
    help="At most N messages.",
)
@click.option(
    "--after",
    metavar="ID",
    type=click.IntRange(1, _LARGEST_ID),
    help="Those behind the message with this id.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared_options
@pass_invocation
def messages_command(
    invocation: Invocation,
    queue_name: str,
    quarantined: bool,
    limit: int,
    after: int | None,
    as_json: bool,
) -> None:
    """List the messages that wait in QUEUE, or its quarantine, without reading their bodies."""
    with invocation.existing_depot() as post_office, post_office.queue(queue_name) as queue:
        state = "quarantined" if quarantined else "queued"
        # One more than is shown tells whether there is another page.
        rows = queue.entries(after, limit + 1, state)
        claims = {} if quarantined else {one.id: one for one in queue.claims()}
        now = time.time_ns()
        page: list[dict[str, Any]] = []
        cells: list[list[str]] = []
        for entry in islice(rows, limit):
            if as_json:
                page.append(_listed(entry, claims.get(entry.id)))
            elif quarantined:
                cells.append([*_row(entry), str(entry.attempts), _error_line(entry)])
            else:
                state = _state(entry, claims.get(entry.id), now)
                cells.append([*_row(entry), ", ".join(entry.marks), state])
            last = entry.id
        more = next(rows, None) is not None
    if as_json:
        print_json({"messages": page, "next_after": str(last) if more else None})
        return
    where = f"in quarantine of {queue_name}" if quarantined else f"in {queue_name}"
    if not cells:
        say(f"no messages {where}" + (f" behind {after}" if after else ""))
        return
    _print_messages(_QUARANTINE_COLUMNS if quarantined else _WAITING_COLUMNS, cells)
    if more:
        complain(f"there are more {where}; the next page: add --after {last}")


def _print_messages(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> None:
    # Marks and states are rare, and a terminal has little room for addresses and subjects.
    shown = [
        number
        for number, column in enumerate(columns)
        if column.heading not in _RARE or any(row[number] for row in cells)
    ]
    print_table(
        [columns[number] for number in shown], [[row[number] for number in shown] for row in cells]
    )


def _listed(entry: Entry, claim: ClaimStatus | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "id": str(entry.id),
        "arrived": iso_time(entry.arrived),
        "from": entry.header_from,
        "to": entry.header_to,
        "subject": entry.subject,
        "message_id": entry.message_id,
        "envelope": {"sender": entry.sender, "recipients": list(entry.recipients)},
        "way": entry.way,
        "mta_queue_id": entry.mta_queue_id or None,
        "size": entry.size,
        "marks": list(entry.marks),
        "state": entry.state,
        "claim": None,
        "not_before": iso_time(entry.not_before) if entry.not_before else None,
        "attempts": entry.attempts,
        "error": None,
    }
    if claim is not None:
        facts["claim"] = {
            "host": claim.host,
            "pid": claim.pid,
            "since": iso_time(claim.since),
            "until": iso_time(claim.until),
        }
    if entry.last_error is not None:
        kind, text, _ = entry.last_error
        facts["error"] = {"type": kind, "message": text}
    return facts


def _row(entry: Entry) -> list[str]:
    return [
        str(entry.id),
        local_time(entry.arrived),
        # A notice is known by its null sender, whatever From says.
        "<>" if entry.sender == "" else entry.header_from,
        ", ".join(entry.recipients)[:_LONGEST_TO] or entry.header_to,
        entry.subject,
        size(entry.size),
    ]


def _state(entry: Entry, claim: ClaimStatus | None, now: int) -> str:
    """Return what keeps a message from being taken now, and how often that failed; ``""``: none."""
    parts = []
    if claim is not None:
        parts.append(f"held by {claim.host} {claim.pid}")
    elif entry.not_before > now:
        parts.append(f"deferred, due in {age(now, entry.not_before)}")
    if entry.attempts:
        parts.append(count(entry.attempts, "failed attempt"))
    return ", ".join(parts)


def _error_line(entry: Entry) -> str:
    kind, text, _ = entry.last_error or ("", "", "")
    first = text.split("\n", 1)[0][:200]
    return f"{kind}: {first}" if kind and first else kind or first


@click.command("show", short_help="Show one message.")
@click.argument("queue_name", metavar="QUEUE")
@click.argument("id", metavar="ID")
@click.option("--raw", is_flag=True, help="Print the message alone, byte for byte as it arrived.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared_options
@pass_invocation
def show_command(
    invocation: Invocation, queue_name: str, id: str, raw: bool, as_json: bool
) -> None:
    """Show a message that waits in QUEUE or is in its quarantine: facts, headers, first text."""
    if raw and as_json:
        raise click.UsageError("give one of --raw and --json")
    with invocation.existing_depot() as post_office, post_office.queue(queue_name) as queue:
        entry = queue.find(id)
        message = queue.message(entry)
        claim = next((one for one in queue.claims() if one.id == entry.id), None)
        if raw:
            _print_raw(message)
        elif as_json:
            print_json(_shown(entry, claim, message, post_office))
        else:
            _print(entry, claim, message, post_office)


def _print_raw(message: Message) -> None:
    if not sys.stdout.isatty():
        sys.stdout.buffer.write(message.raw)
        return
    complain("on a terminal, unprintable bytes show as escapes; redirect the output to have them")
    for line in message.raw.decode("utf-8", "backslashreplace").split("\n"):
        say(line.removesuffix("\r"))


def _archived(entry: Entry, post_office: PostOffice) -> str | None:
    return post_office.archive().path(entry.archive) if entry.archive else None


def _shown(
    entry: Entry, claim: ClaimStatus | None, message: Message, post_office: PostOffice
) -> dict[str, Any]:
    facts = _listed(entry, claim)
    text, cut = _first_text(message)
    facts.update(
        sha256=entry.digest.hex(),
        source=entry.source,
        archive=entry.archive or None,
        archive_path=_archived(entry, post_office),
        reason=entry.reason,
        trail=[
            {"rule": rule, "filter": asked or None, "answer": answer}
            for rule, asked, answer in entry.steps()
        ],
        changed=iso_time(entry.changed) if entry.changed else None,
        headers=[list(item) for item in message.items()[:_MOST_HEADERS]],
        text="\n".join(text) if text else None,
        text_cut=cut,
    )
    if entry.last_error is not None:
        facts["error"]["traceback"] = entry.last_error[2]
    return facts


def _print(
    entry: Entry, claim: ClaimStatus | None, message: Message, post_office: PostOffice
) -> None:
    for name, value in _facts(entry, claim, post_office):
        say(f"{name + ':':<13}{value}")
    steps = entry.steps()
    if steps:
        say("filters:")
        print_trail((rule, asked, answer, None) for rule, asked, answer in steps)
    if entry.last_error is not None:
        say(f"last error:  {_error_line(entry)}")
        for line in entry.last_error[2].splitlines()[-_MOST_LINES:]:
            say(f"  {line}")
    say("")
    headers = message.items()
    for name, value in headers[:_MOST_HEADERS]:
        say(f"{name}: {value}"[:_LONGEST_LINE])
    if len(headers) > _MOST_HEADERS:
        say(f"[{count(len(headers) - _MOST_HEADERS, 'more header')}]")
    say("")
    text, cut = _first_text(message)
    for line in text or ["[no text part]"]:
        say(line)
    if cut:
        say("[more; --raw shows all]")


def _facts(
    entry: Entry, claim: ClaimStatus | None, post_office: PostOffice
) -> list[tuple[str, str]]:
    from postoffice.routing import REASONS

    since = f" since {local_time(entry.changed)}" if entry.changed else ""
    facts = [
        ("id", str(entry.id)),
        ("state", f"{entry.state}{since}"),
        ("arrived", f"{local_time(entry.arrived)}, by {entry.way}"),
        ("size", _size_in_full(entry.size)),
        ("sha256", entry.digest.hex()),
        ("sender", _sender(entry)),
        ("recipients", ", ".join(entry.recipients) or "unknown"),
    ]
    if entry.source:
        facts.append(("file", entry.source))
    if entry.mta_queue_id:
        facts.append(("MTA's id", entry.mta_queue_id))
    path = _archived(entry, post_office)
    if path is not None:
        facts.append(("archive", path if os.path.lexists(path) else f"{path} (not there now)"))
    if entry.marks:
        facts.append(("marks", ", ".join(entry.marks)))
    if claim is not None:
        held = f"{claim.host} {claim.pid} since {local_time(claim.since)}"
        facts.append(("held by", f"{held}, until {local_time(claim.until)} at most"))
    if entry.not_before > time.time_ns():
        facts.append(("deferred", f"due {local_time(entry.not_before)}"))
    if entry.attempts:
        facts.append(("attempts", f"{entry.attempts} failed"))
    facts.append(("reason", f"{entry.reason}: {REASONS.get(entry.reason, entry.way)}"))
    return facts


def _size_in_full(number: int) -> str:
    shown = size(number)
    return shown if shown.endswith(" B") else f"{shown} ({number} bytes)"


def _sender(entry: Entry) -> str:
    if entry.sender is None:
        return "unknown"
    return entry.sender or "<> (the null sender: a notice, or automatic)"


def _first_text(message: Message) -> tuple[list[str], bool]:
    """Return the first lines of the first text part, and whether there are more."""
    text = next(message.text_parts(), "")
    start = text[: _MOST_LINES * _LONGEST_LINE]
    lines = start.split("\n")
    cut = len(start) < len(text) or len(lines) > _MOST_LINES
    shown = [line[:_LONGEST_LINE] for line in lines[:_MOST_LINES]]
    cut = cut or any(len(line) > _LONGEST_LINE for line in lines[:_MOST_LINES])
    while shown and not shown[-1].strip():
        shown.pop()
    return shown, cut
