"""``postoffice route``: what the rules say to a message, before it is imported or after."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import complain, print_json, say, size
from postoffice.cli.trail import print_trail
from postoffice.display import one_line
from postoffice.exceptions import EX_DATAERR, LimitExceeded

if TYPE_CHECKING:
    from postoffice.api import Explanation, PostOffice

__all__ = ["route_command"]

_STANDARD_INPUT = "-"
_EX_NOINPUT = 66


@click.command("route", short_help="Say where messages would go, and why.")
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared_options
@pass_invocation
def route_command(invocation: Invocation, files: tuple[str, ...], as_json: bool) -> int:
    """Say for each FILE, or for standard input, what every rule answers and where it would go.

    Changes nothing and opens no database, so that duplicates and throttled senders are not known.
    """
    told = []
    status = 0
    with invocation.post_office() as post_office:
        for number, name in enumerate(files or (_STANDARD_INPUT,)):
            try:
                explanation = _explain(post_office, name)
            except OSError as error:
                trouble, its_status = error.strerror or one_line(error), _EX_NOINPUT
            except LimitExceeded as error:
                trouble, its_status = f"would be set aside: {one_line(error)}", EX_DATAERR
            except Exception as error:
                # A filter of another package may raise anything; the import sets the message aside.
                fault = f"{type(error).__name__}: {one_line(error)}"
                trouble, its_status = f"would be set aside: {fault}", EX_DATAERR
            else:
                trouble, its_status = "", 0
            if trouble:
                complain(f"{name}: {trouble}")
                told.append({"file": name, "error": trouble})
                status = max(status, its_status)
                continue
            if as_json:
                told.append(_as_json(name, explanation))
            else:
                if number:
                    say("")
                _print(name, explanation)
    if as_json:
        print_json(told)
    return status


def _explain(post_office: PostOffice, name: str) -> Explanation:
    if name == _STANDARD_INPUT:
        # Bytes of any length, of which only a file tells the number beforehand.
        with tempfile.TemporaryFile() as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
            file.seek(0)
            return post_office.explain(file, time.time_ns())
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "is no regular file", name)
        return post_office.explain(file, status.st_mtime_ns)


def _as_json(name: str, explanation: Explanation) -> dict[str, Any]:
    decision = explanation.decision
    return {
        "file": name,
        "verdict": decision.verdict.value,
        "reason": decision.reason,
        "queue": decision.queue,
        "detail": decision.detail,
        "marks": list(decision.marks),
        "size": explanation.size,
        "envelope": {
            "sender": explanation.envelope.sender,
            "recipients": list(explanation.envelope.recipients),
        },
        "from": explanation.headers["header_from"],
        "to": explanation.headers["header_to"],
        "subject": explanation.headers["subject"],
        "message_id": explanation.headers["message_id"],
        "trail": [
            {
                "rule": step.rule,
                "filter": step.filter or None,
                "answer": step.answer,
                "fault": step.fault,
            }
            for step in decision.trail
        ],
    }


def _print(name: str, explanation: Explanation) -> None:
    facts, decision = explanation.headers, explanation.decision
    shown = "standard input" if name == _STANDARD_INPUT else name
    place = f"queue {decision.queue}" if decision.queue is not None else decision.verdict.value
    say(f"{shown}: {place} ({decision.reason}: {decision.detail})")
    say(
        f"  {size(explanation.size)}, from {facts['header_from'] or 'nobody'}, "
        f"to {facts['header_to'] or 'nobody'}, subject: {facts['subject'] or 'none'}"
    )
    for mark in decision.marks:
        say(f"  marked X-Postoffice-Rejected: {mark}")
    print_trail((step.rule, step.filter, step.answer, step.fault) for step in decision.trail)
