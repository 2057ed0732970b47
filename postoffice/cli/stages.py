"""What is on its way to the depot: in Postfix's own queue, and in the Maildir."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from postoffice.cli.output import Column, age, iso_time, print_table, say
from postoffice.display import one_line

if TYPE_CHECKING:
    from postoffice.config import Settings

__all__ = ["Stage", "print_stages", "stages_before"]

_COLUMNS = (
    Column("before the queues"),
    Column("messages", right=True),
    Column("oldest", right=True),
    Column("of these"),
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A place where mail waits before it is in the depot.

    :ivar name: the place, as JSON names it.
    :ivar title: the place, for people.
    :ivar messages: how many wait there; ``None`` if that cannot be had.
    :ivar oldest: when the one arrived that has waited longest, in nanoseconds since the epoch.
    :ivar states: how many are in each state, where the place has states.
    :ivar fault: why it cannot be had; empty otherwise.
    """

    name: str
    title: str
    messages: int | None = None
    oldest: int | None = None
    states: dict[str, int] = field(default_factory=dict)
    fault: str = ""

    def as_json(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "messages": self.messages,
            "oldest": None if self.oldest is None else iso_time(self.oldest),
            "states": self.states,
            "fault": self.fault or None,
        }


def stages_before(settings: Settings) -> list[Stage]:
    """Return what waits where, from Postfix to the depot; never fails."""
    return [_postfix(settings), _maildir(settings)]


def _postfix(settings: Settings) -> Stage:
    from postoffice.postfix import PostfixError, PostqueueStore

    stage = Stage("postfix", "Postfix queue")
    store = PostqueueStore(settings.postfix)
    try:
        store.load()
    except (PostfixError, OSError) as error:
        return Stage(stage.name, stage.title, fault=one_line(error))
    dates = [mail.date for mail in store.mails if mail.date is not None]
    return Stage(
        stage.name,
        stage.title,
        len(store.mails),
        int(min(dates).timestamp()) * 1_000_000_000 if dates else None,
        dict(sorted(Counter(mail.status for mail in store.mails).items())),
        # Postfix was read, but does not run.
        store.notice,
    )


def _maildir(settings: Settings) -> Stage:
    from postoffice.intake.maildir import waiting_files

    stage = Stage("maildir", "Maildir")
    try:
        files = waiting_files(settings.maildir)
    except FileNotFoundError as error:
        return Stage(stage.name, stage.title, fault=f"there is no folder {error.filename} yet")
    except OSError as error:
        return Stage(stage.name, stage.title, fault=f"{error.filename}: {error.strerror}")
    return Stage(stage.name, stage.title, len(files), files[0][0] if files else None)


def print_stages(stages: Sequence[Stage]) -> None:
    """Print a table of them, and a line for what could not be had."""
    now = time.time_ns()
    print_table(
        _COLUMNS,
        [
            [
                one.title,
                "?" if one.messages is None else str(one.messages),
                "" if one.oldest is None else age(one.oldest, now),
                ", ".join(f"{number} {state}" for state, number in one.states.items()),
            ]
            for one in stages
        ],
    )
    for one in stages:
        if one.fault:
            say(f"{one.title}: {one.fault}")
