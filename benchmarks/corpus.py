"""A seeded Maildir of mail as a depot sees it, for the benchmarks.

70% plain text of 3 KB, 20% multipart/alternative of 20 KB, 9% with an attachment of 150 KB and 1%
with one of 2 MB; folded Received and DKIM headers, RFC 2047 subjects, Latin-1 bodies.
"""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Iterator
from pathlib import Path

TEXT = (
    "the quick invoice of a meeting about our next release was sent on monday by their team "
    "and nobody answered because every report came late while customers waited for order "
    "number please find attached regards thanks support question problem server backup"
)
WORDS = TEXT.split()

HOSTS = (
    ("app.example.com", 40),
    ("tickets.example.com", 20),
    ("lists.example.net", 15),
    ("customer.example.org", 15),
    ("nowhere.example", 10),
)


def messages(count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` messages; the same for the same seed."""
    chosen = random.Random(seed)
    hosts = [host for host, _ in HOSTS]
    weights = [weight for _, weight in HOSTS]
    for number in range(count):
        kind = chosen.random()
        if kind < 0.70:
            body = _plain(chosen, 3_000)
        elif kind < 0.90:
            body = _alternative(chosen, 20_000)
        elif kind < 0.99:
            body = _attachment(chosen, 150_000)
        else:
            body = _attachment(chosen, 2_000_000)
        host = chosen.choices(hosts, weights)[0]
        yield _header(chosen, number, seed, host) + body


def fill(folder: Path, count: int, seed: int, start: int = 1_700_000_000) -> None:
    """Make a Maildir at `folder` with `count` messages, delivered a second apart."""
    for name in ("new", "cur", "tmp"):
        (folder / name).mkdir(parents=True)
    for number, raw in enumerate(messages(count, seed)):
        path = folder / "new" / f"{start + number}.M{number % 1_000_000}P4711.mx"
        path.write_bytes(raw)
        os.utime(path, (start + number, start + number))


def _header(chosen: random.Random, number: int, seed: int, host: str) -> bytes:
    sender = f"user{chosen.randrange(5_000)}@mail{chosen.randrange(50)}.example.net"
    words = chosen.sample(WORDS, 5)
    if chosen.random() < 0.3:
        text = base64.b64encode(f"Grüße: {' '.join(words)} ✓".encode()).decode()
        subject = f"=?utf-8?B?{text}?="
    elif chosen.random() < 0.2:
        subject = f"=?iso-8859-1?Q?Anfrage_{words[0]}_f=FCr_{words[1]}?="
    else:
        subject = " ".join(words)
    if chosen.random() < 0.15:
        subject = f"[ticket #{chosen.randrange(10_000)}] {subject}"
    if chosen.random() < 0.02:
        subject = f"Cheap watches {subject}"
    signature = "\r\n\t".join(
        base64.b64encode(chosen.randbytes(48)).decode() for _ in range(5)
    ).replace("\r", "")
    to = f"inbox{chosen.randrange(20)}@{host}"
    return (
        f"Return-Path: <{sender}>\n"
        f"X-Original-To: {to}\n"
        f"Delivered-To: {to}\n"
        f"Received: from mx{chosen.randrange(9)}.example.net (mx.example.net [192.0.2.1])\n"
        f"\tby depot.example.com (Postfix) with ESMTPS id {chosen.getrandbits(40):X}\n"
        f"\tfor <{to}>; Mon, 20 Nov 2026 10:{number % 60:02}:00 +0000 (UTC)\n"
        f"Received: from laptop (unknown [198.51.100.7])\n"
        f"\tby mx.example.net (Postfix) with ESMTPSA id {chosen.getrandbits(40):X};\n"
        f"\tMon, 20 Nov 2026 10:{number % 60:02}:00 +0000 (UTC)\n"
        f"DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed; d=example.net;\n"
        f"\ts=2026; h=From:To:Subject:Date:Message-ID;\n"
        f"\tb={signature}\n"
        f"Message-ID: <{seed}.{number}.{chosen.getrandbits(32):x}@mail.example.net>\n"
        f"Date: Mon, 20 Nov 2026 10:{number % 60:02}:00 +0000\n"
        f"From: {chosen.choice(WORDS).title()} {chosen.choice(WORDS).title()} <{sender}>\n"
        f"To: {to}\n"
        f"Subject: {subject}\n"
        "MIME-Version: 1.0\n"
    ).encode()


def _text(chosen: random.Random, size: int) -> str:
    lines = []
    length = 0
    while length < size:
        line = " ".join(chosen.choices(WORDS, k=10))
        lines.append(line)
        length += len(line) + 1
    return "\n".join(lines)[:size] + "\n"


def _plain(chosen: random.Random, size: int) -> bytes:
    text = _text(chosen, size)
    if chosen.random() < 0.3:
        text = text.replace("report", "Bericht für Köln")
        return b"Content-Type: text/plain; charset=iso-8859-1\n" + (
            b"Content-Transfer-Encoding: 8bit\n\n" + text.encode("iso-8859-1")
        )
    return b"Content-Type: text/plain; charset=us-ascii\n\n" + text.encode()


def _alternative(chosen: random.Random, size: int) -> bytes:
    boundary = f"=_{chosen.getrandbits(64):x}"
    text = _text(chosen, size // 3)
    html = "<html><body><p>" + _text(chosen, size * 2 // 3).replace("\n", "<br>\n") + "</p></html>"
    return (
        f'Content-Type: multipart/alternative; boundary="{boundary}"\n\n'
        f"--{boundary}\nContent-Type: text/plain; charset=utf-8\n\n{text}\n"
        f"--{boundary}\nContent-Type: text/html; charset=utf-8\n\n{html}\n"
        f"--{boundary}--\n"
    ).encode()


def _attachment(chosen: random.Random, size: int) -> bytes:
    boundary = f"=_{chosen.getrandbits(64):x}"
    data = base64.encodebytes(chosen.randbytes(size * 3 // 4)).decode()
    return (
        f'Content-Type: multipart/mixed; boundary="{boundary}"\n\n'
        f"--{boundary}\nContent-Type: text/plain; charset=utf-8\n\n{_text(chosen, 1500)}\n"
        f"--{boundary}\nContent-Type: application/pdf; name=report.pdf\n"
        f"Content-Transfer-Encoding: base64\n"
        f"Content-Disposition: attachment; filename=report.pdf\n\n{data}\n"
        f"--{boundary}--\n"
    ).encode()
