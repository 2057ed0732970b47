"""The client that hands one message over to our LMTP listener: RFC 2033 over a unix socket.

``etc/postoffice-deliver`` imports it alone, by ``python -I -S``.  So it imports none of postoffice,
and of the standard library only what is part of the interpreter, and ``_socket``: :mod:`socket` and
:mod:`signal` would take longer than all the rest.  ``postoffice deliver`` shares its rules on
addresses, lines and statuses.
"""

# There is no import of __future__, and none of typing: each would be a file more to find.
import _signal  # type: ignore[import-not-found]  # typeshed lacks it
import _socket
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import NoReturn, TypeAlias

    Reply: TypeAlias = tuple[int, str, str]

__all__ = [
    "BARE_CR",
    "EX_DATAERR",
    "EX_NOUSER",
    "EX_TEMPFAIL",
    "EX_UNAVAILABLE",
    "NOBODY_LISTENS",
    "AddressError",
    "Broken",
    "Lines",
    "NobodyListens",
    "explained",
    "finish",
    "hand_over",
    "mailbox",
    "main",
    "read_message",
    "refuse_closed_input",
    "refuse_cut_off",
    "replies_to",
    "utf8",
    "verdict",
]

EX_DATAERR = 65
EX_NOUSER = 67
EX_UNAVAILABLE = 69
EX_TEMPFAIL = 75
NOBODY_LISTENS = 111
"""The status that tells the launcher to go the second way; no byte of the message was read."""

_PIECE = 65536
_LONGEST_REPLY = 65536
_LONGEST_TEXT = 400
# Commands that are on their way at once: replies to them never fill a socket's buffer, so that
# neither side waits for the other to read (RFC 2920, 3.1).
_GROUP = 100
# Seconds in a day: alarm(2) takes more, and no server waits as long.
_LONGEST_LIMIT = 86400
_SPECIAL = frozenset(' "(),:;<>@[\\]')

BARE_CR: "Reply" = (554, "5.6.0", "CR stands alone in the message (RFC 5321, 2.3.8)")
"""The reply to each recipient of a message that :class:`Lines` does not read to its end."""


class AddressError(ValueError):
    """The text is no address that could stand in a command."""


class Broken(Exception):
    """The message cannot be handed over now; the text begins with a 4.x.x status (RFC 3463)."""


class NobodyListens(Exception):
    """There is no listener at the socket."""


def utf8(argument: str) -> str:
    """Return an argument that was decoded in the locale's encoding as the UTF-8 that it is."""
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def mailbox(address: str) -> str:
    """Return an address as a command has it (RFC 5321, 4.1.2), without the angle brackets.

    A local part is quoted where it has to be and is not yet: pipe(8) writes it with quotes or
    without, as its flag ``q`` says, and an alias without.

    What it returns can stand between angle brackets in a line; whether there is such a mailbox, the
    listener says.

    :raises AddressError: it lacks a local part or a domain, or holds what no address holds.
    """
    local, at, domain = address.rpartition("@")
    if not at:
        if domain.lower() == "postmaster":
            return domain
        raise AddressError("the address has no domain")
    try:
        address.encode("utf-8")
    except UnicodeEncodeError:
        raise AddressError("the address is not UTF-8") from None
    if any(one < " " or "\x7f" <= one < "\xa0" or one in "\u2028\u2029" for one in address):
        raise AddressError("the address holds a control character")
    literal = domain[1:-1] if domain[:1] == "[" and domain[-1:] == "]" else ""
    if not local or not domain or _has_special(literal.replace(":", "") or domain):
        raise AddressError("the address has no local part or no domain")
    if _is_quoted(local) or (all(local.split(".")) and not _has_special(local)):
        return address
    escaped = local.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"@{domain}'


def _has_special(text: str) -> bool:
    return not _SPECIAL.isdisjoint(text)


def _is_quoted(local: str) -> bool:
    if len(local) < 2 or not (local[0] == local[-1] == '"'):
        return False
    # What is left when the pairs of a backslash and another character are gone.
    inner = local[1:-1].replace("\\\\", "").replace('\\"', "")
    return '"' not in inner and not inner.endswith("\\")


class Lines:
    """The message in pieces whose lines end in LF, the last one too.

    CRLF is taken for LF, as ``sendmail`` takes it: a program that delivers may write either.  A CR
    elsewhere may not be sent (RFC 5321, 2.3.8), and changing it would break signatures: that
    message is rejected.  Memory is that of a piece.

    :ivar bare: whether a CR that stands alone has ended the iteration.
    """

    def __init__(self, read: "Callable[[int], bytes]") -> None:
        """Read with this function: ``read(size)``, ``b""`` at the end."""
        self._read = read
        self.bare = False

    def __iter__(self) -> "Iterator[bytes]":
        """Yield pieces, none of them empty.

        :raises Broken: there is no message at all.
        """
        held = b""
        last = b""
        while piece := self._read(_PIECE):
            piece = held + piece
            held = b"\r" if piece.endswith(b"\r") else b""
            if held:
                piece = piece[:-1]
            if b"\r" in piece:
                piece = piece.replace(b"\r\n", b"\n")
                if b"\r" in piece:
                    self.bare = True
                    return
            if piece:
                last = piece[-1:]
                yield piece
        if held:
            self.bare = True
        elif not last:
            # Nobody sends a mail of no bytes; whoever was to write it has gone.
            raise Broken("4.6.0 there is no message on standard input")
        elif last != b"\n":
            yield b"\n"


class _Session:
    """The client's side of one session (RFC 2033)."""

    def __init__(self, connection: _socket.socket) -> None:
        self._connection = connection
        self._received = b""

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)

    def _line(self) -> bytes:
        while b"\n" not in self._received:
            more = self._connection.recv(_PIECE)
            if not more:
                raise Broken("4.4.2 the listener closed the connection")
            self._received += more
            if len(self._received) > _LONGEST_REPLY:
                break
        line, _, self._received = self._received.partition(b"\n")
        return line.rstrip(b"\r")

    def reply(self) -> "Reply":
        """Return the next reply; the lines of its text are joined by LF."""
        text: list[str] = []
        enhanced = ""
        while len(text) < _GROUP:
            line = self._line()
            code, mark, rest = line[:3], line[3:4], line[4:].decode("utf-8", "replace")
            if not (code.isdigit() and code[:1] in b"2345" and mark in (b" ", b"-", b"")):
                break
            word, _, after = rest.partition(" ")
            if _is_enhanced(word, code[:1].decode()):
                enhanced, rest = word, after
            text.append(rest)
            if mark != b"-":
                found = (int(code), enhanced or f"{code[:1].decode()}.0.0", "\n".join(text))
                if found[0] == 421:
                    # It may answer any command, and ends the session (RFC 5321, 3.8).
                    raise Broken(f"{found[1]} {found[2]}")
                return found
        raise Broken("4.5.0 the listener gave a reply that is none")

    def quit(self) -> None:
        """Say goodbye, and wait for no answer: the fate of the message is known."""
        try:  # noqa: SIM105  # contextlib would be a file more
            self.send(b"QUIT\r\n")
        except OSError:
            # The listener has gone already.
            pass

    def expect(self, code: int) -> str:
        """Return the text of the next reply, which must have this code."""
        found, _, text = self.reply()
        if found != code:
            raise Broken(f"4.3.5 the listener is not ready: {found} {text}")
        return text


def _is_enhanced(word: str, digit: str) -> bool:
    parts = word.split(".")
    return len(parts) == 3 and parts[0] == digit and all(one.isdecimal() for one in parts)


def _transact(
    session: _Session, sender: str, recipients: "Sequence[str]", read: "Callable[[int], bytes]"
) -> "list[Reply]":
    """Send one message; return the reply for each recipient."""
    session.expect(220)
    session.send(b"LHLO localhost\r\n")
    features = {line.split(" ")[0].upper() for line in session.expect(250).split("\n")[1:]}
    mail = f"MAIL FROM:<{sender}>"
    if "8BITMIME" in features:
        mail += " BODY=8BITMIME"
    if not (sender.isascii() and all(map(str.isascii, recipients))):
        if "SMTPUTF8" not in features:
            raise Broken("4.3.5 the listener does not offer SMTPUTF8")
        mail += " SMTPUTF8"
    if "XWAY" in features:
        mail += " XWAY=pipe"
    commands = [mail, *(f"RCPT TO:<{recipient}>" for recipient in recipients), "DATA"]
    size = _GROUP if "PIPELINING" in features else 1
    replies: list[Reply] = []
    for at in range(0, len(commands), size):
        group = commands[at : at + size]
        session.send("".join(f"{command}\r\n" for command in group).encode())
        replies += [session.reply() for command in group]
    about_mail, *fates, about_data = replies
    if about_mail[0] // 100 != 2:
        fates = [about_mail] * len(recipients)
    taken = [at for at, fate in enumerate(fates) if fate[0] // 100 == 2]
    if not taken:
        session.quit()
        return fates
    if about_data[0] == 354:
        lines = Lines(read)
        _send_message(session, lines)
        if lines.bare:
            # The connection is closed within the message, which ends nothing and stores nothing.
            for at in taken:
                fates[at] = BARE_CR
            return fates
    for at in taken:
        fates[at] = session.reply() if about_data[0] == 354 else about_data
    session.quit()
    return fates


def _send_message(session: _Session, lines: Lines) -> None:
    """Send the message with CRLF and doubled dots (RFC 5321, 4.5.2), and the dot that ends it."""
    at_start = True
    for piece in lines:
        if at_start and piece.startswith(b"."):
            session.send(b".")
        at_start = piece.endswith(b"\n")
        session.send(piece.replace(b"\n.", b"\n..").replace(b"\n", b"\r\n"))
    if not lines.bare:
        session.send(b".\r\n")


def replies_to(
    sender: str,
    recipients: "Sequence[str]",
    send: "Callable[[str, list[str]], Sequence[Reply]]",
    write: "Callable[[str], str]" = mailbox,
) -> "list[Reply]":
    """Send to those recipients that are addresses; return the reply for each.

    :param sender: as given by ``-f``.
    :param recipients: as given behind ``--``.
    :param send: sends from a sender, ``""`` for the null one, to recipients, each of them once, and
        returns the reply for each of those.
    :param write: makes of an argument what `send` is given, or raises :exc:`AddressError`.
    """
    try:
        # pipe(8) writes the null sender as MAILER-DAEMON unless null_sender= is set.
        null = sender in ("", "<>") or sender.upper() == "MAILER-DAEMON"
        path = "" if null else write(sender)
    except AddressError as error:
        return [(553, "5.1.7", str(error))] * len(recipients)
    fates: dict[str, Reply] = {}
    mailboxes: dict[str, str] = {}
    for recipient in recipients:
        try:
            mailboxes[recipient] = write(recipient)
        except AddressError as error:
            fates[recipient] = (553, "5.1.3", str(error))
    if mailboxes:
        different = list(dict.fromkeys(mailboxes.values()))
        found = dict(zip(different, send(path, different), strict=True))
        fates |= {recipient: found[one] for recipient, one in mailboxes.items()}
    return [fates[recipient] for recipient in recipients]


def hand_over(
    socket: str, sender: str, recipients: "Sequence[str]", read: "Callable[[int], bytes]"
) -> "list[Reply]":
    """Hand a message over to the listener at a unix socket; return the reply for each recipient.

    Takes as long as the listener does; the caller sets a limit.  Memory is that of a few pieces.

    :param socket: the path of the socket.
    :param sender: as given by ``-f``.
    :param recipients: as given behind ``--``.
    :param read: reads the message; it is called once the listener has accepted a recipient.
    :raises NobodyListens: there is no listener; nothing was read.
    :raises Broken: the message was not handed over, or nobody knows.
    :raises OSError: likewise.
    """

    def send(path: str, mailboxes: "list[str]") -> "list[Reply]":
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            try:
                connection.connect(socket)
            except (FileNotFoundError, ConnectionRefusedError):
                raise NobodyListens from None
            except OSError as error:
                raise Broken(f"4.4.1 the listener cannot be reached: {_cause(error)}") from error
            return _transact(_Session(connection), path, mailboxes, read)
        finally:
            connection.close()

    return replies_to(sender, recipients, send)


def verdict(replies: "Sequence[Reply]") -> "tuple[int, str]":
    """Return the exit status for these replies, and the line that explains it.

    The status holds for all recipients, so a temporary reply to one of them has all tried again;
    those who have the message do not get it twice.  A reply of 5.5.x says that two programs do not
    understand each other, which is no fault of the mail: that is temporary.

    The line begins with a status of the same class (RFC 3463, 2), which pipe(8) and local(8) heed
    more than the exit status.
    """
    lasting = []
    for code, enhanced, text in replies:
        if code // 100 == 5 and not enhanced.startswith("5.5."):
            lasting.append((enhanced, text))
        elif code // 100 != 2:
            return EX_TEMPFAIL, explained("4", enhanced, text)
    if not replies:
        return EX_TEMPFAIL, explained("4", "4.3.0", "there is no reply")
    if not lasting:
        return 0, explained("2", *replies[0][1:])
    enhanced, text = lasting[0]
    subjects = {each.rpartition(".")[0] for each, _ in lasting}
    if all(each == "5.1.1" for each, _ in lasting):
        status = EX_NOUSER
    else:
        status = EX_DATAERR if subjects == {"5.6"} else EX_UNAVAILABLE
    return status, explained("5", enhanced, text)


def explained(digit: str, enhanced: str, text: str) -> str:
    """Return one line in printable ASCII that begins with a status of this class."""
    line = f"{digit}{enhanced[1:]} {' '.join(text.split())}"
    return "".join(one if " " <= one <= "~" else "?" for one in line)[:_LONGEST_TEXT]


def finish(status: int, line: str) -> "NoReturn":
    """Say this line and end the process at once, with whatever it was about."""
    try:
        os.write(1, f"{line}\n".encode("ascii", "replace"))
    finally:
        # Where nobody reads the line, what counts is the status.
        os._exit(status)


def main() -> "NoReturn":
    """Hand the message on standard input over: ``SOCKET SECONDS -f SENDER -- RECIPIENT...``.

    The launcher adds the first two, so that nobody is told of them who has called that.
    """
    try:
        socket, seconds, option, sender, mark, *recipients = sys.argv[1:]
        if option != "-f" or mark != "--" or not recipients:
            raise ValueError
    except ValueError:
        finish(EX_TEMPFAIL, "4.3.5 the arguments are not: -f SENDER -- RECIPIENT...")
    if not (seconds.isascii() and seconds.isdecimal() and 1 <= int(seconds[:9]) <= _LONGEST_LIMIT):
        finish(EX_TEMPFAIL, f"4.3.5 TIMEOUT is not a number of seconds from 1 to {_LONGEST_LIMIT}")
    _signal.signal(_signal.SIGALRM, _too_late)
    _signal.alarm(int(seconds))
    try:
        # Else the connection would be standard input, and be read for the message.
        refuse_closed_input()
        replies = hand_over(socket, utf8(sender), [*map(utf8, recipients)], read_message)
    except NobodyListens:
        os._exit(NOBODY_LISTENS)
    except Broken as error:
        finish(EX_TEMPFAIL, explained("4", *str(error).split(" ", 1)))
    # Whatever it is, the sender's server has the message and can try again.
    except BaseException as error:
        finish(EX_TEMPFAIL, explained("4", "4.3.0", f"it was not handed over: {_cause(error)}"))
    finish(*verdict(replies))


def _cause(error: BaseException) -> str:
    """Return what went wrong, in words and without a path."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError):
        # What Python itself finds wrong with an address has no number and no path.
        return error.strerror or str(error)
    return "the program failed"


def refuse_closed_input() -> None:
    """Fail if there is no standard input; to be asked before anything is opened in its place.

    :raises Broken: so it is.
    """
    try:
        os.fstat(0)
    except OSError:
        raise Broken("4.3.5 there is no standard input to read a message from") from None


def read_message(size: int) -> bytes:
    """Read from standard input; the end is believed only while somebody reads standard output.

    When Postfix is stopped, or pipe(8) dies, a message ends in its midst, and looks complete.

    :raises Broken: whoever wrote the message has gone.
    """
    piece = os.read(0, size)
    if not piece:
        refuse_cut_off()
    return piece


def refuse_cut_off() -> None:
    """Fail if nobody reads standard output, which is a pipe, any more.

    :raises Broken: so it is.
    """
    import select

    poller = select.poll()
    poller.register(1, 0)
    if any(event & select.POLLERR for _, event in poller.poll(0)):
        raise Broken("4.3.2 the message may have been cut off")


def _too_late(number: int, frame: object) -> "NoReturn":
    finish(EX_TEMPFAIL, "4.4.2 the message was not handed over in time")


if __name__ == "__main__":
    main()
