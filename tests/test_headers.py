"""Header fields: slicing, encoded words, parameters, addresses, writing."""

from __future__ import annotations

import email
import email.message
import mmap
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postoffice import addresses, charsets, headers
from postoffice.parameters import MAX_PARAMETERS, parameters

MAILS = sorted((Path(__file__).parent / "mail").glob("*.eml"))


def standard_fields(raw: bytes) -> list[str]:
    """Return what the standard library finds, folds undone."""
    parsed = email.message_from_bytes(raw)
    return [f"{k}: {headers.unfold(v).lstrip(chr(32) + chr(9))}" for k, v in parsed.raw_items()]


def check_slicing(raw: bytes) -> None:
    careful = headers._slice_careful(raw, 0, len(raw))
    assert careful.lines == standard_fields(raw)
    assert careful.keys == [line.partition(":")[0].lower() + ": " for line in careful.lines]
    regular = headers._slice_regular(raw, 0, len(raw))
    if regular is not None:
        assert regular.lines == careful.lines
        assert regular.keys == careful.keys
        assert regular.end == careful.end
        assert not careful.defects
        assert careful.unixfrom is None
        spans = list(headers.field_spans(raw, 0, headers.header_end(raw, 0, regular.end)[0]))
        assert len(spans) == len(regular.lines)
    view = headers.slice_header(memoryview(b"-" + raw)[1:])
    assert view.lines == careful.lines
    assert view.end == careful.end


@pytest.mark.parametrize("path", MAILS, ids=lambda path: path.stem)
def test_slicing_agrees_with_the_standard_library(path: Path) -> None:
    """Both slicers find the fields that email.feedparser finds, in every mail and buffer."""
    check_slicing(path.read_bytes())


PIECES = [
    b"Subject: x",
    b"To:",
    b"X-Postoffice: y",
    b"a: \xe9",
    b"a: \xc3\xa9 ",
    b"\xe2\x84\xaaey: kelvin",
    b"no colon",
    b":",
    b"From me",
    b"From: me",
    b" ",
    b"\t",
    b" fold",
    b"\n",
    b"\n",
    b"\n",
    b"\r\n",
    b"\r\n",
    b"\r",
    b"\0",
    b"=?utf-8?q?=0A?=",
    b"--",
]


@given(st.lists(st.sampled_from(PIECES), max_size=25))
@settings(max_examples=400, deadline=None)
def test_slicing_agrees_on_generated_headers(pieces: list[bytes]) -> None:
    """Both slicers agree with email.feedparser on any mixture of fields, folds and line ends."""
    check_slicing(b"".join(pieces))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_slicing_agrees_on_random_bytes(raw: bytes) -> None:
    """Both slicers agree with email.feedparser on any bytes."""
    check_slicing(raw)


@given(st.sampled_from(MAILS), st.data())
@settings(max_examples=200, deadline=None)
def test_slicing_agrees_on_mutated_mails(path: Path, data: st.DataObject) -> None:
    """Both slicers agree with email.feedparser on mails with bytes cut out and put in."""
    raw = path.read_bytes()[:2000]
    at = data.draw(st.integers(0, len(raw)))
    cut = data.draw(st.integers(0, 5))
    new = data.draw(st.sampled_from([*PIECES, b""]))
    check_slicing(raw[:at] + new + raw[at + cut :])


def test_the_fast_slicer_takes_regular_mail() -> None:
    """LF and CRLF mail with folds, 8-bit and unknown names goes the fast way."""
    raw = b"From: a\nX-Odd-Name: b\nSubject: caf\xe9\n\tfold\nTo:c\nCc:  d\n\nbody"
    for made in (raw, raw.replace(b"\n", b"\r\n")):
        found = headers._slice_regular(made, 0, len(made))
        assert found is not None
        assert found.lines == ["From: a", "X-Odd-Name: b", "Subject: café\tfold", "To: c", "Cc: d"]
        assert made[found.end :] == b"body"


def test_more_fields_than_the_limit_are_not_visible() -> None:
    """Of too many fields the first are visible, and the body is still the body."""
    raw = b"a: b\n" * (headers.MAX_FIELDS + 5) + b"\nbody"
    found = headers.slice_header(raw)
    assert len(found.lines) == headers.MAX_FIELDS
    assert raw[found.end :] == b"body"
    assert any(isinstance(defect, headers.HeaderTooLarge) for defect in found.defects)


def test_a_header_beyond_the_limit_is_cut() -> None:
    """A field longer than the limit is seen as far as the limit."""
    raw = b"Subject: " + b"x" * (headers.MAX_HEADER + 10) + b"\nTo: a@example.com\n\nbody"
    found = headers.slice_header(raw)
    assert found.keys == ["subject: "]
    assert raw[found.end :] == b"body"
    assert found.defects


def test_a_map_is_sliced_like_bytes() -> None:
    """A memory map gives the fields that its bytes give."""
    raw = b"From: a\nSubject: x\n y\n\nbody"
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert headers.slice_header(mapped) == headers.slice_header(raw)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("=?utf-8?q?Gr=C3=BC=C3=9Fe?=", "Grüße"),
        ("=?UTF-8?B?R3LDvMOfZQ==?= an =?iso-8859-1?Q?K=F6ln?=", "Grüße an Köln"),
        ("=?utf-8?q?a?= \t =?utf-8?q?b?=", "ab"),
        ("=?utf-8?q?a?= x =?utf-8?q?b?=", "a x b"),
        ("=?utf-8?q?Gr=C3?= =?utf-8?q?=BC?=", "Grü"),
        ("=?utf-8*de?q?a_b?=", "a b"),
        ("=?x-none?q?caf=E9?=", "café"),
        ("=?us-ascii?q?caf=C3=A9?=", "café"),
        ("=?utf-8?b?R3LDvMOfZ?=", "Grüß"),
        ("=?utf-8?b?!!!?=x", "x"),
        ("=?utf-8?x?abc?=", "=?utf-8?x?abc?="),
        ("=?utf-8?q?open", "=?utf-8?q?open"),
        ("=??q?abc?=", "=??q?abc?="),
        ("=?=?utf-8?q?a?=", "=?a"),
        ("a=?utf-8?q?b c?=d", "ab cd"),
        ("=?utf-8?q?one=0D=0Atwo=00=1B?=", "one  two\ufffd\ufffd"),
        ("=?utf-7?q?+2AA-?=", "\ufffd"),
        ("one\r\n two\n\tthree", "one two\tthree"),
        ("a\u2028b\x85c\x9bd\ud800", "a b c\ufffdd\ufffd"),
        ("=?utf-8?q??=", ""),
    ],
)
def test_decoding_encoded_words(value: str, text: str) -> None:
    """Encoded words are decoded, malformed ones as far as they go."""
    assert headers.decode_header(value) == text


def test_decoding_none() -> None:
    """A missing value stays missing, both ways."""
    assert headers.decode_header(None) is None
    assert headers.encode_header("Subject", None) is None


@given(st.text(alphabet="=?bqBQutf-8_ \t\r\n\0é\ud800\x1b", max_size=60))
@settings(max_examples=300, deadline=None)
def test_decoding_never_forges_lines(value: str) -> None:
    """Whatever the value, its text has no line break, control character or surrogate."""
    text = headers.decode_header(value)
    assert text is not None
    assert not charsets.CONTROLS.search(text)


@pytest.mark.parametrize(
    "value",
    [
        " ".join(["=?utf-8?q?a?="] * 70_000),
        "=?u?q?x" * 150_000,
        "=?" * 500_000,
        "=?" + "?" * 1_000_000,
        " " * 1_000_000,
        "\x01" * 1_000_000,
    ],
    ids=["words", "unterminated", "starts", "marks", "spaces", "controls"],
)
def test_decoding_a_megabyte_is_linear(value: str) -> None:
    """A hostile megabyte is decoded at once."""
    text = headers.decode_header(value)
    assert text is not None
    assert len(text) <= len(value)


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("utf-8", "utf_8"),
        ("ISO-8859-1", "latin_1"),
        ("windows-1252", "cp1252"),
        ("cp-850", "cp850"),
        ("base64", None),
        ("idna", None),
        ("punycode", None),
        ("unicode_escape", None),
        ("no-such", None),
        ("a\0b", None),
        ("x" * 1000, None),
        ("../os", None),
        ("ütf-8", None),
    ],
)
def test_only_text_codecs_are_known(charset: str, name: str | None) -> None:
    """Charsets are looked up among text codecs alone."""
    found = charsets.codec(charset)
    assert (found and "x".encode(found) and "".encode(found)) == (name and "".encode(name))
    assert (found is None) == (name is None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a@example.com", ("a@example.com",)),
        (" <a@example.com> ", ("a@example.com",)),
        ("Ann <a@example.com>", ("a@example.com",)),
        ('"Smith, Ann" <a@example.com>, b@example.com', ("a@example.com", "b@example.com")),
        ('"x <f@evil.example>" <a@example.com>', ("a@example.com",)),
        ("Doe, Ann <a@example.com>", ("a@example.com",)),
        ("Ann Q. Public <a@example.com>", ("a@example.com",)),
        ("a@example.com (Ann), (x (y)) b@(z)example.com", ("a@example.com", "b@example.com")),
        (
            "F: a@example.com, B <b@example.com>;, c@x.example",
            ("a@example.com", "b@example.com", "c@x.example"),
        ),
        ("undisclosed-recipients:;", ()),
        ("a@example.com; b@example.com", ("a@example.com", "b@example.com")),
        ("<@r.example,@s.example:a@example.com>", ("a@example.com",)),
        ("<@r.example a@example.com>", ()),
        ('"a b"@example.com', ('"a b"@example.com',)),
        ('"ab"@example.com', ("ab@example.com",)),
        (r'"a\"b"@example.com', (r'"a\"b"@example.com',)),
        ('"a@b"@example.com', ('"a@b"@example.com',)),
        ("a . b @ example . com", ("a.b@example.com",)),
        ("a@[192.0.2.1]", ("a@[192.0.2.1]",)),
        ("a@example.com.", ("a@example.com.",)),
        ("=?utf-8?q?J=C3=B6rg?= <j@example.com>", ("j@example.com",)),
        ("=?utf-8?q?a=40evil.example?=", ()),
        ("jörg@example.com", ("jörg@example.com",)),
        ("a@b@example.com", ()),
        ("a@b.example <c@example.com>", ()),
        ("C@example.com <c@example.com>", ("c@example.com",)),
        ("a@b@c, d@example.com", ("d@example.com",)),
        ("a b@example.com", ()),
        ("a@example..com", ()),
        ("a@", ()),
        ("@example.com", ()),
        ("root", ()),
        ("", ()),
        ("<>", ()),
        ("<a@example.com", ()),
        ("a@example.com>", ()),
        ("<a@example.com> x", ()),
        ("<a@example.com> <b@example.com>", ()),
        ("c@example.com, (open a@example.com", ("c@example.com",)),
        ('c@example.com, "open a@example.com', ("c@example.com",)),
        ("a@exa\0mple.com", ()),
        ('"a\0b"@example.com', ()),
        ("a\\b@example.com", ()),
        ("a:b@x.example:c@example.com", ()),
    ],
)
def test_addresses(value: str, expected: tuple[str, ...]) -> None:
    """Addresses are what RFC 5322 says; what cannot be parsed gives none."""
    assert addresses.mailboxes(value).addresses == expected
    assert addresses.mailboxes(value + " " * 600).addresses == expected


@given(st.lists(st.sampled_from([*'a.b@,;:<>()"\\[] ', "ex.com", "é"]), max_size=20))
@settings(max_examples=500, deadline=None)
def test_the_fast_way_to_an_address_agrees_with_the_parser(tokens: list[str]) -> None:
    """The regular expressions for simple mailboxes find what the parser finds."""
    value = "".join(tokens)
    parsed = list(addresses._parse_mailboxes(value))
    found = addresses.mailboxes(value)
    assert found.addresses == tuple(f"{local}@{domain}" for local, domain in parsed)
    assert found.hosts == tuple(addresses.host(domain) for _, domain in parsed)
    assert len(found.addresses) <= value.count("@")


@pytest.mark.parametrize(
    "unit", ['"', "(", "()", "<", ",", "@", "a.", "[", "a ", "\\", "a@b,", ":"]
)
def test_addresses_of_a_hostile_field_are_linear(unit: str) -> None:
    """A hundred kilobytes of anything is parsed at once."""
    addresses.mailboxes(unit * (100_000 // len(unit)))


@pytest.mark.parametrize(
    ("domain", "host"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("MÜLLER.example", "xn--mller-kva.example"),
        ("XN--MLLER-KVA.example", "xn--mller-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("ｅｘample。com", "example.com"),
        ("[192.0.2.1]", "[192.0.2.1]"),
        ("ä" * 300, "ä" * 300),
        ("Ä_\u200d.example", "ä_\u200d.example"),
    ],
)
def test_hosts_compare_in_one_form(domain: str, host: str) -> None:
    """A domain is lowered, its last dot dropped, its U-labels made A-labels."""
    assert addresses.host(domain) == host


@pytest.mark.parametrize(
    "value",
    [
        "text/plain",
        "text/plain; charset=utf-8",
        'text/plain; Charset="utf;8"; x',
        'a/b; name="a\\"b;c"; d=<e>',
        "a/b; f*0*=utf-8'de'Gr%C3%BC; f*1=x; f*2*=%20",
        "a/b; f*=utf-8''%41",
        ";;;",
        "",
        'a/b; x="open; y=1',
        "a/b; x=1; x=2; = 3",
    ],
)
def test_parameters_agree_with_the_standard_library(value: str) -> None:
    """Parameters are those that email.message finds."""
    message = email.message.Message()
    message["content-type"] = value
    assert parameters(value) == message.get_params(unquote=False)


@given(st.text(alphabet="ab;=\"\\*0'% <>", max_size=40))
@settings(max_examples=500, deadline=None)
def test_parameters_never_raise(value: str) -> None:
    """Parameters agree with email.message wherever that does not raise."""
    found = parameters(value)
    message = email.message.Message()
    message["content-type"] = value
    try:
        wanted = message.get_params(unquote=False)
    except (ValueError, TypeError, LookupError):
        return
    assert found == wanted


def test_parameters_of_a_hostile_field_are_bounded() -> None:
    """A megabyte of semicolons, and continuation numbers without end, do no harm."""
    assert len(parameters("a/b" + ";" * 1_000_000)) <= MAX_PARAMETERS
    assert parameters("a/b; x*" + "9" * 10_000 + "*=y; z=1") == [("a/b", ""), ("z", '"1"')]


@pytest.mark.parametrize(
    ("name", "value", "wire"),
    [
        ("Subject", "plain", "plain"),
        ("Subject", "Re: Grüße an alle", "Re: =?utf-8?b?R3LDvMOfZQ==?= an alle"),
        (
            "To",
            "Jörg <j@example.com>, b@example.com",
            "=?utf-8?q?J=C3=B6rg?= <j@example.com>, b@example.com",
        ),
        (
            "To",
            '"Müller, Jörg" <j@example.com>',
            "=?utf-8?q?M=C3=BCller=2C_J=C3=B6rg?= <j@example.com>",
        ),
        ("Cc", "jörg@müller.example", "jörg@xn--mller-kva.example"),
        ("From", "x@straße.example (Ü)", "x@xn--strae-oqa.example (=?utf-8?b?w5w=?=)"),
        ("To", "Gäste: a@example.com;", "=?utf-8?q?G=C3=A4ste?=: a@example.com;"),
        ("To", "Jörg", "=?utf-8?q?J=C3=B6rg?="),
    ],
)
def test_encoding(name: str, value: str, wire: str) -> None:
    """Text is encoded as RFC 2047 has it, in address fields the names alone."""
    assert headers.encode_header(name, value) == wire


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\r\nX-Postoffice: Bounced"])
def test_values_cannot_inject_fields(value: str) -> None:
    """A line break or NUL in a value is refused."""
    with pytest.raises(ValueError, match="line break"):
        headers.encode_header("Subject", value)


@given(st.text(alphabet=st.characters(exclude_characters="\r\n\0"), max_size=120))
@settings(max_examples=300, deadline=None)
def test_encoding_is_undone_by_decoding(value: str) -> None:
    """What is encoded, folded and sliced reads as it was, cleaned."""
    if "=?" in value:
        return
    wire = headers.encode_header("Subject", value)
    assert wire is not None
    assert wire.isascii()
    lines = headers.fold("Subject", wire, "\n")
    assert all(line[:1] in "S \t" and line.strip() for line in lines.splitlines())
    found = headers.slice_header(lines.encode() + b"\n")
    assert len(found.lines) == 1
    text = headers.decode_header(found.lines[0][9:])
    assert text is not None
    assert text.strip(" \t") == charsets.clean(value).strip(" \t")


@given(st.text(alphabet='aö @,;:<>()"\\[].é\x1b', max_size=60))
@settings(max_examples=300, deadline=None)
def test_encoded_addresses_never_break_lines(value: str) -> None:
    """An address field made of anything is one field, and ends."""
    wire = headers.encode_header("To", value)
    assert wire is not None
    raw = headers.fold("To", wire, "\r\n").encode() + b"\r\n"
    assert len(headers.slice_header(raw).lines) == 1


def test_long_values_are_folded_within_limits() -> None:
    """Lines stay within 78 characters where there is white space to fold at."""
    wire = headers.encode_header("Subject", "Grüße " * 50)
    assert wire is not None
    assert max(map(len, headers.fold("Subject", wire, "\n").splitlines())) <= 78
