"""The server's side of an LMTP session: bytes in, events out."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postoffice.intake.conversation import (
    Abandon,
    Begin,
    Chunk,
    Close,
    Complete,
    Conversation,
    Event,
    Limits,
    Reply,
    Send,
)
from postoffice.intake.paths import PathError, read_parameters, read_path

UNKNOWN = Reply(550, "5.1.1", "nobody here")
STORED = Reply(250, "2.6.0", "stored")
BARE = b"554 5.6.0 CR or LF stands alone in the message (RFC 5321, 2.3.8)\r\n"
TOO_LARGE = b"552 5.3.4 message is larger than the limit\r\n"


def accept(sender: str, recipient: str) -> Reply | None:
    """Take everybody but nobody."""
    return UNKNOWN if recipient.startswith("nobody@") else None


class Talk:
    """A conversation that answers each message as it ends, and all that came of it.

    :ivar said: what the client was sent.
    :ivar messages: envelope and bytes of each complete message.
    :ivar log: kinds of events, without those of bytes.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        answers: Callable[[Begin], Sequence[Reply]] | None = None,
    ) -> None:
        """Begin; without `answers` every recipient gets its message."""
        self.conversation = Conversation(limits or Limits(), "mail.example.com", accept)
        self.answers = answers or (lambda begin: [STORED] * len(begin.recipients))
        self.said = b""
        self.messages: list[tuple[Begin, bytes]] = []
        self.log: list[object] = []
        self._begin: Begin | None = None
        self._body = b""
        self.follow(self.conversation.greet())

    def follow(self, events: Iterable[Event]) -> None:
        """Do as the events say."""
        for event in events:
            match event:
                case Send(data):
                    self.said += data
                case Chunk(data):
                    assert data
                    assert self._begin is not None
                    self._body += data
                case Begin():
                    self._begin, self._body = event, b""
                    self.log.append(event)
                case Complete():
                    assert self._begin is not None
                    self.messages.append((self._begin, self._body))
                    self.log.append((event, self._body))
                    assert self.conversation.waiting
                    replies = self.answers(self._begin)
                    self._begin = None
                    self.follow(self.conversation.answer(replies))
                case Abandon() | Close():
                    self._begin = None
                    self.log.append(event)

    def __call__(self, data: bytes) -> bytes:
        """Send bytes; return what was said to that."""
        before = len(self.said)
        self.follow(self.conversation.receive(data))
        return self.said[before:]

    def codes(self, data: bytes) -> list[str]:
        """Send bytes; return code and enhanced code of each line that was said to that."""
        return [line[:9].decode().strip() for line in self(data).splitlines()]

    @property
    def closed(self) -> bool:
        """Whether the connection is to be closed."""
        return bool(self.log) and isinstance(self.log[-1], Close)


def greeted(limits: Limits | None = None) -> Talk:
    """Return a talk in which LHLO was said."""
    talk = Talk(limits)
    talk(b"LHLO client.example\r\n")
    return talk


def within_data(limits: Limits | None = None, recipients: int = 1) -> Talk:
    """Return a talk in which DATA was said."""
    talk = greeted(limits)
    rcpts = b"".join(b"RCPT TO:<r%d@example.com>\r\n" % number for number in range(recipients))
    assert talk(b"MAIL FROM:<s@example.org>\r\n" + rcpts + b"DATA\r\n").endswith(
        b"354 end with <CRLF>.<CRLF>\r\n"
    )
    return talk


def test_lhlo_announces_the_extensions() -> None:
    """LHLO is answered with the host's name and the five extensions, and the limit on size."""
    talk = Talk(Limits(max_size=1234))
    assert talk.said == b"220 mail.example.com LMTP\r\n"
    assert talk(b"lhlo client.example\r\n") == (
        b"250-mail.example.com\r\n250-PIPELINING\r\n250-SIZE 1234\r\n250-8BITMIME\r\n"
        b"250-ENHANCEDSTATUSCODES\r\n250-XWAY\r\n250 SMTPUTF8\r\n"
    )
    assert b"250-SIZE 0\r\n" in Talk()(b"LHLO x\r\n")


def test_a_pipelined_message() -> None:
    """Pipelined commands are all answered in order, and refused recipients have no part in it."""
    talk = greeted()
    said = talk.codes(
        b"MAIL FROM:<s@example.org> SIZE=42 BODY=8BITMIME SMTPUTF8\r\n"
        b"RCPT TO:<a@example.com>\r\nRCPT TO:<nobody@example.com>\r\n"
        b"RCPT TO:<b@example.com>\r\nDATA\r\n"
    )
    assert said == ["250 2.1.0", "250 2.1.5", "550 5.1.1", "250 2.1.5", "354 end w"]
    assert talk.codes(b"Subject: hi\r\n\r\nbody\r\n.\r\nQUIT\r\n") == [
        *("250 2.6.0", "250 2.6.0", "221 2.0.0")
    ]
    begin = Begin("s@example.org", ("a@example.com", "b@example.com"), True, 42)
    assert talk.messages == [(begin, b"Subject: hi\n\nbody\n")]
    assert talk.closed


def test_each_recipient_has_its_reply() -> None:
    """Replies come in the order of the accepted RCPTs, also for a recipient that came twice."""
    replies = {
        "a@example.com": Reply(250, "2.0.0", "a"),
        "b@example.com": Reply(451, "4.3.0", "b"),
    }
    talk = Talk(answers=lambda begin: [replies[recipient] for recipient in begin.recipients])
    talk(
        b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.com>\r\nRCPT TO:<a@example.com>\r\n"
        b"RCPT TO:<b@example.com>\r\nDATA\r\n"
    )
    assert talk(b".\r\n") == b"451 4.3.0 b\r\n250 2.0.0 a\r\n451 4.3.0 b\r\n"
    assert talk.messages == [(Begin("", ("b@example.com", "a@example.com"), False, None), b"")]


def test_answers_must_fit() -> None:
    """An answer with too few replies, or for no message, is an error of the caller's."""
    conversation = Conversation(Limits(), "host", accept)
    with pytest.raises(ValueError, match="one reply for each"):
        conversation.answer([])
    conversation.receive(
        b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n.\r\n"
    )
    with pytest.raises(ValueError, match="one reply for each"):
        conversation.answer([STORED])


def test_a_message_is_being_sent_from_its_sender_on() -> None:
    """A message is being sent from MAIL on until its end, or until it is given up."""
    conversation = Conversation(Limits(), "host", accept)
    said = []
    for line in (
        *(b"LHLO x", b"MAIL FROM:<>", b"RSET", b"MAIL FROM:<>", b"RCPT TO:<a@b>", b"DATA"),
        *(b"Subject: one", b"."),
    ):
        conversation.receive(line + b"\r\n")
        said.append(conversation.sending)
    assert said == [False, True, False, True, True, True, True, False]
    conversation.answer([STORED])
    assert not conversation.sending


def test_what_comes_meanwhile_waits() -> None:
    """Between a message and its answer nothing is said, and what has come is taken up then."""
    conversation = Conversation(Limits(), "host", accept)
    conversation.receive(b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@b>\r\nDATA\r\n")
    assert conversation.within_message
    assert not conversation.waiting
    assert conversation.receive(b"x\r\n.\r\nNOOP\r\n") == [Chunk(b"x\n"), Complete()]
    assert conversation.waiting
    assert conversation.receive(b"QUIT\r\n") == []
    assert conversation.answer([STORED]) == [
        Send(b"250 2.6.0 stored\r\n250 2.0.0 OK\r\n221 2.0.0 goodbye\r\n"),
        Close(),
    ]
    assert not conversation.within_message
    assert conversation.receive(b"NOOP\r\n") == []


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"HELO x", "500 5.5.1"),
        (b"EHLO x", "500 5.5.1"),
        (b"LHLO", "501 5.5.4"),
        (b"NOOP", "250 2.0.0"),
        (b"NOOP \xc3\xa4", "250 2.0.0"),
        (b"RSET", "250 2.0.0"),
        (b"RSET now", "501 5.5.4"),
        (b"VRFY", "501 5.5.4"),
        (b"VRFY somebody", "252 2.0.0"),
        (b"HELP", "214 2.0.0"),
        (b"EXPN list", "502 5.5.1"),
        (b"QUIT now", "501 5.5.4"),
        (b"quit ", "221 2.0.0"),
        (b"DATA", "503 5.5.1"),
        (b"DATA now", "501 5.5.4"),
        (b"RCPT TO:<a@b>", "503 5.5.1"),
        (b"STARTTLS", "500 5.5.2"),
        (b"", "500 5.5.2"),
        (b" NOOP", "500 5.5.2"),
        (b"NOOP\n", "500 5.5.2"),
        (b"NO\xffOP", "500 5.5.2"),
        ("R\u017fET".encode(), "500 5.5.2"),
        (b"MAIL FROM <a@b>", "501 5.5.4"),
        (b"MAIL TO:<a@b>", "501 5.5.4"),
        (b"MAIL FROM:a@b", "501 5.1.7"),
        (b"MAIL FROM:<a>", "501 5.1.7"),
        (b"MAIL FROM:<a\rb@c>", "501 5.1.7"),
        (b"MAIL FROM:<a\x00b@c>", "501 5.1.7"),
        (b"MAIL FROM:<a\x1bb@c>", "501 5.1.7"),
        (b"MAIL FROM:<a@b>x", "501 5.5.4"),
        (b"MAIL FROM:<a@b> =", "501 5.5.4"),
        (b"MAIL FROM:<a@b> SIZE", "501 5.5.4"),
        (b"MAIL FROM:<a@b> SIZE=-1", "501 5.5.4"),
        (b"MAIL FROM:<a@b> SIZE=" + b"9" * 21, "501 5.5.4"),
        (b"MAIL FROM:<a@b> SIZE=1 SIZE=1", "501 5.5.4"),
        (b"MAIL FROM:<a@b> BODY=BINARYMIME", "501 5.5.4"),
        (b"MAIL FROM:<a@b> SMTPUTF8=yes", "501 5.5.4"),
        (b"MAIL FROM:<a@b> XWAY=pipe", "250 2.1.0"),
        (b"MAIL FROM:<a@b> XWAY=maildir", "501 5.5.4"),
        (b"MAIL FROM:<a@b> XWAY", "501 5.5.4"),
        (b"MAIL FROM:<a@b> RET=HDRS", "555 5.5.4"),
        (b"MAIL FROM:<a@b> SIZE=1001", "552 5.3.4"),
        (b"MAIL FROM:<a@b>  size=1000 body=7bit ", "250 2.1.0"),
        (b"mail from: <a@b>", "250 2.1.0"),
        ("MAIL FROM:<ä@b>".encode(), "553 5.6.7"),
        ("MAIL FROM:<ä@b> SMTPUTF8".encode(), "250 2.1.0"),
        ("MAIL FROM:<ä@b> SMTPUTF8".encode("latin-1"), "500 5.5.2"),
        ("MAIL FROM:<a\u2028b@c> SMTPUTF8".encode(), "501 5.1.7"),
        ("MAIL FROM:<a\x85b@c> SMTPUTF8".encode(), "501 5.1.7"),
    ],
)
def test_one_command(sent: bytes, code: str) -> None:
    """Each command by itself, after LHLO, has the reply that the standards give it."""
    talk = greeted(Limits(max_size=1000))
    assert talk.codes(sent + b"\r\n") == [code]


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"RCPT TO:<a@b>", "250 2.1.5"),
        (b"rcpt to:<Postmaster>", "250 2.1.5"),
        (b"RCPT TO:<nobody@b>", "550 5.1.1"),
        (b"RCPT TO:<>", "501 5.1.3"),
        (b"RCPT TO:<a>", "501 5.1.3"),
        (b"RCPT TO:a@b", "501 5.1.3"),
        (b"RCPT FROM:<a@b>", "501 5.5.4"),
        (b"RCPT TO:<a@b>>", "501 5.5.4"),
        (b"RCPT TO:<a@b> NOTIFY=NEVER", "555 5.5.4"),
        ("RCPT TO:<a@ä>".encode(), "553 5.6.7"),
        (b"MAIL FROM:<a@b>", "503 5.5.1"),
        (b"DATA", "503 5.5.1"),
    ],
)
def test_one_command_after_mail(sent: bytes, code: str) -> None:
    """Each command by itself, after MAIL, has the reply that the standards give it."""
    talk = greeted()
    talk(b"MAIL FROM:<s@example.org>\r\n")
    assert talk.codes(sent + b"\r\n") == [code]


def test_mail_needs_lhlo() -> None:
    """MAIL before LHLO is refused."""
    assert Talk().codes(b"MAIL FROM:<a@b>\r\nRCPT TO:<a@b>\r\n") == ["503 5.5.1"] * 2


@pytest.mark.parametrize("command", [b"RSET\r\n", b"LHLO again\r\n"])
def test_rset_and_lhlo_forget_the_transaction(command: bytes) -> None:
    """After RSET and after another LHLO there is neither sender nor recipient."""
    talk = greeted()
    talk(b"MAIL FROM:<s@example.org> SMTPUTF8\r\nRCPT TO:<a@b>\r\n")
    talk(command)
    assert talk.codes(b"DATA\r\nMAIL FROM:<>\r\nDATA\r\n") == [
        *("503 5.5.1", "250 2.1.0", "503 5.5.1")
    ]
    assert talk.codes("RCPT TO:<ä@b>\r\n".encode()) == ["553 5.6.7"]


def test_a_second_message_begins_anew() -> None:
    """After a message's answer the next one has a sender and recipients of its own."""
    talk = within_data()
    talk(b".\r\n")
    assert talk.codes(b"RCPT TO:<a@b>\r\nMAIL FROM:<t@example.org>\r\nDATA\r\n") == [
        *("503 5.5.1", "250 2.1.0", "503 5.5.1")
    ]


def test_no_recipient_no_data() -> None:
    """Where every recipient is refused, DATA is refused and no message begins."""
    talk = greeted()
    said = talk.codes(b"MAIL FROM:<s@example.org>\r\nRCPT TO:<nobody@b>\r\nDATA\r\n")
    assert said == ["250 2.1.0", "550 5.1.1", "503 5.5.1"]
    assert talk.log == []


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("<>", ""),
        ("<a@b>", "a@b"),
        ("<a.b+c=d/e@ex-ample.com>", "a.b+c=d/e@ex-ample.com"),
        ("<a@under_score.example>", "a@under_score.example"),
        ("<a@[192.0.2.1]>", "a@[192.0.2.1]"),
        ("<a@[IPv6:2001:db8::1]>", "a@[IPv6:2001:db8::1]"),
        ("<@one.example,@two.example:a@b>", "a@b"),
        ('<@one.example:"a b"@b>', '"a b"@b'),
        ('<"a.b"@c>', "a.b@c"),
        (r'<"a\.b"@c>', "a.b@c"),
        (r'<"a\"b\\"@c>', r'"a\"b\\"@c'),
        ('<"a@b>c"@d>', '"a@b>c"@d'),
        ('<""@b>', '""@b'),
        ('<"a..b"@c>', '"a..b"@c'),
        ("<postMASTER>", "postMASTER"),
        ("<jürgen@exämple.de>", "jürgen@exämple.de"),
        ('<"jür gen"@exämple.de>', '"jür gen"@exämple.de'),
    ],
)
def test_paths(path: str, address: str) -> None:
    """A path is read as RFC 5321 (4.1.2) has it, and what follows it is left."""
    assert read_path(path) == (address, "")
    assert read_path(path + " SIZE=1 X=>") == (address, " SIZE=1 X=>")


@pytest.mark.parametrize(
    "path",
    [
        *("", "<", "a@b", "<a@b", "< a@b>", "<a@b >", "<a b@c>", "<a>", "<@b>", "<a@>", "<a@b@c>"),
        *("<.a@b>", "<a.@b>", "<a..b@c>", "<a@b.>", "<a@.b>", "<a@b..c>", "<a@[]>", "<a@[1]2>"),
        *(
            '<"a@b>',
            '<"a"b@c>',
            '<a"b"@c>',
            '<"a\\"@b>',
            "<a(b)@c>",
            "<@a:>",
            "<@a b@c>",
            "<a,b@c>",
        ),
        *("<a@b\x00>", "<a\x7f@b>", '<"a\tb"@c>', '<"a\x9bb"@c>', "<a\u2029@b>", "<a@[\u00e4]>"),
    ],
)
def test_no_paths(path: str) -> None:
    """What is no path by the grammar is refused."""
    with pytest.raises(PathError):
        read_path(path)


def test_parameters() -> None:
    """Parameters have their keyword in upper case, and a value or none."""
    assert read_parameters("") == {}
    assert read_parameters(" size=10  SMTPUTF8 ") == {"SIZE": "10", "SMTPUTF8": None}
    for text in ("x", " =1", " A=", " A=b=c", " A A", " -A", " A=\x00", " \x0bA"):
        with pytest.raises(PathError):
            read_parameters(text)


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        (b".\r\n", b""),
        (b"\r\n.\r\n", b"\n"),
        (b"a\r\n.\r\n", b"a\n"),
        (b"..\r\n.\r\n", b".\n"),
        (b"..a\r\n...b\r\n.c\r\n.\r\n", b".a\n..b\nc\n"),
        (b"a.\r\n .\r\n.\r\n", b"a.\n .\n"),
        (b"\x00\xff\x1a\r\n.\r\n", b"\x00\xff\x1a\n"),
        (b"\r\n\r\n\r\n.\r\n", b"\n\n\n"),
        (b"x" * 5000 + b"\r\n.\r\n", b"x" * 5000 + b"\n"),
    ],
)
def test_bodies(sent: bytes, stored: bytes) -> None:
    """Lines are stored ended by LF and without the dots of transparency, NULs as they are."""
    whole, bytewise = within_data(), within_data()
    assert whole.codes(sent) == ["250 2.6.0"]
    for number in range(len(sent)):
        bytewise(sent[number : number + 1])
    assert [body for _, body in whole.messages + bytewise.messages] == [stored, stored]
    assert whole.said == bytewise.said


@pytest.mark.parametrize(
    "smuggled",
    [
        *(b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\r\r\n.\r\r\n"),
        *(b"\n.\r", b"\r.\n", b"\r\n.\r\r\n", b"\n\r.\r\n", b"\r\n\x00.\r\n", b"\r\n.\x00\r\n"),
    ],
)
def test_only_one_sequence_ends_a_message(smuggled: bytes) -> None:
    """No sequence but CRLF.CRLF ends a message, so that no second one hides in the first."""
    hidden = b"MAIL FROM:<evil@example.org>\r\nRCPT TO:<a@b>\r\nDATA\r\nevil"
    talk = within_data()
    said = talk(b"first" + smuggled + hidden + b"\r\n.\r\nNOOP\r\n")
    alone = b"\x00" not in smuggled
    assert said == (BARE if alone else b"250 2.6.0 stored\r\n") + b"250 2.0.0 OK\r\n"
    assert len(talk.messages) == (0 if alone else 1)


@pytest.mark.parametrize("alone", [b"\r", b"\n"])
@pytest.mark.parametrize("place", [b"%sx\r\n", b"a%sb\r\n", b"a\r\n%s", b"a%s\r\n", b"a\r\n.%sb"])
def test_cr_and_lf_alone_are_refused(alone: bytes, place: bytes) -> None:
    """A CR or LF that stands alone makes the message refused, for each recipient, at its end."""
    talk = within_data(recipients=2)
    sent = place % alone
    assert talk(sent) == b""
    assert talk(b"\r\n.\r\nNOOP\r\n") == 2 * BARE + b"250 2.0.0 OK\r\n"
    assert [type(event) for event in talk.log] == [Begin, Abandon]


def test_a_message_of_just_the_limit() -> None:
    """The limit counts lines with their CRLF and dots without transparency; more is refused."""
    body = b"..2\r\n" + b"x" * 4 + b"\r\n"
    assert within_data(Limits(max_size=10)).codes(body + b".\r\n") == ["250 2.6.0"]
    talk = within_data(Limits(max_size=9), recipients=2)
    assert talk(body + b".\r\nNOOP\r\n") == 2 * TOO_LARGE + b"250 2.0.0 OK\r\n"
    assert [type(event) for event in talk.log] == [Begin, Abandon]


def test_an_oversize_message_is_read_to_its_end_and_not_kept() -> None:
    """Of a message beyond the limit nothing is kept, and its end is found."""
    talk = within_data(Limits(max_size=100_000))
    piece = b"x" * 998 + b"\r\n"
    assert [talk.conversation.receive(piece) for _ in range(101)][-1] == [Abandon()]
    tracemalloc.start()
    try:
        for _ in range(20_000):
            assert talk.conversation.receive(piece) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000
    assert talk(b"\r\n.\r\n") == TOO_LARGE


def test_an_endless_line_is_thrown_away() -> None:
    """A command line beyond the limit takes no memory, and gets one 500 at its end."""
    talk = greeted()
    tracemalloc.start()
    try:
        for _ in range(10_000):
            assert talk.conversation.receive(b"MAIL FROM:<" + b"x" * 1000) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000
    assert talk.codes(b"\r\nNOOP\r\n") == ["500 5.5.2", "250 2.0.0"]


def test_the_longest_line() -> None:
    """A command line of 2048 octets with its CRLF is obeyed, of one more it is refused."""
    for length, code in ((2048, "250 2.0.0"), (2049, "500 5.5.2")):
        line = b"NOOP " + b"x" * (length - 7) + b"\r\n"
        assert greeted().codes(line) == [code]
        bytewise = greeted()
        said = [bytewise(line[number : number + 1]) for number in range(length)]
        assert b"".join(said)[:9].decode() == code


def test_too_many_recipients() -> None:
    """Recipients beyond the limit are deferred, and the others get their message."""
    talk = greeted()
    rcpts = b"".join(b"RCPT TO:<r%d@b>\r\n" % number for number in range(1003))
    codes = talk.codes(b"MAIL FROM:<>\r\n" + rcpts + b"DATA\r\n")
    assert codes[1:1004] == ["250 2.1.5"] * 1000 + ["452 4.5.3"] * 3
    assert talk.codes(b".\r\n") == ["250 2.6.0"] * 1000


def test_recipients_of_too_many_octets() -> None:
    """Recipients that are long as well as many are deferred before they fill the memory."""
    talk = greeted(Limits(max_recipients=4))
    rcpt = b"RCPT TO:<%s@b>\r\n" % (b"x" * 600)
    talk(b"MAIL FROM:<>\r\n")
    assert talk.codes(rcpt * 2) == ["250 2.1.5", "452 4.5.3"]


def test_too_many_errors_end_the_session() -> None:
    """With the hundredth error the session is over, and what follows it is not read."""
    talk = greeted()
    codes = talk.codes(b"WHAT\r\n" * 99 + b"NOOP\r\nWHAT\r\nQUIT\r\n")
    assert codes == ["500 5.5.2"] * 99 + ["250 2.0.0", "500 5.5.2", "421 4.7.0"]
    assert talk.closed
    assert talk(b"NOOP\r\n") == b""


def test_too_many_commands_without_a_message_end_the_session() -> None:
    """A thousand commands that do nothing for a message are the last; a message counts anew."""
    talk = greeted()
    assert talk.codes(b"NOOP\r\n" * 900) == ["250 2.0.0"] * 900
    talk(b"MAIL FROM:<>\r\nRCPT TO:<a@b>\r\nDATA\r\n.\r\n")
    codes = talk.codes(b"NOOP\r\n" * 2000)
    assert codes == ["250 2.0.0"] * 1000 + ["421 4.7.0"]
    assert talk.closed


def test_what_follows_from_a_refusal_is_no_error() -> None:
    """Recipients pipelined behind a refused MAIL, and unknown ones, do not end the session."""
    talk = greeted(Limits(max_size=10))
    for _ in range(3):
        talk(b"MAIL FROM:<a@b> SIZE=11\r\n" + b"RCPT TO:<a@b>\r\n" * 60 + b"DATA\r\n")
    for _ in range(3):
        talk(b"RSET\r\nMAIL FROM:<a@b>\r\n" + b"RCPT TO:<nobody@b>\r\n" * 60 + b"DATA\r\n")
    assert talk.codes(b"NOOP\r\n") == ["250 2.0.0"]


def test_a_browser_is_sent_away() -> None:
    """A web page that has a browser talk to the port gets no command obeyed."""
    talk = Talk()
    said = talk(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nLHLO x\r\n")
    assert said == b"421 4.7.0 this is no web server\r\n"
    assert talk.closed


def test_end_breaks_off() -> None:
    """A session can be broken off with a reply, once; a message within is gone."""
    talk = within_data()
    talk(b"some of it")
    timeout = Reply(421, "4.4.2", "timeout")
    assert talk.conversation.end(timeout) == [Send(b"421 4.4.2 timeout\r\n"), Close()]
    assert talk.conversation.end(timeout) == []
    assert talk.conversation.receive(b"\r\n.\r\n") == []
    assert not talk.conversation.within_message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two\r\n250 lines", b"550 5.7.1 two\\r\\n250 lines\r\n"),
        ("\x1b[31m ä \u202e", b"550 5.7.1 \\x1b[31m \\xe4 \\u202e\r\n"),
        ("x" * 1000, b"550 5.7.1 " + b"x" * 400 + b"\r\n"),
    ],
)
def test_replies_are_one_line_of_ascii(text: str, line: bytes) -> None:
    """Whatever a reply says is sent as one printable line that is not too long."""
    assert Reply(550, "5.7.1", text).line() == line


ATOMS = [
    *(b"\r", b"\n", b"\r\n", b".", b"..", b"\r\n.\r\n", b"\r\n..", b"\x00", b"\xff", b"a", b" "),
    *(b"LHLO x\r\n", b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<a@b>\r\n", b"RCPT TO:<c@d>\r\n"),
    *(b"DATA\r\n", b"RSET\r\n", b"NOOP\r\n", b"QUIT\r\n", b"RCPT TO:<nobody@b>\r\n", b"x" * 700),
    b"LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n",
    b"MAIL FROM:<\xc3\xa4@b> SMTPUTF8 SIZE=11\r\n",
]
STREAMS = st.lists(st.sampled_from(ATOMS) | st.binary(max_size=8), max_size=40).map(b"".join)
LIMITS = Limits(max_size=2000, max_recipients=3, max_errors=5, max_idle_commands=20)


def check(talk: Talk) -> None:
    """Assert what holds whatever was sent."""
    lines = talk.said.split(b"\r\n")
    assert lines.pop() == b""
    for line in lines:
        assert len(line) <= 510
        assert line.isascii()
        assert line[:3].isdigit()
    for before, after in pairwise([*talk.log, None]):
        assert not isinstance(before, Close) or after is None
    held: bytes = talk.conversation._input
    assert len(held) <= 2048
    for _, body in talk.messages:
        assert len(body) <= 2000
        assert b"\r" not in body


@given(STREAMS, st.lists(st.integers(1, 40), min_size=1))
def test_division_does_not_matter(stream: bytes, lengths: list[int]) -> None:
    """However the same bytes are divided, the client hears and the messages are the same."""
    whole, divided = Talk(LIMITS), Talk(LIMITS)
    whole(stream)
    at = 0
    while at < len(stream):
        for length in lengths:
            divided(stream[at : at + length])
            at += length
    assert divided.said == whole.said
    assert divided.messages == whole.messages
    assert divided.log == whole.log
    check(whole)
    check(divided)


@given(st.lists(st.binary(max_size=300)))
def test_garbage_does_no_harm(pieces: list[bytes]) -> None:
    """No bytes raise, and nothing grows with them."""
    talk = Talk(LIMITS)
    for piece in pieces:
        talk(piece)
        check(talk)


@given(st.lists(st.binary().map(lambda line: line.replace(b"\r", b"").replace(b"\n", b""))))
def test_what_was_sent_is_stored(lines: list[bytes]) -> None:
    """Any lines of any bytes arrive as they were, whatever dots they begin with."""
    talk = within_data()
    sent = b"".join((b"." if line.startswith(b".") else b"") + line + b"\r\n" for line in lines)
    assert talk.codes(sent + b".\r\n") == ["250 2.6.0"]
    assert talk.messages[0][1] == b"".join(line + b"\n" for line in lines)


@given(st.text())
def test_any_text_is_a_path_or_none(text: str) -> None:
    """Whatever stands where a path should, the address is one line and its parts are there."""
    for candidate in (text, f"<{text}>", f"<{text}@b>", f'<"{text}"@b>'):
        try:
            address, _ = read_path(candidate)
        except PathError:
            continue
        assert address == "" or "@" in address or address.lower() == "postmaster"
        assert len(address.splitlines()) <= 1
        if "@" in address:
            assert read_path(f"<{address}>") == (address, "")
