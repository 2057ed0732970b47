"""The messages of the demonstration: what arrives at a mail server on an ordinary day."""

from __future__ import annotations

import base64
from dataclasses import dataclass

__all__ = ["MESSAGES", "Sample"]

_HOUR = 3600
_MINUTE = 60


@dataclass(frozen=True, slots=True)
class Sample:
    """One message.

    :ivar about: what is special about it, for a person.
    :ivar raw: its bytes.
    :ivar ago: how many seconds before now it arrived.
    """

    about: str
    raw: bytes
    ago: int


def _mail(
    sender: str,
    to: str,
    subject: str,
    body: bytes | str = "Hello,\n\nthis is a plain message.\n",
    *more: str,
) -> bytes:
    """Compose a message as raw bytes; `more` are further header lines."""
    number = sum(map(ord, sender + to + subject + "".join(more)))
    lines = [f"From: {sender}", f"To: {to}", f"Subject: {subject}", *more]
    if not any(line.lower().startswith("message-id:") for line in more):
        lines.append(f"Message-ID: <{number}.{len(subject)}@demo.example>")
    content = body.encode() if isinstance(body, str) else body
    return "\n".join(lines).encode("latin-1", "replace") + b"\n\n" + content


def _alternative(text: str, html: str) -> bytes:
    """Compose the body of a multipart/alternative."""
    encoded = base64.encodebytes(html.encode()).decode()
    return (
        "--=-1\nContent-Type: text/plain; charset=utf-8\n\n"
        f"{text}\n--=-1\nContent-Type: text/html; charset=utf-8\n"
        f"Content-Transfer-Encoding: base64\n\n{encoded}--=-1--\n"
    ).encode()


_MULTIPART = 'Content-Type: multipart/alternative; boundary="=-1"'
_BILL = _mail("Ann <ann@paper.example>", "in@billing.example.com", "Bill 1041: EUR 12.50")

_DAY = (
    ("a bill", _BILL),
    (
        "a bill in HTML too",
        _mail(
            "bo@steel.example",
            "in@billing.example.com",
            "Bill 1042: EUR 990.00",
            _alternative("990 EUR, please.", "<b>990 EUR</b>, please."),
            _MULTIPART,
        ),
    ),
    (
        "a bill for the department, as Cc",
        _mail(
            "cy@wood.example",
            "boss@example.com",
            "Bill 1043: EUR 7.20",
            "",
            "Cc: in@billing.example.com",
        ),
    ),
    (
        "a bill in words",
        _mail("Di <di@glass.example>", "in@billing.example.com", "Bill 1044: EUR twelve"),
    ),
    ("the first bill once more", _BILL),
    (
        "a look-alike domain",
        _mail("ed@mud.example", "in@evilbilling.example.com", "Bill 1045: EUR 1.00"),
    ),
    ("an order", _mail("flo@home.example", "web@shop.example.com", "Your order form: one lamp")),
    (
        "an order to a branch",
        _mail("gus@home.example", "web@berlin.shop.example.com", "My order: two chairs"),
    ),
    (
        "an order, subject encoded",
        _mail("hal@home.example", "web@shop.example.com", "=?utf-8?q?order_f=C3=BCr_M=C3=BCller?="),
    ),
    (
        "to the shop, but no order",
        _mail("ida@home.example", "web@shop.example.com", "When do you open?"),
    ),
    (
        "an order from a quoted name",
        _mail('"Jo, of A@B" <jo@home.example>', "web@shop.example.com", "order: nails"),
    ),
    (
        "an order that forges our headers",
        _mail(
            "kim@home.example",
            "web@shop.example.com",
            "order: a key",
            "Please?",
            "X-Postoffice-Id: 1",
            "X-Postoffice-Rejected: Throttled",
        ),
    ),
    (
        "an alarm",
        _mail(
            "monitor@rack.example",
            "ops@example.com",
            "disk full",
            "host: db1\nseverity: critical\n",
            "X-Alert: disk",
        ),
    ),
    (
        "an alarm of low severity",
        _mail(
            "monitor@rack.example",
            "ops@example.com",
            "disk half full",
            "host: db2\nseverity: low\n",
            "X-Alert: disk",
        ),
    ),
    (
        "an alarm in base64",
        _mail(
            "monitor2@rack.example",
            "ops@example.com",
            "fan stopped",
            base64.encodebytes(b"host: db3\nseverity: high\n"),
            "X-Alert: fan",
            "Content-Transfer-Encoding: base64",
        ),
    ),
    (
        "a question",
        _mail(
            "lea@uni.example",
            "support@example.com",
            "How?",
            "How?\n",
            "X-Original-To: support@example.com",
        ),
    ),
    (
        "a question by Bcc",
        _mail(
            "moe@uni.example",
            "undisclosed-recipients:;",
            "Psst",
            "?\n",
            "X-Original-To: support@example.com",
        ),
    ),
    (
        "an answer to ticket 17",
        _mail(
            "nell@uni.example",
            "team@example.com",
            "Re: 17",
            "ok\n",
            "X-Original-To: support+17@example.com",
        ),
    ),
    (
        "a question with 8-bit letters",
        _mail(
            "ole@uni.example",
            "support@example.com",
            "Bj\xf8rn asks",
            "Gr\xfc\xdfe\n".encode("latin-1"),
            "X-Original-To: support@example.com",
        ),
    ),
    (
        "an answer from a mailing list",
        _mail(
            "list@lists.example",
            "users@lists.example",
            "[users] digest",
            "digest\n",
            "X-Original-To: support@example.com",
            "Precedence: list",
        ),
    ),
    (
        "somebody is on holiday",
        _mail(
            "pia@uni.example",
            "support@example.com",
            "Out of office",
            "Back on Monday.\n",
            "X-Original-To: support@example.com",
            "Auto-Submitted: auto-replied",
        ),
    ),
    (
        "a message of 300 KB",
        _mail(
            "quinn@uni.example",
            "support@example.com",
            "My photographs",
            b"0123456789abcdef\n" * 18000,
            "X-Original-To: support@example.com",
        ),
    ),
    (
        "a subject with terminal escapes",
        _mail(
            "rex@uni.example",
            "support@example.com",
            "\x1b[2J\x1b]0;gone\x07 [red]boo[/red]",
            "boo\n",
            "X-Original-To: support@example.com",
        ),
    ),
    (
        "no Message-ID",
        _mail(
            "sam@uni.example",
            "support@example.com",
            "No id",
            "?\n",
            "X-Original-To: support@example.com",
        ).replace(b"Message-ID:", b"X-No-Message-ID:"),
    ),
    ("a prize", _mail("win@luck.example", "web@shop.example.com", "You won the Lottery!")),
    (
        "a prize, encoded",
        _mail("win@luck.example", "in@billing.example.com", "=?utf-8?b?TG90dGVyeSB3aW5uZXI=?="),
    ),
    ("for nobody here", _mail("tom@uni.example", "someone@elsewhere.example", "Hello")),
    (
        "nobody's message",
        b"To: in@billing.example.com\nSubject: Bill 0: EUR 0\nReturn-Path: <>\n\nboo\n",
    ),
    ("From is To", _mail("web@shop.example.com", "web@shop.example.com", "an order of mine")),
    (
        "a notice of ours that came back",
        _mail(
            "x@uni.example", "web@shop.example.com", "order failed", "?\n", "X-Postoffice: Bounced"
        ),
    ),
)

# A robot that answers each answer: six within six seconds.
_LOOP = tuple(
    (
        "a robot's first message" if number == 1 else "its next messages, a second apart",
        _mail(
            "robot@loop.example",
            "support@example.com",
            "Re: Re: Re: your message",
            f"I received your message number {number}.\n",
            "X-Original-To: support@example.com",
            f"Message-ID: <{number}@loop.example>",
        ),
    )
    for number in range(1, 7)
)

MESSAGES = tuple(
    Sample(about, raw, _HOUR * 2 - number * _MINUTE) for number, (about, raw) in enumerate(_DAY)
) + tuple(Sample(about, raw, _HOUR - number) for number, (about, raw) in enumerate(_LOOP))
