"""``postoffice requeue`` and ``postoffice discard``: out of quarantine, one way or the other."""

from __future__ import annotations

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import complain, count, say

__all__ = ["discard_command", "requeue_command"]


@click.command("requeue", short_help="Put messages from quarantine back into their queue.")
@click.argument("queue_name", metavar="QUEUE")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of the quarantine.")
@shared_options
@pass_invocation
def requeue_command(
    invocation: Invocation, queue_name: str, ids: tuple[str, ...], everything: bool
) -> None:
    """Put messages from the quarantine of QUEUE behind its tail, in their order of arrival.

    If one of them is not in quarantine, none is moved.
    """
    if bool(ids) is everything:
        raise click.UsageError("give either the ids of messages, or --all")
    with invocation.existing_depot() as post_office:
        if everything:
            moved = post_office.requeue_all(queue_name)
        else:
            moved = post_office.requeue(queue_name, ids)
    say(f"{count(moved, 'message')} requeued in {queue_name}")


@click.command("discard", short_help="Discard messages from quarantine, for good.")
@click.argument("queue_name", metavar="QUEUE")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@shared_options
@pass_invocation
def discard_command(
    invocation: Invocation, queue_name: str, ids: tuple[str, ...], yes: bool
) -> int:
    """Discard messages from the quarantine of QUEUE, for good.

    The archive keeps their originals.  If one of them is not in quarantine, none is discarded.
    """
    with invocation.existing_depot() as post_office:
        with post_office.queue(queue_name) as queue:
            for id in ids:
                queue.get_quarantined_message(id)
        question = f"Discard {count(len(set(ids)), 'message')} from quarantine of {queue_name}?"
        if not yes and not click.confirm(question, err=True):
            complain("nothing was discarded")
            return 1
        say(f"{count(post_office.discard(queue_name, ids), 'message')} discarded")
    return 0
