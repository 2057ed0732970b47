"""Headers and their fields: slicing a header, and reading and writing a field's value.

Mail is written by attackers.  Every function that reads takes any bytes or text, raises nothing,
and needs time and memory linear in what it is given.  Where a field lies and where the header ends
is what :mod:`email.feedparser` says under ``compat32``; a fast path answers for regular mail, a
careful one for the rest, and the tests hold both against the standard library.

Functions are pure and safe to call from several threads.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from email import errors
from typing import NamedTuple

from postoffice.addresses import ADDRESS_FIELDS, encode_addresses
from postoffice.charsets import clean, decode_charset
from postoffice.encoded_words import decode_words, encode_text, needs_encoding

__all__ = [
    "MAX_FIELDS",
    "MAX_HEADER",
    "Buffer",
    "Header",
    "decode_header",
    "encode_header",
    "field_spans",
    "fold",
    "forged_spans",
    "header_end",
    "is_name",
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


_PLAIN = bytes([9, 10, *range(32, 127)])
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


# -- values ----------------------------------------------------------------------------------------

_SURROGATES = re.compile("[\ud800-\udfff]")


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
        value = decode_words(value)
    return clean(value)


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
    if not needs_encoding(text):
        return text
    text = _SURROGATES.sub("\ufffd", text)
    if name.lower() in ADDRESS_FIELDS:
        text = encode_addresses(text)
        # What no part of an address may carry was left by the encoding of its parts.
        return clean(text)
    return encode_text(text)


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
