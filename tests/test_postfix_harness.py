"""The private Postfix of the tests, and the samples in ``etc`` by which it delivers mail to us."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postfix import ACCOUNT, Postfix, fragment, python_of_account, require_postfix

MAIL = b"From: ann@example.org\nTo: bob@example.com\nSubject: Hello\n\nFrom here on\n.\nall of it\n"
UTF8 = ["SMTPUTF8", "BODY=8BITMIME"]

# Keeps what it is run with: its arguments, one a line, and what it reads. Then it ends as the
# local part of the recipient says.
COMMAND = """\
#!/bin/sh
umask 022
for argument; do printf '%s\\n' "$argument"; done > "{folder}/$$.arguments"
cat > "{folder}/$$.message"
mv "{folder}/$$.message" "{folder}/$$.eml"
case "$4" in
late@*) echo "4.3.0 not now"; exit 75;;
never@*) echo "5.6.0 not this"; exit 65;;
odd@*) exit 1;;
esac
"""


class _Session(socketserver.StreamRequestHandler):
    """One LMTP session, with a client that makes no mistakes."""

    server: _Sink

    def handle(self) -> None:
        sender, recipients = "", list[str]()
        self._say("220 sink LMTP")
        for line in self.rfile:
            command = line.decode().rstrip()
            verb = command[:4].upper()
            if verb == "LHLO":
                self._say("250-PIPELINING", "250-8BITMIME", "250-SMTPUTF8", "250 sink")
            elif verb == "RCPT":
                if "<nobody@" in command:
                    self._say("550 5.1.1 nobody takes this")
                    continue
                recipients.append(command)
                self._say("250 2.1.5 ok")
            elif verb == "DATA":
                self._say("354 go on")
                raw = b"".join(iter(self.rfile.readline, b".\r\n"))
                self.server.arrived.append((sender, recipients, raw))
                self._say(*(_after_data(recipient) for recipient in recipients))
            elif verb == "QUIT":
                self._say("221 2.0.0 bye")
                return
            else:
                if verb == "MAIL":
                    sender, recipients = command, []
                self._say("250 2.0.0 ok")

    def _say(self, *lines: str) -> None:
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())


def _after_data(recipient: str) -> str:
    if "<late@" in recipient:
        return "451 4.3.0 not now"
    return "554 5.6.0 not this" if "<never@" in recipient else "250 2.0.0 stored"


class _Sink(socketserver.ThreadingUnixStreamServer):
    """An LMTP server that keeps what arrives.

    :ivar arrived: the MAIL command, the RCPT commands that were taken, and the body as sent.
    """

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        """Listen, in the way of a user who is in no group of Postfix's."""
        self.arrived: list[tuple[str, list[str], bytes]] = []
        owner = pwd.getpwnam(ACCOUNT).pw_uid
        mask = os.umask(0o117)
        os.seteuid(owner)
        try:
            super().__init__(str(path), _Session)
        finally:
            os.seteuid(0)
            os.umask(mask)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        """Stop listening, and leave no socket behind."""
        self.shutdown()
        self.server_close()
        os.unlink(str(self.server_address))

    def taken(self) -> set[str]:
        """Return the RCPT commands of all that has arrived."""
        return {recipient for _, recipients, _ in self.arrived for recipient in recipients}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder of ``ACCOUNT``, which it can reach: pytest's own are the tester's alone."""
    require_postfix()
    path = Path(tempfile.mkdtemp(prefix="postoffice-account-"))
    shutil.chown(path, ACCOUNT)
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def by_maildir(folder: Path) -> Iterator[Postfix]:
    """A Postfix that delivers to a Maildir, wired as ``etc/main.cf.maildir`` says."""
    owner = pwd.getpwnam(ACCOUNT)
    main = fragment(
        "main.cf.maildir",
        {
            "/srv/postoffice": str(folder),
            "uid_maps = static:5000": f"uid_maps = static:{owner.pw_uid}",
            "gid_maps = static:5000": f"gid_maps = static:{owner.pw_gid}",
        },
    )
    incoming = fragment("main.cf.incoming", {"$mynetworks": ""})
    with Postfix(main + incoming) as postfix:
        yield postfix


@pytest.fixture(scope="module")
def by_lmtp() -> Iterator[tuple[Postfix, Path]]:
    """A Postfix that delivers by LMTP, wired as ``etc`` says, and the place for the socket."""
    require_postfix()
    # One address of a domain that has other mail, as docs/postfix.rst shows it.
    local = (
        "transport_maps = inline:{ support@mx.example.net=lmtp:unix:postoffice/lmtp }\n"
        "local_recipient_maps = $alias_maps $transport_maps\n"
    )
    postfix = Postfix(fragment("main.cf.lmtp", {}) + fragment("main.cf.verify", {}) + local)
    place = postfix.queue_directory / "postoffice"
    place.mkdir()
    shutil.chown(place, ACCOUNT, "postfix")
    place.chmod(0o2750)
    with postfix:
        yield postfix, place / "lmtp"


@pytest.fixture(scope="module")
def by_pipe(folder: Path) -> Iterator[Postfix]:
    """A Postfix that runs a command for each message, wired as ``etc`` says."""
    command = folder / "deliver"
    command.write_text(COMMAND.format(folder=folder))
    command.chmod(0o755)
    launcher = {"/usr/lib/postoffice/deliver": str(command)}
    aliases = folder / "aliases"
    aliases.write_text(fragment("aliases.pipe", launcher))
    shutil.chown(aliases, ACCOUNT)
    subprocess.run(["/usr/sbin/postalias", f"hash:{aliases}"], check=True)
    with Postfix(
        fragment("main.cf.pipe", {}) + f"alias_maps = hash:{aliases}\n",
        fragment("master.cf.pipe", {**launcher, "user=postoffice": f"user={ACCOUNT}"}),
    ) as postfix:
        yield postfix


def _calls(folder: Path) -> list[tuple[list[str], bytes]]:
    """Return, and forget, how the command was run and what it read."""
    calls = []
    for path in sorted(folder.glob("*.eml")):
        arguments = path.with_suffix(".arguments")
        calls.append((arguments.read_text().splitlines(), path.read_bytes()))
        arguments.unlink()
        path.unlink()
    return calls


def _arrive(maildir: Path) -> list[bytes]:
    files = sorted(maildir.glob("new/*"))
    found = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    return found


def test_a_maildir_gets_one_file_per_recipient_with_the_envelope_on_top(
    by_maildir: Postfix, folder: Path
) -> None:
    """Each recipient has a file, its owner's alone, and on top of it what SMTP said."""
    by_maildir.send("ann@example.org", ["a+b@apps.example.com", "c@billing.example.com"], MAIL)
    by_maildir.send("jörg@example.org", ["ü@apps.example.com"], MAIL, UTF8)
    by_maildir.sendmail("", ['"a b"@billing.example.com'], MAIL)
    by_maildir.wait_until_empty()
    modes = {path.stat().st_mode & 0o777 for path in folder.glob("Maildir/new/*")}
    tops = sorted(raw.decode().split("\nReceived:")[0] for raw in _arrive(folder / "Maildir"))
    assert modes == {0o600}
    assert tops == sorted(
        f"Return-Path: <{sender}>\nX-Original-To: {recipient}\nDelivered-To: {recipient}"
        for sender, recipient in [
            ("ann@example.org", "a+b@apps.example.com"),
            ("ann@example.org", "c@billing.example.com"),
            ("jörg@example.org", "ü@apps.example.com"),
            ("", '"a b"@billing.example.com'),
        ]
    )


def test_nobody_hides_a_second_message_in_a_first(by_maildir: Postfix, folder: Path) -> None:
    """With etc/main.cf.incoming, only CR LF . CR LF ends a message."""
    hidden = b"\n.\nMAIL FROM:<forged@example.com>\r\nRCPT TO:<a@apps.example.com>\r\nDATA\r\n"
    with socket.create_connection(("127.0.0.1", by_maildir.smtp_port)) as client:
        replies = client.makefile("rb")
        for command in (b"HELO x", b"MAIL FROM:<>", b"RCPT TO:<a@apps.example.com>", b"DATA"):
            replies.readline()
            client.sendall(command + b"\r\n")
        assert replies.readline().startswith(b"354 ")
        client.sendall(b"Subject: first\r\n\r\nbody" + hidden + b"Subject: second\r\n\r\n.\r\n")
        assert replies.readline().startswith(b"250 ")
        client.sendall(b"QUIT\r\n")
        assert replies.readline().startswith(b"221 ")
    by_maildir.wait_until_empty()
    [raw] = _arrive(folder / "Maildir")
    assert b"MAIL FROM:<forged@example.com>\n" in raw


def test_what_is_queued_survives_a_restart(by_lmtp: tuple[Postfix, Path]) -> None:
    """Without a listener mail waits in the Postfix queue, also while Postfix is stopped."""
    postfix, place = by_lmtp
    postfix.sendmail("ann@example.org", ["a@apps.example.com"], MAIL)
    postfix.wait_for_log("status=deferred")
    postfix.restart()
    [listed] = postfix.queue().values()
    assert listed["sender"] == "ann@example.org"
    with _Sink(place) as sink:
        postfix.flush()
        postfix.wait_until_empty()
    [(sender, recipients, raw)] = sink.arrived
    assert sender == "MAIL FROM:<ann@example.org>"
    assert recipients == ["RCPT TO:<a@apps.example.com>"]
    assert raw.endswith(b"From here on\r\n..\r\nall of it\r\n")


def test_lmtp_reaches_the_socket_out_of_the_jail_with_one_reply_per_recipient(
    by_lmtp: tuple[Postfix, Path],
) -> None:
    """The chrooted client finds the socket, and does with each recipient what its reply says."""
    postfix, place = by_lmtp
    assert re.search(
        r"^lmtp +unix +- +- +y ", (postfix.configuration / "master.cf").read_text(), re.MULTILINE
    )
    people = ["here", "late", "never", '"a b"']
    with _Sink(place) as sink:
        mode = place.stat()
        assert (mode.st_mode & 0o777, mode.st_gid) == (0o660, place.parent.stat().st_gid)
        recipients = [*(f"{one}@apps.example.com" for one in people), "support+x@mx.example.net"]
        assert postfix.send("", recipients, b"Subject: x\n\n" + b"y" * 5000 + b"\n") == {}
        postfix.wait_for_log("to=<never@apps.example.com>")
        postfix.wait_for_log("to=<late@apps.example.com>")
        postfix.wait(lambda: len(sink.taken()) == len(recipients))
        [waiting] = postfix.queue().values()
    assert {sender for sender, _, _ in sink.arrived} == {"MAIL FROM:<>"}
    assert all(raw.endswith(b"\r\n\r\n" + b"y" * 5000 + b"\r\n") for _, _, raw in sink.arrived)
    assert sink.taken() == {f"RCPT TO:<{recipient}>" for recipient in recipients}
    assert "late@apps.example.com" in str(waiting)
    assert re.search("to=<never@apps.example.com>.* dsn=5.6.0, status=bounced", postfix.log)
    postfix.delete_all()


def test_an_unknown_recipient_is_refused_while_the_sender_is_connected(
    by_lmtp: tuple[Postfix, Path],
) -> None:
    """With etc/main.cf.verify, what LMTP refuses at RCPT is refused by SMTP, and never queued."""
    postfix, place = by_lmtp
    with _Sink(place):
        people = ["nobody@apps.example.com", "other@mx.example.net"]
        refused = postfix.send("ann@example.org", people, MAIL)
    assert {code for code, _ in refused.values()} == {550}
    assert refused.keys() == set(people)
    assert b"postoffice/lmtp" not in refused["nobody@apps.example.com"][1]


def test_a_command_gets_the_envelope_as_its_arguments(by_pipe: Postfix, folder: Path) -> None:
    """The null sender is an empty argument; addresses come quoted, extended, and in UTF-8."""
    for sender, recipient in [
        ("", "a+b@apps.example.com"),
        ('"o\\"ne two"@example.org', '"a b"@apps.example.com'),
        ("jörg@example.org", "ü@billing.example.com"),
    ]:
        by_pipe.send(sender, [recipient], MAIL, UTF8)
        by_pipe.wait_until_empty()
        [(arguments, raw)] = _calls(folder)
        assert arguments == ["-f", sender, "--", recipient]
        top = f"Return-Path: <{sender}>\nX-Original-To: {recipient}\nDelivered-To: {recipient}\n"
        assert raw.startswith(f"{top}Received:".encode())
        assert raw.endswith(b"\n\nFrom here on\n.\nall of it\n")
    by_pipe.send("ann@example.org", ["a@apps.example.com", "b@apps.example.com"], MAIL)
    by_pipe.wait_until_empty()
    assert sorted(arguments[-1] for arguments, _ in _calls(folder)) == [
        "a@apps.example.com",
        "b@apps.example.com",
    ]


def test_a_command_decides_by_its_status(by_pipe: Postfix, folder: Path) -> None:
    """Status 75 defers, 65 returns the mail with the command's words, and so does a mere 1."""
    people = ["late", "never", "odd"]
    by_pipe.send("ann@example.org", [f"{one}@apps.example.com" for one in people], MAIL)
    said = {}
    for one in people:
        by_pipe.wait_for_log(f"to=<{one}@")
        [line] = re.findall(rf"to=<{one}@.*(dsn=.*)", by_pipe.log)[:1]
        said[one] = line
    assert said["late"] == "dsn=4.3.0, status=deferred (not now )"
    assert said["never"] == "dsn=5.6.0, status=bounced (not this )"
    assert said["odd"].startswith("dsn=5.3.0, status=bounced (Command died with status 1")
    by_pipe.delete_all()
    _calls(folder)


def test_an_alias_runs_the_command_as_the_owner_of_its_file(by_pipe: Postfix, folder: Path) -> None:
    """An alias gives the command the envelope by its environment, and the mbox line on top."""
    by_pipe.send("", ["support+x@mx.example.net"], MAIL)
    by_pipe.wait_until_empty()
    [(arguments, raw)] = _calls(folder)
    assert arguments == ["-f", "", "--", "support+x@mx.example.net"]
    assert raw.startswith(b"From MAILER-DAEMON ")
    assert b"\nReturn-Path: <>\nX-Original-To: support+x@mx.example.net\n" in raw


def test_the_account_of_the_tests_can_run_our_python() -> None:
    """A command that Postfix runs can be ours."""
    require_postfix()
    words = [*python_of_account(), "-c", "import postoffice; print('here')"]
    said = subprocess.run(words, capture_output=True, check=True, cwd="/", user=ACCOUNT)
    assert said.stdout == b"here\n"
