"""Reading and writing header fields: slicing, RFC 2047, parameters and addresses.

Mail is written by attackers.  Every function that reads takes any bytes or text, raises nothing,
and needs time and memory linear in what it is given.  Where a field lies and where the header ends
is what :mod:`email.feedparser` says under ``compat32``; a fast path answers for regular mail, a
careful one for the rest, and the tests hold both against the standard library.

Functions are pure and safe to call from several threads.
"""

from __future__ import annotations

import binascii
import encodings
import mmap
import re
from collections.abc import Iterator, Sequence
from email import errors, utils
from encodings import aliases as _aliases
from encodings import normalize_encoding
from functools import lru_cache
from typing import NamedTuple

__all__ = [
    "ADDRESS_FIELDS",
    "MAX_FIELDS",
    "MAX_HEADER",
    "Buffer",
    "Header",
    "Mailboxes",
    "all_mailboxes",
    "clean",
    "codec",
    "decode_charset",
    "decode_header",
    "encode_header",
    "field_spans",
    "fold",
    "forged_spans",
    "header_end",
    "host",
    "is_name",
    "mailboxes",
    "parameters",
    "slice_header",
    "unfold",
]

Buffer = bytes | mmap.mmap | memoryview
"""What a message can be read from without a copy of the whole."""

MAX_FIELDS = 10_000
"""Fields of one header that are looked at; later ones are not visible."""

MAX_HEADER = 4 * 1024 * 1024
"""Bytes of one header that are looked at; what lies behind is not visible."""

# The fast path looks this far for the end of the header.
_WINDOW = 64 * 1024

ADDRESS_FIELDS = frozenset(
    [
        "bcc",
        "cc",
        "delivered-to",
        "disposition-notification-to",
        "errors-to",
        "from",
        "mail-followup-to",
        "mail-reply-to",
        "reply-to",
        "resent-bcc",
        "resent-cc",
        "resent-from",
        "resent-reply-to",
        "resent-sender",
        "resent-to",
        "return-path",
        "sender",
        "to",
        "x-original-to",
    ]
)
"""Names, in lower case, of the fields whose values are addresses (RFC 5322, 3.4)."""


# -- text ------------------------------------------------------------------------------------------

_PLAIN = bytes([9, 10, *range(32, 127)])
_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


_SURROGATES = re.compile("[\ud800-\udfff]")


def _replace_control(found: re.Match[str]) -> str:
    return " " if found[0] in _BREAKS else "\ufffd"


def clean(text: str) -> str:
    """Return ``text`` without what could forge a line or drive a terminal.

    Line breaks of any kind become a space; other control characters except the tab, and lone
    surrogates, become U+FFFD.
    """
    if text.isprintable():
        return text
    return _CONTROLS.sub(_replace_control, text)


# Not characters for characters: slow, able to fail on every input, or decoding to code.
_NOT_FOR_MAIL = frozenset(
    [
        "aliases",
        "base64_codec",
        "bz2_codec",
        "hex_codec",
        "idna",
        "mbcs",
        "oem",
        "punycode",
        "quopri_codec",
        "raw_unicode_escape",
        "rot_13",
        "undefined",
        "unicode_escape",
        "uu_codec",
        "zlib_codec",
    ]
)
# Names that mail uses and Python does not know.
_MAIL_CHARSETS = {
    "cp_850": "cp850",
    "cp_1252": "cp1252",
    "iso_8859_8_e": "iso8859_8",
    "iso_8859_8_i": "iso8859_8",
    "utf8mb4": "utf_8",
    "utf_8mb4": "utf_8",
    "windows_874": "cp874",
    "x_gbk": "gbk",
    "x_mac_roman": "mac_roman",
    "x_sjis": "shift_jis",
    "x_x_big5": "big5",
}


@lru_cache(maxsize=1)
def _codecs() -> dict[str, str]:
    # Imported when first needed: most mail needs few charsets, and few processes read mail.
    import pkgutil

    modules = {module.name for module in pkgutil.iter_modules(encodings.__path__)}
    known = {name: name for name in modules}
    known.update({alias: name for alias, name in _aliases.aliases.items() if name in modules})
    known.update(_MAIL_CHARSETS)
    return {name: target for name, target in known.items() if target not in _NOT_FOR_MAIL}


@lru_cache(maxsize=512)
def codec(charset: str) -> str | None:
    """Return Python's name of the text codec for a charset's name, or ``None``.

    Only names that Python is known to have are ever looked up: its own look-up remembers every
    name for ever, and imports modules by it.
    """
    if len(charset) > 40 or not charset.isascii():
        return None
    name = normalize_encoding(charset.strip()).lower()
    return _codecs().get(name) or _codecs().get(name.replace(".", "_"))


def decode_charset(data: bytes | memoryview, charset: str | None) -> str:
    """Decode ``data`` by its charset, else as UTF-8, else as Latin-1.  No lone surrogates."""
    name = codec(charset) if charset else None
    if name is not None:
        try:
            text = str(data, name)
        except (UnicodeError, ValueError):
            pass
        else:
            # Python's UTF-7 lets lone surrogates through.
            if name == "utf_7" and not text.isascii():
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return text
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        return str(data, "latin-1")


def _bytes_of_base64(text: str) -> bytes:
    data = text.encode("ascii", "ignore")
    try:
        return binascii.a2b_base64(data)
    except binascii.Error:
        data = re.sub(rb"[^A-Za-z0-9+/]", b"", data)
        if len(data) % 4 == 1:
            data = data[:-1]
        return binascii.a2b_base64(data + b"==")


def unfold(value: str) -> str:
    """Return a value as the standard library keeps it without its line breaks and escapes."""
    if value.isprintable():
        return value
    value = value.replace("\r", "").replace("\n", "")
    if not value.isascii():
        try:
            value = decode_charset(value.encode("ascii", "surrogateescape"), None)
        except UnicodeEncodeError:
            return value
    return value


def decode_header(value: str | None) -> str | None:
    """Return the text that a field's value stands for; ``None`` for ``None``.

    Encoded words are decoded (RFC 2047), malformed ones as far as they go, the white space between
    two of them dropped (section 6.2).  Line breaks are removed (RFC 5322, 2.2.3), and
    other control characters but the tab become U+FFFD.
    """
    if value is None:
        return None
    if "\n" in value or "\r" in value:
        value = value.replace("\r", "").replace("\n", "")
    if "=?" in value:
        value = _decode_words(value)
    return clean(value)


def _decode_words(value: str) -> str:
    # Each search starts behind the last one's find, and a search that finds nothing ends the loop:
    # the time is linear, which a regular expression for encoded words is not.
    out: list[str] = []
    pending: list[bytes] = []
    pending_charset = ""
    copied = 0
    at = value.find("=?")
    while at >= 0:
        mark = value.find("?", at + 2)
        if mark < 0:
            break
        if mark - at > 80 or value[mark + 2 : mark + 3] != "?" or mark == at + 2:
            at = value.find("=?", mark if value[mark - 1] != "=" else mark - 1)
            continue
        encoding = value[mark + 1]
        charset = value[at + 2 : mark]
        if encoding not in "bBqQ" or " " in charset or "\t" in charset:
            at = value.find("=?", mark)
            continue
        end = value.find("?=", mark + 3)
        if end < 0:
            break
        word = value[mark + 3 : end]
        between = value[copied:at]
        if encoding in "bB":
            data = _bytes_of_base64(word)
        else:
            data = binascii.a2b_qp(word.encode("utf-8", "replace"), header=True)
        charset = charset.partition("*")[0].lower()
        if pending and not between.strip(" \t"):
            between = ""
        if pending and (between or charset != pending_charset):
            out.append(decode_charset(b"".join(pending), pending_charset))
            pending = []
        out.append(between)
        pending.append(data)
        pending_charset = charset
        copied = end + 2
        at = value.find("=?", copied)
    if pending:
        out.append(decode_charset(b"".join(pending), pending_charset))
    out.append(value[copied:])
    return "".join(out)


# -- slicing ---------------------------------------------------------------------------------------


class Header(NamedTuple):
    """The sliced header of one entity.

    :ivar keys: for each field its name in lower case, a colon and a space.
    :ivar lines: for each field its name, a colon, a space and its value, unfolded; raw 8-bit is
        decoded, encoded words are not.
    :ivar plain: whether every line is free of control characters and 8-bit.
    :ivar regular: whether all bytes of the header are well-formed fields and the empty line.
    :ivar end: offset of the first byte behind the header and its empty line.
    :ivar unixfrom: the mbox ``From`` line that the header began with, or ``None``.
    :ivar defects: what :mod:`email` calls defects.
    """

    keys: list[str]
    lines: list[str]
    plain: bool
    regular: bool
    end: int
    unixfrom: str | None = None
    defects: tuple[errors.MessageDefect, ...] = ()


class HeaderTooLarge(errors.MessageDefect):
    """The header has more fields or bytes than are looked at."""


_NAME = re.compile(r"[!-9;-~]+")
_NAME_BYTES = re.compile(rb"[!-9;-~]*:|From |[ \t]")
# The first line break that no header line follows.
_HEADER_END = re.compile(rb"(?:\r\n|\r(?!\n)|\n)(?!From |[!-9;-~]*:|[ \t])")
_FIELD_END = re.compile(rb"\r\n(?![ \t])|\r(?![\n \t])|\n(?![ \t])")
_EMPTY_LINE = re.compile(rb"\r\n|\r|\n")

_COMMON_NAMES = """
    ( for in name
"""
# Keys of names that were found well-formed; bounded, since mail adds to it.
_known = {f"{name}: " for name in _COMMON_NAMES.split()}
_KNOWN_LIMIT = 2048


# A value that begins with more white space than one space, folds included.
_PADDED = re.compile(r":[ \t\n][ \t\n]")


def _decode_8bit(line: str) -> str:
    # ``line`` was decoded as Latin-1, one character a byte.
    if line.isascii():
        return line
    try:
        return line.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return line


def is_name(name: str) -> bool:
    """Whether ``name`` can be the name of a field (RFC 5322, 3.6.8)."""
    return _NAME.fullmatch(name) is not None


def slice_header(buffer: Buffer, start: int = 0, stop: int | None = None) -> Header:
    """Slice the header that begins at ``start`` of ``buffer`` and lies before ``stop``.

    What is a field and where the header ends is as :mod:`email.feedparser` has it.
    """
    if stop is None:
        stop = len(buffer)
    return _slice_regular(buffer, start, stop) or _slice_careful(buffer, start, stop)


def _slice_regular(buffer: Buffer, start: int, stop: int) -> Header | None:
    """Slice a header of well-formed fields, or return ``None`` where anything is odd."""
    near = min(stop, start + _WINDOW)
    if isinstance(buffer, memoryview):
        window = bytes(buffer[start:near])
        base = start
    else:
        window = buffer  # type: ignore[assignment]  # an mmap has the methods of bytes used here
        base = 0
    at = start - base
    limit = near - base
    first = window.find(b"\n", at, limit)
    if first <= at:
        return None
    if window[first - 1] == 13:
        gap = window.find(b"\r\n\r\n", at, limit)
        end = gap + 4 + base
        if gap < 0:
            return None
        block = window[at:gap].replace(b"\r\n", b"\n")
    else:
        gap = window.find(b"\n\n", at, limit)
        end = gap + 2 + base
        if gap < 0:
            return None
        block = window[at:gap]
    plain = not block.translate(None, _PLAIN)
    if not plain and b"\r" in block:
        return None
    text = block.decode("latin-1")
    unfolded = text.replace("\n ", " ")
    if "\t" in text:
        unfolded = unfolded.replace("\n\t", "\t")
    lines = unfolded.split("\n")
    if len(lines) > MAX_FIELDS:
        return None
    if not plain:
        lines = [_decode_8bit(line) for line in lines]
    keys = [line[: line.find(": ") + 2].lower() for line in lines]
    if not (plain and _known.issuperset(keys)) or _PADDED.search(text):
        keys = []
        for index, line in enumerate(lines):
            name, colon, value = line.partition(":")
            key = name.lower() + ": "
            if key not in _known or not colon or not plain:
                if not colon or not _NAME.fullmatch(name):
                    return None
                if len(_known) < _KNOWN_LIMIT and len(key) < 40:
                    _known.add(key)
            keys.append(key)
            lines[index] = f"{name}: " + value.lstrip(" \t")
    return Header(keys, lines, plain, True, end)


def header_end(buffer: Buffer, start: int, stop: int) -> tuple[int, int]:
    """Return where the header's lines end and where the body starts.

    The two differ by the empty line, if there is one.
    """
    if start >= stop:
        return start, start
    if _NAME_BYTES.match(buffer, start, stop):
        found = _HEADER_END.search(buffer, start, stop)
        # At the very end of the buffer there is no further line.
        lines_end = found.end() if found else stop
    else:
        lines_end = start
    empty = _EMPTY_LINE.match(buffer, lines_end, stop)
    return lines_end, empty.end() if empty else lines_end


def field_spans(buffer: Buffer, start: int, lines_end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start, end) of each run of header lines: a field with its folds.

    The name is empty for what is not a field: an mbox ``From`` line, a line that begins with a
    colon, a fold without a field.  Spans follow each other without gaps, from ``start`` to
    ``lines_end``.
    """
    while start < lines_end:
        found = _FIELD_END.search(buffer, start, lines_end)
        end = found.end() if found else lines_end
        name = _NAME_BYTES.match(buffer, start, end)
        label = name[0] if name else b""
        yield (label[:-1] if label.endswith(b":") else b""), start, end
        start = end


_FORGED = re.compile(rb"(?:\A|(?<=[\r\n]))x-postoffice[!-9;-~]*:", re.IGNORECASE)


def forged_spans(buffer: Buffer, start: int, lines_end: int) -> Iterator[tuple[int, int]]:
    """Yield the offsets of the fields whose names begin with ``X-Postoffice``, folds included."""
    at = start
    while found := _FORGED.search(buffer, at, lines_end):
        end = _FIELD_END.search(buffer, found.end(), lines_end)
        at = end.end() if end else lines_end
        yield found.start(), at


def _slice_careful(buffer: Buffer, start: int, stop: int) -> Header:
    """Slice any header: see :func:`slice_header`."""
    lines_end, end = header_end(buffer, start, stop)
    defects: list[errors.MessageDefect] = []
    if end == lines_end and end < stop:
        defects.append(errors.MissingHeaderBodySeparatorDefect())
    keys: list[str] = []
    lines: list[str] = []
    unixfrom = None
    look_end = min(lines_end, start + MAX_HEADER)
    if look_end < lines_end:
        defects.append(HeaderTooLarge())
    for number, (name, at, after) in enumerate(field_spans(buffer, start, look_end)):
        if number == MAX_FIELDS:
            defects.append(HeaderTooLarge())
            break
        field = bytes(buffer[at:after]).rstrip(b"\r\n")
        if name:
            text = _decode_8bit(field.replace(b"\r", b"").replace(b"\n", b"").decode("latin-1"))
            label = name.decode("ascii")
            keys.append(label.lower() + ": ")
            lines.append(f"{label}: " + text[len(label) + 1 :].lstrip(" \t"))
        elif field.startswith(b"From "):
            if at == start:
                unixfrom = clean(_decode_8bit(_first_line(field).decode("latin-1")))
            elif after == lines_end and not re.search(rb"[\r\n]", field):
                # It is the body's first line that lost the empty line before it.
                end = at
                break
            else:
                defects.append(errors.MisplacedEnvelopeHeaderDefect(clean(field.decode("latin-1"))))
        elif field.startswith(b":"):
            defects.append(errors.InvalidHeaderDefect("Missing header name."))
        else:
            defects.append(errors.FirstHeaderLineIsContinuationDefect(""))
    return Header(keys, lines, False, False, end, unixfrom, tuple(defects))


def _first_line(data: bytes) -> bytes:
    found = _EMPTY_LINE.search(data)
    return data[: found.start()] if found else data


# -- parameters ------------------------------------------------------------------------------------

_PARAMETER_MARK = re.compile(r'(?<!\\)"|;')
MAX_PARAMETERS = 1_000
"""Parameters of one field that are looked at."""

Parameter = tuple[str, str | tuple[str | None, str | None, str]]


def _split_parameters(value: str) -> list[str]:
    """Split at the semicolons that are not within quotes."""
    pieces: list[str] = []
    begin = 0
    quoted = False
    for mark in _PARAMETER_MARK.finditer(value):
        if mark[0] == '"':
            quoted = not quoted
        elif not quoted:
            pieces.append(value[begin : mark.start()])
            begin = mark.end()
            if len(pieces) >= MAX_PARAMETERS:
                return pieces
    pieces.append(value[begin:])
    return pieces


def parameters(value: str) -> list[Parameter]:
    """Return the parameters of a field's value as :mod:`email` gives them, values quoted.

    The first pair is the value proper.  An RFC 2231 value is a tuple of charset, language and
    text.  What RFC 2231 cannot make sense of is left out.
    """
    pairs: list[tuple[str, str]] = []
    for piece in _split_parameters(value):
        name, equals, text = piece.partition("=")
        # As the standard library, which lowers only what has a value.
        pairs.append((name.strip().lower() if equals else name.strip(), text.strip()))
    try:
        return utils.decode_params(pairs)
    except (ValueError, TypeError, LookupError):
        # Continuations of mixed kind, or numbers without end.
        regular = [pair for pair in pairs[1:] if "*" not in pair[0]]
        return utils.decode_params([pairs[0], *regular])


# -- addresses (RFC 5322, 3.4) ---------------------------------------------------------------------


class Mailboxes(NamedTuple):
    """What a field's value addresses.

    :ivar addresses: addr-specs in order, comments and folds gone.
    :ivar hosts: their domains, see :func:`host`.
    """

    addresses: tuple[str, ...]
    hosts: tuple[str, ...]


_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
_DOMAIN = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
_ADDR_SPEC = rf"([{_ATEXT}.]+)@({_DOMAIN})"
_BARE = re.compile(rf"[ \t]*<?{_ADDR_SPEC}(?P<close>>?)[ \t]*")
_NAMED = re.compile(rf'[ \t]*(?:"[^"\\]*"|[{_ATEXT}. \t]*)[ \t]*<{_ADDR_SPEC}>[ \t]*')

_TOKEN = re.compile(
    r'(?P<space>[ \t\r\n]+)|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<literal>\[[^\[\]\\]*\])'
    r'|(?P<atom>[^\x00-\x20\x7f()<>\[\]:;@\\,."]+)|(?P<special>.)',
    re.DOTALL,
)
_COMMENT_MARK = re.compile(r"\\.|[()]", re.DOTALL)
_DOT_ATOM = re.compile(rf"[{_ATEXT}\x80-\U0010ffff]+(?:\.[{_ATEXT}\x80-\U0010ffff]+)*")


def _after_comment(value: str, at: int) -> int:
    """Return the offset behind the comment at ``at``, or -1 where it does not end."""
    depth = 0
    for mark in _COMMENT_MARK.finditer(value, at):
        if mark[0] == "(":
            depth += 1
        elif mark[0] == ")":
            depth -= 1
            if depth == 0:
                return mark.end()
    return -1


class _Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


def _tokens(value: str) -> Iterator[_Token]:
    """Yield the tokens of an address list; comments as one token, what is broken as ``bad``."""
    at = 0
    while at < len(value):
        found = _TOKEN.match(value, at)
        if found is None:
            break
        kind = str(found.lastgroup)
        end = found.end()
        if kind == "special":
            text = found[0]
            if text == "(":
                end = _after_comment(value, at)
                if end < 0:
                    yield _Token("bad", "", at, len(value))
                    return
                kind = "comment"
            elif text == '"':
                yield _Token("bad", "", at, len(value))
                return
            elif text in "<>@,:;.":
                kind = text
            else:
                kind = "bad"
        yield _Token(kind, value[at:end], at, end)
        at = end


def _addr_spec(tokens: list[_Token]) -> tuple[str, str] | None:
    """Return local part and domain of the tokens of an addr-spec, or ``None``."""
    kinds = [token.kind for token in tokens]
    if kinds.count("@") != 1:
        return None
    middle = kinds.index("@")
    local = _local_part(tokens[:middle])
    domain = _domain(tokens[middle + 1 :])
    return (local, domain) if local and domain else None


def _local_part(tokens: list[_Token]) -> str | None:
    words: list[str] = []
    after_word = False
    quoted = False
    for token in tokens:
        if token.kind == ".":
            words.append(".")
            after_word = False
        elif token.kind in ("atom", "quoted") and not after_word:
            if token.kind == "quoted":
                quoted = True
                words.append(re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL))
            else:
                words.append(token.text)
            after_word = True
        else:
            return None
    local = "".join(words)
    if quoted and not _DOT_ATOM.fullmatch(local):
        if _CONTROLS.search(local):
            return None
        local = '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'
    return local or None


def _domain(tokens: list[_Token]) -> str | None:
    if len(tokens) == 1 and tokens[0].kind == "literal":
        return tokens[0].text if tokens[0].text.isprintable() else None
    want_atom = True
    for token in tokens:
        if token.kind != ("atom" if want_atom else "."):
            return None
        want_atom = not want_atom
    return "".join(token.text for token in tokens) or None


# No mailbox has as many; more would only fill memory.
_MAILBOX_TOKENS = 1_000
_ROUTE_TOKENS = 1_000


class _Mailbox:
    """The tokens of one mailbox while the list is read."""

    def __init__(self) -> None:
        self.outer: list[_Token] = []
        self.angle: list[_Token] | None = None
        self.open = False
        self.broken = False

    def take(self, token: _Token) -> None:
        """Add a token that is neither a comment, nor space, nor a separator."""
        kind = token.kind
        if kind == "bad":
            self.broken = True
        elif self.open:
            if kind == ">":
                self.open = False
            elif kind == "<":
                self.broken = True
            else:
                self.angle.append(token)  # type: ignore[union-attr]  # open says it is a list
        elif self.angle is not None or kind == ">":
            self.broken = True
        elif kind == "<":
            self.angle = []
            self.open = True
        else:
            self.outer.append(token)
        if len(self.outer) > _MAILBOX_TOKENS or (self.angle and len(self.angle) > _ROUTE_TOKENS):
            self.broken = True
            self.outer.clear()
            self.angle = None
            self.open = False

    def addr_spec(self) -> tuple[str, str] | None:
        """Return local part and domain, or ``None`` where this is not a mailbox."""
        if self.broken or self.open:
            return None
        if self.angle is None:
            return _addr_spec(self.outer)
        inner = self.angle
        if inner and inner[0].kind in "@,":
            # A route (RFC 5322, 4.4): what counts is behind the colon.
            kinds = [token.kind for token in inner]
            if ":" not in kinds:
                return None
            inner = inner[kinds.index(":") + 1 :]
        spec = _addr_spec(inner)
        if spec and any(token.kind in ("@", "literal") for token in self.outer):
            # An address for a name is not allowed; it does no harm where it says the same.
            named = _addr_spec(self.outer)
            if named is None or "@".join(named).lower() != "@".join(spec).lower():
                return None
        return spec


def _parse_mailboxes(value: str) -> Iterator[tuple[str, str]]:
    box = _Mailbox()
    for token in _tokens(value):
        kind = token.kind
        if kind in ("space", "comment"):
            continue
        if kind in ",;" and not (box.open and kind == ","):
            if spec := box.addr_spec():
                yield spec
            box = _Mailbox()
        elif kind == ":" and not box.open:
            if not box.broken and box.angle is None and not _has_at(box.outer):
                # The name of a group; its members follow.
                box = _Mailbox()
            else:
                box.broken = True
        else:
            box.take(token)
    if spec := box.addr_spec():
        yield spec


def _has_at(tokens: list[_Token]) -> bool:
    return any(token.kind == "@" for token in tokens)


def host(domain: str) -> str:
    """Return a domain in the form in which domains are compared.

    Lower case, without a trailing dot, in A-labels (UTS 46, non-transitional); text that IDNA
    cannot encode stays, in lower case.  Address literals stay as they are.
    """
    if domain.startswith("["):
        return domain.lower()
    if domain.endswith("."):
        domain = domain[:-1]
    if domain.isascii() or len(domain) > 253:
        return domain.lower()
    # Imported when first needed: its tables take longer to load than this whole module.
    import idna

    try:
        return idna.encode(domain, uts46=True, transitional=False).decode("ascii").lower()
    except (idna.IDNAError, UnicodeError):
        return domain.lower()


def _mailboxes(value: str) -> Mailboxes:
    if "," not in value and "(" not in value:
        found = _BARE.fullmatch(value)
        if found is None or (found["close"] == ">") != (value.lstrip(" \t")[:1] == "<"):
            found = _NAMED.fullmatch(value)
        if found is not None:
            local, domain = found[1], found[2]
            return Mailboxes((f"{local}@{domain}",), (domain.lower(),))
    specs = list(_parse_mailboxes(value))
    addresses = tuple(f"{local}@{domain}" for local, domain in specs)
    return Mailboxes(addresses, tuple(host(domain) for _, domain in specs))


_cached_mailboxes = lru_cache(maxsize=4096)(_mailboxes)
_CACHED_LENGTH = 512


def mailboxes(value: str) -> Mailboxes:
    """Return what the value of one address field addresses (RFC 5322, 3.4 and 4.4).

    Encoded words are not decoded: they stand only in names.  Quoted names, comments, groups and
    routes are understood.  A mailbox that cannot be parsed (two ``@`` outside quotes among them)
    is left out, and so is one without a domain.  ``value`` is unfolded.
    """
    return _cached_mailboxes(value) if len(value) <= _CACHED_LENGTH else _mailboxes(value)


def all_mailboxes(values: Sequence[str]) -> Mailboxes:
    """Return what all these values of address fields address, in order."""
    if len(values) == 1:
        return mailboxes(values[0])
    found = [mailboxes(value) for value in values]
    return Mailboxes(
        tuple(address for one in found for address in one.addresses),
        tuple(host for one in found for host in one.hosts),
    )


# -- writing ---------------------------------------------------------------------------------------

_Q_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/")
_Q_TABLE = [chr(code) if code in _Q_SAFE else f"={code:02X}" for code in range(256)]
_Q_TABLE[32] = "_"
# An encoded word has at most 75 characters (RFC 2047, 2), of which 12 are =?utf-8?q??=; these are
# shorter, so that a first line with the field's name stays within 78.
_WORD_ROOM = 52


def _encode_words(text: str) -> str:
    """Encode all of ``text`` as UTF-8 encoded words, parted by spaces."""
    data = text.encode("utf-8")
    base64 = 2 * sum(byte in _Q_SAFE or byte == 32 for byte in data) < len(data)
    words: list[str] = []
    if base64:
        word_of, room, width = _base64_word, _WORD_ROOM // 4 * 3, [1] * 256
    else:
        word_of, room, width = _quoted_word, _WORD_ROOM, [len(text) for text in _Q_TABLE]
    piece = bytearray()
    used = 0
    for character in text:
        char = character.encode("utf-8")
        size = sum(width[byte] for byte in char)
        if used + size > room:
            words.append(word_of(bytes(piece)))
            piece.clear()
            used = 0
        piece += char
        used += size
    words.append(word_of(bytes(piece)))
    return " ".join(words)


def _base64_word(data: bytes) -> str:
    return f"=?utf-8?b?{binascii.b2a_base64(data, newline=False).decode('ascii')}?="


def _quoted_word(data: bytes) -> str:
    return f"=?utf-8?q?{''.join([_Q_TABLE[byte] for byte in data])}?="


def _needs_encoding(text: str) -> bool:
    return not text.isascii() or not text.replace("\t", "").isprintable()


def _encode_text(text: str) -> str:
    """Encode the words of unstructured text that need it, and what stands between them."""
    odd = [
        index
        for index, char in enumerate(text)
        if not (char.isascii() and (char.isprintable() or char == "\t"))
    ]
    if not odd:
        return text
    begin = text.rfind(" ", 0, odd[0]) + 1
    end = text.find(" ", odd[-1])
    end = len(text) if end < 0 else end
    if "=?" in text[:begin]:
        begin = 0
    if "=?" in text[end:]:
        end = len(text)
    return text[:begin] + _encode_words(text[begin:end]) + text[end:]


def _encode_domain(tokens: list[_Token]) -> str:
    """Return the text of an address's tokens with its domain in A-labels where it has them."""
    kinds = [token.kind for token in tokens]
    if "@" not in kinds:
        return "".join(token.text for token in tokens)
    begin = len(kinds) - kinds[::-1].index("@")
    end = begin
    while end < len(kinds) and kinds[end] in ("atom", "."):
        end += 1
    texts = [token.text for token in tokens]
    domain = "".join(texts[begin:end])
    if not domain.isascii():
        texts[begin:end] = [host(domain)]
    return "".join(texts)


def _encode_mailbox(tokens: list[_Token]) -> str:
    """Encode one mailbox of an address list."""
    text = "".join(token.text for token in tokens)
    if not _needs_encoding(text):
        return text
    kinds = [token.kind for token in tokens]
    if "<" in kinds:
        angle = kinds.index("<")
        name = "".join(token.text for token in tokens[:angle])
        if _needs_encoding(name):
            lead = name[: len(name) - len(name.lstrip(" \t"))]
            parts = [
                re.sub(r"\\(.)", r"\1", token.text[1:-1]) if token.kind == "quoted" else token.text
                for token in tokens[:angle]
            ]
            name = f"{lead}{_encode_words(''.join(parts).strip())} "
        return name + _encode_domain(tokens[angle:])
    if "@" in kinds:
        return _encode_domain(tokens)
    return _encode_text(text)


def _encode_addresses(value: str) -> str:
    out: list[str] = []
    box: list[_Token] = []
    in_angle = False
    for token in _tokens(value):
        if token.kind in ("<", ">"):
            in_angle = token.kind == "<"
        if token.kind in ",;:" and not in_angle:
            out.append(_encode_mailbox(box) + token.text)
            box = []
        elif token.kind == "comment" and _needs_encoding(token.text):
            box.append(token._replace(text=f"({_encode_words(token.text[1:-1])})"))
        elif token.kind == "bad" and not token.text:
            box.append(token._replace(kind="atom", text=value[token.start : token.end]))
        else:
            box.append(token)
    out.append(_encode_mailbox(box))
    return "".join(out)


def encode_header(name: str, value: object) -> str | None:
    """Return ``value`` in the form in which a field of this name carries it; ``None`` for ``None``.

    ASCII stays as it is.  Anything else becomes encoded words (RFC 2047), in address fields the
    names alone: a local part stays as it is (SMTPUTF8, RFC 6532), a domain becomes A-labels if
    IDNA can encode it.

    :raises ValueError: if the value holds a CR, an LF or a NUL.
    """
    if value is None:
        return None
    text = value if isinstance(value, str) else str(value)
    if "\r" in text or "\n" in text or "\0" in text:
        raise ValueError(f"the value of {name} holds a line break or a NUL")
    if not _needs_encoding(text):
        return text
    text = _SURROGATES.sub("\ufffd", text)
    if name.lower() in ADDRESS_FIELDS:
        text = _encode_addresses(text)
        # What no part of an address may carry was left by the encoding of its parts.
        return clean(text)
    return _encode_text(text)


_FOLD_UNIT = re.compile(r"[ \t]*[^ \t]+")


def fold(name: str, value: str, linesep: str) -> str:
    """Return the field's lines, folded at white space where they pass 78 characters.

    ``value`` is as :func:`encode_header` gives it; a single word without white space is not broken.
    """
    line = f"{name}: {value}"
    if len(line) <= 78:
        return line.rstrip(" \t") + linesep if value else line + linesep
    lines: list[str] = []
    current = f"{name}:"
    first = True
    for unit in _FOLD_UNIT.findall(" " + value):
        if not first and len(current) + len(unit) > 78:
            lines.append(current)
            current = unit
        else:
            current += unit
        first = False
    lines.append(current)
    return linesep.join(lines) + linesep
