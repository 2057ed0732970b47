"""``postoffice mailq``: what waits in Postfix's own queue, and what an administrator does about it.

Commands that change the queue are in :mod:`postoffice.cli.controlling`.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import (
    Column,
    complain,
    count,
    print_json,
    print_table,
    say,
    size,
    time_span,
)
from postoffice.cli.selecting import Selection, Source, selection_options, source_options
from postoffice.display import one_line

if TYPE_CHECKING:
    from postoffice.postfix import Mail, PostqueueStore

__all__ = ["mailq_command", "print_mails"]

# The module that has each command, by the command's name; the order is that of the help.
_MODULES = {
    "list": "mailq",
    "summary": "mailq",
    "show": "mailq",
    "age": "mailq",
    "hold": "controlling",
    "release": "controlling",
    "requeue": "controlling",
    "delete": "controlling",
    "expire": "controlling",
}
_WITH_VALUE = ("-C", "--config")

_COLUMNS = (
    Column("id"),
    Column("status"),
    Column("age", right=True),
    Column("size", right=True),
    Column("sender", share=2),
    Column("recipients", share=2),
    Column("reason", share=3),
)

# In fewer columns, an address would be cut behind some letters.
_WIDE = 120
_REASONS = 5

# The ages of qshape, in minutes: each is where a column ends.
_AGES = tuple(5 << power for power in range(9))
_AGE_NAMES = (*map(str, _AGES), f"{_AGES[-1]}+")
_AGE_COLUMNS = (
    Column("domain", share=1),
    Column("T", right=True),
    *(Column(name, right=True) for name in _AGE_NAMES),
)


class _Mailq(click.Group):
    """The group of commands, in which ``list`` need not be said."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command when it is asked for."""
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"postoffice.cli.{_MODULES[cmd_name]}")
        command: click.Command = getattr(module, f"mailq_{cmd_name}_command")
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``list`` where the name of a command would stand, if there is none."""
        place = 0
        while place < len(args) and (
            args[place] in ("-v", "--verbose") or args[place].startswith(_WITH_VALUE)
        ):
            place += 2 if args[place] in _WITH_VALUE else 1
        if place >= len(args) or args[place] not in (*_MODULES, "-h", "--help"):
            args = [*args[:place], "list", *args[place:]]
        return super().parse_args(ctx, args)


@click.command(
    "mailq",
    cls=_Mailq,
    short_help="Look at Postfix's own queue, and act on it.",
    epilog="Without a command: list.",
)
@shared_options
def mailq_command() -> None:
    """Look at Postfix's own queue, and hold, release, requeue, delete or expire what is in it.

    Without the name of a command it lists the queue; mailq list -h has the options.
    """


# -- list ------------------------------------------------------------------------------------------


@click.command("list", short_help="List the messages.")
@selection_options
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared_options
@pass_invocation
def mailq_list_command(
    invocation: Invocation, selection: Selection, source: Source, as_json: bool
) -> None:
    """List the messages in Postfix's queue, or those of them that are selected."""
    store = source.load(invocation.postfix_settings(), selection)
    mails = selection.apply(store).mails
    if as_json:
        print_json([_as_json(mail) for mail in mails])
        return
    if not mails:
        say("Postfix's queue is empty" if not store.mails else "no message is selected")
        return
    print_mails(mails, store)
    say(f"{count(len(mails), 'message')}, {size(sum(mail.size for mail in mails))}")


def print_mails(mails: Sequence[Mail], store: PostqueueStore) -> None:
    """Print a table of these messages.

    A terminal that has no room for reasons gets the most frequent of them below.
    """
    now = store.loaded_at
    rows = [_row(mail, now) for mail in mails]
    if not sys.stdout.isatty() or shutil.get_terminal_size().columns >= _WIDE:
        print_table(_COLUMNS, rows)
        return
    print_table(_COLUMNS[:-1], [row[:-1] for row in rows])
    reasons = Counter(row[-1] for row in rows if row[-1])
    if reasons:
        print_table(
            (Column("messages", right=True), Column("reason", share=1)),
            [[str(number), reason] for reason, number in reasons.most_common(_REASONS)],
        )


def _row(mail: Mail, now: datetime | None) -> list[str]:
    others = len(mail.recipients) - 1
    return [
        mail.qid,
        _state(mail),
        "" if mail.date is None or now is None else time_span(now - mail.date),
        size(mail.size),
        mail.sender or "<>",
        (mail.recipients[0] if mail.recipients else "") + (f" +{others}" if others > 0 else ""),
        mail.errors[0] if mail.errors else mail.parse_error,
    ]


def _state(mail: Mail) -> str:
    return f"{mail.status}, expired" if mail.forced_expire else mail.status


def _as_json(mail: Mail) -> dict[str, Any]:
    return {
        "id": mail.qid,
        "status": mail.status,
        "forced_expire": mail.forced_expire,
        "arrived": _iso(mail.date),
        "size": mail.size,
        "sender": mail.sender,
        "recipients": [
            {"address": str(one), "state": one.state, "reason": one.reason}
            for one in mail.recipients
        ],
        "errors": mail.errors,
    }


def _iso(moment: datetime | None) -> str | None:
    """Return a local time as ISO 8601 has it, in UTC."""
    if moment is None:
        return None
    try:
        return moment.astimezone(UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        # A listing from a file may name a year that this machine's clock cannot have.
        return None


# -- summary ---------------------------------------------------------------------------------------


@click.command("summary", short_help="Sum the messages up.")
@selection_options
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared_options
@pass_invocation
def mailq_summary_command(
    invocation: Invocation, selection: Selection, source: Source, as_json: bool
) -> None:
    """Sum Postfix's queue up: states, sizes, ages, and the most frequent of all else."""
    store = source.load(invocation.postfix_settings(), selection)
    store.mails = selection.apply(store).mails
    summary = store.summary()
    if as_json:
        print_json(summary)
        return
    ages = summary["mails_by_age"]
    say(f"messages    {summary['total_mails']}")
    say(f"states      {', '.join(f'{name} {number}' for name, number in summary['top_status'])}")
    if not summary["total_mails"]:
        return
    say(
        f"size        {size(summary['total_mails_size'])} in all, "
        f"{size(round(summary['average_mail_size']))} on average, "
        f"{size(summary['min_mail_size'])} to {size(summary['max_mail_size'])}"
    )
    say(
        f"ages        {ages['last_24h']} up to a day, {ages['1_to_4_days_ago']} up to four days, "
        f"{ages['older_than_4_days']} older"
    )
    for counted, heading, top, unique in (
        ("messages", "senders", "top_senders", "unique_senders"),
        ("messages", "sender domains", "top_sender_domains", "unique_sender_domains"),
        ("messages", "recipients", "top_recipients", "unique_recipients"),
        # A message to two of a domain is two here, as in the table of ages.
        ("recipients", "recipient domains", "top_recipient_domains", "unique_recipient_domains"),
        ("messages", "errors", "top_errors", None),
    ):
        found = summary[top]
        if not found:
            continue
        there_are = "" if unique is None else f" ({summary[unique]})"
        say("")
        print_table(
            (Column(counted, right=True), Column(f"{heading}{there_are}", share=1)),
            [[str(number), text or "<>"] for text, number in found],
        )


# -- show ------------------------------------------------------------------------------------------


@click.command("show", short_help="Show messages with their headers.")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared_options
@pass_invocation
def mailq_show_command(
    invocation: Invocation,
    ids: tuple[str, ...],
    source: Source,
    as_json: bool,
) -> None:
    """Show the messages with these IDs: their envelopes, reasons and headers.

    From a file there are no headers.
    """
    from postoffice.postfix import PostfixError, Spool

    selection = Selection(ids=ids)
    settings = invocation.postfix_settings()
    mails = selection.apply(source.load(settings, selection)).mails
    if source.file is None:
        try:
            Spool(settings).headers(mails)
        except PostfixError as error:
            # The rest is worth having without them.
            complain(f"the headers cannot be read: {one_line(error)}")
    if as_json:
        print_json(
            [
                {**_as_json(mail), "headers": dict(mail.head), "fault": mail.parse_error or None}
                for mail in mails
            ]
        )
        return
    for number, mail in enumerate(mails):
        if number:
            say("")
        for line in mail.show().split("\n"):
            say(line)


# -- age -------------------------------------------------------------------------------------------


@click.command("age", short_help="Count by domain and age, as qshape does.")
@selection_options
@source_options
@click.option(
    "--by",
    type=click.Choice(("recipient", "sender")),
    default="recipient",
    show_default=True,
    help="Whose domains.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared_options
@pass_invocation
def mailq_age_command(
    invocation: Invocation,
    selection: Selection,
    source: Source,
    by: str,
    as_json: bool,
) -> None:
    """Count recipients, or messages by sender, by domain and by age in minutes.

    Each column has those that are younger than its heading, and not younger than the one before.
    """
    store = source.load(invocation.postfix_settings(), selection)
    mails = selection.apply(store).mails
    rows = _ages(mails, by, store.loaded_at or datetime.now())  # noqa: DTZ005  # as dates are: local
    if as_json:
        print_json(
            [
                {
                    "domain": domain,
                    "total": sum(ages),
                    "ages": dict(zip(_AGE_NAMES, ages, strict=True)),
                }
                for domain, ages in rows.items()
            ]
        )
        return
    totals = [sum(column) for column in zip(*rows.values(), strict=True)] or [0] * len(_AGE_NAMES)
    print_table(
        _AGE_COLUMNS,
        [
            [domain, str(sum(ages)), *map(str, ages)]
            for domain, ages in {"TOTAL": totals, **rows}.items()
        ],
    )


def _ages(mails: Sequence[Mail], by: str, now: datetime) -> Mapping[str, list[int]]:
    """Return the counts of each domain, those of the most frequent first."""
    found: dict[str, list[int]] = {}
    for mail in mails:
        age = timedelta() if mail.date is None else now - mail.date
        column = sum(age >= timedelta(minutes=limit) for limit in _AGES)
        for address in [mail.sender] if by == "sender" else mail.recipients:
            domain = (address.rpartition("@")[2] or address).lower() or "<>"
            found.setdefault(domain, [0] * len(_AGE_NAMES))[column] += 1
    return dict(sorted(found.items(), key=lambda item: (-sum(item[1]), item[0])))
