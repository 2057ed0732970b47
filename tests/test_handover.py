"""The hand-over client: what it sends, how it understands replies, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postoffice.intake import conversation, handover
from tests.scripted_lmtp import CLOSE, SILENCE, ScriptedListener

FOLDER = Path(handover.__file__).parent
# How the launcher starts it.
START = "import sys; sys.path.append(sys.argv.pop(1)); import handover; handover.main()"
MAIL = b"From: a@x.example\nTo: b@y.example\n\nHello.\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return where the listener's socket is to be; a socket's path must be short."""
    return tmp_path / "lmtp"


def command(
    place: Path, sender: str = "a@x.example", recipients: Sequence[str] = ("b@y.example",)
) -> list[str]:
    """Return the words of the client's command."""
    words = [sys.executable, "-I", "-S", "-c", START, str(FOLDER), str(place), "20"]
    return [*words, "-f", sender, "--", *recipients]


def run(
    place: Path,
    sender: str = "a@x.example",
    recipients: Sequence[str] = ("b@y.example",),
    raw: bytes = MAIL,
) -> tuple[int, str]:
    """Run the client; return its status and the one line that it printed."""
    done = subprocess.run(
        command(place, sender, recipients), input=raw, capture_output=True, check=False
    )
    assert done.stderr == b""
    assert done.stdout.count(b"\n") == 1
    return done.returncode, done.stdout.decode("ascii").rstrip("\n")


def reader(raw: bytes, size: int) -> Callable[[int], bytes]:
    """Return a function that reads this message in pieces of one size."""
    places = iter(range(0, len(raw), size))
    return lambda most: raw[(at := next(places, len(raw))) : at + size]


# -- what is sent ----------------------------------------------------------------------------------


def test_delivers(place: Path) -> None:
    """A message is sent in one session, its status is 0, and the listener's words are printed."""
    with ScriptedListener(place) as listener:
        assert run(place) == (0, "2.6.0 stored")
    session = listener.session
    assert session.commands[:4] == [
        "LHLO localhost",
        "MAIL FROM:<a@x.example> BODY=8BITMIME",
        "RCPT TO:<b@y.example>",
        "DATA",
    ]
    assert session.complete
    assert bytes(session.message) == MAIL.replace(b"\n", b"\r\n")


def test_pipelines(place: Path) -> None:
    """Where the listener offers it, all commands up to DATA are on their way at once."""
    with ScriptedListener(place) as listener:
        assert run(place, recipients=["b@y.example", "c@y.example"])[0] == 0
    assert [line.split(" ")[0] for line in listener.session.ahead] == ["MAIL", "RCPT", "RCPT"]


def test_waits_without_pipelining(place: Path) -> None:
    """Where the listener does not offer it, no command is sent before the last one's reply."""
    with ScriptedListener(place, {"LHLO": "250-here\r\n250 8BITMIME"}) as listener:
        assert run(place, recipients=["b@y.example", "c@y.example"])[0] == 0
    assert listener.session.ahead == []


def test_offers_nothing_that_was_not_offered(place: Path) -> None:
    """A listener without any extension gets the plain commands."""
    with ScriptedListener(place, {"LHLO": "250 here"}) as listener:
        assert run(place)[0] == 0
    assert listener.session.commands[1] == "MAIL FROM:<a@x.example>"


def test_hundreds_of_recipients(place: Path) -> None:
    """Each of many recipients has its own command, and each reply counts."""
    recipients = [f"r{number}@y.example" for number in range(450)]
    with ScriptedListener(place, fates=["250 2.6.0 stored"] * 449 + ["451 4.3.0 no"]) as listener:
        assert run(place, recipients=recipients) == (75, "4.3.0 no")
    assert sum(line.startswith("RCPT") for line in listener.session.commands) == 450


def test_recipient_named_twice(place: Path) -> None:
    """A recipient that stands twice on the command line is sent once."""
    with ScriptedListener(place) as listener:
        assert run(place, recipients=["b@y.example"] * 3)[0] == 0
    assert sum(line.startswith("RCPT") for line in listener.session.commands) == 1


@pytest.mark.parametrize("sender", ["", "<>", "MAILER-DAEMON", "mailer-daemon"])
def test_null_sender(place: Path, sender: str) -> None:
    """The null sender is known in each form that Postfix may give it."""
    with ScriptedListener(place) as listener:
        assert run(place, sender)[0] == 0
    assert listener.session.commands[1] == "MAIL FROM:<> BODY=8BITMIME"


def test_daemon_with_a_domain_is_an_address(place: Path) -> None:
    """MAILER-DAEMON with a domain is a sender like any other."""
    with ScriptedListener(place) as listener:
        assert run(place, "MAILER-DAEMON@x.example")[0] == 0
    assert listener.session.commands[1].startswith("MAIL FROM:<MAILER-DAEMON@x.example>")


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "en_US.ISO-8859-1"])
def test_utf8(place: Path, locale: str) -> None:
    """Addresses beyond ASCII go out in UTF-8 with SMTPUTF8, whatever the locale."""
    with ScriptedListener(place) as listener:
        done = subprocess.run(
            command(place, "jörg@x.example", ["ü@bücher.example"]),
            input=MAIL,
            capture_output=True,
            check=False,
            env={"LC_ALL": locale},
        )
        assert (done.returncode, done.stdout) == (0, b"2.6.0 stored\n")
    assert listener.session.commands[1:3] == [
        "MAIL FROM:<jörg@x.example> BODY=8BITMIME SMTPUTF8",
        "RCPT TO:<ü@bücher.example>",
    ]


def test_utf8_needs_the_extension(place: Path) -> None:
    """Where the listener lacks SMTPUTF8, an address beyond ASCII defers the message."""
    with ScriptedListener(place, {"LHLO": "250-here\r\n250 PIPELINING"}):
        status, line = run(place, recipients=["ü@y.example"])
    assert (status, line) == (75, "4.3.5 the listener does not offer SMTPUTF8")


EDGE = handover._PIECE


@pytest.mark.parametrize(
    ("raw", "sent"),
    [
        (b".\n", b"..\r\n"),
        (b"a\n.b\n..c\n.\n", b"a\r\n..b\r\n...c\r\n..\r\n"),
        (b"a: b\n\nno end", b"a: b\r\n\r\nno end\r\n"),
        (b"a: b\r\n\r\n.c\r\n", b"a: b\r\n\r\n..c\r\n"),
        (b"a: \xff\x00\xc3\xbc\n\n\n", b"a: \xff\x00\xc3\xbc\r\n\r\n\r\n"),
        (b"x" * (EDGE - 1) + b"\n.y\n", b"x" * (EDGE - 1) + b"\r\n..y\r\n"),
        (b"x" * EDGE + b".y\n", b"x" * EDGE + b".y\r\n"),
        (b"x" * (EDGE - 1) + b"\r\n.y\r\n", b"x" * (EDGE - 1) + b"\r\n..y\r\n"),
        (b"x" * (EDGE - 2) + b"\n.\ny", b"x" * (EDGE - 2) + b"\r\n..\r\ny\r\n"),
    ],
)
def test_lines_and_dots(tmp_path: Path, place: Path, raw: bytes, sent: bytes) -> None:
    """Lines are sent with CRLF and doubled dots, wherever the pieces that were read end."""
    path = tmp_path / "mail"
    path.write_bytes(raw)
    # From a file, each piece is as long as it may be.
    with ScriptedListener(place) as listener, path.open("rb") as file:
        done = subprocess.run(command(place), stdin=file, capture_output=True, check=False)
    assert done.returncode == 0
    assert bytes(listener.session.message) == sent


@given(
    st.lists(st.sampled_from([b"\r\n", b"\n", b".", b"\r", b"x"]), min_size=1), st.integers(1, 5)
)
def test_lines_of_any_pieces(parts: list[bytes], size: int) -> None:
    """However a message is read, CRLF becomes LF, the last line ends, and a lone CR is found."""
    raw = b"".join(parts)
    lines = handover.Lines(reader(raw, size))
    found = b"".join(lines)
    expected = raw.replace(b"\r\n", b"\n")
    if b"\r" in expected:
        assert lines.bare
        assert expected.startswith(found)
    else:
        assert not lines.bare
        assert found == expected + (b"" if expected.endswith(b"\n") else b"\n")


@pytest.mark.parametrize("raw", [b"a: b\n\nc\rd\n", b"a: b\n\nc\r", b"a: b\n\n\r\r\n"])
def test_lone_cr(place: Path, raw: bytes) -> None:
    """A CR that ends no line rejects the message, which is never completed."""
    with ScriptedListener(place) as listener:
        status, line = run(place, raw=raw)
    assert (status, line) == (65, "5.6.0 CR stands alone in the message (RFC 5321, 2.3.8)")
    assert not listener.session.complete


def test_no_message(place: Path) -> None:
    """Standard input that ends at once is nobody's message: it is deferred, and nothing is sent."""
    with ScriptedListener(place) as listener:
        status, line = run(place, raw=b"")
    assert (status, line) == (75, "4.6.0 there is no message on standard input")
    assert not listener.session.complete


def test_large_message_in_little_memory(place: Path, tmp_path: Path) -> None:
    """A message of 20 MB is streamed: the client stays as small as it is for any other."""
    raw = b"Subject: large\n\n" + (b"." + b"x" * 75 + b"\n") * 260_000
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(raw)
    small.write_bytes(MAIL)
    memory = []
    for path in (small, large):
        with ScriptedListener(place) as listener, path.open("rb") as file:
            process = subprocess.Popen(command(place), stdin=file, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        place.unlink()
        assert process.returncode == 0
        memory.append(usage.ru_maxrss)
    assert bytes(listener.session.message) == raw.replace(b"\n", b"\r\n").replace(b"\n.", b"\n..")
    assert memory[1] < memory[0] + 2000


# -- replies and statuses --------------------------------------------------------------------------

STORED = (250, "2.6.0", "stored")
UNKNOWN = (550, "5.1.1", "unknown")
FULL = (452, "4.3.1", "full")


@pytest.mark.parametrize(
    ("replies", "status", "line"),
    [
        ([STORED], 0, "2.6.0 stored"),
        ([STORED, STORED], 0, "2.6.0 stored"),
        ([FULL], 75, "4.3.1 full"),
        ([STORED, FULL], 75, "4.3.1 full"),
        ([UNKNOWN, FULL], 75, "4.3.1 full"),
        ([UNKNOWN], 67, "5.1.1 unknown"),
        ([STORED, UNKNOWN], 67, "5.1.1 unknown"),
        ([UNKNOWN, (554, "5.7.1", "no")], 69, "5.1.1 unknown"),
        ([(554, "5.7.1", "no")], 69, "5.7.1 no"),
        ([(552, "5.3.4", "too large")], 69, "5.3.4 too large"),
        ([(554, "5.6.0", "bare")], 65, "5.6.0 bare"),
        # Two programs that do not understand each other are no fault of the mail.
        ([(503, "5.5.1", "what?")], 75, "4.5.1 what?"),
        ([(354, "3.0.0", "go on")], 75, "4.0.0 go on"),
        ([], 75, "4.3.0 there is no reply"),
    ],
)
def test_verdict(replies: list[handover.Reply], status: int, line: str) -> None:
    """One temporary reply defers all; else a permanent one rejects; only then it is delivered."""
    assert handover.verdict(replies) == (status, line)


def test_verdict_of_the_listener_s_own_replies() -> None:
    """The replies of the protocol machine are understood as they are."""
    assert handover.verdict([conversation.Reply(550, "5.1.1", "nobody")]) == (67, "5.1.1 nobody")


@given(st.text(), st.sampled_from(["4.3.0", "5.1.1", "2.0.0"]), st.integers(200, 599))
def test_line_agrees_with_status(text: str, enhanced: str, code: int) -> None:
    """The line is short, printable ASCII, and of the class of the exit status."""
    status, line = handover.verdict([(code, enhanced, text)])
    assert line.isascii()
    assert line.isprintable()
    assert len(line) <= 400
    assert line[:2] == {0: "2.", 75: "4."}.get(status, "5.")


@pytest.mark.parametrize(
    ("replies", "fates", "status", "line"),
    [
        ({"MAIL": "452 4.3.1 full"}, [], 75, "4.3.1 full"),
        ({"MAIL": "552 5.3.4 too large"}, [], 69, "5.3.4 too large"),
        ({"RCPT": "550 5.1.1 unknown"}, [], 67, "5.1.1 unknown"),
        ({"RCPT": "550 unknown"}, [], 69, "5.0.0 unknown"),
        ({"RCPT": "550-5.1.1 un\r\n550 5.1.1 known"}, [], 67, "5.1.1 un known"),
        ({"RCPT TO:<c@y.example>": "451 4.2.0 later"}, [], 75, "4.2.0 later"),
        ({"RCPT TO:<c@y.example>": "550 5.1.1 unknown"}, [], 67, "5.1.1 unknown"),
        ({"DATA": "451 4.3.0 not now"}, [], 75, "4.3.0 not now"),
        ({"DATA": "554 5.7.1 no"}, [], 69, "5.7.1 no"),
        ({}, ["250 2.6.0 a", "451 4.3.0 b"], 75, "4.3.0 b"),
        ({}, ["550 5.1.1 a", "250 2.6.0 b"], 67, "5.1.1 a"),
        ({}, ["554 5.6.0 a", "554 5.6.0 b"], 65, "5.6.0 a"),
        # The class of the code counts, and a text that says otherwise is text.
        ({}, ["451 5.1.1 a"], 75, "4.0.0 5.1.1 a"),
        ({"MAIL": "421 4.3.2 closing"}, [], 75, "4.3.2 closing"),
        ({"greeting": "421 4.3.2 too many"}, [], 75, "4.3.2 too many"),
        ({"greeting": "554 no"}, [], 75, "4.3.5 the listener is not ready: 554 no"),
        ({"LHLO": "500 5.5.2 no"}, [], 75, "4.3.5 the listener is not ready: 500 no"),
        ({"greeting": "HTTP/1.1 400 Bad Request"}, [], 75, "4.5.0 the listener gave a reply"),
        ({"greeting": "220-" + "x" * 200_000}, [], 75, "4.5.0 the listener gave a reply"),
        ({"greeting": "220-x\r\n" * 200}, [], 75, "4.5.0 the listener gave a reply"),
        ({"MAIL": "450 4.3.0 a\x1b[2Jü"}, [], 75, "4.3.0 a?[2J?"),
    ],
)
def test_replies(
    place: Path, replies: dict[str, str], fates: list[str], status: int, line: str
) -> None:
    """Each reply, at whatever step, ends in the status that it asks for, or in 75."""
    with ScriptedListener(place, replies, fates):
        found = run(place, recipients=["b@y.example", "c@y.example"])
    assert found[0] == status
    assert found[1].startswith(line)


@pytest.mark.parametrize("step", ["greeting", "LHLO", "MAIL", "RCPT", "DATA", "fate"])
def test_connection_lost(place: Path, step: str) -> None:
    """A connection that is closed at any step defers the message."""
    fates = [CLOSE] if step == "fate" else []
    with ScriptedListener(place, {step: CLOSE}, fates):
        status, line = run(place)
    assert status == 75
    assert line.startswith("4.")


def test_connection_lost_within_the_message(place: Path) -> None:
    """A listener that goes while it is sent a message defers it."""
    server = socket.socket(socket.AF_UNIX)
    with server:
        server.bind(os.fspath(place))
        server.listen()

        def go() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(
                    b"220 a\r\n250-b\r\n250 PIPELINING\r\n250 c\r\n250 d\r\n354 e\r\n"
                )
                connection.recv(1000)

        thread = threading.Thread(target=go)
        thread.start()
        status, line = run(place, raw=b"a: b\n\n" + b"x\n" * 1_000_000)
        thread.join()
    assert status == 75
    assert line.startswith("4.")


@pytest.mark.parametrize("step", ["greeting", "LHLO", "DATA", "fate"])
def test_time_limit(place: Path, step: str) -> None:
    """A listener that never answers defers the message when the time is over."""
    fates = [SILENCE] if step == "fate" else []
    words = command(place)
    words[words.index("20")] = "1"
    with ScriptedListener(place, {step: SILENCE}, fates):
        done = subprocess.run(words, input=MAIL, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (
        75,
        b"4.4.2 the message was not handed over in time\n",
    )


def test_time_limit_of_a_message_that_never_ends(place: Path) -> None:
    """Standard input that never ends defers the message when the time is over."""
    words = command(place)
    words[words.index("20")] = "1"
    with (
        ScriptedListener(place) as listener,
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"4.4.2 ")
        assert process.wait() == 75
    assert not listener.session.complete


def test_death_by_a_signal(place: Path) -> None:
    """SIGTERM ends the client at once, by the signal, and nothing is completed."""
    with ScriptedListener(place, {"DATA": SILENCE}) as listener:
        process = subprocess.Popen(command(place), stdin=subprocess.PIPE)
        assert listener.begun.wait(20)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == -signal.SIGTERM
    assert not listener.session.complete


def unread(words: Sequence[str], path: Path) -> tuple[int, bytes, int]:
    """Run a command with this file; return its status, its output, and how far it has read."""
    path.write_bytes(MAIL)
    with path.open("rb") as file:
        done = subprocess.run(words, stdin=file, capture_output=True, check=False)
        return done.returncode, done.stdout + done.stderr, os.lseek(file.fileno(), 0, os.SEEK_CUR)


def test_nobody_listens(place: Path, tmp_path: Path) -> None:
    """Without a listener the status is 111; nothing was read, and nothing is said."""
    assert unread(command(place), tmp_path / "mail") == (111, b"", 0)
    with ScriptedListener(place):
        pass
    assert place.is_socket()
    assert unread(command(place), tmp_path / "mail") == (111, b"", 0)


def test_socket_that_cannot_be_used(tmp_path: Path) -> None:
    """A socket of which nobody knows whether somebody listens defers the message."""
    status, said, _ = unread(command(tmp_path / ("x" * 200)), tmp_path / "mail")
    assert status == 75
    assert said == b"4.4.1 the listener cannot be reached: AF_UNIX path too long\n"


def test_socket_that_this_user_may_not_use(tmp_path: Path) -> None:
    """A socket that is another user's defers the message, and the cause is in words."""
    if os.geteuid():
        pytest.skip("only root can be another user")
    other = "import sys, os; sys.path.append(sys.argv.pop(1)); import handover; "
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        place = Path(folder, "lmtp")
        words = command(place)
        words[words.index(START)] = f"{other} os.setuid(65534); handover.main()"
        with ScriptedListener(place):
            place.chmod(0o600)
            status, said, _ = unread(words, tmp_path / "mail")
    assert (status, said) == (75, b"4.4.1 the listener cannot be reached: Permission denied\n")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["s"],
        ["s", "9", "-f", "a"],
        ["s", "9", "-f", "a", "--"],
    ],
)
def test_wrong_command(words: list[str]) -> None:
    """A command line that is wrong defers the message; what the launcher adds is not told of."""
    assert ended(words) == (75, b"4.3.5 the arguments are not: -f SENDER -- RECIPIENT...\n", b"")


@pytest.mark.parametrize("seconds", ["", "x", "0", "-1", "1.5", "86401", "9" * 5000, "\u0661"])
def test_wrong_time_limit(seconds: str) -> None:
    """A time limit that is none defers the message, and says which value of the launcher it is."""
    words = ["s", seconds, "-f", "a@x.example", "--", "b@x.example"]
    said = b"4.3.5 TIMEOUT is not a number of seconds from 1 to 86400\n"
    assert ended(words) == (75, said, b"")


def test_no_standard_input(place: Path) -> None:
    """Without a standard input nobody is asked, and the connection is not read for the message."""
    with ScriptedListener(place) as listener:
        words = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *command(place)]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    said = b"4.3.5 there is no standard input to read a message from\n"
    assert (done.returncode, done.stdout) == (75, said)
    assert listener.sessions == []


def test_says_the_way_in(place: Path) -> None:
    """A listener that wants to know is told that the message came by a pipe."""
    features = "250-here\r\n250-8BITMIME\r\n250 XWAY"
    with ScriptedListener(place, {"LHLO": features}) as listener:
        assert run(place)[0] == 0
    assert listener.session.commands[1] == "MAIL FROM:<a@x.example> BODY=8BITMIME XWAY=pipe"


def ended(words: Sequence[str]) -> tuple[int, bytes, bytes]:
    """Run the client with these arguments; return its status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", START, str(FOLDER), *words],
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_output_that_nobody_reads(place: Path) -> None:
    """Whether somebody reads what is printed does not change the status."""
    with ScriptedListener(place):
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command(place)], input=MAIL, check=False
        )
    assert done.returncode == 0


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("ann@x.example", "ann@x.example"),
        ("ann+tag@x.example", "ann+tag@x.example"),
        ("-f@x.example", "-f@x.example"),
        ("a=b/c!#$%&'*?^_`{|}~@x.example", "a=b/c!#$%&'*?^_`{|}~@x.example"),
        ("ann@[192.0.2.1]", "ann@[192.0.2.1]"),
        ("ann@[IPv6:2001:db8::1]", "ann@[IPv6:2001:db8::1]"),
        ("postmaster", "postmaster"),
        ("ü@bücher.example", "ü@bücher.example"),
        ("a b@x.example", '"a b"@x.example'),
        ('"a b"@x.example', '"a b"@x.example'),
        ("a..b@x.example", '"a..b"@x.example'),
        (".a@x.example", '".a"@x.example'),
        ("a@b@x.example", '"a@b"@x.example'),
        ('a"b@x.example', '"a\\"b"@x.example'),
        ("a\\b@x.example", '"a\\\\b"@x.example'),
        ('"a\\"b"@x.example', '"a\\"b"@x.example'),
        ('"a"b"@x.example', '"\\"a\\"b\\""@x.example'),
        ('"a\\"@x.example', '"\\"a\\\\\\""@x.example'),
        ("a>b@x.example", '"a>b"@x.example'),
    ],
)
def test_mailbox(address: str, written: str) -> None:
    """A local part is quoted where it has to be, and where it is not yet."""
    assert handover.mailbox(address) == written


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ann",
        "@",
        "ann@",
        "@x.example",
        "a@x.example>\r\nRCPT TO:<b@x.example",
        "a\nb@x.example",
        "a\x00b@x.example",
        "a\x85b@x.example",
        "ann@x.example> SIZE=1",
        "ann@[a b]",
        "ann@x example",
        "ann@[x]y]",
        "\udcff@x.example",
    ],
)
def test_no_address(address: str) -> None:
    """What could break out of a command, or is no address, is refused."""
    with pytest.raises(handover.AddressError):
        handover.mailbox(address)


@given(st.text(), st.text())
def test_no_address_breaks_out(local: str, domain: str) -> None:
    """Whatever the argument is, it is refused or stays within its angle brackets."""
    try:
        written = handover.mailbox(f"{local}@{domain}")
    except handover.AddressError:
        return
    assert not any(one < " " or one == "\x7f" for one in written)
    outside = written.rpartition("@")[2]
    assert not set(outside) & set("<> ")
    if not written.startswith('"'):
        assert not set(written) & set("<> ")


def test_wrong_recipient(place: Path) -> None:
    """A recipient that is no address is refused by itself; the others have the message."""
    with ScriptedListener(place) as listener:
        found = run(place, recipients=["nobody", "b@y.example"])
    assert found == (69, "5.1.3 the address has no domain")
    assert listener.session.complete


def test_wrong_recipient_alone(place: Path, tmp_path: Path) -> None:
    """Where no recipient is an address, nobody is asked."""
    found = unread(command(place, recipients=["a\nb@x.example"]), tmp_path / "mail")
    assert found == (69, b"5.1.3 the address holds a control character\n", 0)


def test_wrong_sender(place: Path) -> None:
    """A sender that is no address has the message rejected."""
    assert run(place, "nobody") == (69, "5.1.7 the address has no domain")


# -- company ---------------------------------------------------------------------------------------


def converse(place: Path, refused: str, replies: Sequence[conversation.Reply]) -> list[object]:
    """Run the client against our own protocol machine; return the machine's events."""
    events: list[object] = []

    def accept(sender: str, recipient: str) -> conversation.Reply | None:
        return conversation.Reply(550, "5.1.1", "unknown") if recipient == refused else None

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            machine = conversation.Conversation(conversation.Limits(), "here", accept)
            due = machine.greet()
            while True:
                for event in due:
                    events.append(event)
                    if isinstance(event, conversation.Close):
                        return
                    # The client does not wait for the reply to its QUIT.
                    if isinstance(event, conversation.Send) and b"221" not in event.data:
                        connection.sendall(event.data)
                if machine.waiting:
                    due = machine.answer(replies)
                elif data := connection.recv(65536):
                    due = machine.receive(data)
                else:
                    return

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(place))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        recipients = ["b@y.example", refused, '"c"@y.example', "c@y.example", "ü d@y.example"]
        status, line = run(place, "", recipients, b"a: b\n\n.\n..\nno end")
        thread.join()
    events.append((status, line))
    return events


def test_our_own_protocol_machine(place: Path) -> None:
    """Client and listener of ours understand each other, recipient by recipient, byte by byte."""
    stored = conversation.Reply(250, "2.6.0", "stored")
    events = converse(place, "x@y.example", [stored, stored, stored])
    (begin,) = [event for event in events if isinstance(event, conversation.Begin)]
    assert begin.sender == ""
    assert begin.recipients == ("b@y.example", "c@y.example", '"ü d"@y.example')
    assert begin.smtputf8
    chunks = [event.data for event in events if isinstance(event, conversation.Chunk)]
    assert b"".join(chunks) == b"a: b\n\n.\n..\nno end\n"
    assert events[-1] == (67, "5.1.1 unknown")


def test_imports_little() -> None:
    """The client loads none of postoffice, and nothing that takes long."""
    code = "import sys; sys.path.append(sys.argv[1]); import handover; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(FOLDER)],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "handover" in loaded
    assert not loaded & {"socket", "signal", "enum", "re", "typing", "contextlib", "__future__"}
    assert not [name for name in loaded if name.startswith(("postoffice", "ZODB"))]
