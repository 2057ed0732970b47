"""What each filter matches, and what it says about it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zope.interface.verify import verifyObject

from postoffice import filters
from postoffice.exceptions import MatchTimeout
from postoffice.filters import (
    FACTORIES,
    BodyRegexpFileFilter,
    BodyRegexpFilter,
    EnvelopeToFilter,
    FilterError,
    HeaderRegexpFileFilter,
    HeaderRegexpFilter,
    ToHostnameFilter,
)
from postoffice.interfaces import IFilter
from postoffice.message import Envelope, Message


def mail(*fields: str, body: str = "Hello.\n", to: tuple[str, ...] = ()) -> Message:
    """Make a message of header fields and a body, perhaps with envelope recipients."""
    raw = "".join(f"{field}\n" for field in fields) + "\n" + body
    envelope = Envelope("a@b.example", to, 0) if to else None
    return Message.from_bytes(raw.encode("utf-8", "surrogateescape"), (), envelope)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("to_hostname", "example.com"),
        ("header_regexp", "Subject: x"),
        ("body_regexp", "x"),
        ("envelope_to", "@example.com"),
        ("header_regexp_file", "expressions"),
        ("body_regexp_file", "expressions"),
    ],
)
def test_filters_keep_their_contract(tmp_path: Path, name: str, value: str) -> None:
    """Each filter made as the configuration does provides IFilter and a line about itself."""
    (tmp_path / "expressions").write_text("x\n")
    made = FACTORIES[name](value, str(tmp_path))
    assert verifyObject(IFilter, made)
    assert made.description.startswith(f"{name}: ")
    assert value in made.description


# -- to_hostname -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "to", "matches"),
    [
        ("example.com", "a@example.com", True),
        ("example.com", "a@app.example.com", False),
        ("example.com", "a@EXAMPLE.com", True),
        ("EXAMPLE.com", "a@example.com.", True),
        ("example.com.", "a@example.com", True),
        (".example.com", "a@example.com", True),
        (".example.com", "a@app.example.com", True),
        (".example.com", "a@a.b.example.com", True),
        (".example.com", "a@evilexample.com", False),
        ("*.example.com", "a@example.com", True),
        ("*.example.com", "a@app.example.com", True),
        ("*.example.com", "a@evilexample.com", False),
        ("one.example two.example", "a@two.example", True),
        ("one.example\ttwo.example", "a@three.example", False),
        ("example.com # comment", "a@example.com", True),
        ("example.com # other.example", "a@other.example", False),
        ("bücher.example", "a@xn--bcher-kva.example", True),
        (".xn--bcher-kva.example", "a@shop.BÜCHER.example", True),
        ("[192.0.2.1]", "a@[192.0.2.1]", True),
        ("example.com", "Fred <fred@example.com>, x@other.example", True),
        ("example.com", '"a@example.com, b" <fred@other.example>', False),
        ("example.com", "list: a@other.example, b@example.com;", True),
        ("example.com", "<@example.com:a@other.example>", False),
        ("other.example", "<@example.com:a@other.example>", True),
        ("example.com", "a@example.com@other.example", False),
        ("other.example", "a@example.com@other.example", False),
        ("other.example", "a@other.example (was a@example.com)", True),
        ("example.com", "a@other.example (was a@example.com)", False),
        ("example.com", "not an address", False),
    ],
)
def test_to_hostname(hosts: str, to: str, matches: bool) -> None:
    """A host matches at label boundaries, whatever its case, form, name or comments."""
    assert (ToHostnameFilter(hosts)(mail(f"To: {to}")) is not None) == matches


def test_to_hostname_looks_in_three_headers() -> None:
    """To, Cc and X-Original-To count, every To and Cc, but of X-Original-To the topmost only."""
    one = ToHostnameFilter("example.com")
    assert one(mail("To: a@other.example", "To: a@example.com"))
    assert one(mail("To: a@other.example", "Cc: a@example.com"))
    assert one(mail("X-Original-To: a@example.com", "X-Original-To: a@other.example"))
    assert one(mail("X-Original-To: a@other.example", "X-Original-To: a@example.com")) is None
    assert one(mail("From: a@example.com", "Bcc: a@example.com")) is None


def test_to_hostname_believes_the_envelope_first() -> None:
    """A known recipient stands for X-Original-To, whatever such a field says."""
    message = mail("X-Original-To: a@example.com", to=("a@other.example",))
    assert ToHostnameFilter("example.com")(message) is None
    assert ToHostnameFilter("other.example")(message)


@pytest.mark.parametrize(
    "expr",
    [
        "example.com;headers=From",
        "example.com; headers = Reply-To , From # why",
        "example.com\t;headers=From\t#comment",
    ],
)
def test_to_hostname_can_be_told_its_headers(expr: str) -> None:
    """The attribute headers replaces the usual three."""
    one = ToHostnameFilter(expr)
    assert one(mail("From: a@example.com"))
    assert one(mail("To: a@example.com")) is None


def test_to_hostname_takes_headers_as_an_argument() -> None:
    """The second argument is the headers, as repoze.postoffice had it."""
    assert ToHostnameFilter("example.com", ["Sender"])(mail("Sender: a@example.com"))
    assert ToHostnameFilter("example.com", headers=("Sender",))(mail("To: a@example.com")) is None


def test_to_hostname_says_what_matched() -> None:
    """The answer names the filter, the host as configured, the host found, and the header."""
    answer = ToHostnameFilter("x.example *.Example.com")(mail("Cc: a@APP.example.com"))
    assert answer == "to_hostname: *.Example.com matches app.example.com in Cc"


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("", "no host"),
        ("  # only a comment", "no host"),
        (";headers=To", "no host"),
        ("a@example.com", "no host name"),
        ("a.example, b.example", "no host name"),
        ("*example.com", "no host name"),
        ("*", "no host name"),
        (".", "no host name"),
        ("..example.com", "no host name"),
        ("mail.*.example", "no host name"),
        ("http://example.com", "no host name"),
        ("example.com;header=To", "header=To"),
        ("example.com;headers=", "no name of a header"),
        ("example.com;headers=To,,Cc", "no name of a header"),
        ("example.com;headers=To:Cc", "no name of a header"),
    ],
)
def test_to_hostname_refuses_nonsense(expr: str, fault: str) -> None:
    """What can never match as meant is an error that says what to write."""
    with pytest.raises(FilterError) as caught:
        ToHostnameFilter(expr)
    assert fault in caught.value.fault
    assert caught.value.mend
    assert str(caught.value) == f"{caught.value.fault}; {caught.value.mend}"


@pytest.mark.parametrize(
    ("wide", "narrow", "covers"),
    [
        (".example.com", "example.com app.example.com", True),
        (".example.com", ".app.example.com", True),
        ("*.example.com", ".example.com", True),
        ("example.com", ".example.com", False),
        (".app.example.com", ".example.com", False),
        (".example.com", "evilexample.com", False),
        (".example.com", "example.com other.example", False),
        ("example.com;headers=To", "example.com", False),
        ("example.com", "example.com;headers=TO", True),
    ],
)
def test_to_hostname_knows_what_it_covers(wide: str, narrow: str, covers: bool) -> None:
    """One filter covers another when no message can match the other alone."""
    assert ToHostnameFilter(wide).covers(ToHostnameFilter(narrow)) == covers


# -- envelope_to -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "recipient", "matches"),
    [
        ("support@example.com", "support@example.com", True),
        ("support@example.com", "Support@EXAMPLE.com.", True),
        ("SUPPORT@example.com", "support@example.com", True),
        ("support@example.com", "support@app.example.com", False),
        ("support@example.com", "support+1@example.com", False),
        ("support+*@example.com", "support+ticket-7@example.com", True),
        ("support+*@example.com", "support@example.com", False),
        ("*-bounces@example.com", "list-bounces@example.com", True),
        ("a*b*c@example.com", "aXbYc@example.com", True),
        ("a*b*c@example.com", "acb@example.com", False),
        ("aa*aa@example.com", "aaa@example.com", False),
        ("*@example.com", "anyone@example.com", True),
        ("@example.com", "anyone@example.com", True),
        ("@example.com", "anyone@app.example.com", False),
        ("@.example.com", "anyone@app.example.com", True),
        ("@*.example.com", "anyone@example.com", True),
        ("@*.example.com", "anyone@evilexample.com", False),
        ("@mx*.example.com", "anyone@mx7.example.com", True),
        ("postmaster@*", "postmaster@anywhere.example", True),
        ("a@b.example c@d.example", "c@d.example", True),
        ("ü@bücher.example", "Ü@xn--bcher-kva.example", True),
        ("a?c@example.com", "abc@example.com", False),
        ("[a]@example.com", "a@example.com", False),
    ],
)
def test_envelope_to(patterns: str, recipient: str, matches: bool) -> None:
    """A pattern takes the whole address, with stars for any characters, in any case."""
    answer = EnvelopeToFilter(patterns)(mail("To: nobody@nowhere.example", to=(recipient,)))
    assert (answer is not None) == matches


def test_envelope_to_asks_every_recipient() -> None:
    """Any of several recipients may match any of several patterns."""
    one = EnvelopeToFilter("a@example.com", "b@example.com c@example.com")
    answer = one(mail(to=("x@example.com", "c@example.com")))
    assert answer == "envelope_to: c@example.com matches c@example.com"


def test_envelope_to_reads_the_topmost_trace_header() -> None:
    """Without an envelope the topmost X-Original-To counts, else the topmost Delivered-To."""
    one = EnvelopeToFilter("support@example.com")
    assert one(mail("X-Original-To: support@example.com"))
    assert one(mail("Delivered-To: <support@example.com>"))
    assert one(mail("X-Original-To: x@y.example", "X-Original-To: support@example.com")) is None
    assert one(mail("X-Original-To: x@y.example", "Delivered-To: support@example.com")) is None
    assert one(mail("To: support@example.com")) is None
    assert one(mail("X-Original-To: support@example.com", to=("x@y.example",))) is None


def test_a_recipient_without_a_domain_matches_nothing() -> None:
    """A local name is no address, so that not even @* takes it."""
    assert EnvelopeToFilter("*@*")(mail(to=("root",))) is None


@pytest.mark.parametrize("patterns", ["", "   ", "support", "support@", "a@b,c@d", "<a@b>", "a@b@"])
def test_envelope_to_refuses_nonsense(patterns: str) -> None:
    """What is no pattern of addresses is an error that says what to write."""
    with pytest.raises(FilterError):
        EnvelopeToFilter(patterns)


@given(st.text("ab*", max_size=8), st.text("ab", max_size=12))
def test_stars_stand_for_any_characters(pattern: str, local: str) -> None:
    """A pattern matches exactly as the regular expression in which each star is ``.*``."""
    expected = re.fullmatch(re.escape(pattern).replace(r"\*", ".*") or ".*", local) is not None
    answer = EnvelopeToFilter(f"{pattern}@b.example")(mail(to=(f"{local}@b.example",)))
    assert (answer is not None) == expected


# -- header_regexp ---------------------------------------------------------------------------------


def test_header_regexp_matches_from_the_start() -> None:
    """An expression is matched from the start of "Name: value" and need not reach the end."""
    message = mail("To: a@b.example", "Subject: Garden party tonight")
    assert HeaderRegexpFilter("Subject:.+[Pp]arty.+")(message)
    assert HeaderRegexpFilter("party")(message) is None
    assert HeaderRegexpFilter(".*party")(message)
    assert HeaderRegexpFilter("subject:")(message) is None
    assert HeaderRegexpFilter("(?i)subject:")(message)


def test_header_regexp_sees_every_field() -> None:
    """Repeated fields are matched, not only the first of them."""
    assert HeaderRegexpFilter("Received: from evil")(
        mail("Received: from good", "Received: from evil")
    )


@pytest.mark.parametrize(
    "field",
    [
        "Subject: =?utf-8?q?K=C3=BCndigung?=",
        "Subject: =?iso-8859-1?b?S/xuZGlndW5n?=",
        "Subject: Kündigung",
        "Subject: =?utf-8?q?K=C3=BCn?=\n =?utf-8?q?digung?=",
        os.fsdecode("Subject: Kündigung".encode("latin-1")),
    ],
)
def test_header_regexp_sees_decoded_text(field: str) -> None:
    """Encoded words, raw 8-bit and folds are undone before matching."""
    assert HeaderRegexpFilter("Subject: Kündigung$")(mail(field))


def test_header_regexp_does_not_see_forged_fields() -> None:
    """X-Postoffice fields of the sender's are not there, ours are."""
    raw = b"X-Postoffice-Date: 1\nSubject: x\n\n"
    message = Message.from_bytes(raw, (("X-Postoffice-Date", "2"),))
    assert HeaderRegexpFilter("X-Postoffice-Date: 1")(message) is None
    assert HeaderRegexpFilter("X-Postoffice-Date: 2")(message)


def test_header_regexp_takes_several_expressions() -> None:
    """Any of the constructor's expressions may match; the answer names which."""
    one = HeaderRegexpFilter("Subject: a", "Subject: b")
    assert one(mail("Subject: b")) == "header_regexp: Subject: b matches a header"
    assert one(mail("Subject: c")) is None
    assert HeaderRegexpFilter()(mail("Subject: c")) is None


def test_header_regexp_works_on_thousands_of_fields() -> None:
    """The last of many fields is matched as the first is."""
    message = mail(*(f"X-{n}: x" for n in range(3000)), "Subject: last")
    assert HeaderRegexpFilter("Subject: last")(message)
    assert HeaderRegexpFilter("Subject: other")(message) is None


@pytest.mark.parametrize("expression", ["(", "*", "[a", r"\Z{", "(?P<a>x)(?P<a>y)"])
@pytest.mark.parametrize("kind", [HeaderRegexpFilter, BodyRegexpFilter])
def test_a_bad_expression_is_refused(
    kind: type[HeaderRegexpFilter | BodyRegexpFilter], expression: str
) -> None:
    """An expression that Python's re refuses is an error that shows it."""
    try:
        re.compile(expression)
    except re.error:
        with pytest.raises(FilterError, match="is no regular expression") as caught:
            kind("fine", expression)
        assert repr(expression) in caught.value.fault
    else:
        assert kind(expression).sources == (expression,)


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_an_empty_value_is_refused(tmp_path: Path, name: str) -> None:
    """Every filter needs a value: an empty expression would match every message."""
    with pytest.raises(FilterError):
        FACTORIES[name]("", str(tmp_path))


# -- body_regexp -----------------------------------------------------------------------------------


def test_body_regexp_searches_line_by_line() -> None:
    """An expression is found anywhere, and ^ and $ stand at the ends of each line."""
    message = mail("Subject: x", body="first\nsecond line\nthird\n")
    assert BodyRegexpFilter("cond")(message) == "body_regexp: cond matches a text part"
    assert BodyRegexpFilter("^second line$")(message)
    assert BodyRegexpFilter("^cond")(message) is None
    assert BodyRegexpFilter("Subject")(message) is None


def test_body_regexp_reads_lines_that_end_in_crlf() -> None:
    """The dollar stands before CRLF as well."""
    raw = b"Subject: x\r\n\r\nfirst\r\nsecond\r\n"
    assert BodyRegexpFilter("^first$")(Message.from_bytes(raw))


MULTIPART = """\
--=_
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

Gr=FC=DFe
--=_
Content-Type: text/html; charset=utf-8
Content-Transfer-Encoding: base64

PGI+R3LDvMOfZSBhdXMgS8O2bG48L2I+
--=_
Content-Type: application/octet-stream

secret
--=_--
"""


def test_body_regexp_searches_each_decoded_text_part() -> None:
    """Text parts are searched with encoding and charset undone, other parts are not."""
    message = mail('Content-Type: multipart/mixed; boundary="=_"', body=MULTIPART)
    assert BodyRegexpFilter("^Grüße$")(message)
    assert BodyRegexpFilter("Köln")(message)
    assert BodyRegexpFilter("secret")(message) is None
    assert BodyRegexpFilter("base64", "boundary", "--")(message) is None


@pytest.mark.parametrize(
    ("charset", "body"),
    [
        ("no-such-charset", "Grüße".encode()),
        ("us-ascii", "Grüße".encode("latin-1")),
        ("utf-8", "Grüße".encode("latin-1")),
    ],
)
def test_body_regexp_falls_back_on_other_charsets(charset: str, body: bytes) -> None:
    """Text that its charset cannot decode is read as UTF-8, or else as Latin-1."""
    raw = f"Content-Type: text/plain; charset={charset}\n\n".encode() + body
    assert BodyRegexpFilter("^Grüße$")(Message.from_bytes(raw))


def test_body_regexp_does_not_run_on_oversize_mail() -> None:
    """The notice that stands for an oversize body is not searched."""
    message = mail("Subject: x", body="spam\n")
    message.oversize = True
    assert BodyRegexpFilter("spam")(message) is None


def test_a_match_is_found_behind_a_part_that_takes_too_long() -> None:
    """A part on which the expression exceeds its limit does not hide another that matches."""
    slow = "x" * 50 + "!"
    part = "--=_\nContent-Type: text/plain\n\n{}\n"
    body = part.format(slow) + part.format("yy") + "--=_--\n"
    message = mail('Content-Type: multipart/mixed; boundary="=_"', body=body)
    expression = r"^(x+)+\1$|yy"
    assert BodyRegexpFilter(expression)(message)
    with pytest.raises(MatchTimeout):
        BodyRegexpFilter(r"^(x+)+\1$")(message)


def test_many_matches_have_a_limit_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fields and parts there are, a filter does not go on for ever."""
    part = "--=_\nContent-Type: text/plain\n\nx\n"
    fields = [f"X-{n}: x" for n in range(1000)]
    content = 'Content-Type: multipart/mixed; boundary="=_"'
    message = mail(content, *fields, body=part * 3 + "--=_--\n")
    kinds = (HeaderRegexpFilter, BodyRegexpFilter)
    assert [kind("y")(message) for kind in kinds] == [None, None]
    monkeypatch.setattr(filters, "MAX_FILTER_SECONDS", -1.0)
    for kind in kinds:
        with pytest.raises(MatchTimeout, match="on one message"):
            kind("y")(message)


# -- files of expressions --------------------------------------------------------------------------


def test_a_file_holds_an_expression_a_line(tmp_path: Path) -> None:
    """Any line of the file may match, and the answer names line and file."""
    path = tmp_path / "expressions"
    path.write_text("Subject: a\nSubject: b\n")
    one = HeaderRegexpFileFilter(str(path))
    assert one(mail("Subject: b")) == f"header_regexp_file: Subject: b in {path} matches a header"
    assert one(mail("Subject: c")) is None
    path.write_text("^a$\n^b$\n")
    two = BodyRegexpFileFilter(str(path))
    assert two(mail(body="x\nb\n")) == f"body_regexp_file: ^b$ in {path} matches a text part"
    assert two(mail(body="x\n")) is None


def test_blank_lines_and_comments_are_skipped(tmp_path: Path) -> None:
    """Neither matches anything; a leading number sign is written with a backslash."""
    path = tmp_path / "expressions"
    path.write_bytes(b"\xef\xbb\xbf# comment\r\n\r\n   \t\n\\#1\r\n\n #2\n")
    assert BodyRegexpFileFilter(str(path)).sources == (r"\#1", " #2")
    assert BodyRegexpFileFilter(str(path))(mail(body="we are #1\n"))
    assert BodyRegexpFileFilter(str(path))(mail(body="comment\n\n")) is None


def test_white_space_at_the_ends_of_a_line_counts(tmp_path: Path) -> None:
    """Leading and trailing white space belongs to the expression."""
    path = tmp_path / "expressions"
    path.write_text(" word \n")
    one = BodyRegexpFileFilter(str(path))
    assert one.sources == (" word ",)
    assert one(mail(body="a word here\n"))
    assert one(mail(body="word\n")) is None


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    """Other characters that Unicode calls line breaks belong to the expression."""
    path = tmp_path / "expressions"
    path.write_text("a\x0cb\u2028c\n", encoding="utf-8")
    assert BodyRegexpFileFilter(str(path)).sources == ("a\x0cb\u2028c",)


def test_a_file_is_read_as_utf_8(tmp_path: Path) -> None:
    """The locale plays no part in what an expression says."""
    path = tmp_path / "expressions"
    path.write_text("Subject: Ä", encoding="utf-8")
    assert HeaderRegexpFileFilter(str(path))(mail("Subject: Ärger"))


@pytest.mark.parametrize("kind", [HeaderRegexpFileFilter, BodyRegexpFileFilter])
def test_an_error_in_a_file_names_the_line(
    tmp_path: Path, kind: type[HeaderRegexpFileFilter | BodyRegexpFileFilter]
) -> None:
    """A bad expression, or a byte that is not UTF-8, is told with file and line."""
    path = tmp_path / "expressions"
    path.write_text("# one\nfine\nb(d\n")
    with pytest.raises(
        FilterError, match=f"^{re.escape(str(path))}, line 3: 'b\\(d' is no regular"
    ):
        kind(str(path))
    path.write_bytes(b"fine\n\xff\n")
    with pytest.raises(FilterError, match=f"^{re.escape(str(path))}, line 2: byte 0xff"):
        kind(str(path))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """A missing file, a folder, a FIFO and an impossible name are refused without waiting."""
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "fifo", ".", "nul\0"):
        with pytest.raises(FilterError, match="cannot read"):
            HeaderRegexpFileFilter.from_option(name, str(tmp_path))


def test_a_path_is_relative_to_the_folder(tmp_path: Path) -> None:
    """A relative path is looked up in the configuration's folder, an absolute one as it is."""
    path = tmp_path / "expressions"
    path.write_text("x\n")
    assert HeaderRegexpFileFilter.from_option("expressions", str(tmp_path)).path == str(path)
    assert BodyRegexpFileFilter.from_option(str(path), "/nowhere").path == str(path)


# -- hostile input ---------------------------------------------------------------------------------

EVERY_FILTER = [
    ToHostnameFilter(".example.com;headers=To,From,X-Original-To"),
    EnvelopeToFilter("*a*@*"),
    HeaderRegexpFilter(r"To:.*\bexample\b", r"(?i)subject:\s+(\w+\s?)*$"),
    BodyRegexpFilter(r"^\s*spam\s*$", r"[^\x00-\x7f]{3}"),
]


@given(st.binary(max_size=300))
def test_any_bytes_get_an_answer(raw: bytes) -> None:
    """Whatever bytes a message is made of, every filter answers with one line or none."""
    for start in (b"", b"To: ", b"Content-Type: multipart/mixed; boundary=a\n\n--a\n"):
        for one in EVERY_FILTER:
            answer = one(Message.from_bytes(start + raw))
            assert answer is None or (answer and answer.isprintable())


def test_an_answer_shows_no_control_characters() -> None:
    """What the message says is cleaned and cut before it is shown."""
    message = mail(to=("\x1b[2J" + "a" * 1000 + "@b.example",))
    answer = EnvelopeToFilter("@b.example")(message)
    assert answer is not None
    assert "\x1b" not in answer
    assert len(answer) < 300
