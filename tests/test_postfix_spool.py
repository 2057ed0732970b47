"""The queue directories of a real Postfix, read by its own postcat."""

from __future__ import annotations

import os
import shutil
import smtplib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from postoffice.postfix import (
    Mail,
    PostfixError,
    PostfixMissing,
    PostfixSettings,
    Spool,
)
from tests.postfix import ACCOUNT, Postfix, python_of_account, require_postfix
from tests.postfix_queue import (
    HOSTILE_ADDRESSES,
    HOSTILE_TEXT,
    configuration,
    letter,
    loaded,
    postsuper,
    settings_of,
    wait_for_states,
)

LONG = "X-Long: " + "y" * 5000
FORGED = "rfc822;a+40b+0Arecipient:+20forged@b.test+0A+20+20+20+20+20+20999+20sender:+20f@b.test"


@pytest.fixture(scope="module", params=[False, True], ids=["short", "long"])
def postfix(request: pytest.FixtureRequest) -> Iterator[Postfix]:
    """A Postfix with mail of every kind, short ids and then long ones."""
    require_postfix()
    with Postfix(configuration(request.param)) as running:
        running.send("a@example.org", ["b@down.test"], letter("plain", "X-Folded: one", "\ttwo"))
        running.send("", HOSTILE_ADDRESSES, letter("hostile", f"X-Hostile: {HOSTILE_TEXT}"))
        running.send("a@example.org", ["c@down.test"], letter("long", LONG, "X-Last: yes"))
        running.send("held@example.org", ["d@down.test"], letter("hold"))
        running.sendmail("no\nline@example.org", ["e\nf@down.test"], letter("breaks"))
        with smtplib.SMTP("127.0.0.1", running.smtp_port, timeout=30) as client:
            client.ehlo()
            client.command_encoding = "utf-8"
            client.mail("ü@example.org", ["SMTPUTF8"])
            client.rcpt("jürgen@down.test")
            client.data(letter("übergrößen"))
            client.mail("forger@example.org")
            client.rcpt("g@down.test", [f"ORCPT={FORGED}"])
            client.data(letter("forged"))
        wait_for_states(running, deferred=6, hold=1)
        postsuper(running, "-e", [_one(running, "plain").qid])
        yield running


def _one(postfix: Postfix, subject: str) -> Mail:
    """Return the message with this subject."""
    (found,) = [
        mail
        for mail in Spool(settings_of(postfix)).mails(parse=True)
        if subject in mail.head.Subject[0]
    ]
    return found


def facts(mail: Mail) -> tuple[object, ...]:
    """Return what both Postfix's listing and the directories tell of a message."""
    known = (mail.size, mail.date, mail.sender, mail.status, mail.forced_expire)
    return (*known, sorted(map(str, mail.recipients)))


def test_the_directories_agree_with_the_listing(postfix: Postfix) -> None:
    """Every message is there with what Postfix itself lists of it, hostile addresses too."""
    mails = list(Spool(settings_of(postfix)).mails())
    assert {mail.qid: facts(mail) for mail in mails} == {
        mail.qid: facts(mail) for mail in loaded(postfix, "json")
    }
    assert {mail.parse_error for mail in mails} == {""}
    assert not any(mail.parsed for mail in mails)


def test_headers_are_the_messages_own(postfix: Postfix) -> None:
    """Headers come with the messages, folded, hostile, in UTF-8, and behind overlong lines."""
    assert _one(postfix, "plain").head["X-Folded"][0].split() == ["one", "two"]
    assert _one(postfix, "hostile").head["X-Hostile"] == [HOSTILE_TEXT]
    assert _one(postfix, "übergrößen").recipients == ["jürgen@down.test"]
    long = _one(postfix, "long")
    assert long.head["X-Long"] == [LONG.partition(" ")[2]]
    assert long.head["X-Last"] == ["yes"]


def test_one_message_parsed_by_itself(postfix: Postfix) -> None:
    """A message parses the same headers by itself, behind overlong lines too."""
    for mail in Spool(settings_of(postfix)).mails(parse=True):
        alone = Mail(mail.qid, settings=settings_of(postfix))
        alone.parse()
        assert (alone.head, alone.parse_error) == (mail.head, "")


def test_headers_of_listed_messages(postfix: Postfix) -> None:
    """Messages from a listing get their headers; what is gone or another's by now says so."""
    mails = loaded(postfix)
    changed = loaded(postfix)[0]
    assert changed.date is not None
    changed.date = changed.date.replace(year=2001)
    gone, invalid = Mail("123456789A"), Mail("-q")
    Spool(settings_of(postfix)).headers([*mails, changed, gone, invalid])
    assert all(mail.parsed and mail.head.Subject for mail in mails)
    assert changed.parse_error == "its id is another message's by now"
    assert gone.parse_error == "it is not in Postfix's queue any more"
    assert invalid.parse_error == "'-q' is no id of a message in Postfix's queue"
    assert not any(mail.parsed for mail in (changed, gone, invalid))


def test_mail_of_the_other_directories(postfix: Postfix) -> None:
    """Corrupt mail and mail in maildrop are there, and what is still being received is not."""
    one = _one(postfix, "hold")
    source = postfix.queue_directory / "hold" / one.qid
    corrupt = postfix.queue_directory / "corrupt"
    copies = [corrupt / "C0FFEE", postfix.queue_directory / "incoming" / "C0FFEE1"]
    for copy in copies:
        shutil.copy(source, copy)
        shutil.chown(copy, "postfix")
    copies[1].chmod(0o600)
    try:
        found = {mail.qid: mail for mail in Spool(settings_of(postfix)).mails(parse=True)}
        assert len(found) == 8
        mail = found["C0FFEE"]
        assert (mail.status, mail.sender, mail.recipients) == (
            "corrupt",
            "held@example.org",
            ["d@down.test"],
        )
        assert mail.head.Subject == ["hold"]
        bare = Mail("C0FFEE")
        bare.status = "corrupt"
        Spool(settings_of(postfix)).headers([bare])
        assert bare.head.Subject == ["hold"]
    finally:
        for copy in copies:
            copy.unlink()


def test_a_stopped_postfix_is_read(postfix: Postfix) -> None:
    """The directories are read when Postfix does not run."""
    before = {mail.qid: facts(mail) for mail in Spool(settings_of(postfix)).mails()}
    postfix.stop()
    try:
        assert {mail.qid: facts(mail) for mail in Spool(settings_of(postfix)).mails()} == before
    finally:
        postfix.start()


def test_mail_that_was_submitted_here(postfix: Postfix) -> None:
    """Mail in maildrop, where its file begins otherwise, is read without a doubt."""
    postfix.stop()
    maildrop = postfix.queue_directory / "maildrop"
    try:
        postfix.sendmail("local", ["b@down.test", "c@down.test"], letter("submitted"))
        (name,) = [path.name for path in maildrop.iterdir()]
        for parse in (False, True):
            found = {one.qid: one for one in Spool(settings_of(postfix)).mails(parse)}
            assert found[name].parse_error == ""
            (listed,) = [mail for mail in loaded(postfix) if mail.qid == name]
            assert facts(found[name]) == facts(listed)
        assert found[name].head.Subject == ["submitted"]
    finally:
        for path in maildrop.iterdir():
            path.unlink()
        postfix.start()


def test_without_the_right(postfix: Postfix) -> None:
    """Who may not read the directories is told what would do."""
    program = """
import sys
from postoffice.postfix import Mail, PostfixRefused, PostfixSettings, Spool
spool = Spool(PostfixSettings(config_directory=sys.argv[1], spool_path=sys.argv[2]))
for act in (lambda: list(spool.mails()), lambda: spool.headers([Mail(sys.argv[3])])):
    try:
        act()
    except PostfixRefused as error:
        print(error)
"""
    qid = loaded(postfix)[0].qid
    places = [str(postfix.configuration), str(postfix.queue_directory)]
    done = subprocess.run(
        [*python_of_account(), "-c", program, *places, qid],
        capture_output=True,
        check=True,
        text=True,
        cwd="/",
        user=ACCOUNT,
        group=os.getgid(),
        extra_groups=[],
    )
    first, second = done.stdout.splitlines()
    assert first.endswith(
        "reading the queue directories needs root, the methods json and postqueue do not"
    )
    assert "Permission denied" in second


def test_nothing_there(tmp_path: Path, postfix: Postfix) -> None:
    """A spool that is none, and a postcat that is none, are an error of one line each."""
    with pytest.raises(PostfixError, match="spool_path is to be Postfix's queue_directory"):
        list(Spool(PostfixSettings(spool_path=str(tmp_path))).mails())
    with pytest.raises(PostfixMissing, match="no command /nowhere/postcat"):
        list(Spool(settings_of(postfix, cat_message=("/nowhere/postcat",))).mails())
