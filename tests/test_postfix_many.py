"""A Postfix with ten thousand messages, in every state and hostile ones among them."""

from __future__ import annotations

import random
import shutil
import smtplib
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from postoffice.postfix import Mail, MailSelector, PostqueueStore, QueueControl
from tests.postfix import Postfix, require_postfix
from tests.postfix_queue import HOSTILE_ADDRESSES, HOSTILE_TEXT, configuration, letter, settings_of

pytestmark = pytest.mark.torture

DEFERRED, HELD, ACTIVE, HOSTILE = 7000, 2000, 700, 300
EXPIRED = 800
MANY = DEFERRED + HELD + ACTIVE + HOSTILE
SMTP_SOURCE = "/usr/sbin/smtp-source"
MINUTES = 600.0
# What goes to hang.test stays active, with a server that never answers.
HANGING = "transport_maps = inline:{{ {{ hang.test = lmtp:inet:127.0.0.1:{port} }} }}\n"
FORGED = "rfc822;a+40b+0Arecipient:+20forged@b.test+0A+20+20+20+20+20+20999+20sender:+20f@b.test"


@pytest.fixture(scope="module")
def postfix() -> Iterator[Postfix]:
    """A Postfix with all of them."""
    require_postfix()
    if shutil.which(SMTP_SOURCE) is None:
        pytest.skip(f"there is no {SMTP_SOURCE}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        main = configuration(long_ids=True) + HANGING.format(port=port)
        with Postfix(main) as running:
            fill(running)
            yield running


def fill(postfix: Postfix) -> None:
    """Send it the messages, and wait until each is in its state."""
    for number in range(10):
        send_many(postfix, DEFERRED // 10, f"s{number}@example.org", f"r{number}@down.test")
    send_many(postfix, HELD, "held@example.org", "h@down.test", "hold them")
    send_many(postfix, ACTIVE, "active@example.org", "a@hang.test")
    random_ = random.Random(6)
    with smtplib.SMTP("127.0.0.1", postfix.smtp_port, timeout=60) as client:
        client.ehlo()
        client.command_encoding = "utf-8"
        for number in range(HOSTILE):
            utf8 = number % 3 == 0
            client.mail("" if number % 2 else '"a \\"b"@example.org', ["SMTPUTF8"] if utf8 else [])
            if utf8:
                client.rcpt("jürgen@down.test")
            else:
                client.rcpt(random_.choice(HOSTILE_ADDRESSES), [f"ORCPT={FORGED}"])
            client.rcpt(random_.choice(HOSTILE_ADDRESSES))
            long = "X-Long: " + "y" * random_.choice([10, 3000])
            client.data(letter(f"{HOSTILE_TEXT} {number}", long, "X-Last: yes"))
    expected = {"deferred": DEFERRED + HOSTILE, "hold": HELD, "active": ACTIVE}
    postfix.wait(lambda: Counter(one["queue_name"] for one in raw(postfix)) == expected, MINUTES)
    store = PostqueueStore(settings_of(postfix))
    store.load()
    doomed = MailSelector(store).lookup_status("deferred")[:EXPIRED]
    assert len(QueueControl(settings_of(postfix)).expire(doomed).done) == EXPIRED


def send_many(
    postfix: Postfix, number: int, sender: str, recipient: str, subject: str = "many"
) -> None:
    """Send the same message many times."""
    options = ["-s", "10", "-m", str(number), "-l", "2000", "-S", subject]
    addresses = ["-f", sender, "-t", recipient, f"127.0.0.1:{postfix.smtp_port}"]
    subprocess.run([SMTP_SOURCE, *options, *addresses], check=True, capture_output=True)


def raw(postfix: Postfix) -> list[dict[str, Any]]:
    """Return what Postfix itself lists."""
    return list(postfix.queue().values())


def of_postfix(postfix: Postfix) -> dict[str, tuple[object, ...]]:
    """Return what Postfix itself lists, by the ids."""
    return {
        one["queue_id"]: (
            one["queue_name"],
            one["message_size"],
            one["forced_expire"],
            datetime.fromtimestamp(one["arrival_time"]),  # noqa: DTZ006  # local, as documented
            one["sender"].replace("MAILER-DAEMON", ""),
            sorted(to["address"] for to in one["recipients"]),
        )
        for one in raw(postfix)
    }


def facts(mails: list[Mail]) -> dict[str, tuple[object, ...]]:
    """Return the same of our messages."""
    return {
        mail.qid: (
            *(mail.status, mail.size, mail.forced_expire, mail.date, mail.sender),
            sorted(map(str, mail.recipients)),
        )
        for mail in mails
    }


@pytest.mark.parametrize("method", ["json", "postqueue", "spool"])
def test_each_method_agrees_with_postfix(postfix: Postfix, method: str) -> None:
    """By each method all messages are there, with what Postfix itself tells of each."""
    store = PostqueueStore(settings_of(postfix))
    store.load(method)
    assert len(store.mails) == MANY
    assert facts(store.mails) == of_postfix(postfix)
    assert {mail.parse_error for mail in store.mails} == {""}
    summary = store.summary()
    assert summary["total_mails"] == MANY
    assert summary["total_mails_size"] == sum(mail.size for mail in store.mails)
    states = {"deferred": DEFERRED + HOSTILE, "hold": HELD, "active": ACTIVE}
    assert dict(summary["top_status"]) == states


def test_all_headers(postfix: Postfix) -> None:
    """The headers of all messages are read, behind overlong lines too, and by each method alike."""
    found = []
    for method in ("json", "spool"):
        store = PostqueueStore(settings_of(postfix))
        store.load(method, parse=True)
        assert all(mail.parsed and not mail.parse_error for mail in store.mails)
        found.append({mail.qid: dict(mail.head) for mail in store.mails})
        selector = MailSelector(store).lookup_header("X-Last", "yes")
        assert len(selector) == HOSTILE
        assert len(selector.reset().lookup_header("subject", "hold", exact=False)) == HELD
    assert found[0] == found[1]


def test_control_of_many(postfix: Postfix) -> None:
    """What is done to thousands is what Postfix then lists, and no other message is touched."""
    control = QueueControl(settings_of(postfix))
    store = PostqueueStore(settings_of(postfix))
    store.load()
    held = MailSelector(store).lookup_status("hold").mails
    some = MailSelector(store).lookup_sender("s1@example.org").mails
    before = of_postfix(postfix)
    assert len(control.release(held).done) == HELD
    assert len(control.hold(some).done) == len(some) == DEFERRED // 10
    after = of_postfix(postfix)
    changed = {qid for qid in before if before[qid][0] != after[qid][0]}
    assert changed == {mail.qid for mail in [*held, *some]}
    assert {after[mail.qid][0] for mail in some} == {"hold"}
    assert {qid: facts[1:] for qid, facts in after.items()} == {
        qid: facts[1:] for qid, facts in before.items()
    }
    hostile = MailSelector(store).lookup_recipient("@down.test", exact=False)
    hostile.lookup_header("X-Last", "yes")
    assert len(hostile) == 0
    doomed = MailSelector(store).lookup_sender("").mails
    outcome = control.delete([*doomed, *some])
    assert set(outcome.done) == {mail.qid for mail in [*doomed, *some]}
    left = of_postfix(postfix)
    assert left.keys() == before.keys() - set(outcome.done)
    again = control.delete([*doomed, *some])
    assert (len(again.gone), again.done) == (len(doomed) + len(some), ())
