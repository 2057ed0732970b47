"""Looking messages of Postfix's queue up: by one property after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import TYPE_CHECKING, overload

from postoffice.postfix.mail import Mail

if TYPE_CHECKING:
    from postoffice.postfix.store import PostqueueStore

__all__ = ["Lookup", "MailSelector"]


@dataclass(frozen=True, slots=True)
class Lookup:
    """One step of a selection.

    :ivar name: by what messages are looked up, as ``sender``.
    :ivar sought: what was sought, for people.
    :ivar matches: whether a message is selected.
    """

    name: str
    sought: str
    matches: Callable[[Mail], bool]


class MailSelector(Sequence[Mail]):
    """The messages of a store that match all lookups up to now; each lookup narrows them down.

    A lookup returns the selector itself, so that lookups are chained, and the selector is a
    sequence of the messages that are left::

        selector = MailSelector(store)
        for mail in selector.lookup_status(["deferred"]).lookup_sender("ann@example.org"):
            print(mail.qid)

    Text is compared without regard to case, as a whole, or with ``exact=False`` as a part.
    One thread at a time uses a selector.

    :ivar store: the :class:`PostqueueStore`.
    :ivar mails: the messages that are left, in the store's order.
    :ivar filters: the lookups up to now, in their order.
    """

    store: PostqueueStore
    mails: list[Mail]
    filters: list[Lookup]

    def __init__(self, store: PostqueueStore) -> None:
        """Select all messages of this store."""
        self.store = store
        self.filters = []
        self.mails = list(store.mails)

    # -- what is left ------------------------------------------------------------------------------

    @overload
    def __getitem__(self, index: int) -> Mail: ...

    @overload
    def __getitem__(self, index: slice) -> list[Mail]: ...

    def __getitem__(self, index: int | slice) -> Mail | list[Mail]:
        return self.mails[index]

    def __len__(self) -> int:
        return len(self.mails)

    def __repr__(self) -> str:
        steps = " and ".join(f"{one.name} {one.sought}" for one in self.filters)
        return f"<MailSelector: {len(self.mails)} of {len(self.store.mails)}; {steps or 'all'}>"

    def reset(self) -> MailSelector:
        """Forget the lookups, and select all messages that the store has now."""
        self.filters = []
        return self.replay()

    def replay(self) -> MailSelector:
        """Apply the lookups again, to what the store has now: after it was loaded anew."""
        self.mails = [
            mail for mail in self.store.mails if all(one.matches(mail) for one in self.filters)
        ]
        return self

    def _narrow(self, name: str, sought: str, matches: Callable[[Mail], bool]) -> MailSelector:
        # A lookup that raises is none: it would raise in each replay.
        self.mails = [mail for mail in self.mails if matches(mail)]
        self.filters.append(Lookup(name, sought, matches))
        return self

    # -- lookups -----------------------------------------------------------------------------------

    def lookup_qids(self, qids: Iterable[str]) -> MailSelector:
        """Select the messages with these ids."""
        wanted = frozenset(_items(qids))
        return self._narrow("id", ", ".join(sorted(wanted)), lambda mail: mail.qid in wanted)

    def lookup_status(self, status: Iterable[str]) -> MailSelector:
        """Select the messages in one of these states: ``active``, ``deferred``, ``hold``."""
        wanted = frozenset(_items(status))
        return self._narrow("status", ", ".join(sorted(wanted)), lambda mail: mail.status in wanted)

    def lookup_sender(self, sender: str, exact: bool = True) -> MailSelector:
        """Select by the envelope's sender; the null sender is the empty string, exactly."""
        matches = _text(sender, exact)
        return self._narrow("sender", repr(sender), lambda mail: matches(mail.sender))

    def lookup_recipient(self, recipient: str, exact: bool = True) -> MailSelector:
        """Select the messages that have still to be delivered to such a recipient."""
        matches = _text(recipient, exact)
        return self._narrow(
            "recipient", repr(recipient), lambda mail: any(map(matches, mail.recipients))
        )

    def lookup_error(self, error: str, exact: bool = True) -> MailSelector:
        """Select the messages with such a delivery error."""
        matches = _text(error, exact)
        return self._narrow("error", repr(error), lambda mail: any(map(matches, mail.errors)))

    def lookup_header(self, header: str, value: str, exact: bool = True) -> MailSelector:
        """Select the messages with such a value in one of their header fields of this name.

        Only messages that were parsed have headers: load the store with ``parse=True``.
        """
        matches = _text(value, exact)
        return self._narrow(
            "header",
            f"{header}: {value!r}",
            lambda mail: any(map(matches, mail.head.get_all(header))),
        )

    def lookup_date(self, start: date | None = None, stop: date | None = None) -> MailSelector:
        """Select the messages that arrived at `start` or later, and at `stop` or earlier.

        Both are local time and naive, as ``Mail.date`` is.  A :class:`~datetime.date` that is no
        :class:`~datetime.datetime` is a whole day: from its beginning, and up to its end.
        """
        first, last = _moment(start, time.min), _moment(stop, time.max)
        return self._narrow(
            "date",
            f"{start or ''}..{stop or ''}",
            lambda mail: (
                mail.date is not None
                and (first is None or first <= mail.date)
                and (last is None or mail.date <= last)
            ),
        )

    def lookup_size(self, smin: int = 0, smax: int | None = None) -> MailSelector:
        """Select the messages of `smin` bytes or more, and of `smax` bytes or less."""
        return self._narrow(
            "size",
            f"{smin}..{'' if smax is None else smax}",
            lambda mail: smin <= mail.size and (smax is None or mail.size <= smax),
        )


def _items(words: Iterable[str]) -> Iterable[str]:
    """Return the words; a single one may be given as it is."""
    return [words] if isinstance(words, str) else words


def _moment(day: date | None, clock: time) -> datetime | None:
    """Return the time of day of a bare date, and any other moment as it is."""
    if day is None or isinstance(day, datetime):
        return day
    return datetime.combine(day, clock)


def _text(sought: str, exact: bool) -> Callable[[str], bool]:
    wanted = sought.casefold()
    if exact:
        return lambda text: text.casefold() == wanted
    return lambda text: wanted in text.casefold()
