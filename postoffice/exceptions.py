"""The error tree.

Every failure is temporary or permanent, and says so by its class: a temporary one goes away by
itself or by an administrator's hand, and the same call may be made again; a permanent one stays
until its cause is changed.  What is not known is temporary.  ``exit_status`` is the status, from
``sysexits.h``, with which a command ends on that error.
"""

from __future__ import annotations

from collections.abc import Iterable

from transaction.interfaces import TransientError

__all__ = [
    "ConfigurationError",
    "DepotDisconnected",
    "DepotError",
    "DepotFormatError",
    "DepotMisconfigured",
    "DepotUnavailable",
    "FolderMissing",
    "HandlerError",
    "LimitExceeded",
    "MatchTimeout",
    "MessageMissing",
    "MessageTaken",
    "PermanentError",
    "PostofficeError",
    "QueueEmpty",
    "QueueMissing",
    "QueueNotEmpty",
    "QueueRemoved",
    "TemporaryError",
]

EX_USAGE = 2
EX_DATAERR = 65
EX_UNAVAILABLE = 69
EX_TEMPFAIL = 75


class PostofficeError(Exception):
    """Any error that postoffice itself raises; its text is one line for a person."""

    exit_status = EX_TEMPFAIL


class TemporaryError(PostofficeError):
    """The same call may succeed later."""


class PermanentError(PostofficeError):
    """The same call fails again until its cause is changed."""

    exit_status = EX_DATAERR


class ConfigurationError(PermanentError):
    """``postoffice.ini`` cannot be used as it stands.

    :ivar file: path of the file at fault.
    :ivar section: name of the section, or ``None``.
    :ivar option: name of the option, or ``None``.
    :ivar fault: what is wrong.
    :ivar mend: what would be right.
    """

    exit_status = EX_USAGE

    def __init__(
        self, file: str, section: str | None, option: str | None, fault: str, mend: str
    ) -> None:
        """Compose the one line from its five parts."""
        self.file = file
        self.section = section
        self.option = option
        self.fault = fault
        self.mend = mend
        super().__init__(file, section, option, fault, mend)

    def __str__(self) -> str:
        """Return the one line: file, section, option, the fault and the mend."""
        place = self.file
        if self.section is not None:
            place += f": [{self.section}]"
        if self.option is not None:
            place += f" {self.option}"
        return " ".join(f"{place}: {self.fault}; {self.mend}".split())


class DepotError(PostofficeError):
    """The database, or what it holds, stands in the way."""


class DepotUnavailable(DepotError, TemporaryError):
    """The database cannot be reached, is locked by another process, or cannot be written."""


class DepotMisconfigured(DepotUnavailable):
    """The database's URI, or the file that it names, cannot be used as it stands.

    Unlike others of its kind it does not go away by itself: somebody has to correct it.
    """

    exit_status = EX_USAGE


class DepotDisconnected(DepotUnavailable, TransientError):
    """The database went away meanwhile; run the transaction again."""


class DepotFormatError(DepotError, PermanentError):
    """The data at the depot's path is of a format that this release does not read."""

    exit_status = EX_UNAVAILABLE


class _Named(DepotError, PermanentError, KeyError):
    """A look-up by name or id that found nothing; also a :exc:`KeyError`."""

    exit_status = EX_UNAVAILABLE

    def __str__(self) -> str:
        """Return the text itself: :exc:`KeyError` would show its ``repr``."""
        return str(self.args[0]) if self.args else ""


class FolderMissing(_Named):
    """There is no depot at this path of the database."""


class QueueMissing(_Named):
    """There is no queue of this name; the text names those that there are."""

    def __init__(self, queue_name: str, there_are: Iterable[str]) -> None:
        """Remember the name asked for and list the queues that exist."""
        names = ", ".join(repr(name) for name in there_are)
        super().__init__(f"no queue {queue_name!r}; there are: {names or 'none'}")
        self.queue_name = queue_name


class QueueRemoved(QueueMissing):
    """The queue was there when this object was made for it, and has been removed since."""

    def __init__(self, queue_name: str) -> None:
        """Remember the queue's name."""
        _Named.__init__(self, f"queue {queue_name!r} was removed")
        self.queue_name = queue_name


class MessageMissing(_Named, ValueError):
    """The message is not (or no longer) where it was looked for.

    Also a :exc:`ValueError`, which repoze.postoffice raised in ``remove_from_quarantine``.
    """


class HandlerError(PermanentError, TypeError):
    """What is to handle messages is nothing that can be called with a message."""

    exit_status = EX_USAGE


class MessageTaken(DepotError, TemporaryError, TransientError):
    """Another consumer took the message meanwhile; run the transaction again."""


class QueueEmpty(DepotError, LookupError):
    """No message can be taken from this queue now."""


class QueueNotEmpty(DepotError, PermanentError):
    """A queue was to be removed while messages wait in it or in its quarantine."""

    exit_status = EX_UNAVAILABLE


class LimitExceeded(PermanentError):
    """A message asks for more time, memory or depth than any message may have."""


class MatchTimeout(LimitExceeded):
    """A regular expression took longer on a message than it may."""
