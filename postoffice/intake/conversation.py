"""The server's side of an LMTP session (RFC 2033): bytes in, replies and a message's bytes out.

::

    conversation = Conversation(Limits(), "mail.example.com", accept)
    events = conversation.greet()
    while True:
        for event in events:
            ...                                       # send, store, close
        if conversation.waiting:
            events = conversation.answer(replies)     # the message's fate, by recipient
        else:
            events = conversation.receive(read())

Nothing here knows sockets or time.  Memory is bounded whatever the client sends: a message's bytes
leave with the events of the call that brought them, a command line that is too long is thrown away
as it comes, and sender and recipients of one message have a limit.  A conversation belongs to one
session and to one thread at a time.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from postoffice.display import printable
from postoffice.intake.paths import PathError, read_parameters, read_path

__all__ = [
    "Abandon",
    "Accept",
    "Begin",
    "Chunk",
    "Close",
    "Complete",
    "Conversation",
    "Event",
    "Limits",
    "Reply",
    "Send",
]

_END = b"\r\n.\r\n"
# What the end of a message may have begun with, when more is to come.
_KEPT = range(len(_END) - 1, -1, -1)
_BEGUN = frozenset(_END[:length] for length in _KEPT)
# Where a message, read in one pass, is anything but lines that end in CRLF and begin with no dot.
_ODD = re.compile(rb"\r(?!\n[^.])")
# Longer ones than RFC 5321 (4.5.3.1.4) asks for: addresses grow with SMTPUTF8 and with VERP.
_LONGEST_LINE = 2048
_LONGEST_TEXT = 400
# The longest path that RFC 5321 (4.5.3.1.3) knows; what recipients may have on average.
_PATH_OCTETS = 256
_SIZE = re.compile(r"[0-9]{1,20}")
# What a browser says that was led to believe a mail server is a web server.
_WEB = frozenset(["CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"])


class Reply(NamedTuple):
    """One reply (RFC 5321, 4.2) with its enhanced status code (RFC 3463).

    :ivar code: three digits.
    :ivar enhanced: as ``2.1.5``; its class is the first digit of `code`.
    :ivar text: for a person; what is not printable ASCII is sent as an escape.
    """

    code: int
    enhanced: str
    text: str

    def line(self) -> bytes:
        """Return it as it is sent: one line, no longer than RFC 5321 (4.5.3.1.5) allows."""
        text = self.text
        if not (text.isascii() and text.isprintable()):
            text = printable(text).encode("ascii", "backslashreplace").decode("ascii")
        return f"{self.code} {self.enhanced} {text[:_LONGEST_TEXT]}\r\n".encode("ascii")


#: ``accept(sender, recipient)`` refuses a recipient with a reply, or takes it with ``None``.  It
#: is called for each RCPT, and does not raise.
Accept: TypeAlias = Callable[[str, str], Reply | None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one session may ask for.

    :ivar max_size: octets of a message, its lines ended by CRLF, as RFC 1870 counts; ``None``: any.
    :ivar max_recipients: of one message; RFC 5321 (4.5.3.1.8) asks for 100 at least.
    :ivar max_errors: commands that broke the rules, without a message between them.
    :ivar max_idle_commands: commands that do nothing for a message, likewise.
    """

    max_size: int | None = None
    max_recipients: int = 1000
    max_errors: int = 100
    max_idle_commands: int = 1000


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes to the client."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Begin:
    """A message begins; its bytes follow.

    :ivar sender: the reverse-path; ``""`` is the null one.
    :ivar recipients: the forward-paths that were accepted, each once.
    :ivar smtputf8: whether the client asked for SMTPUTF8 (RFC 6531).
    :ivar declared_size: octets, as the client said; ``None`` if it did not.
    :ivar way: the way in: ``lmtp``, or ``pipe`` where ``deliver`` hands it over.
    """

    sender: str
    recipients: tuple[str, ...]
    smtputf8: bool
    declared_size: int | None
    way: str = "lmtp"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some bytes of the message, as they are to be stored: lines end in LF, dots are unstuffed.

    Lines end as in what Postfix itself writes to a Maildir, so that filters, digests and
    applications see the same bytes whichever way a mail came.  As no message with a CR or LF
    elsewhere gets through, what was sent can be told from what is stored.
    """

    data: bytes


@dataclass(frozen=True, slots=True)
class Complete:
    """The message has ended; nothing goes on before :meth:`Conversation.answer`."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Forget the message that had begun: it is refused, and the client told so at its end."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection once all has been sent.  No event follows."""


Event: TypeAlias = Send | Begin | Chunk | Complete | Abandon | Close

_OK = Reply(250, "2.0.0", "OK").line()
_SENDER_OK = Reply(250, "2.1.0", "sender OK").line()
_RECIPIENT_OK = Reply(250, "2.1.5", "recipient OK").line()
_GO_AHEAD = b"354 end with <CRLF>.<CRLF>\r\n"
_HELP = Reply(214, "2.0.0", "LMTP: LHLO MAIL RCPT DATA RSET NOOP VRFY HELP QUIT")
_TOO_LARGE = Reply(552, "5.3.4", "message is larger than the limit")
# RFC 5321 (2.3.8, 4.1.1.4): only CRLF ends a line, and no client may send a CR or LF elsewhere.
# To take it for a line's end lets a second message hide in the first; to keep it makes two
# different messages alike once lines end in LF.  Postfix mends such mail before it comes here, so
# that a refusal strikes a client that does not.
_BARE = Reply(554, "5.6.0", "CR or LF stands alone in the message (RFC 5321, 2.3.8)")
_SYNTAX = Reply(500, "5.5.2", "command not recognised")
_LONG = Reply(500, "5.5.2", "command line too long")
_ARGUMENT = Reply(501, "5.5.4", "wrong argument")
_NO_GREETING = Reply(503, "5.5.1", "say LHLO first")
_NO_UTF8 = Reply(553, "5.6.7", "an address beyond ASCII needs SMTPUTF8")
_TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "too many recipients")


class _State(enum.Enum):
    COMMANDS = enum.auto()
    BODY = enum.auto()
    WAITING = enum.auto()
    CLOSED = enum.auto()


@dataclass(slots=True)
class _Mail:
    """One mail transaction (RFC 5321, 3.3).

    :ivar recipients: the place of each among the recipients.
    :ivar way: as in :class:`Begin`.
    :ivar places: those of all that were accepted, in the order of their RCPTs.
    :ivar octets: of all recipients.
    :ivar disappointed: a refusal of ours is why a pipelined command has nothing to go on.
    :ivar at_start: no byte of the message has come.
    :ivar size: octets of the message, as RFC 1870 counts them.
    :ivar bare: a CR or LF stood alone.
    :ivar refused: the rest of the message is thrown away.
    """

    sender: str | None = None
    smtputf8: bool = False
    way: str = "lmtp"
    declared_size: int | None = None
    recipients: dict[str, int] = field(default_factory=dict)
    places: list[int] = field(default_factory=list)
    octets: int = 0
    disappointed: bool = False
    at_start: bool = True
    size: int = 0
    bare: bool = False
    refused: bool = False


class Conversation:
    """One LMTP session."""

    def __init__(self, limits: Limits, hostname: str, accept: Accept) -> None:
        """Begin a session; nothing is said yet.

        :param hostname: the server's name for itself; ASCII.
        """
        self._limits = limits
        self._hostname = hostname
        self._accept = accept
        self._state = _State.COMMANDS
        self._input = b""
        self._events: list[Event] = []
        self._output: list[bytes] = []
        self._skipping = False
        self._errors = 0
        self._idle_commands = 0
        self._greeted = False
        self._mail = _Mail()
        self._commands: dict[str, Callable[[str], None]] = {
            "LHLO": self._lhlo,
            "MAIL": self._take_sender,
            "RCPT": self._rcpt,
            "DATA": self._data,
            "RSET": self._rset,
            "NOOP": self._noop,
            "VRFY": self._vrfy,
            "HELP": self._help,
            "QUIT": self._quit,
            "HELO": self._helo,
            "EHLO": self._helo,
            "EXPN": self._unoffered,
        }

    # -- what the caller does ----------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether a complete message waits for its answer.

        Nothing should be read from the client meanwhile: what is given to :meth:`receive` is kept.
        """
        return self._state is _State.WAITING

    @property
    def sending(self) -> bool:
        """Whether a message is coming, from its sender's address on."""
        if self._state is _State.COMMANDS:
            return self._mail.sender is not None
        return self._state is _State.BODY

    @property
    def within_message(self) -> bool:
        """Whether a message is being received, or waits for its answer."""
        return self._state is _State.BODY or self._state is _State.WAITING

    def greet(self) -> list[Event]:
        """Return the greeting, which is sent before anything is received."""
        return [Send(f"220 {self._hostname} LMTP\r\n".encode("ascii"))]

    def receive(self, data: bytes) -> list[Event]:
        """Take what the client sent; return what follows from it, in order.

        However the same bytes are divided among calls, the joined ``Send`` and ``Chunk`` bytes and
        the other events are the same.  No bytes raise.
        """
        if self._state is not _State.CLOSED:
            self._input += data
        return self._proceed()

    def answer(self, replies: Sequence[Reply]) -> list[Event]:
        """Tell the client what became of the message; return what follows from that.

        What the client had sent meanwhile is taken up then.

        :param replies: one for each of the recipients in :class:`Begin`, in their order.
        :raises ValueError: they are more or fewer, or no message waits.
        """
        if self._state is not _State.WAITING or len(replies) != len(self._mail.recipients):
            raise ValueError("one reply for each recipient of the message that waits")
        lines = [reply.line() for reply in replies]
        self._finish(lines)
        return self._proceed()

    def end(self, reply: Reply) -> list[Event]:
        """Break the session off with a reply of code 421 (RFC 5321, 3.8).

        A message that had begun is forgotten; the caller has no ``Abandon`` of it.
        """
        if self._state is _State.CLOSED:
            return []
        self._say(reply)
        self._close()
        return self._proceed()

    # -- reading -----------------------------------------------------------------------------------

    def _proceed(self) -> list[Event]:
        going = True
        while going:
            if self._state is _State.BODY:
                going = self._read_body()
            elif self._state is _State.COMMANDS:
                going = self._read_commands()
            else:
                going = False
        self._flush()
        events, self._events = self._events, []
        return events

    def _read_commands(self) -> bool:
        """Obey the commands that have come; return whether something else is to be read now."""
        data, at = self._input, 0
        while self._state is _State.COMMANDS:
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            line = data[at:end]
            at = end + 2
            if self._skipping or len(line) + 2 > _LONGEST_LINE:
                self._skipping = False
                self._err(_LONG)
            else:
                self._command(line)
        self._input = data[at:] if self._state is not _State.CLOSED else b""
        if self._state is not _State.COMMANDS:
            if self._state is _State.BODY:
                # The line of DATA counts as the one before the first: a dot may follow at once.
                self._input = b"\r\n" + self._input
            return True
        half = self._input[-1:] if self._input.endswith(b"\r") else b""
        if self._skipping or len(self._input) + 2 - len(half) > _LONGEST_LINE:
            self._skipping = True
            self._input = half
        return False

    def _read_body(self) -> bool:
        """Take the bytes of the message that have come; return whether it has ended."""
        data = self._input
        odd = _ODD.search(data)
        place = len(data) if odd is None else odd.start()
        found = data[place : place + len(_END)]
        if found == _END:
            self._take(*_plain(data[: place + 2]))
        elif found in _BEGUN:
            self._take(*_plain(data[:place]))
            self._input = found
            return False
        else:
            place = data.find(_END)
            if place < 0:
                # A line's end is never divided: what may belong to one stays until more has come.
                kept = next(length for length in _KEPT if data.endswith(_END[:length]))
                self._take(*_unstuffed(data[: len(data) - kept]))
                self._input = data[len(data) - kept :]
                return False
            self._take(*_unstuffed(data[: place + 2]))
        self._input = data[place + len(_END) :]
        self._end_message()
        return True

    def _take(self, text: bytes | None, size: int) -> None:
        """Take some of the message, as it is to be stored; ``None`` where CR or LF stood alone."""
        mail = self._mail
        if text is None:
            mail.bare = True
        elif mail.at_start and text:
            text = text[1:]
        if mail.at_start and size:
            # The line of DATA is no part of it.
            mail.at_start = False
            size -= 2
        mail.size += size
        if mail.refused:
            return
        if mail.bare or self._too_large:
            mail.refused = True
            self._emit(Abandon())
        elif text:
            self._emit(Chunk(text))

    @property
    def _too_large(self) -> bool:
        return self._limits.max_size is not None and self._mail.size > self._limits.max_size

    def _end_message(self) -> None:
        if self._mail.refused:
            reply = _TOO_LARGE if self._too_large else _BARE
            self._finish([reply.line()] * len(self._mail.recipients))
            return
        self._emit(Complete())
        self._state = _State.WAITING

    def _finish(self, lines: list[bytes]) -> None:
        """Answer for each RCPT that was accepted, in their order (RFC 2033, 4.2)."""
        self._output.extend(lines[place] for place in self._mail.places)
        self._state = _State.COMMANDS
        self._errors = self._idle_commands = 0
        self._reset()

    # -- saying ------------------------------------------------------------------------------------

    def _say(self, reply: Reply) -> None:
        self._output.append(reply.line())

    def _flush(self) -> None:
        if self._output:
            self._events.append(Send(b"".join(self._output)))
            self._output.clear()

    def _emit(self, event: Event) -> None:
        self._flush()
        self._events.append(event)

    def _err(self, reply: Reply) -> None:
        """Refuse what broke the rules."""
        self._say(reply)
        self._errors += 1
        if self._errors >= self._limits.max_errors:
            self._say(Reply(421, "4.7.0", "too many errors"))
            self._close()

    def _idle(self) -> None:
        """Count a command that did nothing for a message."""
        self._idle_commands += 1
        if self._idle_commands >= self._limits.max_idle_commands:
            self._say(Reply(421, "4.7.0", "too many commands without a message"))
            self._close()

    def _close(self) -> None:
        self._state = _State.CLOSED
        self._input = b""
        self._reset()
        self._emit(Close())

    # -- commands ----------------------------------------------------------------------------------

    def _command(self, line: bytes) -> None:
        try:
            text = line.decode("utf-8").rstrip(" ")
        except UnicodeDecodeError:
            self._err(_SYNTAX)
            return
        verb, _, argument = text.partition(" ")
        verb = verb.upper() if verb.isascii() else ""
        obey = self._commands.get(verb)
        if obey is not None:
            obey(argument)
        elif verb in _WEB:
            # Its next lines may be a page's, which hold commands for us.
            self._say(Reply(421, "4.7.0", "this is no web server"))
            self._close()
        else:
            self._err(_SYNTAX)

    def _reset(self) -> None:
        """Forget sender, recipients and message."""
        self._mail = _Mail()

    def _lhlo(self, argument: str) -> None:
        if not argument:
            self._err(_ARGUMENT)
            return
        self._greeted = True
        self._reset()
        lines = [
            self._hostname,
            "PIPELINING",
            f"SIZE {self._limits.max_size or 0}",
            "8BITMIME",
            "ENHANCEDSTATUSCODES",
            # Ours alone (RFC 5321, 2.2.2): by it `deliver` says that a message came by a pipe.
            "XWAY",
        ]
        text = "".join(f"250-{line}\r\n" for line in lines) + "250 SMTPUTF8\r\n"
        self._output.append(text.encode("ascii"))
        self._idle()

    def _helo(self, _argument: str) -> None:
        # RFC 2033, 4.1: HELO and EHLO must not succeed.
        self._err(Reply(500, "5.5.1", "this is LMTP: say LHLO"))

    def _take_sender(self, argument: str) -> None:
        if not self._greeted:
            self._err(_NO_GREETING)
            return
        if self._mail.sender is not None:
            self._err(Reply(503, "5.5.1", "there is a sender already"))
            return
        self._mail.disappointed = True
        path = _argument_of("FROM:", argument)
        if path is None:
            self._err(_ARGUMENT)
            return
        try:
            sender, rest = read_path(path)
        except PathError:
            self._err(Reply(501, "5.1.7", "this is no address of a sender"))
            return
        refusal = self._take_parameters(rest)
        if refusal is None and not self._mail.smtputf8 and not sender.isascii():
            refusal = _NO_UTF8
        if refusal is not None:
            self._reset()
            self._mail.disappointed = True
            self._err(refusal)
            return
        self._mail.disappointed = False
        self._mail.sender = sender
        self._output.append(_SENDER_OK)

    def _take_parameters(self, text: str) -> Reply | None:
        """Take the parameters of MAIL; return why they are refused, or ``None``."""
        try:
            parameters = read_parameters(text)
        except PathError:
            return _ARGUMENT
        for keyword, value in parameters.items():
            if keyword == "SIZE":
                if value is None or not _SIZE.fullmatch(value):
                    return _ARGUMENT
                self._mail.declared_size = int(value)
            elif keyword == "BODY":
                if value is None or value.upper() not in ("7BIT", "8BITMIME"):
                    return _ARGUMENT
            elif keyword == "SMTPUTF8":
                if value is not None:
                    return _ARGUMENT
                self._mail.smtputf8 = True
            elif keyword == "XWAY":
                if value is None or value.lower() != "pipe":
                    return _ARGUMENT
                self._mail.way = "pipe"
            else:
                return Reply(555, "5.5.4", "parameter not recognised")
        most = self._limits.max_size
        if most is not None and (self._mail.declared_size or 0) > most:
            return _TOO_LARGE
        return None

    def _rcpt(self, argument: str) -> None:
        if self._mail.sender is None:
            self._miss(Reply(503, "5.5.1", "there is no sender yet"))
            return
        path = _argument_of("TO:", argument)
        if path is None:
            self._refuse_recipient(_ARGUMENT)
            return
        try:
            recipient, rest = read_path(path)
        except PathError:
            recipient = rest = ""
        if not recipient:
            self._refuse_recipient(Reply(501, "5.1.3", "this is no address of a recipient"))
            return
        try:
            parameters = read_parameters(rest)
        except PathError:
            self._refuse_recipient(_ARGUMENT)
            return
        if parameters:
            self._refuse_recipient(Reply(555, "5.5.4", "parameter not recognised"))
        elif not self._mail.smtputf8 and not recipient.isascii():
            self._refuse_recipient(_NO_UTF8)
        else:
            self._take_recipient(self._mail.sender, recipient)

    def _refuse_recipient(self, reply: Reply) -> None:
        self._mail.disappointed = True
        self._err(reply)

    def _take_recipient(self, sender: str, recipient: str) -> None:
        octets = self._mail.octets + len(recipient.encode("utf-8"))
        most = self._limits.max_recipients
        if len(self._mail.places) >= most or octets > most * _PATH_OCTETS:
            refusal: Reply | None = _TOO_MANY_RECIPIENTS
        else:
            refusal = self._accept(sender, recipient)
        if refusal is not None:
            # No error of the client's: it could not know.
            self._mail.disappointed = True
            self._say(refusal)
            return
        self._mail.octets = octets
        self._mail.places.append(
            self._mail.recipients.setdefault(recipient, len(self._mail.recipients))
        )
        self._output.append(_RECIPIENT_OK)

    def _miss(self, reply: Reply) -> None:
        """Refuse a command that lacks what should have come before it."""
        if not self._mail.disappointed:
            self._err(reply)
            return
        self._say(reply)
        self._idle()

    def _data(self, argument: str) -> None:
        if argument:
            self._err(_ARGUMENT)
        elif self._mail.sender is None:
            self._miss(Reply(503, "5.5.1", "there is no sender yet"))
        elif not self._mail.places:
            # RFC 2033, 4.2: no message is asked for that has no recipient.
            self._miss(Reply(503, "5.5.1", "there is no recipient"))
        else:
            self._emit(
                Begin(
                    self._mail.sender,
                    tuple(self._mail.recipients),
                    self._mail.smtputf8,
                    self._mail.declared_size,
                    self._mail.way,
                )
            )
            self._output.append(_GO_AHEAD)
            self._state = _State.BODY

    def _rset(self, argument: str) -> None:
        if argument:
            self._err(_ARGUMENT)
            return
        self._reset()
        self._output.append(_OK)
        self._idle()

    def _noop(self, _argument: str) -> None:
        self._output.append(_OK)
        self._idle()

    def _vrfy(self, argument: str) -> None:
        if not argument:
            self._err(_ARGUMENT)
            return
        self._say(Reply(252, "2.0.0", "try to deliver to it"))
        self._idle()

    def _help(self, _argument: str) -> None:
        self._say(_HELP)
        self._idle()

    def _unoffered(self, _argument: str) -> None:
        self._err(Reply(502, "5.5.1", "command not offered"))

    def _quit(self, argument: str) -> None:
        if argument:
            self._err(_ARGUMENT)
            return
        self._say(Reply(221, "2.0.0", "goodbye"))
        self._close()


def _argument_of(word: str, argument: str) -> str | None:
    """Return what follows FROM: or TO:; spaces there are wrong, and harmless."""
    if argument[: len(word)].upper() != word:
        return None
    return argument[len(word) :].lstrip(" ")


def _plain(data: bytes) -> tuple[bytes | None, int]:
    """Return text and octets of what has an LF after every CR, and a dot after none of them."""
    text = data.replace(b"\r", b"")
    alone = text.count(b"\n") != len(data) - len(text)
    return None if alone else text, len(data)


def _unstuffed(data: bytes) -> tuple[bytes | None, int]:
    """Return text and octets of any bytes, without the dots of transparency."""
    text = data.replace(b"\r\n", b"\n")
    if b"\r" in text or text.count(b"\n") != len(data) - len(text):
        return None, len(data) - data.count(b"\r\n.")
    plain = text.replace(b"\n.", b"\n")
    return plain, len(data) - (len(text) - len(plain))
