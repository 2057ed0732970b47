"""``postoffice consume``: processes that hand each message of a queue to an application."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import Failure
from postoffice.display import one_line
from postoffice.exceptions import EX_USAGE, HandlerError

if TYPE_CHECKING:
    from postoffice.config import Settings

__all__ = ["consume_command"]

log = logging.getLogger("postoffice")

_HANDLER = re.compile(r"(\w+(?:\.\w+)*):(\w+(?:\.\w+)*)")
_LINE = "%(asctime)s %(levelname)s %(process)d %(message)s"
_MOST_WORKERS = 1000


@click.command("consume", short_help="Have a function of yours process a queue's messages.")
@click.argument("queue_name", metavar="QUEUE")
@click.argument("handler", metavar="MODULE:HANDLER")
@click.option(
    "--workers",
    type=click.IntRange(1, _MOST_WORKERS),
    default=1,
    show_default=True,
    metavar="N",
    help="Work with N processes.",
)
@shared_options
@pass_invocation
def consume_command(invocation: Invocation, queue_name: str, handler: str, workers: int) -> None:
    """Call HANDLER of MODULE with each message of QUEUE, a transaction each, until SIGTERM.

    A message on which it fails comes again later, and goes to quarantine in the end; max_attempts
    and retry_delay in the queue's section say when.  MODULE is sought in the working directory
    first.  Workers that die are started again.
    """
    from postoffice.database_uri import database_file
    from postoffice.storage_socket import is_there
    from postoffice.workers import Workers

    if not _HANDLER.fullmatch(handler):
        raise click.UsageError(
            f"{handler!r} names no handler; write MODULE:HANDLER, such as app.mail:handle"
        )
    settings = invocation.settings()
    path = database_file(settings.zodb_uri)
    if workers > 1 and path is not None and not is_there(path):
        raise Failure(
            f"--workers {workers}: database {path} is a file that one process at a time can open; "
            "start one worker, or `postoffice serve`, which serves it to any number",
            EX_USAGE,
        )
    with invocation.logs(settings):
        if invocation.verbose and not settings.has_logging:
            _say_more()
        refusal = Workers(lambda: _work(settings, queue_name, handler), workers).run()
    if refusal is not None:
        raise Failure(refusal.text, refusal.status)


def _say_more() -> None:
    """Have each line on standard error say which process it is of, and tracebacks shown."""
    log.setLevel(logging.DEBUG)
    for handler in logging.getLogger().handlers:
        if handler.formatter is not None:
            handler.setFormatter(type(handler.formatter)(_LINE))


def _work(settings: Settings, queue_name: str, handler: str) -> None:
    """Be a worker: return when told to stop.

    :raises postoffice.exceptions.PostofficeError: it cannot work, or cannot go on.
    """
    from postoffice.api import PostOffice
    from postoffice.consumer import consume

    function = _imported(handler)
    with PostOffice(settings) as post_office:
        post_office.apply_policy(queue_name)
    path = settings.zodb_path_text
    consume(settings.zodb_uri, queue_name, function, path=path, stop=_heed_signals())


def _heed_signals() -> Callable[[], bool]:
    """Return a function that tells whether a signal has told us to stop; a second kills nobody.

    Who interrupts a terminal, or stops a unit of systemd, signals this process and its parent, and
    the parent then signals this process once more.
    """
    signalled = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal signalled
        signalled = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return lambda: signalled


def _imported(handler: str) -> Callable[..., object]:
    """Import a handler, as a module of the working directory or of the environment.

    :raises HandlerError: it is not there, or is not to be called.
    """
    module, _, names = handler.partition(":")
    # As `python -m` does, and just so far.
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    # An import runs a module, which may raise anything.
    except Exception as error:
        log.info("%s cannot be imported", module, exc_info=True)
        raise HandlerError(
            f"{module} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    for name in names.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            near = difflib.get_close_matches(name, dir(found), 1)
            instead = f"; did you mean {near[0]!r}?" if near else ""
            raise HandlerError(f"{handler}: there is no {name!r}{instead}") from None
    if not callable(found):
        raise HandlerError(f"{handler} is no function, but {type(found).__name__}")
    function: Callable[..., object] = found
    return function
