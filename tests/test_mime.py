"""The parts of a message and their texts."""

from __future__ import annotations

import email
import email.message
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postoffice import charsets, headers, mime
from postoffice.message import Message

MAILS = sorted((Path(__file__).parent / "mail").glob("*.eml"))


def part_of(raw: bytes) -> mime.Part:
    return mime.parse(raw, headers.slice_header(raw))


def texts_of(raw: bytes) -> list[str]:
    return list(mime.texts(raw, part_of(raw)))


# Where the standard library puts its lines elsewhere, and ours is the better answer: it drops the
# empty line before a body that begins with "From ", and does not undo a quoted-printable whose
# name is followed by a space.
PAYLOAD_DIFFERS = {"from-line-ends-header"}
DECODED_DIFFERS = {"from-line-ends-header", "broken-quoted-printable"}


def check_parts(raw: bytes, name: str = "") -> None:
    """Hold the parts against those of the standard library's parser."""
    parsed = email.message_from_bytes(raw)
    message = Message.from_bytes(raw, own_headers=None)
    theirs, ours = list(parsed.walk()), list(message.walk())
    assert len(ours) == len(theirs)
    for their, our in zip(theirs, ours, strict=True):
        assert our.is_multipart() == their.is_multipart()
        assert our.preamble == their.preamble
        assert our.epilogue == their.epilogue
        assert our.get_content_type() == their.get_content_type()
        assert our.get_unixfrom() == their.get_unixfrom()
        if not their.is_multipart() and name not in PAYLOAD_DIFFERS:
            # As the parser left it: get_payload would replace raw 8-bit.
            assert attrgetter("_payload")(our) == attrgetter("_payload")(their)
        if name not in DECODED_DIFFERS:
            assert our.get_payload(decode=True) == their.get_payload(decode=True)


def standard_texts(raw: bytes) -> list[str]:
    """Return the texts that follow from the standard library's parts."""
    found = []
    for part in email.message_from_bytes(raw).walk():
        if part.is_multipart() or part.get_content_maintype() != "text":
            continue
        data = part.get_payload(decode=True)
        assert isinstance(data, bytes)
        charset = Message.from_bytes(part.as_bytes(), None).get_content_charset()
        found.append(charsets.decode_charset(data, charset).replace("\r\n", "\n"))
    return found


@pytest.mark.parametrize("path", MAILS, ids=lambda path: path.stem)
def test_parts_agree_with_the_standard_library(path: Path) -> None:
    """Parts, bodies, preambles and epilogues are those of email.feedparser, in every mail."""
    check_parts(path.read_bytes(), path.stem)


@pytest.mark.parametrize(
    "path", [path for path in MAILS if path.stem not in DECODED_DIFFERS], ids=lambda path: path.stem
)
def test_texts_agree_with_the_standard_library(path: Path) -> None:
    """The texts are those of the standard library's parts, in every mail but a known few."""
    raw = path.read_bytes()
    assert texts_of(raw) == standard_texts(raw)


LINES = [
    b"--b",
    b"--b",
    b"--b--",
    b"--b ",
    b"--b--x",
    b"--c",
    b"--c--",
    b"-- ",
    b"--",
    b"",
    b"",
    b"text",
    b" ; fold=1",
    b"Subject: x",
    b"From here",
    b"Content-Type: multipart/mixed; boundary=b",
    b"Content-Type: multipart/digest; boundary=c",
    b'Content-Type: multipart/mixed; boundary="c--"',
    b'Content-Type: multipart/mixed; boundary=""',
    b"Content-Type: multipart/mixed",
    b"Content-Type: message/rfc822",
    b"Content-Type: message/delivery-status",
    b"Content-Type: text/html",
    b"Content-Transfer-Encoding: base64",
    b"SGVsbG8=",
]


@given(
    st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from([b"\n"] * 6 + [b"\r\n", b"\r"]))),
    st.booleans(),
)
@settings(max_examples=800, deadline=None)
def test_parts_agree_on_generated_multiparts(lines: list[tuple[bytes, bytes]], top: bool) -> None:
    """Parts are those of email.feedparser whatever the order of boundaries and fields."""
    raw = b"Content-Type: multipart/mixed; boundary=b\n\n" * top
    raw += b"".join(line + end for line, end in lines)
    if b"\nFrom " in raw or b"\rFrom " in raw:
        # Its empty line is another: see PAYLOAD_DIFFERS.
        raw = raw.replace(b"From here", b"from here")
    check_parts(raw)
    assert texts_of(raw) == standard_texts(raw)


@given(st.sampled_from(MAILS), st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_mails_have_parts(path: Path, data: st.DataObject) -> None:
    """Mails with lines cut out and put in have parts and texts without line breaks of CRLF."""
    raw = path.read_bytes()[:4000]
    at = data.draw(st.integers(0, len(raw)))
    cut = data.draw(st.integers(0, 40))
    new = data.draw(st.sampled_from([*LINES, b"\r", b"\0", b"\xff", b"="]))
    made = raw[:at] + new + raw[at + cut :]
    for text in texts_of(made):
        text.encode("utf-8")
    root = part_of(made)
    for part in root.walk():
        assert 0 <= part.start <= part.body <= part.end <= len(made)
        assert part.start <= part.stop <= len(made)


def test_deep_nesting_is_opaque() -> None:
    """What lies deeper than the limit is one opaque part, with a defect."""
    raw = b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (i, i) for i in range(1000)
    )
    parts = list(part_of(raw + b"\ntext\n").walk())
    assert len(parts) == mime.MAX_DEPTH + 1
    assert isinstance(parts[-1].defects[-1], mime.TooManyParts)
    attached = list(part_of(b"Content-Type: message/rfc822\n\n" * 3000).walk())
    assert len(attached) == mime.MAX_DEPTH + 1


@pytest.mark.parametrize(
    "raw",
    [
        b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n\nx\n" * 30_000,
        b"Content-Type: multipart/digest; boundary=b\n\n" + b"--b\n\nx\n" * 30_000,
        b"Content-Type: message/delivery-status\n\n" + b"a: b\n\n" * 30_000,
    ],
    ids=["mixed", "digest", "delivery-status"],
)
def test_parts_beyond_the_limit_are_opaque(raw: bytes) -> None:
    """Parts beyond the limit are not split, and a defect says so."""
    root = part_of(raw)
    assert len(list(root.walk())) <= mime.MAX_PARTS + 2
    assert any(isinstance(defect, mime.TooManyParts) for defect in root.defects)


@pytest.mark.parametrize(
    "raw",
    [
        b'Content-Type: multipart/mixed; boundary="--"\n\n' + b"-" * 1_000_000,
        b'Content-Type: multipart/mixed; boundary="' + b"-" * 60 + b'"\n\n' + b"\n-" * 500_000,
        b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n" * 250_000,
        b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--bx\n" * 200_000,
        b"\n" + b"\n" * 1_000_000,
        b"\n" + b"y" * 5_000_000,
        b"Content-Transfer-Encoding: uue\n\n" + b"begin 644 x" * 100_000,
        b"Content-Transfer-Encoding: base64\n\n" + b"a\n" * 500_001,
    ],
    ids=["hyphens", "lines", "empty", "almost", "newlines", "long-line", "uu", "base64"],
)
def test_hostile_bodies_are_linear(raw: bytes) -> None:
    """A megabyte made to be slow has its parts and texts at once."""
    assert sum(map(len, texts_of(raw))) <= len(raw)


def test_a_view_has_the_parts_of_its_bytes() -> None:
    """Parts are found in a memory view as in bytes, without a copy of the whole."""
    raw = (Path(__file__).parent / "mail" / "text-attachment.eml").read_bytes()
    view = memoryview(b"-" + raw)[1:]
    assert list(mime.texts(view, mime.parse(view, headers.slice_header(view)))) == texts_of(raw)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("utf16-text", ["Grüße\nzwei"]),
        ("uuencoded-text", ["uuencoded text\n"]),
        ("uuencoded-broken", ["begin 644 a.txt\nÿÿ\nnot closed\n"]),
        ("text-attachment", ["<p>café</p>", "a;b\n1;2\n"]),
        ("latin1-text", ["Grüße\n"]),
        ("unknown-charset", ["café\n"]),
        ("dangerous-charset", ["a-zzzz\n"]),
        ("broken-base64", ["Hello world"]),
        ("broken-quoted-printable", ["café =ZZ same line "]),
        ("unknown-transfer-encoding", ["Uryyb.\n"]),
        ("utf7-surrogate", ["a \ufffd b\n"]),
        ("digest", ["first", "second"]),
        ("unterminated-multipart", ["first", "<p>second</p>"]),
        ("boundary-looks-like-field", ["", "two"]),
        ("inner-unterminated-multipart", ["one", "two"]),
        ("missing-boundary", []),
        ("crlf", ["one", "two"]),
        ("null-sender-bounce", ["I am sorry.\n", "", "", "The original text.\n"]),
        ("empty", [""]),
    ],
)
def test_texts(name: str, texts: list[str]) -> None:
    """Text parts are decoded by transfer encoding and charset, whatever their state."""
    raw = (Path(__file__).parent / "mail" / f"{name}.eml").read_bytes()
    assert texts_of(raw) == texts


@pytest.mark.parametrize(
    "value",
    [
        "text/plain",
        "Text/HTML; charset=UTF-8",
        'multipart/mixed; boundary="a b "',
        "multipart/mixed; boundary=x; charset=y",
        "text",
        "text/plain/x; charset=a",
        "; charset=a",
        "boundary=a",
        "",
        "text/plain; charset*=us-ascii'en'utf-8",
        'text/plain; charset="a\\"b"',
        "text/plain; charset=a; charset=b",
    ],
)
def test_content_types_agree_with_the_standard_library(value: str) -> None:
    """Type, charset and boundary are those that email.message finds."""
    message = email.message.Message()
    message["Content-Type"] = value
    found = mime.content_type(value)
    assert found.type == message.get_content_type()
    assert (found.charset or "").lower() == (message.get_content_charset() or "")
    assert found.boundary == message.get_boundary()
