"""``postoffice mailq hold``, ``release``, ``requeue``, ``delete`` and ``expire``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.mailq import print_mails
from postoffice.cli.output import complain, count, say, size
from postoffice.cli.selecting import Selection, Source, selection_options
from postoffice.exceptions import EX_TEMPFAIL

if TYPE_CHECKING:
    from postoffice.postfix import Mail, Outcome

__all__ = [
    "mailq_delete_command",
    "mailq_expire_command",
    "mailq_hold_command",
    "mailq_release_command",
    "mailq_requeue_command",
]


@dataclass(frozen=True, slots=True)
class _Action:
    """Something that is done to messages.

    :ivar name: the command, and the method of :class:`postoffice.postfix.QueueControl`.
    :ivar verb: what it does to messages, for a question.
    :ivar participle: what it has done.
    :ivar concerns: which messages it would change.
    """

    name: str
    verb: str
    participle: str
    concerns: Callable[[Mail], bool]


_HOLD = _Action("hold", "Hold", "held", lambda mail: mail.status != "hold")
_RELEASE = _Action("release", "Release", "released", lambda mail: mail.status == "hold")
_REQUEUE = _Action("requeue", "Requeue", "requeued", lambda mail: True)
_DELETE = _Action("delete", "Delete", "deleted", lambda mail: True)
_EXPIRE = _Action("expire", "Expire", "expired", lambda mail: not mail.forced_expire)


def _control_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--yes", is_flag=True, help="Do not ask."),
        click.option("--dry-run", is_flag=True, help="Only show what would be done."),
        click.option("--all", "everything", is_flag=True, help="All messages."),
    ):
        command = option(command)
    return selection_options(command)


@click.command("hold", short_help="Keep messages from being delivered.")
@_control_options
@shared_options
@pass_invocation
def mailq_hold_command(invocation: Invocation, /, **given: Any) -> int:
    """Keep messages from being delivered, until they are released."""
    return _act(_HOLD, invocation, **given)


@click.command("release", short_help="Let held messages be delivered.")
@_control_options
@shared_options
@pass_invocation
def mailq_release_command(invocation: Invocation, /, **given: Any) -> int:
    """Let held messages be delivered again."""
    return _act(_RELEASE, invocation, **given)


@click.command("requeue", short_help="Have messages go through Postfix anew.")
@_control_options
@shared_options
@pass_invocation
def mailq_requeue_command(invocation: Invocation, /, **given: Any) -> int:
    """Have messages go through Postfix anew, with what its configuration is now.

    They get other ids by that, within a minute.
    """
    return _act(_REQUEUE, invocation, **given)


@click.command("delete", short_help="Delete messages, for good.")
@_control_options
@shared_options
@pass_invocation
def mailq_delete_command(invocation: Invocation, /, **given: Any) -> int:
    """Delete messages, for good; nobody is told."""
    return _act(_DELETE, invocation, **given)


@click.command("expire", short_help="Return messages to their senders.")
@_control_options
@shared_options
@pass_invocation
def mailq_expire_command(invocation: Invocation, /, **given: Any) -> int:
    """Have messages returned to their senders, when Postfix next tries them; held ones stay.

    Needs Postfix 3.5.
    """
    return _act(_EXPIRE, invocation, **given)


def _act(
    action: _Action,
    invocation: Invocation,
    *,
    everything: bool,
    dry_run: bool,
    yes: bool,
    selection: Selection,
) -> int:
    from postoffice.postfix import QueueControl

    if selection.is_empty is not everything:
        raise click.UsageError("say which messages: by ids or a selection, or else --all")
    if "corrupt" in selection.statuses:
        raise click.UsageError(
            "postsuper does not act on what is corrupt; its file is in corrupt of spool_path"
        )
    settings = invocation.postfix_settings()
    store = Source().load(settings, selection)
    mails = [mail for mail in selection.apply(store) if action.concerns(mail)]
    if not mails:
        say(f"no message is to be {action.participle}")
        return 0
    if dry_run:
        print_mails(mails, store)
        say(f"{count(len(mails), 'message')} would be {action.participle}")
        return 0
    if not yes and not click.confirm(_question(action, mails), err=True):
        complain(f"nothing was {action.participle}")
        return 1
    act: Callable[[list[Mail]], Outcome] = getattr(QueueControl(settings), action.name)
    outcome = act(mails)
    _tell(action, outcome)
    return 0 if outcome.done else EX_TEMPFAIL


def _question(action: _Action, mails: list[Mail]) -> str:
    senders = len({mail.sender for mail in mails})
    return (
        f"{action.verb} {count(len(mails), 'message')} in Postfix's queue "
        f"({size(sum(mail.size for mail in mails))}, from {count(senders, 'sender')})?"
    )


def _tell(action: _Action, outcome: Outcome) -> None:
    say(f"{count(len(outcome.done), 'message')} {action.participle}")
    for ids, what in (
        (outcome.unchanged, "did not change, or left just before"),
        (outcome.gone, "left the queue before"),
        (outcome.replaced, "left the queue before, and another has the id now: it was left alone"),
    ):
        if ids:
            few = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
            complain(f"{count(len(ids), 'message')} {what}: {few}")
