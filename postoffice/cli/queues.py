"""``postoffice queues``: what waits where, and the removal of a queue."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import Column, age, iso_time, print_json, print_table, say
from postoffice.cli.stages import print_stages, stages_before
from postoffice.display import one_line
from postoffice.exceptions import PostofficeError

if TYPE_CHECKING:
    from postoffice.api import QueueStatus

__all__ = ["queues_command"]

_COLUMNS = (
    Column("queue"),
    Column("waiting", right=True),
    Column("held", right=True),
    Column("deferred", right=True),
    Column("quarantined", right=True),
    Column("oldest", right=True),
    Column("in configuration"),
)


@click.group(
    "queues", invoke_without_command=True, short_help="List the queues, or remove one of them."
)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Above them, what is in Postfix's queue and in the Maildir, and how the daemon is.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared_options
@click.pass_context
def queues_command(ctx: click.Context, everything: bool, as_json: bool) -> None:
    """List the queues: how many messages wait, and how many are in quarantine.

    Of those that wait, consumers hold some, and some are deferred, to come again when they are due.
    Oldest is how long ago the message arrived that is at the head of the queue.

    With --all, what has not reached the depot stands above them, and how the daemon is.  What of
    that cannot be had is a line there, and does not change how the command ends.
    """
    if ctx.invoked_subcommand is not None:
        return
    invocation = ctx.ensure_object(Invocation)
    if everything:
        _print_everything(invocation, as_json)
        return
    found = _queues(invocation)
    if as_json:
        print_json([_as_json(one) for one in found])
    else:
        _print_queues(found)


def _queues(invocation: Invocation) -> list[QueueStatus]:
    with invocation.existing_depot() as post_office:
        return post_office.queues()


def _print_queues(found: list[QueueStatus]) -> None:
    now = time.time_ns()
    print_table(_COLUMNS, [_row(one, now) for one in found])


def _print_everything(invocation: Invocation, as_json: bool) -> None:
    """Print what comes before the queues, and these; without a depot it ends as ever."""
    from postoffice.cli.daemon_state import daemon_json, tell_daemon

    settings = invocation.settings()
    stages = stages_before(settings)
    if not as_json:
        print_stages(stages)
        say("")
        tell_daemon(settings)
        found = _queues(invocation)
        say("")
        _print_queues(found)
        return
    facts: dict[str, object] = {one.name: one.as_json() for one in stages}
    facts["daemon"] = daemon_json(settings)
    try:
        found = _queues(invocation)
    except (PostofficeError, OSError) as error:
        print_json({**facts, "queues": None, "fault": one_line(error)})
        raise
    print_json({**facts, "queues": [_as_json(one) for one in found], "fault": None})


def _as_json(one: QueueStatus) -> dict[str, object]:
    return {
        "name": one.name,
        "waiting": one.waiting,
        "held": one.held,
        "deferred": one.deferred,
        "quarantined": one.quarantined,
        "oldest": None if one.oldest is None else iso_time(one.oldest),
        "configured": one.configured,
        "made": one.made,
    }


def _row(one: QueueStatus, now: int) -> list[str]:
    configured = "yes" if one.configured else "no"
    return [
        one.name,
        str(one.waiting),
        str(one.held),
        str(one.deferred),
        str(one.quarantined),
        "" if one.oldest is None else age(one.oldest, now),
        configured if one.made else "yes; made by the next intake",
    ]


@queues_command.command("remove", short_help="Remove a queue that holds nothing.")
@click.argument("name", metavar="QUEUE")
@shared_options
@pass_invocation
def queues_remove_command(invocation: Invocation, name: str) -> None:
    """Remove QUEUE, which neither holds messages nor has any in quarantine."""
    with invocation.existing_depot() as post_office:
        post_office.remove_queue(name)
        say(f"queue {name} is removed")
        if name in post_office.settings.queue_names:
            say(
                f"it is still in {post_office.settings.path}, so the next intake of mail makes it "
                "again"
            )
