"""``postoffice deliver``: one message from standard input into the queues."""

from __future__ import annotations

import logging
import os
import signal
import sys
import syslog
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import click

from postoffice.cli.invocation import Invocation, pass_invocation, shared_options
from postoffice.cli.output import Failure, complain
from postoffice.display import one_line
from postoffice.exceptions import EX_TEMPFAIL, ConfigurationError
from postoffice.intake import handover

__all__ = ["deliver_command"]

log = logging.getLogger("postoffice")

# Bytes that a message has in memory; a larger one waits in a file.
_IN_MEMORY = 1_048_576
# Seconds, until the configuration has told how many.
_FIRST_LIMIT = 100


@click.command("deliver", short_help="Take one message from standard input, for Postfix.")
@click.option("-f", "sender", metavar="SENDER", required=True, help="The envelope sender.")
@click.argument("recipients", metavar="RECIPIENT...", nargs=-1, required=True)
@shared_options
@pass_invocation
def deliver_command(invocation: Invocation, sender: str, recipients: tuple[str, ...]) -> int:
    """Take one message from standard input for each RECIPIENT, as Postfix's pipe(8) gives it.

    The status is 0 once it is stored for good, 65, 67 or 69 when it never will be, and 75 when it
    should come again.  What is printed begins with the matching status of RFC 3463.  Postfix should
    run etc/postoffice-deliver, which runs this.
    """
    with _limits():
        try:
            handover.refuse_closed_input()
            replies = _deliver(invocation, sender, recipients)
            status, line = handover.verdict(replies)
        except handover.Broken as error:
            status, line = EX_TEMPFAIL, str(error)
        except (ConfigurationError, Failure) as error:
            _report(error)
            status, line = EX_TEMPFAIL, "4.3.5 the configuration here cannot be used"
        # Whatever it is, Postfix has the message and tries again.
        except Exception as error:
            log.debug("deliver failed", exc_info=True)
            _report(error)
            status, line = EX_TEMPFAIL, "4.3.0 mail cannot be taken at the moment"
    # Where nobody reads the line, what counts is the status.
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode("ascii", "replace"))
    return status


def _deliver(
    invocation: Invocation, sender: str, recipients: Sequence[str]
) -> Sequence[handover.Reply]:
    """Deliver what is on standard input; return the reply for each recipient."""
    from postoffice.api import PostOffice
    from postoffice.intake.arrival import Incoming, Memory
    from postoffice.intake.conversation import Begin

    settings = invocation.settings()
    signal.setitimer(signal.ITIMER_REAL, settings.deliver_timeout)
    lines = handover.Lines(handover.read_message)

    def send(path: str, mailboxes: list[str]) -> Sequence[handover.Reply]:
        smtputf8 = not all(map(str.isascii, [path, *mailboxes]))
        begin = Begin(path, tuple(mailboxes), smtputf8, None)
        incoming = Incoming(begin, tempfile.gettempdir(), Memory(_IN_MEMORY), _IN_MEMORY)
        try:
            for piece in lines:
                incoming.add(piece)
            if lines.bare:
                return [handover.BARE_CR] * len(mailboxes)
            arrival = incoming.arrival()
            handover.refuse_cut_off()
            replies: Sequence[handover.Reply] = post_office.deliver(arrival)
            return replies
        finally:
            incoming.discard()

    with invocation.logs(settings), PostOffice(settings) as post_office:
        return handover.replies_to(
            handover.utf8(sender), [*map(handover.utf8, recipients)], send, _address
        )


def _address(argument: str) -> str:
    """Return an address as the listener would understand it.

    :raises postoffice.intake.handover.AddressError: it would not.
    """
    from postoffice.intake.paths import PathError, read_path

    try:
        address, rest = read_path(f"<{handover.mailbox(argument)}>")
    except PathError:
        rest = argument
    if rest:
        raise handover.AddressError("the address is not valid")
    return address


@contextmanager
def _limits() -> Iterator[None]:
    """End the process with 75 when it is told to end, or takes too long.

    At once, in the midst of a commit too: the database bears that, and a message that was stored
    and comes again is known.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        handover.finish(EX_TEMPFAIL, "4.3.2 delivery was interrupted")

    def too_late(number: int, frame: FrameType | None) -> NoReturn:
        handover.finish(EX_TEMPFAIL, "4.3.0 delivery took too long")

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, stop),
        signal.SIGALRM: signal.signal(signal.SIGALRM, too_late),
    }
    signal.setitimer(signal.ITIMER_REAL, _FIRST_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(error: Exception) -> None:
    """Tell the administrator, in the system's log for mail, or at a terminal.

    Postfix returns to senders what a command prints, so that nothing of this is printed for it.
    """
    text = f"deliver: {one_line(error) or type(error).__name__}"
    syslog.openlog("postoffice", syslog.LOG_PID, syslog.LOG_MAIL)
    syslog.syslog(syslog.LOG_ERR, text)
    if sys.stderr.isatty():
        complain(text)
