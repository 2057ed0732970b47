"""One run of the command: the options that all commands share, and what they lead to."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from postoffice.cli.output import Failure
from postoffice.display import one_line, printable

if TYPE_CHECKING:
    from postoffice.api import PostOffice
    from postoffice.config import Settings
    from postoffice.postfix.settings import PostfixSettings

__all__ = ["Invocation", "pass_invocation", "shared_options"]

# What these log of an outage is raised too, and told in one line.
_LIBRARIES = ("ZEO", "ZODB", "relstorage", "txn")

_TIME_AND_LEVEL = "%(asctime)s %(levelname)s "
_LINE = _TIME_AND_LEVEL + "%(message)s"
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7


class _Verbose(logging.Formatter):
    """Writes lines with nothing in them but what is printable."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


class _Plain(_Verbose):
    """Leaves tracebacks out, which libraries log beside raising what we report."""

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.exc_info = record.exc_text = None
        return super().format(record)


class _ForJournal(_Verbose):
    """Writes for journald, which notes the time itself: each line with its priority in front."""

    def __init__(self, line: str) -> None:
        super().__init__(line.removeprefix(_TIME_AND_LEVEL))

    def format(self, record: logging.LogRecord) -> str:
        # sd-daemon(3); the numbers are those of syslog.
        level = next((n for least, n in _PRIORITIES if record.levelno >= least), _DEBUG)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).split("\n"))


class _PlainForJournal(_ForJournal, _Plain):
    """Leaves tracebacks out, for journald."""


def _is_journal(stream: TextIO) -> bool:
    """Say whether what is written goes to journald; see systemd.exec(5), JOURNAL_STREAM."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _handler(
    for_journal: type[logging.Formatter], otherwise: type[logging.Formatter]
) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((for_journal if _is_journal(sys.stderr) else otherwise)(_LINE))
    return handler


def _plain_handler() -> logging.Handler:
    """Return a handler without what libraries say, and without tracebacks."""
    handler = _handler(_PlainForJournal, _Plain)
    handler.addFilter(_is_for_everybody)
    return handler


def _is_for_everybody(record: logging.LogRecord) -> bool:
    """Tell whether a line is for somebody who has not asked for more."""
    return record.name.partition(".")[0] not in _LIBRARIES


_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(slots=True)
class Invocation:
    """What the shared options say, wherever on the line they stand.

    :ivar config: the configuration file, or ``None`` to look for it.
    :ivar verbose: whether ``-v`` was given.
    """

    config: Path | None = None
    verbose: bool = False

    def settings(self) -> Settings:
        """Read the configuration file.

        :raises Failure: it is not in any of the usual places.
        :raises postoffice.exceptions.ConfigurationError: it cannot be used.
        """
        from postoffice import config

        path = self.config or config.find(sys.argv[0])
        if path is None:
            beside = Path(os.path.abspath(sys.argv[0])).parent.parent / "etc"
            raise Failure(
                f"no postoffice.ini in . or ./etc or {beside} or /etc; name one with -C FILE, "
                "or make one with `postoffice init DIR`",
                2,
            )
        return config.load(path)

    def postfix_settings(self) -> PostfixSettings:
        """Read how Postfix's own queue is reached; without a file, as a distribution has it.

        :raises postoffice.exceptions.ConfigurationError: the file cannot be used for that.
        """
        from postoffice import config

        path = self.config or config.find(sys.argv[0])
        return config.PostfixSettings() if path is None else config.load_postfix(path)

    @contextmanager
    def post_office(self) -> Iterator[PostOffice]:
        """Give the post office of the configuration file, with logging set up, and close it."""
        from postoffice.database import open_database

        with self.post_office_by(open_database) as post_office:
            yield post_office

    @contextmanager
    def post_office_by(self, opener: Callable[[str], Any]) -> Iterator[PostOffice]:
        """Give the post office as :meth:`post_office` does, its database opened by `opener`."""
        from postoffice.api import PostOffice

        settings = self.settings()
        with self.logs(settings), PostOffice(settings, opener) as post_office:
            yield post_office

    @contextmanager
    def existing_depot(self) -> Iterator[PostOffice]:
        """Give the post office as :meth:`post_office` does, for somebody who waits.

        It makes no database of a file, and waits some seconds only for a server.

        :raises postoffice.exceptions.FolderMissing: there is none yet.
        :raises postoffice.exceptions.DepotUnavailable: the database fails, now or in between.
        :raises OSError: its folder cannot be looked into.
        """
        from ZODB.POSException import POSError

        from postoffice.database import missing_file, open_soon
        from postoffice.exceptions import DepotUnavailable, FolderMissing

        with self.post_office_by(open_soon) as post_office:
            path = missing_file(post_office.settings.zodb_uri)
            if path is not None:
                raise FolderMissing(
                    f"there is no database {path} yet; the first intake of mail makes it"
                )
            try:
                yield post_office
            except POSError as error:
                raise DepotUnavailable(f"the database failed: {one_line(error)}") from error

    @contextmanager
    def logs(self, settings: Settings) -> Iterator[None]:
        """Log as the file says, or else to standard error.

        Warnings and errors always, and with ``-v`` a line for each message.
        """
        from postoffice.config import set_up_logging

        if set_up_logging(settings):
            yield
            return
        with self._logs_to(_handler(_ForJournal, _Verbose) if self.verbose else _plain_handler()):
            yield

    @contextmanager
    def logs_of_daemon(self, settings: Settings) -> Iterator[None]:
        """Log as :meth:`logs` does, but never what libraries say.

        Of an outage that lasts for an hour they say the same again and again.
        """
        from postoffice.config import set_up_logging

        if set_up_logging(settings):
            yield
            return
        with self._logs_to(_plain_handler()):
            yield

    @contextmanager
    def _logs_to(self, handler: logging.Handler) -> Iterator[None]:
        root, own = logging.getLogger(), logging.getLogger("postoffice")
        level = own.level
        root.addHandler(handler)
        own.setLevel(logging.INFO if self.verbose else logging.WARNING)
        try:
            yield
        finally:
            own.setLevel(level)
            root.removeHandler(handler)


pass_invocation = click.make_pass_decorator(Invocation)


def _note_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.ensure_object(Invocation).config = value


def _note_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Invocation).verbose = True


def shared_options(command: _F) -> _F:
    """Give a command the options that may stand before and behind its name."""
    verbose = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_note_verbose,
        help="Say more.",
    )
    config = click.option(
        "-C",
        "--config",
        metavar="FILE",
        # Whether it can be read, the configuration's own error says, with the mend.
        type=click.Path(path_type=Path, readable=False),
        expose_value=False,
        callback=_note_config,
        help="The configuration file, instead of looking for postoffice.ini.",
    )
    return config(verbose(command))
