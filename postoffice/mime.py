"""The parts of a message, by offsets into its bytes.

:func:`parse` finds the same parts as :mod:`email.feedparser` does under ``compat32``, in one pass,
without copying bodies, with limits on depth and number.  It raises nothing.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from email import errors

# What email.message itself undoes base64 with.
from email._encoded_words import decode_b  # type: ignore[import-not-found]  # not in the stubs
from functools import lru_cache
from typing import NamedTuple

from postoffice.charsets import decode_charset
from postoffice.headers import Buffer, Header, slice_header
from postoffice.parameters import parameters

__all__ = [
    "MAX_DEPTH",
    "MAX_PARTS",
    "ContentType",
    "Part",
    "TooManyParts",
    "content_type",
    "decode_transfer",
    "parse",
    "texts",
]

MAX_DEPTH = 100
"""Levels of parts within parts; what is deeper is one opaque part."""

MAX_PARTS = 10_000
"""Parts of one message; what follows is opaque."""


class TooManyParts(errors.MessageDefect):
    """The message has more parts, or deeper ones, than are looked at."""


class ContentType(NamedTuple):
    """What a Content-Type field says.

    :ivar type: maintype/subtype in lower case; ``text/plain`` for anything malformed.
    :ivar charset: the charset as given, or ``None``.
    :ivar boundary: the boundary as given, or ``None``.
    """

    type: str
    charset: str | None
    boundary: str | None


_SIMPLE = re.compile(
    r"([a-zA-Z0-9-]+/[a-zA-Z0-9.+-]+)"
    r'(?:;[ \t]*(charset|boundary)=(?:"([^"\\;]*)"|([^\s"\\;()<>,]+)))?[ \t]*;?'
)


def content_type(value: str) -> ContentType:
    """Read the value of a Content-Type field (RFC 2045, 5.1)."""
    return _cached_content_type(value) if len(value) < 200 else _content_type(value)


def _content_type(value: str) -> ContentType:
    found = _SIMPLE.fullmatch(value)
    if found is not None:
        kind, name, quoted, bare = found.groups()
        text = quoted if quoted is not None else bare
        if name == "charset":
            return ContentType(kind.lower(), text, None)
        return ContentType(kind.lower(), None, text.rstrip() if name else None)
    kind = value.partition(";")[0].strip().lower()
    if kind.count("/") != 1:
        kind = "text/plain"
    charset = boundary = None
    for name, text in parameters(value):
        if charset is None and name.lower() == "charset":
            charset = parameter_text(text).lower()
        elif boundary is None and name.lower() == "boundary":
            boundary = parameter_text(text).rstrip()
    return ContentType(kind, charset, boundary)


_cached_content_type = lru_cache(maxsize=512)(_content_type)


def unquote(text: str) -> str:
    """Return ``text`` without its quotes or angle brackets, as :func:`email.utils.unquote`."""
    if len(text) > 1:
        if text.startswith('"') and text.endswith('"'):
            return text[1:-1].replace("\\\\", "\\").replace('\\"', '"')
        if text.startswith("<") and text.endswith(">"):
            return text[1:-1]
    return text


def parameter_text(value: str | tuple[str | None, str | None, str]) -> str:
    """Return a parameter's text, decoded by RFC 2231 where it is a tuple."""
    if isinstance(value, str):
        return unquote(value)
    charset, _, text = value
    data = unquote(text).encode("raw-unicode-escape", "replace")
    return decode_charset(data, charset)


class Part:
    """One entity: the message itself, or a part of it.

    :ivar header: its sliced header.
    :ivar content: what its Content-Type says, or its default type.
    :ivar start: offset of its first byte.
    :ivar body: offset of its body.
    :ivar end: offset behind its body's text, without the line break that belongs to a boundary.
    :ivar stop: offset behind all of it.
    :ivar default_type: ``text/plain``, or ``message/rfc822`` within a digest.
    :ivar parts: its parts, or ``None`` where it has but a body.
    :ivar preamble: offsets of the text before the first boundary, or ``None``.
    :ivar epilogue: offsets of the text behind the last one, or ``None``.
    :ivar defects: what :mod:`email` calls defects.
    """

    __slots__ = (
        "body",
        "content",
        "default_type",
        "defects",
        "end",
        "epilogue",
        "header",
        "parts",
        "preamble",
        "start",
        "stop",
    )

    def __init__(
        self, header: Header, content: ContentType, start: int, stop: int, default: str
    ) -> None:
        """Begin as one opaque body; the parser fills in the rest."""
        self.header = header
        self.content = content
        self.start = start
        self.body = header.end
        self.end = stop
        self.stop = stop
        self.default_type = default
        self.parts: list[Part] | None = None
        self.preamble: tuple[int, int] | None = None
        self.epilogue: tuple[int, int] | None = None
        self.defects: list[errors.MessageDefect] = list(header.defects)

    def field(self, key: str) -> str | None:
        """Return the topmost value of a field; ``key`` is its lower name, a colon and a space."""
        try:
            return self.header.lines[self.header.keys.index(key)][len(key) :]
        except ValueError:
            return None

    def walk(self) -> Iterator[Part]:
        """Yield this part and all within it, depth first."""
        stack = [self]
        while stack:
            part = stack.pop()
            yield part
            if part.parts:
                stack.extend(reversed(part.parts))


class _Boundary(NamedTuple):
    """A boundary line.

    :ivar closes: whether it is the last one of its multipart.
    :ivar start: offset of the line.
    :ivar after: offset of the next line.
    """

    closes: bool
    start: int
    after: int


_LINE = re.compile(rb"[^\r\n]*")
_BREAK = re.compile(rb"\r\n|\r|\n")
_BEFORE_EMPTY = re.compile(rb"(?:\r\n|\r(?!\n)|\n)(?=\r|\n)")
# What may follow the boundary on its line (RFC 2046, 5.1.1).
_BOUNDARY_TAIL = re.compile(rb"(--)?[ \t]*(?:\r\n|\r|\n|\Z)")


def _find(buffer: Buffer, text: bytes, at: int, stop: int) -> int:
    """Return the offset of ``text``, or -1."""
    if isinstance(buffer, memoryview):
        found = re.compile(re.escape(text)).search(buffer, at, stop)
        return found.start() if found else -1
    return buffer.find(text, at, stop)


def _boundaries(buffer: Buffer, boundary: str, at: int, stop: int) -> Iterator[_Boundary]:
    """Yield the lines from ``at``, a line's start, to ``stop`` that are this boundary."""
    marks = [b"--" + boundary.encode("utf-8", "replace")]
    if not boundary.isascii():
        # It may have been decoded from either.
        marks.append(b"--" + boundary.encode("latin-1", "replace"))
    # The offset at which each is found next.
    waiting = [(_find(buffer, mark, at, stop), mark) for mark in marks]
    while True:
        waiting = [entry for entry in waiting if entry[0] >= 0]
        if not waiting:
            return
        entry = min(waiting)
        start, mark = entry
        if start == at or buffer[start - 1] in b"\r\n":
            tail = _BOUNDARY_TAIL.match(buffer, start + len(mark), stop)
            if tail is not None:
                yield _Boundary(tail[1] is not None, start, tail.end())
        waiting[waiting.index(entry)] = _find(buffer, mark, start + 1, stop), mark


class _Parser:
    """Finds the parts of one message.

    Each entity is given the offsets between which it lies, as the boundaries around it say, since
    an outer boundary ends whatever is within (RFC 2046, 5.1.2).  So each level reads its bytes
    once, for its own boundary alone.
    """

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.count = 0
        # The entity begun last, or the multipart whose part ended last.
        self.last: Part | None = None

    def entity(self, at: int, stop: int, depth: int, default: str) -> Part:
        """Read the entity between two offsets."""
        return self.behind(slice_header(self.buffer, at, stop), at, stop, depth, default)

    def behind(self, header: Header, at: int, stop: int, depth: int, default: str) -> Part:
        """Read the entity between two offsets whose header is known."""
        value = None
        if "content-type: " in header.keys:
            value = header.lines[header.keys.index("content-type: ")][14:]
        content = ContentType(default, None, None) if value is None else content_type(value)
        part = Part(header, content, at, stop, default)
        self.last = part
        self.count += 1
        kind = content.type
        if not kind.startswith(("multipart/", "message/")):
            return part
        if depth >= MAX_DEPTH:
            part.defects.append(TooManyParts())
        elif kind == "message/delivery-status":
            self._blocks(part, depth)
        elif kind.startswith("message/"):
            part.parts = [self.entity(part.body, stop, depth + 1, "text/plain")]
        elif content.boundary is not None:
            self._multipart(part, content.boundary, depth)
        else:
            part.defects.append(errors.NoBoundaryInMultipartDefect())
        return part

    def _blocks(self, part: Part, depth: int) -> None:
        """Read the blocks of fields of a message/delivery-status (RFC 3464, 2.1)."""
        part.parts = []
        at, stop = part.body, part.stop
        while True:
            empty = _BREAK.match(self.buffer, at, stop)
            block_end = at
            if empty is None:
                before = _BEFORE_EMPTY.search(self.buffer, at, stop)
                block_end = before.end() if before else stop
                empty = _BREAK.match(self.buffer, block_end, stop)
            part.parts.append(self.entity(at, block_end, depth + 1, "text/plain"))
            if empty is None or empty.end() >= stop:
                return
            at = empty.end()
            if self.count >= MAX_PARTS:
                part.defects.append(TooManyParts())
                return

    def _multipart(self, part: Part, boundary: str, depth: int) -> None:
        """Read the parts of a multipart (RFC 2046, 5.1)."""
        buffer, stop = self.buffer, part.stop
        lines = _boundaries(buffer, boundary, part.body, stop)
        line = next(lines, None)
        if line is None or line.closes:
            part.defects.append(errors.StartBoundaryNotFoundDefect())
            part.end = stop if line is None else line.start
            part.epilogue = (stop, stop)
            return
        if line.start > part.body:
            part.preamble = (part.body, _without_break(buffer, part.body, line.start))
        part.parts = []
        default = "message/rfc822" if part.content.type == "multipart/digest" else "text/plain"
        while not line.closes:
            at = line.after
            if self.count >= MAX_PARTS:
                part.defects.append(TooManyParts())
                break
            following = next(lines, None)
            # Boundary lines right behind one another are one.
            while following is not None and following.start == at:
                at = following.after
                following = next(lines, None)
            child = self.entity(
                at, stop if following is None else following.start, depth + 1, default
            )
            part.parts.append(child)
            self._give_back_break(child)
            self.last = part
            if following is None:
                part.defects.append(errors.CloseBoundaryNotFoundDefect())
                return
            line = following
        part.epilogue = (line.after, stop)

    def _give_back_break(self, child: Part) -> None:
        """Take from a part the line break that belongs to the boundary behind it."""
        buffer, last = self.buffer, self.last
        stop = _without_break(buffer, child.body, child.stop)
        part: Part | None = child
        while part is not None and part.stop > stop:
            part.stop = max(stop, part.body)
            part = part.parts[-1] if part.parts else None
        # Which text loses it is as the standard library has it.
        if last is None:
            return
        if last.content.type.startswith("multipart/"):
            if last.epilogue is not None:
                begin, end = last.epilogue
                last.epilogue = (
                    None if begin >= end else (begin, _without_break(buffer, begin, end))
                )
        elif last.parts is None:
            last.end = _without_break(buffer, last.body, last.end)


def _without_break(buffer: Buffer, begin: int, end: int) -> int:
    """Return ``end`` moved before one line break, not before ``begin``."""
    if end > begin:
        last = buffer[end - 1]
        if last == 10:
            end -= 1
            if end > begin and buffer[end - 1] == 13:
                end -= 1
        elif last == 13:
            end -= 1
    return end


def parse(buffer: Buffer, header: Header, default_type: str = "text/plain") -> Part:
    """Return the parts of the message in ``buffer``, whose header is sliced already.

    Time is at worst the length times the depth, memory the number of parts.
    """
    root = _Parser(buffer).behind(header, 0, len(buffer), 0, default_type)
    if root.parts is None and root.content.type.startswith("multipart/"):
        root.defects.append(errors.MultipartInvariantViolationDefect())
    return root


# -- bodies ----------------------------------------------------------------------------------------


def decode_transfer(data: bytes | memoryview, encoding: str) -> bytes | memoryview:
    """Undo a Content-Transfer-Encoding (RFC 2045, 6); unknown ones leave the data as it is."""
    if encoding == "base64":
        try:
            return binascii.a2b_base64(data)
        except binascii.Error:
            return bytes(decode_b(bytes(data).translate(None, b"\r\n"))[0])
    if encoding == "quoted-printable":
        return binascii.a2b_qp(data)
    if encoding in ("x-uuencode", "uuencode", "uue", "x-uue"):
        decoded = _decode_uu(bytes(data))
        return data if decoded is None else decoded
    return data


def decode_base64(data: bytes) -> tuple[bytes, list[errors.MessageDefect]]:
    """Undo base64 as far as it goes; return the data and the defects met."""
    value, defects = decode_b(data.translate(None, b"\r\n"))
    return value, defects


_UU_BEGIN = re.compile(rb"^begin [0-7]+ [^\r\n]*\r?\n", re.MULTILINE)


def _decode_uu(data: bytes) -> bytes | None:
    """Return the first file that is uuencoded in ``data``, or ``None``."""
    begin = _UU_BEGIN.search(data)
    if begin is None:
        return None
    out: list[bytes] = []
    at = begin.end()
    while at < len(data):
        found = _LINE.match(data, at)
        line = found[0] if found else b""
        line_break = _BREAK.match(data, at + len(line))
        at = line_break.end() if line_break else len(data)
        if not line:
            continue
        if line.strip(b" \t\r\n\f") == b"end":
            break
        try:
            out.append(binascii.a2b_uu(line))
        except binascii.Error:
            # Some encoders pad lines with garbage: what counts is in the first character.
            size = (((line[0] - 32) & 63) * 4 + 5) // 3
            try:
                out.append(binascii.a2b_uu(line[:size]))
            except binascii.Error:
                return None
    return b"".join(out)


def text_of(data: bytes | memoryview, encoding: str | None, charset: str | None) -> str:
    """Return the text of a body: transfer encoding and charset undone, line ends LF."""
    if encoding is not None:
        data = decode_transfer(data, encoding.strip().lower())
    text = decode_charset(data, charset)
    return text.replace("\r\n", "\n") if "\r" in text else text


def texts(buffer: Buffer, root: Part) -> Iterator[str]:
    """Yield the text of each ``text/*`` part, depth first."""
    for part in root.walk():
        if part.parts is None and part.content.type.startswith("text/"):
            yield text_of(
                bytes(buffer[part.body : part.end]),
                part.field("content-transfer-encoding: "),
                part.content.charset,
            )
