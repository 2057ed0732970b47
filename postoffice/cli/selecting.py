"""The selection of messages of Postfix's queue, as all of the ``mailq`` commands take it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from postoffice.cli.output import Failure, complain

if TYPE_CHECKING:
    from postoffice.postfix import Mail, MailSelector, PostfixSettings, PostqueueStore

__all__ = ["Selection", "Source", "selection_options", "source_options"]

_EX_NOINPUT = 66
_EX_UNAVAILABLE = 69
_NULL_SENDER = "<>"
_STATES = ("active", "deferred", "hold", "incoming", "maildrop", "corrupt")
_CORRUPT = "corrupt"
_METHODS = ("json", "postqueue", "spool")
_DASH = Path("-")
_STANDARD_INPUT = Path("/dev/stdin")
_FIELD = re.compile(r"([!-9;-~]+):[ \t]*(.*)", re.DOTALL)
# As many years as no mail waits; an earlier time has no date.
_LONGEST = 100 * 365 * 86400


def _duration(text: str) -> timedelta:
    from postoffice.config.values import Fault, duration

    try:
        return timedelta(seconds=min(duration(text), _LONGEST))
    except Fault as error:
        raise click.BadParameter(f"{error.fault}; {error.mend}") from error


def _size_range(text: str) -> tuple[int, int | None]:
    from postoffice.config.values import Fault, size

    least, dots, most = text.partition("..")
    if not dots or not (least or most):
        raise click.BadParameter(f"{text!r} is no range of sizes; write 10k..1m, 1m.. or ..500k")
    try:
        # In the configuration 0 is no limit; here it is one.
        smallest, largest = size(least) or 0 if least else 0, size(most) or 0 if most else None
    except Fault as error:
        raise click.BadParameter(f"{error.fault}; {error.mend}") from error
    if largest is not None and largest < smallest:
        raise click.BadParameter(f"no size is in {text!r}; write the smaller one first")
    return smallest, largest


def _field(text: str) -> tuple[str, str]:
    found = _FIELD.fullmatch(text)
    if found is None or not found[2]:
        raise click.BadParameter(f"{text!r} is no field; write NAME:TEXT, as Subject:invoice")
    return found[1], found[2]


def _some_text(text: str) -> str:
    if not text:
        raise click.BadParameter(f"nothing is in everything; the null sender is {_NULL_SENDER}")
    return text


@dataclass(frozen=True, slots=True)
class Source:
    """Where the queue is read from.

    :ivar method: ``json``, ``postqueue`` or ``spool``; ``None``: the best that there is.
    :ivar file: what another machine's ``postqueue`` has printed, instead of our Postfix.
    """

    method: str | None = None
    file: Path | None = None

    def load(self, settings: PostfixSettings, selection: Selection) -> PostqueueStore:
        """Load the queue, with the headers if the selection needs them.

        :raises Failure: the file cannot be read.
        :raises postoffice.postfix.PostfixError: the queue cannot.
        """
        from postoffice.postfix import PostqueueStore

        if self.file is not None and (self.method is not None or selection.headers):
            option = "--method" if self.method is not None else "--header"
            raise click.UsageError(f"{option} asks our Postfix, which --from-file does not")
        method = self._method_for(selection)
        file = _STANDARD_INPUT if self.file == _DASH else self.file
        store = PostqueueStore(settings)
        try:
            store.load(method, file, parse=bool(selection.headers))
        except OSError as error:
            if self.file is None:
                raise
            raise Failure(f"{self.file}: {error.strerror}", _EX_NOINPUT) from error
        if store.notice:
            complain(store.notice)
        if selection.headers:
            _complain_of_unread(store.mails)
        return store

    def _method_for(self, selection: Selection) -> str | None:
        """Return a method that tells what is asked for: nothing found would be no answer."""
        older, newer = selection.older_than, selection.newer_than
        if older is not None and newer is not None and older > newer:
            raise click.UsageError("nothing is older than --older-than and newer than --newer-than")
        method = self.method
        if _CORRUPT in selection.statuses:
            if self.file is not None or method not in (None, "spool"):
                raise click.UsageError(
                    "no listing of Postfix's has what is corrupt; --method spool has"
                )
            method = "spool"
        if method == "spool" and selection.errors:
            raise click.UsageError("the queue directories, by --method spool, hold no errors")
        return method


def _complain_of_unread(mails: list[Mail]) -> None:
    unread = [mail for mail in mails if not mail.parsed]
    if unread:
        complain(
            f"the headers of {len(unread)} of {len(mails)} messages could not be read: "
            f"{unread[0].qid}: {unread[0].parse_error}"
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Which messages; all parts have to agree.

    :ivar ids: one of these ids; empty for any.
    :ivar statuses: one of these states; empty for any.
    :ivar senders: parts of the sender's address.
    :ivar recipients: parts of recipients' addresses.
    :ivar errors: parts of delivery errors.
    :ivar headers: names of header fields, and parts of their values.
    :ivar older_than: age at least.
    :ivar newer_than: age at most.
    :ivar size: bytes at least, and bytes at most.
    :ivar is_exact: whether the parts of texts are whole texts instead.
    """

    ids: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    senders: tuple[str, ...] = ()
    recipients: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    older_than: timedelta | None = None
    newer_than: timedelta | None = None
    size: tuple[int, int | None] | None = None
    is_exact: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for, so that all messages are meant."""
        return self == Selection(is_exact=self.is_exact)

    def apply(self, store: PostqueueStore) -> MailSelector:
        """Return the messages that are meant, of those that were loaded.

        :raises Failure: one of the ids is not there.
        """
        from postoffice.postfix import MailSelector

        selector = MailSelector(store)
        if self.ids:
            selector.lookup_qids(self.ids)
            there = {mail.qid for mail in selector}
            missing = [qid for qid in self.ids if qid not in there]
            if missing:
                raise Failure(
                    f"no message {', '.join(missing)} in Postfix's queue", _EX_UNAVAILABLE
                )
        if self.statuses:
            selector.lookup_status(self.statuses)
        for text in self.senders:
            if text == _NULL_SENDER:
                selector.lookup_sender("")
            else:
                selector.lookup_sender(text, self.is_exact)
        for text in self.recipients:
            selector.lookup_recipient(text, self.is_exact)
        for text in self.errors:
            selector.lookup_error(text, self.is_exact)
        for name, text in self.headers:
            selector.lookup_header(name, text, self.is_exact)
        self._apply_ages(selector, store.loaded_at)
        if self.size is not None:
            selector.lookup_size(*self.size)
        return selector

    def _apply_ages(self, selector: MailSelector, now: datetime | None) -> None:
        if now is None:
            raise ValueError("the store was not loaded")
        if self.older_than is not None:
            selector.lookup_date(stop=now - self.older_than)
        if self.newer_than is not None:
            selector.lookup_date(start=now - self.newer_than)


def _gathered(command: Callable[..., Any], name: str, kind: type) -> Callable[..., Any]:
    """Return a command that gets the options which are fields of `kind` as one such value."""
    names = [one.name for one in fields(kind)]

    @functools.wraps(command)
    def gathering(*args: Any, **given: Any) -> Any:
        given[name] = kind(**{one: given.pop(one) for one in names})
        return command(*args, **given)

    return gathering


def selection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that select messages; it gets them as its `selection`."""
    command = _gathered(command, "selection", Selection)
    for option in reversed(_SELECTING):
        command = option(command)
    return command


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options for where the queue is read from; it gets them as its `source`."""
    command = _gathered(command, "source", Source)
    for option in reversed(_SOURCES):
        command = option(command)
    return command


_SELECTING: tuple[Callable[[Any], Any], ...] = (
    click.argument("ids", metavar="[ID]...", nargs=-1),
    click.option(
        "--status",
        "statuses",
        multiple=True,
        type=click.Choice(_STATES),
        help="In this state; more than one: in any of them.",
    ),
    click.option(
        "--sender",
        "senders",
        multiple=True,
        type=_some_text,
        metavar="TEXT",
        help=f"With this in the sender's address; {_NULL_SENDER} is the null sender.",
    ),
    click.option(
        "--recipient",
        "recipients",
        multiple=True,
        type=_some_text,
        metavar="TEXT",
        help="With this in a recipient's address.",
    ),
    click.option(
        "--error",
        "errors",
        multiple=True,
        type=_some_text,
        metavar="TEXT",
        help="With this in a reason why a delivery failed.",
    ),
    click.option(
        "--header",
        "headers",
        multiple=True,
        type=_field,
        metavar="NAME:TEXT",
        help="With this in a header field of that name.",
    ),
    click.option(
        "--exact", "is_exact", is_flag=True, help="Compare texts as a whole, not in part."
    ),
    click.option(
        "--older-than", type=_duration, metavar="AGE", help="Arrived 5m, 2h, 7d ago or more."
    ),
    click.option(
        "--newer-than", type=_duration, metavar="AGE", help="Arrived 5m, 2h, 7d ago or less."
    ),
    click.option(
        "--size",
        type=_size_range,
        metavar="MIN..MAX",
        help="Of so many bytes: 10k..1m, 1m.. or ..500k.",
    ),
)
_SOURCES: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--method",
        type=click.Choice(_METHODS),
        help="Read the queue by postqueue -j, postqueue -p, or from its directories.",
    ),
    click.option(
        "--from-file",
        "file",
        metavar="FILE",
        type=click.Path(path_type=Path, readable=False),
        help="Read what postqueue -j, postqueue -p or mailq has printed, elsewhere or earlier;"
        " - is standard input.",
    ),
)
