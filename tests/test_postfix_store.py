"""The queue of a real Postfix, and of commands that behave as none should, in a store."""

from __future__ import annotations

import copy
import pickle
import re
import smtplib
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from postoffice.postfix import (
    Mail,
    MailHeaders,
    OutputCut,
    PostfixDown,
    PostfixError,
    PostfixMissing,
    PostfixRefused,
    PostfixSettings,
    PostfixSilent,
    PostqueueStore,
    Recipient,
)
from tests.postfix import ACCOUNT, Postfix, require_postfix

SAMPLES = Path(__file__).parent / "postfix_samples"
NOW = datetime(2026, 11, 21, 23, 0)  # noqa: DTZ001 - local and naive, as listings are
FORGED = "451 4.3.0 (a) (b 4jWvMs5br4zKDYp* 999999 Sat Nov 21 14:15:44 forged@queue.line"
# What goes to hang.test stays active, what goes to down.test or late.test is deferred.
MAIN = """
relay_domains = hang.test, down.test, late.test
transport_maps = inline:{{ {{ hang.test = lmtp:inet:127.0.0.1:{port} }}
    {{ down.test = lmtp:inet:127.0.0.1:9 }} {{ late.test = retry:4.3.0 {forged} }} }}
header_checks = regexp:{{ {{ /^Subject: hold/ HOLD }} }}
queue_run_delay = 1h
minimal_backoff_time = 1h
maximal_backoff_time = 1h
enable_long_queue_ids = {long}
"""


def letter(subject: str) -> bytes:
    """Compose a message with two fields that hostile software might have named."""
    return (
        f"From: Ann <ann@example.org>\nTo: bob@example.com\nSubject: {subject}\n"
        "Reply-To: one@example.org\nX-Folded: one\n two\n__class__: str\nparse: no\n\nHello.\n"
    ).encode()


def program(folder: Path, text: str) -> tuple[str, ...]:
    """Write a shell script that plays a command of Postfix."""
    path = folder / "command"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return (str(path),)


def facts(mails: list[Mail]) -> dict[str, tuple[object, ...]]:
    """Return all that the queue tells of these messages, by their ids."""
    return {
        mail.qid: (
            *(mail.size, mail.date, mail.sender, mail.status, mail.forced_expire, mail.errors),
            *((str(to), to.reason, to.state) for to in mail.recipients),
        )
        for mail in mails
    }


# -- of a real Postfix -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["no", "yes"], ids=["short", "long"])
def postfix(request: pytest.FixtureRequest) -> Iterator[Postfix]:
    """A Postfix with mail in each of its states, short ids and then long ones."""
    require_postfix()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with Postfix(MAIN.format(port=port, forged=FORGED, long=request.param)) as running:
            fill(running)
            yield running


def fill(postfix: Postfix) -> None:
    """Send it mail, and wait until each message is in its state."""
    postfix.send("a@example.org", ["b@down.test", "c@down.test"], letter("deferred"))
    postfix.send("", ["b@down.test"], letter("from nobody"))
    postfix.send('"a b"@example.org', ['"(x y)"@down.test', '"a\\"b"@down.test'], letter("quoted"))
    # By SMTP it would be refused at once.
    postfix.sendmail("a@example.org", ["forged@late.test", "b@down.test"], letter("forged"))
    postfix.send("a@example.org", ["h@down.test"], letter("hold"))
    postfix.send("a@example.org", ["x@down.test"], letter("hold and expire"))
    postfix.send("a@example.org", ["d@hang.test", "b@down.test", "e@hang.test"], letter("active"))
    with smtplib.SMTP("127.0.0.1", postfix.smtp_port, timeout=30) as client:
        client.ehlo()
        client.command_encoding = "utf-8"
        client.mail("ü@example.org", ["SMTPUTF8"])
        client.rcpt("jürgen@down.test")
        client.data(letter("utf8"))
    expected = {"active": 1, "deferred": 5, "hold": 2}

    def settled() -> bool:
        queue = postfix.queue().values()
        pending = [
            to
            for one in queue
            if one["queue_name"] == "deferred" or len(one["recipients"]) == 3  # type: ignore[arg-type] # a list
            for to in one["recipients"]  # type: ignore[attr-defined] # a list
            if "delay_reason" not in to and "hang.test" not in to["address"]
        ]
        return Counter(one["queue_name"] for one in queue) == expected and not pending

    postfix.wait(settled)
    expired = [one["queue_id"] for one in postfix.queue().values() if "x@down" in str(one)]
    command = ["postsuper", "-c", str(postfix.configuration), "-e", *map(str, expired)]
    subprocess.run(command, check=True, capture_output=True)


def store_of(postfix: Postfix) -> PostqueueStore:
    """Return an empty store for this Postfix."""
    return PostqueueStore(PostfixSettings(config_directory=str(postfix.configuration)))


def test_json_and_postqueue_agree(postfix: Postfix) -> None:
    """Both ways to list a real queue give the same messages, and all that Postfix tells of them."""
    store = store_of(postfix)
    store.load("json")
    by_json = facts(store.mails)
    store.load("postqueue")
    assert facts(store.mails) == by_json
    assert by_json.keys() == postfix.queue().keys()
    assert [store._is_mail_id(qid) for qid in by_json] == [True] * 8


def test_spool_agrees_but_for_reasons(postfix: Postfix) -> None:
    """The queue directories give the messages that the listing gives, without errors."""

    def without_reasons() -> dict[str, tuple[object, ...]]:
        return {
            mail.qid: (
                *(mail.size, mail.date, mail.sender, mail.status, mail.forced_expire),
                sorted(map(str, mail.recipients)),
            )
            for mail in store.mails
        }

    settings = PostfixSettings(
        config_directory=str(postfix.configuration), spool_path=str(postfix.queue_directory)
    )
    store = PostqueueStore(settings)
    store.load("json")
    by_json = without_reasons()
    store.load("spool", parse=True)
    assert without_reasons() == by_json
    assert {mail.parsed for mail in store.mails} == {True}
    assert not any(mail.errors for mail in store.mails)


def test_what_is_told_of_messages(postfix: Postfix) -> None:
    """Addresses, states, sizes and reasons are those that were sent and given."""
    store = store_of(postfix)
    before = datetime.now()  # noqa: DTZ005 - local and naive, as documented
    store.load()
    assert store.loaded_at is not None
    assert timedelta() <= store.loaded_at - before < timedelta(minutes=1)
    assert store.notice == ""
    by_first = {str(mail.recipients[0]): mail for mail in store.mails if len(mail.recipients) < 3}
    assert by_first["h@down.test"].status == "hold"
    assert not by_first["h@down.test"].forced_expire
    assert by_first["x@down.test"].status == "hold"
    assert by_first["x@down.test"].forced_expire
    assert by_first["jürgen@down.test"].sender == "ü@example.org"
    assert '"a b"@example.org' in {mail.sender for mail in store.mails}
    assert "" in {mail.sender for mail in store.mails}
    assert {"b@down.test", '"(x y)"@down.test', "jürgen@down.test"} <= by_first.keys() | {
        to for mail in store.mails for to in mail.recipients
    }
    [forged] = [mail for mail in store.mails if "forged@late.test" in mail.recipients]
    assert sum(FORGED[10:] in error for error in forged.errors) == 1
    assert len(forged.errors) == 2
    [active] = [mail for mail in store.mails if mail.status == "active"]
    assert {str(to): to.state for to in active.recipients} == {
        "d@hang.test": "pending",
        "e@hang.test": "pending",
        "b@down.test": "deferred",
    }
    for mail in store.mails:
        assert mail.date is not None
        assert abs(mail.date - store.loaded_at) < timedelta(minutes=5)
        assert 300 < mail.size < 1000


def test_commands_are_found_without_sbin(postfix: Postfix, monkeypatch: pytest.MonkeyPatch) -> None:
    """Postfix's commands are found where an ordinary user's PATH does not lead."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    store = store_of(postfix)
    store.load(parse=True)
    assert len(store.mails) == 8


def test_headers_are_read_with_the_queue(postfix: Postfix) -> None:
    """Loading with parse gives every message its header fields, by their own names."""
    store = store_of(postfix)
    store.load(parse=True)
    assert {mail.parsed for mail in store.mails} == {True}
    assert {mail.parse_error for mail in store.mails} == {""}
    assert {"From", "Received", "Reply-To", "X-Folded", "__class__"} <= set(store.known_headers)
    [mail] = [mail for mail in store.mails if mail.head.Subject == ["quoted"]]
    assert mail.From == mail.head.From == ["Ann <ann@example.org>"]
    assert len(mail.Received) == 1


def test_headers_of_one_message(postfix: Postfix) -> None:
    """A message reads its own header fields when asked, and shows them."""
    store = store_of(postfix)
    store.load()
    mail = next(mail for mail in store.mails if mail.status == "active")
    assert mail.dump()["headers"] == {}
    assert mail.postcat_cmd[-1] == mail.qid
    mail.parse()
    assert (mail.parsed, mail.parse_error) == (True, "")
    assert mail.dump()["headers"]["Subject"] == ["active"]
    assert mail.dump()["postqueue"]["status"] == "active"
    shown = mail.show()
    assert mail.qid in shown
    assert "X-Folded: one two" in shown
    assert shown.isascii()


def test_message_that_is_gone(postfix: Postfix) -> None:
    """A message that left the queue is not parsed, and says why."""
    mail = Mail("ABC1234567", settings=store_of(postfix).settings)
    mail.parse()
    assert not mail.parsed
    assert "No such file" in mail.parse_error
    mail = Mail("--help", settings=store_of(postfix).settings)
    mail.parse()
    assert "is no id" in mail.parse_error


def test_summary_agrees_with_postfix(postfix: Postfix) -> None:
    """A summary counts what Postfix lists."""
    store = store_of(postfix)
    store.load()
    summary = store.summary()
    listed = postfix.queue().values()
    assert summary["total_mails"] == len(listed) == 8
    assert summary["total_mails_size"] == sum(int(str(one["message_size"])) for one in listed)
    assert dict(summary["top_status"]) == Counter(one["queue_name"] for one in listed)
    assert summary["mails_by_age"]["last_24h"] == 8


def test_stopped_postfix(postfix: Postfix) -> None:
    """The queue of a stopped Postfix is read by root, with a notice."""
    store = store_of(postfix)
    store.load()
    before = facts(store.mails)
    postfix.stop()
    try:
        for method in ("json", "postqueue"):
            store.load(method)
            assert facts(store.mails).keys() == before.keys()
            assert "is down" in store.notice
    finally:
        postfix.start()
    store.load()
    assert store.notice == ""


def test_user_without_the_right(postfix: Postfix) -> None:
    """A user for whom this configuration is none of his own is told so in one line."""
    # sudo's part, played by a command that needs no password.
    other = ("setpriv", f"--reuid={ACCOUNT}", "--regid=nogroup", "--clear-groups")
    settings = PostfixSettings(config_directory=str(postfix.configuration), sudo=other)
    for method in ("json", "postqueue"):
        with pytest.raises(PostfixRefused, match="run as root, set sudo") as raised:
            PostqueueStore(settings).load(method)
        assert "\n" not in str(raised.value)
        assert raised.value.exit_status == 77


# -- of commands that misbehave --------------------------------------------------------------------


def test_down_for_a_user(tmp_path: Path) -> None:
    """Where the queue cannot be read without the mail system, the line says to start it."""
    said = "postqueue: fatal: Queue report unavailable - mail system is down"
    settings = PostfixSettings(list_queue=program(tmp_path, f"echo '{said}' >&2; exit 69"))
    with pytest.raises(PostfixDown, match="postfix start"):
        PostqueueStore(settings).load()


@pytest.mark.parametrize(
    "settings",
    [
        PostfixSettings(list_queue=("no-such-command",)),
        PostfixSettings(sudo=("no-such-command",)),
        PostfixSettings(sudo=("env",), list_queue=("no-such-command",)),
        PostfixSettings(list_queue=("/etc/passwd/postqueue",)),
    ],
)
def test_absent_postfix(settings: PostfixSettings) -> None:
    """Where there is no such command, the line says to install or to name it."""
    with pytest.raises(PostfixMissing, match="install Postfix, or name its command"):
        PostqueueStore(settings).load()


def test_command_that_may_not_be_run(tmp_path: Path) -> None:
    """A file that is no program is refused in one line."""
    path = tmp_path / "postqueue"
    path.write_text("")
    with pytest.raises(PostfixRefused, match="may not be run"):
        PostqueueStore(PostfixSettings(list_queue=(str(path),))).load()


def test_old_postfix_has_no_json(tmp_path: Path) -> None:
    """Where postqueue knows no -j, the default is -p, and asking for -j is told."""
    sample = SAMPLES / "listing.txt"
    script = (
        f"case $1 in -p) exec cat '{sample}';; esac\n"
        "echo \"postqueue: invalid option -- 'j'\" >&2\n"
        "echo 'postqueue: fatal: usage: postqueue -f | postqueue -p' >&2; exit 69"
    )
    store = PostqueueStore(PostfixSettings(list_queue=program(tmp_path, script)))
    store.load()
    assert len(store.mails) == 8
    with pytest.raises(PostfixError, match=re.escape("came with Postfix 3.1")):
        store.load("json")


@pytest.mark.parametrize("command", ["mailq", "postqueue -p"])
def test_command_that_is_not_postqueue(tmp_path: Path, command: str) -> None:
    """A command that does not take postqueue's options is told, with what would be right."""
    said = f"echo '{command.split()[0]}: fatal: usage: {command} [options]' >&2; exit 75"
    settings = PostfixSettings(list_queue=program(tmp_path, said))
    with pytest.raises(PostfixError, match="list_queue names postqueue, without options"):
        PostqueueStore(settings).load()


@pytest.mark.parametrize(
    ("option", "name"), [("json", "listing.json"), ("postqueue", "listing.txt")]
)
def test_output_that_is_cut(tmp_path: Path, option: str, name: str) -> None:
    """A listing that ends too early raises, and the store keeps what it had."""
    settings = PostfixSettings(list_queue=program(tmp_path, f"head -c 700 '{SAMPLES / name}'"))
    store = PostqueueStore(settings, lambda: NOW)
    store.load(filename=SAMPLES / name)
    before = list(store.mails), store.loaded_at
    with pytest.raises(OutputCut, match="list the queue again"):
        store.load(option)
    assert (store.mails, store.loaded_at) == before


def test_command_that_dies_says_why(tmp_path: Path) -> None:
    """Where a command fails in the middle of its output, its own words are the error."""
    script = f"head -c 700 '{SAMPLES / 'listing.json'}'; echo 'postqueue: fatal: boom' >&2; exit 1"
    with pytest.raises(PostfixError, match="status 1: postqueue: fatal: boom"):
        PostqueueStore(PostfixSettings(list_queue=program(tmp_path, script))).load()


def test_silent_command_is_ended(tmp_path: Path) -> None:
    """A command that says nothing for longer than the settings allow is ended."""
    command = program(tmp_path, f"echo $$ > '{tmp_path}/pid'; exec sleep 600")
    settings = PostfixSettings(list_queue=command, timeout=0.5)
    for method in ("json", "postqueue"):
        with pytest.raises(PostfixSilent, match="said nothing"):
            PostqueueStore(settings).load(method)
        assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_talk_of_a_command_is_bounded(tmp_path: Path) -> None:
    """Megabytes of warnings neither block a listing nor become an error's text."""
    script = f"yes warning | head -c 3000000 >&2; exec cat '{SAMPLES / 'listing.json'}'"
    store = PostqueueStore(PostfixSettings(list_queue=program(tmp_path, script)))
    store.load()
    assert len(store.mails) == 8
    script = "yes | tr -d '\\n' | head -c 3000000 >&2; exit 1"
    store = PostqueueStore(PostfixSettings(list_queue=program(tmp_path, script)))
    with pytest.raises(PostfixError) as raised:
        store.load()
    assert len(str(raised.value)) < 1000


# -- of a file -------------------------------------------------------------------------------------


def loaded(name: str = "listing.json") -> PostqueueStore:
    """Return a store with the messages of a sample."""
    store = PostqueueStore(clock=lambda: NOW)
    store.load(filename=SAMPLES / name)
    return store


@pytest.mark.parametrize("method", [None, "json", "postqueue"])
def test_file_is_told_by_its_content(method: str | None) -> None:
    """A file is read as what it is, whatever the method, and without Postfix."""
    store = PostqueueStore(PostfixSettings(list_queue=("no-such-command",)), lambda: NOW)
    for name in ("listing.txt", "listing.json"):
        store.load(method, filename=SAMPLES / name)
        assert [mail.status for mail in store.mails] == ["active"] * 2 + ["deferred"] * 4 + [
            "hold"
        ] * 2
        assert store.loaded_at == NOW


def test_unknown_method() -> None:
    """A method that there is not, or that reads no file, is refused with those there are."""
    with pytest.raises(ValueError, match="there are json, postqueue"):
        PostqueueStore().load("spoon")
    with pytest.raises(ValueError, match="there are json, postqueue"):
        PostqueueStore().load("spool", filename=SAMPLES / "listing.txt")
    with pytest.raises(FileNotFoundError):
        PostqueueStore().load(filename=SAMPLES / "nothing")


def test_method_of_a_derived_class() -> None:
    """A derived store loads by methods of its own, into messages of its own class."""

    class Letter(Mail):
        """A message that knows more."""

        @property
        def is_bounce(self) -> bool:
            """Whether it was sent by nobody."""
            return not self.sender

    class Store(PostqueueStore):
        """Loads lines of its own."""

        MailClass = Letter

        def _get_postqueue_output(self) -> list[str]:
            return (SAMPLES / "listing.txt").read_text("utf-8").split("\n")

        def _load_from_nothing(self, parse: bool = False) -> None:
            self.mails = []

    store = Store(clock=lambda: NOW)
    store.load("postqueue")
    assert [isinstance(mail, Letter) and mail.is_bounce for mail in store.mails].count(True) == 1
    store.load("nothing")
    assert store.mails == []


def test_summary_has_every_key() -> None:
    """A summary has the documented keys, with sizes in bytes and the most frequent first."""
    summary = loaded().summary()
    assert summary == {
        "total_mails": 8,
        "mails_by_age": {"last_24h": 6, "1_to_4_days_ago": 1, "older_than_4_days": 1},
        "total_mails_size": 278941,
        "average_mail_size": 278941 / 8,
        "max_mail_size": 273941,
        "min_mail_size": 240,
        "top_status": [("deferred", 4), ("active", 2), ("hold", 2)],
        "unique_senders": 7,
        "unique_sender_domains": 2,
        "unique_recipients": 17,
        "unique_recipient_domains": 4,
        "top_senders": [
            ("alice@depot.test", 2),
            ("s@x.test", 1),
            ("ü@depot.test", 1),
            ("", 1),
            ('"a b"@depot.test', 1),
        ],
        "top_sender_domains": [("depot.test", 5), ("x.test", 2)],
        "top_recipients": [
            ("a@hang.test", 1),
            ("b@down.test", 1),
            ("d@hang.test", 1),
            ("e@hang.test", 1),
            ("jürgen@down.test", 1),
        ],
        "top_recipient_domains": [
            ("down.test", 12),
            ("hang.test", 3),
            ("lmtp.test", 1),
            ("vmail.test", 1),
        ],
        "top_errors": summary["top_errors"],
    }
    assert summary["top_errors"][0] == ("connect to 127.0.0.1[127.0.0.1]:9: Connection refused", 5)


def test_summary_of_nothing() -> None:
    """A store that holds nothing has a summary of zeros."""
    summary = PostqueueStore().summary()
    assert summary["total_mails"] == summary["average_mail_size"] == summary["min_mail_size"] == 0
    assert summary["top_status"] == [("active", 0), ("deferred", 0), ("hold", 0)]
    assert summary["top_senders"] == []


def test_public_patterns_are_as_documented() -> None:
    """The patterns know ids and addresses as pymailq's document has them."""
    store = PostqueueStore()
    assert store.mail_id_re.pattern == r"^([A-F0-9]{8,12}|[B-Zb-z0-9]{11,16})[*!]?$"
    assert store.mail_addr_re.pattern == r"^[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]+$"
    assert store._is_mail_id("C0004979687")
    assert not store._is_mail_id("C00049796..")
    assert store.postqueue_mailstatus == ["active", "deferred", "hold"]
    assert store.postqueue_cmd == ["postqueue", "-p"]
    assert store.spool_path == "/var/spool/postfix"
    assert store.MailClass is Mail


# -- values ----------------------------------------------------------------------------------------


def test_settings_make_commands() -> None:
    """A command is sudo's words, its own, the instance's and the options, in this order."""
    settings = PostfixSettings(
        control=("/opt/postsuper", "-v"), config_directory="/etc/p2", sudo=("sudo", "-n")
    )
    assert settings.command("control", "-h", "-") == [
        *("sudo", "-n", "/opt/postsuper", "-v", "-c", "/etc/p2", "-h", "-"),
    ]


def test_header_names_hide_nothing() -> None:
    """A field named as an attribute of every object, or as a method, is an item and no more."""
    block = (
        b"__class__: x\n__getattr__: y\nget: z\nkeys: k\n_fields: f\nFrom: a\nfrom: b\n\nTo: c\n"
    )
    head = MailHeaders.from_bytes(block)
    assert type(head) is MailHeaders
    assert head.get("get") == ["z"]
    assert list(head.keys()) == list(head)
    assert head["__class__"] == ["x"]
    assert head.From == ["a"]
    assert head.get_all("FROM") == ["a", "b"]
    assert "To" not in head
    assert not hasattr(head, "To")
    mail = Mail("ABC12345")
    mail.read_headers(block)
    assert type(mail) is Mail
    assert mail.parse.__func__ is Mail.parse  # type: ignore[attr-defined] # a bound method has it
    assert not hasattr(mail, "To")


@pytest.mark.parametrize(
    ("block", "fields"),
    [
        (b"", {}),
        (b"\nFrom: a\n", {}),
        (b" begins folded\nFrom: a\n", {"From": ["a"]}),
        (b"no field\n folded\nFrom: a\n", {"From": ["a"]}),
        (b"From : a\nTo:\tb\r\n\tc\r\n", {"From": ["a"], "To": ["b\n\tc"]}),
        (b": nameless\nX:\nX: 2", {"X": ["", "2"]}),
        (b"Subject: \xff\x00\x1b[31m", {"Subject": ["\ufffd\x00\x1b[31m"]}),
    ],
)
def test_header_blocks(block: bytes, fields: dict[str, list[str]]) -> None:
    """Fields are found by RFC 5322's rules; what is none is left out."""
    assert dict(MailHeaders.from_bytes(block)) == fields


def test_what_is_shown_is_printable() -> None:
    """Nothing that a message or a server wrote reaches the terminal as it is."""
    mail = Mail("ABC12345", 5, NOW, "\x1b[2J@x.test", recipients=[Recipient("a\n@x", "b\x07")])
    mail.read_headers(b"Subject: \x1b]0;title\x07\nX-\x1b: \xe2\x80\xae\n")
    assert all(line.isprintable() for line in mail.show().split("\n"))
    assert "2026-11-21 23:00:00" in mail.show()


def test_values_are_copied_and_pickled() -> None:
    """Messages with their recipients and fields survive copies and pickles."""
    mail = Mail("ABC12345", 5, NOW, "a@x.test", recipients=[Recipient("b@x.test", "why")])
    mail.read_headers(b"From: a\n")
    for other in (copy.copy(mail), copy.deepcopy(mail), pickle.loads(pickle.dumps(mail))):
        assert other.dump() == mail.dump()
        assert (other.recipients[0].reason, other.recipients[0].state) == ("why", "deferred")
        assert other.From == ["a"]
