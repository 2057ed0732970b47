"""``postoffice release``: messages that are held or deferred can be taken now."""

from __future__ import annotations

import socket

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import complain, count, say

__all__ = ["release_command"]

_MOST_NAMED = 5


@click.command("release", short_help="Let messages that are held or deferred be taken now.")
@click.argument("queue_name", metavar="QUEUE")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that are held or deferred.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@shared_options
@pass_invocation
def release_command(
    invocation: Invocation, queue_name: str, ids: tuple[str, ...], everything: bool, yes: bool
) -> int:
    """Let messages of QUEUE that a consumer holds, or that are deferred, be taken now.

    What a dead process of this machine held is free by itself, and any other when its lease ends;
    this is for who knows that the holder is dead and does not want to wait.
    """
    if bool(ids) is everything:
        raise click.UsageError("give either the ids of messages, or --all")
    with invocation.existing_depot() as post_office:
        with post_office.queue(queue_name) as queue:
            wanted = {queue.find(id).id for id in ids}
            here = socket.gethostname()
            alive = sorted(
                {
                    claim.pid
                    for claim in queue.claims()
                    if claim.host == here and (everything or claim.id in wanted)
                }
            )
        if alive and not yes:
            complain(
                f"held by {_processes(alive)} of this machine, which may be at work on them; "
                "released, they are worked on a second time, though only one result is committed"
            )
            if not click.confirm("Release them all the same?", err=True):
                complain("nothing was released")
                return 1
        if everything:
            released = post_office.release_all(queue_name)
        else:
            released = post_office.release(queue_name, ids)
        say(f"{count(released, 'message')} released in {queue_name}")
    return 0


def _processes(pids: list[int]) -> str:
    named = ", ".join(map(str, pids[:_MOST_NAMED]))
    more = len(pids) - _MOST_NAMED
    return f"process{'es' if len(pids) > 1 else ''} {named}" + (
        f" and {more} more" if more > 0 else ""
    )
