"""The message: what arrived byte for byte, read leniently, changed and written."""

from __future__ import annotations

import copy
import email
import email.header
import email.message
import email.policy
import mmap
import pickle
import tempfile
import tracemalloc
from email.generator import BytesGenerator
from email.mime.text import MIMEText
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postoffice.message import (
    Envelope,
    Message,
    MIMEMultipart,
    decode_header,
    encode_header,
    mta_queue_id,
)

MAILS = sorted((Path(__file__).parent / "mail").glob("*.eml"))
OWN = (("X-Postoffice-Date", "1700000000"), ("X-Postoffice-Rejected", "Throttled"))


def mail(name: str) -> bytes:
    return (Path(__file__).parent / "mail" / f"{name}.eml").read_bytes()


def read_everything(message: Message) -> None:
    """Call every reading method of a message and all its parts."""
    for text in (*message.header_texts(), *message.values(), *message.keys()):
        assert not set(text) & set("\r\n\0\x1b\x85\u2028")
        text.encode("utf-8")
    assert len(message) == len(message.items()) == len(list(message))
    for name in ("To", "From", "Cc", "X-Original-To", "Return-Path", "Subject", "None"):
        assert (name in message) == (message[name] is not None)
        assert len(message.addresses(name)) == len(message.hostnames(name))
        assert message.topmost(name) == message.get(name)
        message.first_raw(name)
        message.get_all(name)
    assert message.message_id.strip()
    assert message.raw[message.header_end :] == bytes(message.body_view)
    for text in message.text_parts():
        text.encode("utf-8")
    for part in message.walk():
        assert isinstance(part, email.message.Message)
        assert part.get_content_type().count("/") == 1
        assert part.get_content_type() == (
            f"{part.get_content_maintype()}/{part.get_content_subtype()}"
        )
        part.get_content_charset()
        part.get_charsets()
        part.get_params()
        part.get_param("name")
        part.get_filename()
        part.get_boundary()
        part.get_content_disposition()
        part.get_payload()
        part.get_payload(decode=True)
        part.get_unixfrom()
        part.as_bytes()
        part.as_string()
        assert part.items() is not None
        assert list(part.defects) is not None
        assert isinstance(part, Message)
        assert part.raw is not None
    assert str(message).encode("utf-8") is not None


@pytest.mark.parametrize("path", MAILS, ids=lambda path: path.stem)
def test_every_mail_is_read_without_raising(path: Path) -> None:
    """No reading method raises on any mail, and reading changes nothing."""
    raw = path.read_bytes()
    for own in (None, (), OWN):
        message = Message.from_bytes(raw, own)
        before = message.as_bytes()
        read_everything(message)
        assert message.raw == raw
        assert message.is_untouched()
        assert message.as_bytes() == bytes(message) == before
        if own is None:
            assert before == raw


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_random_bytes_are_read_without_raising(raw: bytes) -> None:
    """No reading method raises on any bytes."""
    message = Message.from_bytes(raw, OWN)
    read_everything(message)
    assert message.raw == raw


SCRAPS = [
    b"",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"=?utf-8?b?",
    b'"',
    b"\n--b\n",
    b";",
    b"X-Postoffice: ",
]


@given(st.sampled_from(MAILS), st.data())
@settings(max_examples=150, deadline=None)
def test_mutated_mails_are_read_and_changed_without_raising(
    path: Path, data: st.DataObject
) -> None:
    """No method raises on mails with bytes cut out and put in, nor on changing them."""
    raw = path.read_bytes()[:3000]
    for _ in range(3):
        at = data.draw(st.integers(0, len(raw)))
        cut = data.draw(st.integers(0, 10))
        raw = raw[:at] + data.draw(st.sampled_from(SCRAPS)) + raw[at + cut :]
    message = Message.from_bytes(raw, OWN)
    read_everything(message)
    again = Message.from_bytes(message.as_bytes(), None)
    assert [k for k in again if k.lower().startswith("x-postoffice")] == [k for k, _ in OWN]
    assert again.header_texts() == message.header_texts()
    message["X-New"] = "Grüße"
    del message["subject"]
    changed = Message.from_bytes(message.as_bytes(), None)
    assert changed["X-New"] == "Grüße"
    assert "subject" not in changed
    assert bytes(changed.body_view) == bytes(message.body_view)
    message.as_bytes(policy=email.policy.SMTP)


@pytest.mark.parametrize(
    "raw",
    [
        b"".join(b"Content-Type: multipart/a; boundary=%d\n\n--%d\n" % (i, i) for i in range(1000)),
        b"Subject: x\n\n" + b"y" * 5_000_000,
        b"Subject: " + b"=?utf-8?q?a?= " * 70_000 + b"\n\n",
        b"Subject: " + b" " * 1_000_000 + b"x\n\n",
        b"Subject: a" + b"\n " * 200_000 + b"x\n\n",
        b"a: b\n" * 100_000 + b"\n",
        b"From \n" * 100_000 + b"\n",
        b"a\r" * 100_000,
        b"Content-Type: text/plain" + b";" * 500_000 + b"\n\n",
        b"\n".join([b"Content-Type: multipart/mixed; boundary=b\n", b"--b\nx\n" * 50_000]),
        b"\0" * 500_000,
    ],
    ids=[
        "nested",
        "line",
        "words",
        "spaces",
        "folds",
        "fields",
        "from",
        "cr",
        "params",
        "parts",
        "nul",
    ],
)
def test_huge_hostile_mails_are_read_in_time(raw: bytes) -> None:
    """Mails made to be slow or deep are read by every method, at once."""
    message = Message.from_bytes(raw, OWN)
    message.header_texts()
    message.hostnames("To")
    assert sum(map(len, message.text_parts())) <= len(raw)
    assert len(list(message.walk())) <= 10_001
    message.get_payload(decode=True)
    message.get_filename()
    assert message.message_id
    assert message.as_bytes().startswith(b"X-Postoffice-Date: 1700000000\n")


# -- the bytes -------------------------------------------------------------------------------------


def test_ours_come_first_and_forged_fields_are_cut() -> None:
    """as_bytes is our fields and the raw bytes without forged fields and their folds."""
    raw = mail("forged-postoffice-headers")
    message = Message.from_bytes(raw, OWN)
    kept = [line for line in raw.splitlines(True)[:-1] if b"ostoffice" not in line.lower()[:20]]
    kept = [line for line in kept if line not in (b" and folded\n", b" 17\n")] + [b""]
    wanted = b"X-Postoffice-Date: 1700000000\nX-Postoffice-Rejected: Throttled\n"
    rejected = raw.lower().index(b"x-postoffice-rejected")
    wanted += raw[raw.index(b"From:") : rejected] + b"Subject: x\n\n" + raw.splitlines(True)[-1]
    assert message.as_bytes() == wanted
    assert message.raw == raw
    assert message["x-postoffice-rejected"] == "Throttled"
    assert message.get_all("X-Postoffice-Id") is None
    assert "X-Postoffice" not in message


def test_forged_fields_can_be_looked_at() -> None:
    """With no headers of ours declared, the raw header is shown as it is."""
    assert Message.from_bytes(mail("ricochet"), own_headers=None)["X-Postoffice"] == "Bounced"
    assert Message.from_bytes(mail("ricochet"))["X-Postoffice"] is None


def test_forged_fields_beyond_the_limit_are_cut() -> None:
    """A forged field is cut even where fields are no longer looked at."""
    raw = b"a: b\n" * 20_000 + b"X-Postoffice: Bounced\n folded\nc: d\n\nbody"
    message = Message.from_bytes(raw)
    wanted = b"a: b\n" * 20_000 + b"c: d\n\nbody"
    assert message.as_bytes() == wanted
    message["X-New"] = "y"
    assert message.as_bytes() == (
        b"a: b\n" * 10_000 + b"X-New: y\n" + b"a: b\n" * 10_000 + b"c: d\n\nbody"
    )


def test_ours_end_as_the_raw_does() -> None:
    """Our fields end in CRLF where the raw's first line does."""
    message = Message.from_bytes(mail("crlf"), OWN)
    assert message.as_bytes() == (
        b"X-Postoffice-Date: 1700000000\r\nX-Postoffice-Rejected: Throttled\r\n" + mail("crlf")
    )


def test_a_leading_fold_cannot_continue_ours() -> None:
    """A fold at the very start of the raw is dropped, it would continue our last field."""
    message = Message.from_bytes(mail("leading-fold"), OWN)
    assert b"evil" not in message.as_bytes()
    again = Message.from_bytes(message.as_bytes(), None)
    assert again["X-Postoffice-Rejected"] == "Throttled"


def test_ours_come_before_an_mbox_line() -> None:
    """An mbox From line comes behind our fields, and hides neither ours nor the others."""
    raw = mail("mbox-from-line")
    message = Message.from_bytes(raw, OWN)
    assert message.get_unixfrom() == raw.split(b"\n")[0].decode()
    assert message.as_bytes().endswith(raw)
    again = Message.from_bytes(message.as_bytes(), None)
    assert again.header_texts() == message.header_texts()
    plain = Message.from_bytes(raw)
    plain["X-New"] = "y"
    assert plain.as_bytes() == raw.replace(b"\n\n", b"\nX-New: y\n\n", 1)


def test_unixfrom_is_put_in_front() -> None:
    """as_bytes and as_string put an mbox line in front when asked."""
    message = Message.from_bytes(mail("plain"))
    assert message.as_bytes(unixfrom=True).startswith(b"From nobody ")
    assert message.as_string(unixfrom=True).startswith("From nobody ")


def test_our_values_cannot_forge() -> None:
    """A line break in a value of ours becomes a space."""
    message = Message.from_bytes(b"Subject: x\n\n", [("X-Postoffice-Rejected", "a\nb: c")])
    assert message.header_texts() == ["X-Postoffice-Rejected: a b: c", "Subject: x"]
    assert message.as_bytes() == b"X-Postoffice-Rejected: a b: c\nSubject: x\n\n"


def test_a_loader_is_called_when_needed_and_once() -> None:
    """The bytes are loaded when they are needed, and only once."""
    calls: list[int] = []

    def load() -> bytes:
        calls.append(1)
        return mail("plain")

    message = Message.from_loader(load, OWN, Envelope("a@example.com", (), 1))
    assert message.addresses("Return-Path") == ("a@example.com",)
    assert not calls
    assert message["Subject"] == "plain"
    assert message.raw == mail("plain")
    assert message.as_bytes().startswith(b"X-Postoffice-Date")
    assert len(calls) == 1


def test_a_map_is_read_without_a_copy() -> None:
    """A large message is read from a map of its file in little memory."""
    big = b"\n".join([b"QUJD" * 19] * 100_000)
    raw = mail("plain").split(b"\n\n")[0]
    raw += b"\nContent-Type: multipart/mixed; boundary=b\n\n--b\n\nshort\n--b\n"
    raw += b"Content-Type: application/pdf\n\n" + big + b"\n--b--\n"
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for buffer in (mapped, memoryview(raw)):
                tracemalloc.start()
                message = Message.from_bytes(buffer)
                assert list(message.text_parts()) == ["short"]
                assert message.message_id == "<plain@example.com>"
                with message.body_view as body:
                    assert len(body) == len(raw) - message.header_end
                assert tracemalloc.get_traced_memory()[1] < 1_000_000
                tracemalloc.stop()
                assert message.raw == raw
                del message


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("raw-latin1-subject", "subject", "Grüße aus Köln"),
        ("raw-utf8-subject", "SUBJECT", "Grüße aus Köln"),
        ("raw-8bit-to", "To", "Jörg <joerg@example.org>"),
        ("encoded-word-broken-base64", "Subject", "Grüß end"),
        ("encoded-word-unterminated", "Subject", "=?utf-8?q?Gr=C3=BC and no end"),
        ("encoded-words-split-character", "Subject", "Grüße"),
        ("encoded-word-forges-lines", "Subject", "one  X-Forged: two\ufffd\ufffd[31m"),
        (
            "escape-sequences-in-subject",
            "Subject",
            "\ufffd]0;owned\ufffd\ufffd[2J \ufffd31m red \ufffd",
        ),
        ("nul-bytes", "Subject", "a\ufffdb"),
        ("header-without-value", "Subject", ""),
        ("header-without-value", "X-Blank", ""),
        ("header-without-value", "X-None", None),
        ("fold-after-colon", "Subject", "one"),
        ("fold-after-colon", "X-Wide", "three"),
        ("fold-with-blank", "Subject", "one  two\t"),
        ("bare-cr", "X-Two", "two three"),
        ("repeated-subject", "Subject", "first"),
        ("utf7-surrogate", "Subject", "\ufffd"),
    ],
)
def test_header_values(name: str, field: str, value: str | None) -> None:
    """A header value is the decoded text of the topmost field, or None."""
    message = Message.from_bytes(mail(name))
    assert message[field] == message.get(field) == message.topmost(field) == value


def test_reading_headers_as_a_mapping() -> None:
    """Names keep case and order, repeated fields are all there, a missing one gives the default."""
    message = Message.from_bytes(b"subject: =?utf-8?q?=C3=A4?=\nTo: a\nSUBJECT: b\n\n", OWN)
    assert message.keys() == [
        "X-Postoffice-Date",
        "X-Postoffice-Rejected",
        "subject",
        "To",
        "SUBJECT",
    ]
    assert message.get_all("Subject") == ["ä", "b"]
    assert message.get_all("Cc", []) == []
    assert message.get("Cc", "x") == "x"
    assert message.first_raw("Subject") == "=?utf-8?q?=C3=A4?="
    assert message.header_texts()[2:] == ["subject: ä", "To: a", "SUBJECT: b"]
    texts = message.header_texts()
    texts.clear()
    assert message.header_texts()


@pytest.mark.parametrize(
    ("name", "part", "filename"),
    [
        ("rfc2231-filename", 1, "Grüße.txt"),
        ("rfc2231-filename", 2, "Grüße.txt"),
        ("rfc2231-broken", 0, None),
        ("text-attachment", 2, "a.csv"),
        ("malformed-content-type", 0, None),
    ],
)
def test_file_names(name: str, part: int, filename: str | None) -> None:
    """A file's name is decoded by RFC 2231 and RFC 2047, and broken ones raise nothing."""
    found = list(Message.from_bytes(mail(name)).walk())[part].get_filename()
    assert filename is None or found == filename


def test_payload_index() -> None:
    """get_payload gives a part by its index, and raises for a body as the standard library does."""
    message = Message.from_bytes(mail("text-attachment"))
    assert message.get_payload(0).get_content_type() == "text/html"
    assert message.get_payload(decode=True) is None
    with pytest.raises(TypeError):
        Message.from_bytes(mail("plain")).get_payload(0)


def test_parts_are_as_lenient() -> None:
    """Parts are messages of ours, with decoded headers and bytes of their own."""
    message = Message.from_bytes(mail("null-sender-bounce"))
    attached = message.get_payload(2).get_payload(0)
    assert isinstance(attached, Message)
    assert attached["Subject"] == "original"
    assert attached.raw == b"From: ann@example.com\nSubject: original\n\nThe original text.\n"
    assert bytes(attached.body_view) == b"The original text.\n"


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "addresses"),
    [
        ("two-at-address", "To", ("carol@example.net",)),
        ("group-address", "To", ("bob@example.org", "cd@example.net")),
        ("route-address", "To", ("bob@example.org",)),
        ("quoted-comma-name", "To", ("bob@example.org", '"a b"@example.net')),
        ("comment-address", "To", ("bob@example.org", "carol@example.net")),
        ("unclosed-quote-address", "To", ("carol@example.net",)),
        ("repeated-trace-headers", "Return-Path", ("real@example.com",)),
        ("repeated-trace-headers", "X-Original-To", ("alice@example.org",)),
        ("repeated-trace-headers", "delivered-to", ("box@example.org",)),
        ("null-sender-bounce", "Return-Path", ()),
        ("smtputf8", "To", ("jörg@müller.example",)),
        ("no-from", "From", ()),
    ],
)
def test_addresses(name: str, field: str, addresses: tuple[str, ...]) -> None:
    """Addresses are those of all fields; of trace headers the topmost alone counts."""
    assert Message.from_bytes(mail(name)).addresses(field) == addresses


def test_hostnames() -> None:
    """Hosts are normalised, whatever form the domain has."""
    message = Message.from_bytes(mail("idna-domain"))
    assert message.hostnames("To") == ("xn--mller-kva.example",)
    assert set(message.hostnames("Cc")) == {"xn--mller-kva.example"}
    literal = Message.from_bytes(mail("address-literal"))
    assert literal.hostnames("To") == ("[192.0.2.1]", "[ipv6:2001:db8::1]")


def test_all_fields_of_a_name_count() -> None:
    """Addresses of repeated fields are all there."""
    message = Message.from_bytes(b"To: a@example.com\nto: B <b@Example.org>\n\n")
    assert message.addresses("To") == ("a@example.com", "b@Example.org")
    assert message.hostnames("to") == ("example.com", "example.org")


def test_the_envelope_goes_before_trace_headers() -> None:
    """A known envelope stands for the trace headers, an unknown part of it does not."""
    raw = mail("repeated-trace-headers")
    known = Message.from_bytes(raw, (), Envelope("", ("x@Example.com", "y@example.com"), 1))
    assert known.addresses("Return-Path") == ()
    assert known.addresses("X-Original-To") == ("x@Example.com", "y@example.com")
    assert known.hostnames("Delivered-To") == ("example.com", "example.com")
    assert known["Return-Path"] == "<real@example.com>"
    unknown = Message.from_bytes(raw, (), Envelope(None, (), 1))
    assert unknown.addresses("Return-Path") == ("real@example.com",)
    assert unknown.addresses("Delivered-To") == ("box@example.org",)


@pytest.mark.parametrize(
    ("raw", "sender", "recipients"),
    [
        (mail("repeated-trace-headers"), "real@example.com", ("alice@example.org",)),
        (mail("null-sender-bounce"), "", ("ann@example.com",)),
        (b"Delivered-To: Box <box@example.org>\n\n", None, ("box@example.org",)),
        (b"Return-Path: root\nX-Original-To: <postmaster>\n\n", "root", ("postmaster",)),
        (b"Return-Path: a@b@c\nX-Original-To: a@b@c\n\n", None, ()),
        (b"Return-Path:\nX-Original-To:\nDelivered-To: a@example.com\n\n", None, ()),
        (b"Return-Path: a@b.example, c@d.example\n\n", None, ()),
        (b"", None, ()),
    ],
)
def test_the_envelope_from_trace_headers(
    raw: bytes, sender: str | None, recipients: tuple[str, ...]
) -> None:
    """The envelope is read from the topmost trace headers alone."""
    envelope = Envelope.from_trace(Message.from_bytes(raw), 5)
    assert envelope == Envelope(sender, recipients, 5)


@pytest.mark.parametrize(
    ("received", "found"),
    [
        (b"by mx.example.com (Postfix, from userid 0)\n\tid 4ABCD; Mon, 1 Jan 2024", "4ABCD"),
        (
            b"from a (a [192.0.2.1]) by mx (Postfix) with LMTP id 4XyZ12abcd\n\tfor <b@c>; x",
            "4XyZ12abcd",
        ),
        (b"by mx with ESMTP ID 4ABCDE", ""),
        (b"by mx id 4AB; short", ""),
        (b"by mx id 4ABCD/EFGH; odd", ""),
        (b"", ""),
        (b"x" * 3000 + b" id 4ABCDE;", ""),
    ],
)
def test_the_queue_id_of_the_topmost_received(received: bytes, found: str) -> None:
    """The id in the mail server's own queue is that of the topmost Received, or none."""
    raw = b"Received: %s\nReceived: by other id 5FFFFFF;\nSubject: x\n\n" % received
    assert Envelope.from_trace(Message.from_bytes(raw), 5).mta_queue_id == found
    assert mta_queue_id(Message.from_bytes(b"Subject: x\n\n")) == ""


# -- identity --------------------------------------------------------------------------------------


def test_message_id() -> None:
    """The Message-ID is the topmost one, stripped."""
    assert Message.from_bytes(mail("plain")).message_id == "<plain@example.com>"
    assert Message.from_bytes(b"Message-ID:\n  <a b> \n\n").message_id == "<a b>"


@pytest.mark.parametrize("name", ["no-message-id", "blank-message-id", "empty", "no-header"])
def test_a_missing_message_id_is_made_from_the_content(name: str) -> None:
    """Two deliveries of a mail without Message-ID agree on one, and other mails have others."""
    raw = mail(name)
    made = Message.from_bytes(raw, OWN).message_id
    trace = b"Return-Path: <a@example.com>\nX-Original-To: b@example.com\nReceived: by x;\n now\n"
    delivered = trace + (raw if raw[:1] in b"FTD" and raw else b"\n" + raw)
    if name.endswith("message-id"):
        assert Message.from_bytes(delivered).message_id == made
    assert made.endswith("@postoffice.invalid>")
    assert made != Message.from_bytes(raw + b"x").message_id


# -- changing and composing ------------------------------------------------------------------------


def test_untouched_fields_stay_when_others_change() -> None:
    """After a change to the header all other fields and the body stay byte for byte."""
    raw = (
        b"X-Odd :no\n" * 0 + b"A:  1\nB: \xe9\n fold\t\nSubject: x\nb: =?utf-8?q??=\n\nbody\xff\r\n"
    )
    message = Message.from_bytes(raw, [("X-Postoffice-Id", "7")])
    message.replace_header("subject", "Grüße")
    message.add_header("Content-Disposition", "attachment", filename="ä.txt")
    del message["A"]
    assert message.as_bytes() == (
        b"X-Postoffice-Id: 7\nB: \xe9\n fold\t\nSubject: =?utf-8?b?R3LDvMOfZQ==?=\n"
        b"b: =?utf-8?q??=\nContent-Disposition: attachment; filename*=utf-8''%C3%A4.txt\n"
        b"\nbody\xff\r\n"
    )
    assert message.raw == raw
    assert message["Subject"] == "Grüße"
    assert message.get_filename() == "ä.txt"
    with pytest.raises(KeyError):
        message.replace_header("None", "x")


def test_changed_messages_keep_line_ends() -> None:
    """New fields of a CRLF message end in CRLF, and its parts stay as they are."""
    message = Message.from_bytes(mail("crlf"))
    message["X-New"] = "y"
    assert message.as_bytes() == mail("crlf").replace(b"\r\n\r\n", b"\r\nX-New: y\r\n\r\n", 1)


def test_an_unchanged_part_is_written_as_it_arrived() -> None:
    """When one part is changed the others are written byte for byte."""
    message = Message.from_bytes(mail("text-attachment"))
    html, csv, image = message.get_payload()
    csv.set_payload("new")
    del csv["Content-Transfer-Encoding"]
    written = message.as_bytes()
    assert html.raw in written
    assert image.raw in written
    again = Message.from_bytes(written)
    assert list(again.text_parts()) == ["<p>café</p>", "new"] == list(message.text_parts())
    message.get_payload().pop()
    assert len(Message.from_bytes(message.as_bytes()).get_payload()) == 2


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\r\nX-Postoffice: Bounced", "a\0b"])
def test_set_values_cannot_inject(value: str) -> None:
    """A line break or NUL in a value is refused by every way of setting it."""
    message = Message()
    message["Subject"] = "x"
    with pytest.raises(ValueError, match="Subject"):
        message["Subject"] = value
    with pytest.raises(ValueError, match="Subject"):
        message.replace_header("Subject", value)
    with pytest.raises(ValueError, match="X-Y"):
        message.add_header("X-Y", "z", param=value)
    assert message.as_bytes() == b"Subject: x\n\n"


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\nb", "ä"])
def test_set_names_are_checked(name: str) -> None:
    """A name that no field can have is refused."""
    message = Message()
    with pytest.raises(ValueError, match="not a name"):
        message[name] = "x"


def test_a_value_is_required() -> None:
    """None is no value."""
    message = Message()
    with pytest.raises(TypeError, match="Subject"):
        message["Subject"] = None


def test_composing() -> None:
    """A message is composed as in the standard library, with text for values."""
    message = Message()
    assert not message
    message["To"] = "Jörg Müller <jörg@müller.example>, Bob <bob@example.com>"
    message["Subject"] = email.header.Header("Grüße", "utf-8")
    message["X-Number"] = 17
    message.set_payload("Grüße\n", "utf-8")
    assert message["To"] == "Jörg Müller <jörg@xn--mller-kva.example>, Bob <bob@example.com>"
    assert message["subject"] == "Grüße"
    assert message["x-number"] == "17"
    assert message.hostnames("To") == ("xn--mller-kva.example", "example.com")
    again = Message.from_bytes(message.as_bytes(), None)
    assert again.items() == message.items()
    assert list(again.text_parts()) == list(message.text_parts()) == ["Grüße\n"]
    assert message.raw == message.as_bytes()
    assert message.raw[message.header_end :] == bytes(message.body_view)
    assert message.message_id == message.message_id


@pytest.mark.parametrize("payload", [None, "Grüße \ud800 \udcff", b"\xff", 17, ""])
def test_any_payload_is_written(payload: Any) -> None:
    """as_bytes and as_string of a composed message do not raise, whatever its payload."""
    for kind in (
        "text/plain",
        "message/rfc822",
        "message/delivery-status",
        "multipart/mixed",
        "a/b",
    ):
        message = Message()
        message["Content-Type"] = kind
        message.set_payload(payload)
        assert message.as_bytes().startswith(b"Content-Type")
        assert str(message).startswith("Content-Type")
        assert message.as_bytes(policy=email.policy.SMTP).startswith(b"Content-Type")


def test_multipart() -> None:
    """MIMEMultipart takes the arguments of the standard library's, and text for headers."""
    message = MIMEMultipart("alternative", boundary="b", charset="x")
    message["Subject"] = "Grüße"
    message.attach(MIMEText("plain", "plain", "utf-8"))
    part = Message()
    part.set_payload("ours")
    message.attach(part)
    assert isinstance(message, Message)
    assert isinstance(message, email.message.Message)
    again = Message.from_bytes(message.as_bytes())
    assert again["Subject"] == "Grüße"
    assert again.get_content_type() == "multipart/alternative"
    assert list(again.text_parts()) == list(message.text_parts()) == ["plain", "ours"]
    assert len(MIMEMultipart(_subparts=[part]).get_payload()) == 1


def test_content_type_methods() -> None:
    """Parameters, type and boundary are changed as in the standard library."""
    message = Message.from_bytes(b"Content-Type: text/plain; charset=a; x=y\n\nz")
    message.set_param("charset", "utf-8")
    assert message.get_content_charset() == "utf-8"
    message.del_param("x")
    assert message.get_param("x") is None
    message.set_type("multipart/mixed")
    message.set_boundary("b b")
    assert message.get_boundary() == "b b"
    message.set_boundary("c")
    assert message.get_boundary() == "c"
    assert message.get_content_type() == "multipart/mixed"
    with pytest.raises(email.errors.HeaderParseError):
        Message().set_boundary("b")


def test_the_standard_parser_can_make_ours() -> None:
    """email.message_from_bytes makes messages of ours, read alike."""
    for name in ("raw-latin1-subject", "text-attachment", "crlf"):
        parsed = email.message_from_bytes(mail(name), Message)
        assert parsed.header_texts() == Message.from_bytes(mail(name)).header_texts()
        assert list(parsed.text_parts()) == list(Message.from_bytes(mail(name)).text_parts())


@pytest.mark.parametrize("path", MAILS, ids=lambda path: path.stem)
def test_the_standard_generator_can_write_ours(path: Path) -> None:
    """A message is written by the standard generator, as smtplib does, and keeps its fields."""
    message = copy.copy(Message.from_bytes(path.read_bytes(), OWN))
    del message["Bcc"]
    out = BytesIO()
    BytesGenerator(out, mangle_from_=False).flatten(message, linesep="\r\n")
    again = Message.from_bytes(out.getvalue(), None)
    assert again.header_texts() == message.header_texts()


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MAILS, ids=lambda path: path.stem)
def test_pickling_keeps_the_message(path: Path) -> None:
    """A pickled message has its bytes, our headers, its envelope, its queue and id, no entry."""
    message = Message.from_bytes(path.read_bytes(), OWN, Envelope("a@example.com", (), 1))
    message.queue_name, message.id, message.entry, message.oversize = "q", 5, object(), True
    read_everything(message)
    again = pickle.loads(pickle.dumps(message))
    assert again.raw == message.raw
    assert again.as_bytes() == message.as_bytes()
    assert again.items() == message.items()
    assert again.envelope == message.envelope
    assert (again.queue_name, again.id, again.entry, again.oversize) == ("q", 5, None, True)
    assert len(pickle.dumps(message)) < len(message.raw) + 600


def test_pickling_keeps_changes() -> None:
    """A changed, a composed and a mapped message are pickled with all that they say."""
    message = Message.from_bytes(memoryview(mail("text-attachment")), OWN)
    message["X-New"] = "ä"
    message.get_payload(1).set_payload("new")
    again = pickle.loads(pickle.dumps(message))
    assert again.as_bytes() == message.as_bytes()
    assert again["X-New"] == "ä"
    composed = Message()
    composed["Subject"] = "ä"
    composed.set_payload("x")
    assert pickle.loads(pickle.dumps(composed)).as_bytes() == composed.as_bytes()
    loaded = Message.from_loader(lambda: mail("digest"))
    part = pickle.loads(pickle.dumps(loaded.get_payload(0)))
    assert part.get_content_type() == "message/rfc822"
    assert part.get_payload(0)["Subject"] == "one"


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_copies_are_changed_alone(copier) -> None:  # type: ignore[no-untyped-def]  # either copier
    """A change of a copy's header leaves the original, and a deep copy has parts of its own."""
    message = Message.from_bytes(mail("text-attachment"), OWN)
    message.get_payload()
    made = copier(message)
    made["X-New"] = "y"
    assert "X-New" not in message
    assert message.is_untouched()
    assert made["Subject"] == "x"
    if copier is copy.deepcopy:
        made.get_payload(0)["X-Part"] = "z"
        assert b"X-Part" not in message.as_bytes()
        assert b"X-Part: z" in made.as_bytes()
        assert copy.deepcopy(made).as_bytes() == made.as_bytes()


def test_unknown_attributes_are_missing() -> None:
    """An attribute that no message has is an AttributeError."""
    with pytest.raises(AttributeError, match="no_such"):
        _ = Message.from_bytes(b"").no_such


def test_encoding_is_offered_with_the_message() -> None:
    """encode_header and decode_header come with the message, for users of repoze.postoffice."""
    assert decode_header(encode_header("Subject", "Grüße")) == "Grüße"
