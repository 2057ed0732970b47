"""Notices: who may get one, what it says, and that nothing in the original can shape it."""

from __future__ import annotations

import copy
import email
import email.policy
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.message import Message as StdlibMessage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from repoze.sendmail.encoding import encode_message

from postoffice.bounces import (
    REASONS,
    Notice,
    automatic,
    compose_bounce,
    compose_quarantine_notice,
    recipient_of_notice,
)
from postoffice.message import Envelope, Message

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=timezone(timedelta(hours=1)))
ARRIVED = int(datetime(2026, 3, 1, 11, 0, tzinfo=UTC).timestamp()) * 1_000_000_000
SENDER = "chris@example.com"
SUBMISSIONS = "submissions@example.net"
FROM = "Bouncer <bouncer@example.net>"

HEADER = b"""\
Return-Path: <chris@example.com>
From: Chris <chris@example.org>
To: Submissions <submissions@example.net>
Subject: A poem
Date: Last Tuesday
Message-ID: <poem@example.com>
"""

EXPECTED_ONCE = {
    "From",
    "To",
    "Subject",
    "Date",
    "Message-ID",
    "Auto-Submitted",
    "X-Postoffice",
    "MIME-Version",
    "Content-Type",
}
EXPECTED_AT_MOST_ONCE = {"In-Reply-To", "References", "Content-Transfer-Encoding"}


def make_message(
    header: bytes = HEADER,
    sender: str | None = SENDER,
    recipients: tuple[str, ...] = (SUBMISSIONS,),
    arrived: int = ARRIVED,
) -> Message:
    """Return a message as the intake hands it on."""
    raw = header + b"\nRoses are red.\n"
    return Message.from_bytes(raw, envelope=Envelope(sender, recipients, arrived))


def reparsed(notice: Notice | None) -> StdlibMessage:
    """Return the notice as whoever receives it reads it."""
    assert notice is not None
    return email.message_from_bytes(notice.message.as_bytes())


def subject_of(message: StdlibMessage) -> str:
    unfolded = message["Subject"].replace("\n", "")
    return str(make_header(decode_header(unfolded)))


def text_of(message: StdlibMessage) -> str:
    """Return what the notice says to people."""
    part = next(part for part in message.walk() if part.get_content_type() == "text/plain")
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload.decode(part.get_content_charset() or "ascii")


def parts_of(message: StdlibMessage) -> list[StdlibMessage]:
    payload = message.get_payload()
    assert isinstance(payload, list)
    return [part for part in payload if isinstance(part, StdlibMessage)]


def bounce(
    message: Message, reason: str | None = None, custom: StdlibMessage | None = None
) -> StdlibMessage:
    return reparsed(compose_bounce(message, FROM, NOW, reason, custom))


# Who may get a notice.


def test_ordinary_mail_may_be_answered() -> None:
    """Mail from a person with a known envelope sender may get a notice."""
    assert automatic(make_message()) is None


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (b"Return-Path: <>", "null-sender"),
        (b"Return-Path: < >", "null-sender"),
        (b"Return-Path:", "null-sender"),
        (b"X-Postoffice: Bounced", "notice"),
        (b"x-postoffice:\tbounced", "notice"),
        (b"X-Postoffice:\n Bounced", "notice"),
        (b"Auto-Submitted: auto-generated", "auto-submitted"),
        (b"Auto-Submitted: auto-replied; owner-email=a@b.example", "auto-submitted"),
        (b"auto-submitted: Auto-Notified", "auto-submitted"),
        (b"Auto-Submitted: no\nAuto-Submitted: auto-replied", "auto-submitted"),
        (b"Auto-Submitted: north", "auto-submitted"),
        (b"Auto-Submitted:", "auto-submitted"),
        (b"X-Autoreply: yes", "auto-submitted"),
        (b"Precedence: bulk", "precedence"),
        (b"Precedence: Junk", "precedence"),
        (b"Precedence: list (really)", "precedence"),
        (b"Precedence: auto_reply", "precedence"),
        (b"List-Id: Poets <poets.example.com>", "mailing-list"),
        (b"List-Unsubscribe: <mailto:leave@example.com>", "mailing-list"),
        (b"LIST-POST: NO", "mailing-list"),
        (b"Mailing-List: contact poets-help@example.com", "mailing-list"),
        (b"X-Auto-Response-Suppress: All", "suppressed"),
        (b"X-Auto-Response-Suppress: DR, RN, autoreply", "suppressed"),
        (b"X-Auto-Response-Suppress: NDR", "suppressed"),
        (b"Content-Type: multipart/report; report-type=delivery-status; boundary=x", "report"),
        (b"Content-Type: Multipart/Report", "report"),
        (b"Content-Type: message/disposition-notification", "report"),
    ],
)
def test_automatic_mail_is_recognised_by_its_header(field: bytes, reason: str) -> None:
    """A message whose header speaks of automatic mail gets no notice, with the reason's name."""
    message = make_message(HEADER + field + b"\n")
    assert automatic(message) == reason
    assert compose_bounce(message, FROM, NOW) is None
    assert compose_quarantine_notice(message, FROM, NOW) is None


@pytest.mark.parametrize(
    "field",
    [
        b"Auto-Submitted: no",
        b"Auto-Submitted: No (typed by hand)",
        b"Precedence: first-class",
        b"Precedence: normal",
        b"X-Auto-Response-Suppress: None",
        b"X-Auto-Response-Suppress: DR, RN",
        b"X-Postoffice: Hello",
        b"X-Postoffice-Rejected: Bounced",
        b"X-Listed: yes",
        b"Content-Type: multipart/mixed; boundary=report",
    ],
)
def test_personal_mail_is_not_taken_for_automatic(field: bytes) -> None:
    """A header field that resembles those of automatic mail forbids nothing."""
    assert automatic(make_message(HEADER + field + b"\n")) is None


def test_the_body_forbids_nothing() -> None:
    """What looks like a header field in the body is not taken for one."""
    raw = HEADER + b"\nX-Postoffice: Bounced\nPrecedence: bulk\n"
    message = Message.from_bytes(raw, envelope=Envelope(SENDER, (SUBMISSIONS,), ARRIVED))
    assert automatic(message) is None


@pytest.mark.parametrize(
    ("sender", "reason"),
    [
        ("", "null-sender"),
        (None, "unknown-sender"),
        ("chris", "invalid-sender"),
        ("@", "invalid-sender"),
        ("chris@", "invalid-sender"),
        ("@example.com", "invalid-sender"),
        ("chris@example..com", "invalid-sender"),
        ("chris@-example.com", "invalid-sender"),
        ("a@b.example, c@d.example", "invalid-sender"),
        ("a@b@c.example", "invalid-sender"),
        ("<chris@example.com>", "invalid-sender"),
        ('"<a@b.example>"@example.com', "invalid-sender"),
        ("chris rossi@example.com", "invalid-sender"),
        ("chris@example.com\nBcc: all@example.com", "invalid-sender"),
        ("chris@example.com\r", "invalid-sender"),
        ("chris\x00@example.com", "invalid-sender"),
        ("chris\x85@example.com", "invalid-sender"),
        ("chris\u2028@example.com", "invalid-sender"),
        ("chris\u202e@example.com", "invalid-sender"),
        ("chris\udce9@example.com", "invalid-sender"),
        ("-oQ/tmp@example.com", "invalid-sender"),
        ("c" * 243 + "@example.com", "invalid-sender"),
        ("\u00e9" * 122 + "@example.com", "invalid-sender"),
        ("chris@" + "c" * 64 + ".example", "invalid-sender"),
        ("chris@\u00bd\u2488.example", "invalid-sender"),
        ("Submissions@Example.NET", "own-address"),
        ("MAILER-DAEMON@example.com", "role-sender"),
        ("mailer-daemon+1@example.com", "role-sender"),
        ('"postmaster"@example.com', "role-sender"),
        ("listserv@example.com", "role-sender"),
        ("majordomo@example.com", "role-sender"),
        ("owner-poets@example.com", "role-sender"),
        ("poets-owner@example.com", "role-sender"),
        ("poets-request@example.com", "role-sender"),
        ("poets-bounces+chris=example.com@lists.example", "role-sender"),
        ("bounce-17@example.com", "role-sender"),
        ("bounces@example.com", "role-sender"),
        ("noreply@example.com", "role-sender"),
        ("No-Reply@example.com", "role-sender"),
        ("no_reply+17@example.com", "role-sender"),
        ("donotreply@example.com", "role-sender"),
        ("do-not-reply@example.com", "role-sender"),
    ],
)
def test_sender_that_gets_no_notice(sender: str | None, reason: str) -> None:
    """No notice goes to an envelope sender that is none, unsafe, our own or a program's."""
    message = make_message(sender=sender)
    assert automatic(message) == reason
    assert compose_bounce(message, FROM, NOW) is None
    assert compose_quarantine_notice(message, FROM, NOW) is None


@pytest.mark.parametrize(
    "sender",
    [
        "chris+poems@example.com",
        "chris..rossi.@example.com",
        "prvs=1234=chris@example.com",
        "SRS0=abc=de=example.org=chris@example.com",
        '"chris,rossi"@example.com',
        '"a@b"@example.com',
        "chris@[192.0.2.1]",
        "chris@[IPv6:2001:db8::1]",
        "chris@host_1.example.com",
        "norbert@example.com",
        "bouncer@example.com",
        "requester@example.com",
        "o'brien@example.com",
        "c" * 242 + "@example.com",
        "ch\u00ecara@example.com",
    ],
)
def test_sender_that_may_get_a_notice(sender: str) -> None:
    """The notice goes to the envelope sender as it is written, case and all."""
    message = make_message(sender=sender)
    assert automatic(message) is None
    assert recipient_of_notice(message) == sender
    notice = compose_bounce(message, FROM, NOW)
    assert notice is not None
    assert notice.recipients == (sender,)


def test_recipient_domain_is_ascii() -> None:
    """A domain in another script goes out in its ASCII form, so that any server takes it."""
    message = make_message(sender="chris@b\u00fccher.example")
    assert recipient_of_notice(message) == "chris@xn--bcher-kva.example"


@pytest.mark.parametrize("sender", ["", None])
def test_header_from_never_gets_a_notice(sender: str | None) -> None:
    """Without a usable envelope sender there is no recipient, whatever From and Reply-To say."""
    message = make_message(HEADER + b"Reply-To: chris@example.com\n", sender=sender)
    assert recipient_of_notice(message) is None


def test_message_without_envelope_gets_no_notice() -> None:
    """A message whose envelope is not known at all has an unknown sender."""
    message = Message()
    message["From"] = "Chris <chris@example.com>"
    assert recipient_of_notice(message) is None
    assert automatic(message) == "unknown-sender"
    assert compose_bounce(message, FROM, NOW) is None


def test_no_notice_to_the_address_it_comes_from() -> None:
    """A notice that would go to the very address that it is from is not composed."""
    message = make_message(sender="Bouncer@example.net")
    assert compose_bounce(message, FROM, NOW) is None
    assert compose_quarantine_notice(message, FROM, NOW) is None


def test_a_notice_is_never_answered() -> None:
    """A notice of ours that comes back, even under a person's address, gets no notice."""
    notice = compose_bounce(make_message(), FROM, NOW)
    assert notice is not None
    returned = Message.from_bytes(
        notice.message.as_bytes(), envelope=Envelope(SENDER, (SUBMISSIONS,), ARRIVED)
    )
    assert automatic(returned) == "notice"


def test_every_reason_is_explained() -> None:
    """Each reason's name is stable text without spaces and has an explanation."""
    assert all(name == name.lower() and " " not in name for name in REASONS)
    assert all(REASONS.values())


# What a bounce says.


def test_bounce_comes_from_the_null_sender() -> None:
    """The envelope of a bounce is from nobody to the envelope sender of the original."""
    notice = compose_bounce(make_message(), FROM, NOW)
    assert notice is not None
    assert (notice.sender, notice.recipients) == ("", (SENDER,))


def test_bounce_header() -> None:
    """A bounce says what it is, what it answers, when, and names the original's recipients."""
    message = bounce(make_message())
    assert message["From"] == FROM
    assert message["To"] == SENDER
    expected = "Your message to Submissions <submissions@example.net> has bounced."
    assert subject_of(message) == expected
    assert message["Date"] == "Sun, 01 Mar 2026 12:30:00 +0100"
    assert message["Auto-Submitted"] == "auto-replied"
    assert message["X-Postoffice"] == "Bounced"
    assert message["In-Reply-To"] == "<poem@example.com>"
    assert message["References"] == "<poem@example.com>"
    assert message["MIME-Version"] == "1.0"


def test_message_ids_are_unique_and_of_our_domain() -> None:
    """Two notices about one message have different Message-IDs, of the From address's domain."""
    first, second = (bounce(make_message())["Message-ID"] for _ in range(2))
    assert first != second
    assert first.startswith("<20260301123000.")
    assert first.endswith("@example.net>")


def test_bounce_default_text() -> None:
    """Without a reason the text says when and to whom it was sent, and that it is invalid."""
    text = text_of(bounce(make_message()))
    assert text.startswith("Your message has bounced.\n\n    To: ")
    assert "\n    To: Submissions <submissions@example.net>\n" in text
    assert "\n    Sent: Last Tuesday\n" in text
    assert "\n    Subject: A poem\n" in text
    assert "\n    The message is invalid.\n" in text


def test_bounce_reason_text() -> None:
    """A reason, in any script and of several lines, is in the text in UTF-8."""
    text = text_of(
        bounce(make_message(), "Not entertaining eno\xfagh.\r\n\u8a69\u3067\u306f\x1b[2J")
    )
    assert "\n    Not entertaining eno\xfagh.\n    \u8a69\u3067\u306f [2J\n" in text


@pytest.mark.parametrize("reason", ["", "  \n\t\n", "\x00"])
def test_empty_reason_is_none(reason: str) -> None:
    """A reason without anything to read is as good as none."""
    assert "The message is invalid." in text_of(bounce(make_message(), reason))


def test_long_reason_is_cut() -> None:
    """A reason of any length becomes at most 50 lines and 2,000 characters."""
    assert text_of(bounce(make_message(), "#" * 1_000_000)).count("#") <= 2000
    assert len(text_of(bounce(make_message(), "x\n" * 1_000_000)).splitlines()) < 70


def test_bounce_is_a_delivery_status_notification() -> None:
    """A bounce is a text, a status of each recipient, and the original's header without body."""
    recipients = (SUBMISSIONS, "p\u00f6ems+x@b\u00fccher.example", "not an address")
    message = bounce(make_message(recipients=recipients), "Too\nlong, eno\xfagh.")
    assert message.get_content_type() == "multipart/report"
    assert message.get_param("report-type") == "delivery-status"
    text, status, header = parts_of(message)
    assert text.get_content_type() == "text/plain"
    assert text.get_content_charset() == "utf-8"
    assert status.get_content_type() == "message/delivery-status"
    assert [part.items() for part in parts_of(status)] == [
        [
            ("Reporting-MTA", "dns; example.net"),
            ("Arrival-Date", "Sun, 01 Mar 2026 11:00:00 +0000"),
        ],
        [
            ("Final-Recipient", "rfc822; submissions@example.net"),
            ("Action", "failed"),
            ("Status", "5.0.0"),
            ("Diagnostic-Code", "X-Postoffice; Too long, eno?gh."),
        ],
        [
            ("Final-Recipient", "utf-8; p\\x{F6}ems\\x{2B}x@xn--bcher-kva.example"),
            ("Action", "failed"),
            ("Status", "5.0.0"),
            ("Diagnostic-Code", "X-Postoffice; Too long, eno?gh."),
        ],
    ]
    assert header.get_content_type() == "text/rfc822-headers"
    assert header["Content-Transfer-Encoding"] == "7bit"
    assert header.get_payload(decode=True) == HEADER
    assert b"Roses" not in message.as_bytes()


def test_bounce_without_known_recipient_is_a_text() -> None:
    """If the envelope names no recipient there is no status to report, only the text."""
    message = bounce(make_message(recipients=()))
    assert message.get_content_type() == "text/plain"
    assert "has bounced" in text_of(message)
    assert "Submissions <submissions@example.net>" in subject_of(message)


def test_bounce_of_mail_without_header_fields() -> None:
    """What the header does not say is taken from the envelope."""
    message = bounce(make_message(b"X-Nothing: 1\n"))
    assert subject_of(message) == "Your message to submissions@example.net has bounced."
    assert "\n    Received: Sun, 01 Mar 2026 11:00:00 +0000\n" in text_of(message)
    assert "In-Reply-To" not in message
    assert "References" not in message


@pytest.mark.parametrize("arrived", [0, -1, 10**30])
def test_bounce_of_mail_from_nowhere(arrived: int) -> None:
    """What neither header nor envelope says, nor can be true, is left out."""
    message = bounce(make_message(b"X-Nothing: 1\n", recipients=(), arrived=arrived))
    assert subject_of(message) == "Your message has bounced."
    assert text_of(message).startswith("Your message has bounced.\n\nThe reason given is:")


def test_status_without_arrival() -> None:
    """A status says nothing of the arrival if its time is not known."""
    status = parts_of(bounce(make_message(arrived=0)))[1]
    assert parts_of(status)[0].items() == [("Reporting-MTA", "dns; example.net")]


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        ("To: Submissi\u00f6ns <s@example.net>\n".encode(), "Submissi\u00f6ns <s@example.net>"),
        (b"To: =?utf-8?q?=C3=A9?= <s@example.net>\n", "\u00e9 <s@example.net>"),
        (b"To: undisclosed-recipients:;\n", "undisclosed-recipients:;"),
        (b"To: a@example.net,\n b@example.net\n", "a@example.net, b@example.net"),
        (
            b"To: =?utf-8?q?=3D=3Futf-8=3Fq=3F=0D=0ABcc=3A?= x\n",
            None,
        ),
    ],
)
def test_subject_shows_recipients_decoded(header: bytes, shown: str | None) -> None:
    """The Subject names the original's To as a person reads it, on one line."""
    subject = subject_of(bounce(make_message(header)))
    assert subject.splitlines() == [subject]
    if shown is not None:
        assert subject == f"Your message to {shown} has bounced."


def test_subject_that_looks_encoded_is_not_decoded_twice() -> None:
    """An encoded word within an encoded word is shown as text, and not decoded by the reader."""
    header = b"To: =?us-ascii?q?=3D=3Fus-ascii=3Fq=3FBoo=3F=3D?= <s@example.net>\n"
    assert "=?us-ascii?q?Boo?=" in subject_of(bounce(make_message(header)))


def test_long_recipients_are_cut() -> None:
    """A To of any length takes a short piece of the Subject."""
    subject = subject_of(bounce(make_message(b"To: " + b"someone@example.net, " * 9999 + b"\n")))
    assert len(subject) < 250
    assert subject.endswith("... has bounced.")


def test_references_are_carried_on() -> None:
    """References are the original's, then its Message-ID, which In-Reply-To has alone."""
    header = b"References: <a@x> <b@x>\n <c@x>\nIn-Reply-To: <c@x>\nMessage-ID: <d@x>\n"
    message = bounce(make_message(header))
    assert message["References"] == "<a@x> <b@x> <c@x> <d@x>"
    assert message["In-Reply-To"] == "<d@x>"


def test_references_start_from_in_reply_to() -> None:
    """Mail without References that answers one message continues that thread."""
    one = bounce(make_message(b"In-Reply-To: <c@x>\nMessage-ID: <d@x>\n"))
    two = bounce(make_message(b"In-Reply-To: <b@x> <c@x>\nMessage-ID: <d@x>\n"))
    assert one["References"] == "<c@x> <d@x>"
    assert two["References"] == "<d@x>"


def test_long_references_are_cut() -> None:
    """Of long References the first and the last are kept, each once."""
    ids = " ".join(f"<{n}@x>" for n in range(2000))
    header = f"References: {ids} <1999@x>\nMessage-ID: <own@x>\n".encode()
    kept = bounce(make_message(header))["References"].split()
    assert kept == ["<0@x>", *(f"<{n}@x>" for n in range(1982, 2000)), "<own@x>"]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"poem",
        b"<poem>",
        b"<@x>",
        b"<x@>",
        b"<a b@x>",
        b"<a\x00@x>",
        b"<a\x1b@x>",
        b"<\xe9@x>",
        b"<" + b"a" * 300 + b"@x>",
    ],
)
def test_broken_message_id_is_not_repeated(value: bytes) -> None:
    """A Message-ID that is none by its syntax enters no header of the notice."""
    message = bounce(make_message(b"Message-ID: " + value + b"\nReferences: " + value + b"\n"))
    assert "In-Reply-To" not in message
    assert "References" not in message


def test_reason_and_custom_message_exclude_each_other() -> None:
    """Giving both a reason and a message is an error, even for mail that gets no notice."""
    for sender in (SENDER, ""):
        with pytest.raises(ValueError, match="only one"):
            compose_bounce(make_message(sender=sender), FROM, NOW, "Boo", StdlibMessage())


@pytest.mark.parametrize(
    "from_addr",
    [
        "",
        "bouncer",
        "a@example.net, b@example.net",
        "bouncer@example.net\r\nBcc: c@example.com",
        "Bouncer\n <bouncer@example.net>",
        "<>",
    ],
)
@pytest.mark.parametrize("sender", [SENDER, ""])
def test_bad_from_address_is_an_error(from_addr: str, sender: str) -> None:
    """A from address that is not one address with a domain is refused, always."""
    message = make_message(sender=sender)
    with pytest.raises(ValueError, match="not one address"):
        compose_bounce(message, from_addr, NOW)
    with pytest.raises(ValueError, match="not one address"):
        compose_quarantine_notice(message, from_addr, NOW)


def test_time_without_zone_is_an_error() -> None:
    """A time that does not say its zone is refused."""
    naive = NOW.replace(tzinfo=None)
    with pytest.raises(ValueError, match="zone"):
        compose_bounce(make_message(), FROM, naive)
    with pytest.raises(ValueError, match="zone"):
        compose_quarantine_notice(make_message(), FROM, naive)


@pytest.mark.parametrize(
    ("from_addr", "shown"),
    [
        ("bouncer@example.net", "bouncer@example.net"),
        ("Bounc\xe9r <bouncer@example.net>", "Bounc\xe9r <bouncer@example.net>"),
        ('"Bouncer, The" <b@example.net>', '"Bouncer, The" <b@example.net>'),
        ("B <b@b\u00fccher.example>", "B <b@xn--bcher-kva.example>"),
    ],
)
def test_from_address(from_addr: str, shown: str) -> None:
    """The notice is from the address as the application gave it, in any script."""
    message = reparsed(compose_bounce(make_message(), from_addr, NOW))
    assert str(make_header(decode_header(message["From"]))) == shown


def test_smtputf8_sender() -> None:
    """A sender whose local part is not ASCII keeps its address, in UTF-8, in the notice's To."""
    sender = "ch\u00ecara@example.com"
    for custom in (None, MIMEText("Boo"), EmailMessage(), Message()):
        notice = compose_bounce(make_message(sender=sender), FROM, NOW, custom=custom)
        assert notice is not None
        assert notice.message["To"] == sender
        assert f"To: {sender}\n".encode() in notice.message.as_bytes()
        assert sender in notice.message.as_string()
        # So does smtplib.SMTP.send_message.
        policy: Any = notice.message.policy
        as_sent = notice.message.as_bytes(policy=policy.clone(utf8=True))
        assert f"To: {sender}\n".encode() in as_sent


def test_smtputf8_from_address() -> None:
    """A from address whose local part is not ASCII is written in UTF-8."""
    notice = compose_bounce(make_message(), "B\u00f6 <b\u00f6@example.net>", NOW)
    assert notice is not None
    raw = notice.message.as_bytes()
    assert " <b\u00f6@example.net>\n".encode() in raw


# What an application composed itself.


def test_custom_message_is_sent_as_given() -> None:
    """An application's own message keeps all it has and gets the fields that are missing."""
    custom = MIMEText("TEST")
    custom["Subject"] = "No"
    custom["To"] = "Chris <other@example.com>"
    custom["X-Mine"] = "1"
    message = bounce(make_message(), custom=custom)
    assert message.get_payload() == "TEST"
    assert message["Subject"] == "No"
    assert message["To"] == "Chris <other@example.com>"
    assert message["X-Mine"] == "1"
    assert message["From"] == FROM
    assert message["X-Postoffice"] == "Bounced"
    assert message["Auto-Submitted"] == "auto-replied"
    assert message["In-Reply-To"] == message["References"] == "<poem@example.com>"
    assert message["Date"]
    assert message["Message-ID"]
    assert all(len(message.get_all(name, ())) == 1 for name in message)


def test_custom_message_keeps_its_own_fields() -> None:
    """What an application set is not set again, X-Postoffice alone excepted."""
    custom = MIMEText("TEST")
    values = {
        "From": "x@example.net",
        "Auto-Submitted": "auto-generated",
        "In-Reply-To": "<x@y>",
        "References": "<x@y>",
        "Message-ID": "<z@y>",
        "Date": "Sun, 01 Mar 2026 11:00:00 +0000",
    }
    for name, value in values.items():
        custom[name] = value
    custom["X-Postoffice"] = "Hello"
    custom["x-postoffice"] = "again"
    message = bounce(make_message(), custom=custom)
    assert {name: message[name] for name in values} == values
    assert message.get_all("X-Postoffice") == ["Bounced"]


def test_custom_message_is_sent_to_the_envelope_sender() -> None:
    """Whatever To an application's message has, the null sender sends it to the sender alone."""
    custom = MIMEText("TEST")
    custom["To"] = "everybody@example.com"
    notice = compose_bounce(make_message(), FROM, NOW, custom=custom)
    assert notice is not None
    assert (notice.sender, notice.recipients) == ("", (SENDER,))


@pytest.mark.parametrize("make", [StdlibMessage, EmailMessage, Message, MIMEMultipart])
def test_custom_message_is_left_alone(make: Callable[[], StdlibMessage]) -> None:
    """The application's object, of whatever class, is not changed: a copy is sent."""
    custom = make()
    custom["Subject"] = "N\u00f6"
    before = copy.deepcopy(custom).items()
    message = bounce(make_message(), custom=custom)
    assert custom.items() == before
    assert message["X-Postoffice"] == "Bounced"
    assert subject_of(message) == "N\u00f6"


def test_custom_message_that_cannot_be_serialised() -> None:
    """What cannot be sent is an error when it is composed, not when the rest is committed."""
    custom = StdlibMessage()
    custom["Subject"] = "one\nX-Two: two"
    with pytest.raises(HeaderParseError):
        compose_bounce(make_message(), FROM, NOW, custom=custom)


# The note that a message is delayed.


def test_quarantine_notice() -> None:
    """A quarantine notice is a plain automatic reply with the headers that a bounce has."""
    notice = compose_quarantine_notice(make_message(), "Oopsy Daisy <error@example.net>", NOW)
    message = reparsed(notice)
    assert notice is not None
    assert (notice.sender, notice.recipients) == ("", (SENDER,))
    assert message.get_content_type() == "text/plain"
    assert message["From"] == "Oopsy Daisy <error@example.net>"
    assert message["To"] == SENDER
    assert subject_of(message) == (
        "An error has occurred while processing your email to Submissions <submissions@example.net>"
    )
    assert message["X-Postoffice"] == "Bounced"
    assert message["Auto-Submitted"] == "auto-replied"
    assert message["In-Reply-To"] == message["References"] == "<poem@example.com>"
    assert "\n    Sent: Last Tuesday\n" in text_of(message)
    assert "need not send it again" in text_of(message)
    assert set(message.keys()) == EXPECTED_ONCE | EXPECTED_AT_MOST_ONCE


# Hostile originals.


def check_wellformed(notice: Notice | None) -> None:
    """Check that the notice has its own header fields, once each, and no overlong line."""
    assert notice is not None
    raw = notice.message.as_bytes()
    assert raw == notice.message.as_bytes()
    assert b"\x00" not in raw
    assert b"\r" not in raw
    assert raw.isascii()
    assert max(map(len, raw.split(b"\n"))) <= 998
    header = email.message_from_bytes(raw).keys()
    assert len(header) == len(set(header))
    assert EXPECTED_ONCE <= set(header) <= EXPECTED_ONCE | EXPECTED_AT_MOST_ONCE
    assert all(value.isprintable() for value in subject_of(email.message_from_bytes(raw)))
    assert email.message_from_bytes(raw, policy=email.policy.default)["To"] == SENDER
    for part in email.message_from_bytes(raw).walk():
        assert not part.defects
    assert encode_message(copy.deepcopy(notice.message)).isascii()


HOSTILE = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")),
    st.lists(
        st.sampled_from(
            [
                b"\r\nBcc: x@example.com\r\n",
                b"\nBcc: x@example.com\n\n",
                b"\rBcc: x",
                b"\n ",
                b"\r\n\t",
                b"\x00",
                b"\x1b[2J",
                b"\xe2\x80\xa8",
                b"\xe2\x80\xae",
                b"\xff\xfe",
                b"<a@b>",
                b"<",
                b">",
                b"@",
                b"=?utf-8?q?=0D=0ABcc=3A_x=40example.com?=",
                b"=?utf-8?b?DQpCY2M6IHhAZXhhbXBsZS5jb20=?=",
                b"=?utf-8?q?=3D=3Futf-8=3Fq=3F=0D=3F=3D?=",
                b"x" * 1200,
                b"%s{0}{to}",
                b'"',
                b",",
                b"(" * 50,
                b"--===============",
                b"From me",
            ]
        ),
        max_size=12,
    ).map(b"".join),
)
# Such mail gets no notice at all, which is right, but proves nothing about one.
FIELDS = ("To", "Subject", "Date", "Message-ID", "References", "In-Reply-To", "From", "Cc")


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), HOSTILE), max_size=6))
@example([("To", b"\r\nBcc: x@example.com\r\n\r\nbody"), ("Date", b"a\rb\x00c")])
@example([("Subject", b"a\r\r\n b \r")])
def test_hostile_fields_shape_no_notice(fields: list[tuple[str, bytes]]) -> None:
    """Whatever the original's fields hold, a notice has its own, once each, in short lines."""
    header = b"".join(name.encode() + b": " + value + b"\n" for name, value in fields)
    message = make_message(header)
    if automatic(message) is None:
        check_wellformed(compose_bounce(message, FROM, NOW))
        check_wellformed(compose_quarantine_notice(message, FROM, NOW))


@settings(max_examples=150)
@given(HOSTILE, st.text(max_size=50) | st.none())
def test_hostile_bytes_shape_no_notice(raw: bytes, reason: str | None) -> None:
    """Whatever bytes are the whole original, and the reason, a notice is well formed."""
    message = Message.from_bytes(raw, envelope=Envelope(SENDER, (SUBMISSIONS,), ARRIVED))
    if automatic(message) is None:
        check_wellformed(compose_bounce(message, FROM, NOW, reason))
        check_wellformed(compose_quarantine_notice(message, FROM, NOW))


@settings(max_examples=150)
@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=3))
@example("a@b.example\r\nBcc: x@example.com", ["a@b.example\r\nAction: delivered"])
def test_hostile_envelope_shapes_no_notice(sender: str, recipients: list[str]) -> None:
    """Whatever the envelope holds, nothing raises, and no recipient is unprintable or blank."""
    message = make_message(sender=sender, recipients=tuple(recipients))
    automatic(message)
    recipient = recipient_of_notice(message)
    assert recipient is None or (recipient.isprintable() and " " not in recipient)
    check_wellformed(compose_bounce(make_message(recipients=tuple(recipients)), FROM, NOW))


@pytest.mark.parametrize("name", ["To", "References", "X"])
@pytest.mark.parametrize(
    "value",
    [
        b"x" * 1_000_000,
        b" " * 1_000_000,
        b"<" * 1_000_000,
        b"<a" * 500_000,
        b"<a@b> " * 160_000,
        b"\xff" * 1_000_000,
        b"=?utf-8?q?=C3=A9?= " * 55_000,
        b"x\n " * 300_000,
    ],
    ids=["letters", "spaces", "brackets", "open", "ids", "8bit", "encoded", "folds"],
)
def test_huge_fields_are_bounded(name: str, value: bytes) -> None:
    """A field of a megabyte makes neither a long notice nor a slow one."""
    message = make_message(name.encode() + b": x" + value + b"\n")
    started = time.process_time()
    notice = compose_bounce(message, FROM, NOW)
    check_wellformed(notice)
    assert notice is not None
    assert time.process_time() - started < 5
    assert len(notice.message.as_bytes()) < 300_000


@pytest.mark.parametrize(
    ("header", "returned"),
    [
        (b"A: b\r\nC: d\r\n", b"A: b\nC: d\n"),
        (b"A: \xc3\xa9\n", b"A: \xc3\xa9\n"),
        (b"A: \xff\xfe\x00\x1b[2J\n", b"A: \xff\xfe\x00\x1b[2J\n"),
        (b"A: b\r c\nD: e\n", b"A: b\r c\nD: e\n"),
        (b"A: b \nC:\t\n", b"A: b \nC:\t\n"),
        (b"A: " + b"b" * 2000 + b"\n", b"A: " + b"b" * 2000 + b"\n"),
    ],
)
def test_header_of_the_original_is_returned_exactly(header: bytes, returned: bytes) -> None:
    """The original's header comes back octet for octet, line ends apart, encoded if need be."""
    message = bounce(make_message(header))
    assert parts_of(message)[2].get_payload(decode=True) == returned


def test_long_header_of_the_original_is_cut() -> None:
    """Of a header over 64 KiB whole lines of its beginning are returned."""
    line = b"X-Line: " + b"x" * 70 + b"\n"
    message = bounce(make_message(line * 2000))
    returned = parts_of(message)[2].get_payload(decode=True)
    assert isinstance(returned, bytes)
    assert 65_000 < len(returned) <= 65_536
    assert returned == line * returned.count(b"\n")
