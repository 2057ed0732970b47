"""The message: what arrived, kept byte for byte, and read from hostile input without raising."""

from __future__ import annotations

import email.message
import email.utils
import hashlib
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from email import errors, generator

# What email.policy exports; that module itself takes long to load.
from email._policybase import Policy, compat32
from email.mime.multipart import MIMEMultipart as _StandardMultipart
from io import BytesIO
from itertools import islice
from typing import Any

from postoffice import headers, mime
from postoffice.addresses import Mailboxes, all_mailboxes, mailboxes
from postoffice.charsets import clean, codec, decode_charset
from postoffice.headers import Buffer, decode_header, encode_header
from postoffice.parameters import parameters

__all__ = [
    "Envelope",
    "MIMEMultipart",
    "Message",
    "decode_header",
    "encode_header",
    "mta_queue_id",
]

# Which trace headers a known envelope stands for.
_TRACE = frozenset(["x-original-to: ", "delivered-to: ", "return-path: "])
_FORGED = "x-postoffice"
# What differs between two deliveries of one mail.
_PER_DELIVERY = frozenset([b"received", b"return-path", b"delivered-to", b"x-original-to"])


@dataclass(frozen=True, slots=True)
class Envelope:
    """Who sent a message to whom, and when: as SMTP said it, not as the header claims.

    :ivar sender: the reverse-path; ``""`` is the null reverse-path, ``None`` is unknown.
    :ivar recipients: the forward-paths; empty where they are unknown.
    :ivar arrived: nanoseconds since the epoch.
    :ivar mta_queue_id: the id of the message in the queue of the MTA that delivered it, or ``""``.
    """

    sender: str | None
    recipients: tuple[str, ...]
    arrived: int
    mta_queue_id: str = ""

    @classmethod
    def from_trace(cls, message: Message, arrived: int) -> Envelope:
        """Read the envelope from the trace headers that the delivering MTA wrote.

        The sender is the topmost Return-Path (RFC 5321, 4.4), the recipient the topmost
        X-Original-To, else the topmost Delivered-To; the sender of a message can write any other.
        """
        path = message.first_raw("Return-Path")
        sender = None if path is None else _path(path)
        recipient = None
        for name in ("X-Original-To", "Delivered-To"):
            value = message.first_raw(name)
            if value is not None:
                recipient = _path(value) or None
                break
        queue_id = mta_queue_id(message)
        return cls(sender, (recipient,) if recipient else (), arrived, queue_id)


_QUEUE_ID = re.compile(r"\sid\s+([0-9A-Za-z]{5,20})(?=[\s;]|$)")
_LONGEST_TRACE = 2000


def mta_queue_id(message: Message) -> str:
    """Return the id that the message had in the queue of our MTA, or ``""``.

    It stands in the topmost Received field (RFC 5321, 4.4), which that MTA wrote.
    """
    found = _QUEUE_ID.search((message.first_raw("Received") or "")[:_LONGEST_TRACE])
    return found[1] if found else ""


_LOCAL_NAME = re.compile(r"[^\x00-\x20\x7f()<>\[\]:;@\\,\"]+")


def _path(value: str) -> str | None:
    """Return the address of a path; ``""`` for ``<>``; ``None`` for what is none."""
    value = value.strip(" \t")
    if value == "<>":
        return ""
    found = mailboxes(value).addresses
    if found:
        return found[0] if len(found) == 1 else None
    bare = value[1:-1] if value.startswith("<") and value.endswith(">") else value
    return bare if _LOCAL_NAME.fullmatch(bare) else None


class _Source(str):
    """A field's value as it arrived, with the bytes of the whole field."""

    __slots__ = ("source",)
    source: bytes

    @classmethod
    def of(cls, value: str, source: bytes) -> _Source:
        """Make the value and give it its bytes."""
        made = cls(value)
        made.source = source
        return made


class _Fields:
    """The visible fields of a message, ready for look-ups."""

    __slots__ = ("boxes", "encoded", "keys", "lines", "plain", "texts")

    def __init__(self, keys: list[str], lines: list[str], plain: bool) -> None:
        self.keys = keys
        self.lines = lines
        # There is nothing to clean in any line as it stands.
        self.plain = plain
        self.encoded = "=?" in "\n".join(lines)
        self.texts: list[str] | None = None
        # What the address fields hold, by key: filters ask for the same ones again and again.
        self.boxes: dict[str, Mailboxes] = {}

    def raw(self, index: int) -> str:
        """Return the value of one field with its encoded words undecoded."""
        value = self.lines[index][len(self.keys[index]) :]
        return value if self.plain else clean(value)

    def text(self, index: int) -> str:
        """Return the decoded value of one field."""
        if self.texts is not None:
            return self.texts[index][len(self.keys[index]) :]
        value = self.lines[index][len(self.keys[index]) :]
        if self.plain and "=?" not in value:
            return value
        return decode_header(value) or ""

    def all_texts(self) -> list[str]:
        """Return name and decoded value of every field."""
        if self.texts is None:
            if self.plain and not self.encoded:
                self.texts = self.lines
            else:
                self.texts = [
                    line[: len(key)] + (decode_header(line[len(key) :]) or "")
                    if "=?" in line
                    else line
                    if self.plain
                    else clean(line)
                    for key, line in zip(self.keys, self.lines, strict=True)
                ]
        return self.texts


class Message(email.message.Message):
    """An e-mail message: an :class:`email.message.Message` that hostile bytes cannot break.

    Made from bytes it is parsed only when asked: a look at a header slices the header, a look at
    the payload finds the parts.  No reading method raises, whatever the bytes; time and memory are
    linear in their length, and depth, parts and fields are limited (what is beyond the limits is
    opaque, and noted in ``defects``).  Header values are always ``str``, unfolded and decoded,
    without control characters other than the tab.  Made empty it is composed as in the standard
    library; a value set may hold any text, but a line break or a NUL is a :exc:`ValueError`.

    An instance must not be changed in one thread while another uses it.

    :ivar queue_name: the queue that the message came from, or ``None``.
    :ivar id: its id for life in the depot, or ``None``.
    :ivar entry: what the depot knows about it, or ``None``; not pickled.
    :ivar oversize: whether the intake cut its body off for its size.
    :ivar envelope: its envelope, where known, or ``None``.
    :ivar own_headers: the pairs of name and value that postoffice put in front; ``None`` where the
        raw header is shown as it is.
    """

    queue_name: str | None = None
    id: int | None = None
    entry: Any = None
    oversize: bool = False
    envelope: Envelope | None = None
    own_headers: tuple[tuple[str, str], ...] | None = None

    # What the standard library sets in its constructor and we set when it is asked for.
    policy: Policy = compat32
    _charset: Any = None
    _default_type: str = "text/plain"

    _raw: Buffer | None = None
    _load: Callable[[], Buffer] | None = None
    # A part of a larger message: its place in that one's bytes.
    _place: mime.Part | None = None

    def __init__(self, policy: Policy = compat32) -> None:
        """Make an empty message, to be composed."""
        super().__init__(policy)
        if policy is compat32:
            del self.policy

    @classmethod
    def from_bytes(
        cls,
        raw: Buffer,
        own_headers: Iterable[tuple[str, str]] | None = (),
        envelope: Envelope | None = None,
    ) -> Message:
        """Make the message that arrived as ``raw``.

        :param raw: bytes, or a read-only map or view of them, which must then outlive the message.
        :param own_headers: fields of ours, shown before those of ``raw``; those in ``raw`` whose
            names begin with ``X-Postoffice`` are then taken for forged and are not visible.
            ``None`` shows ``raw`` as it is.
        :param envelope: the envelope, where known.
        """
        self = cls.__new__(cls)
        self._raw = raw
        if own_headers is not None:
            self.own_headers = tuple(own_headers)
        if envelope is not None:
            self.envelope = envelope
        return self

    @classmethod
    def from_loader(
        cls,
        load: Callable[[], Buffer],
        own_headers: Iterable[tuple[str, str]] | None = (),
        envelope: Envelope | None = None,
    ) -> Message:
        """Make the message whose bytes ``load`` returns; it is called once, when they are needed.

        Otherwise as :meth:`from_bytes`.  What ``load`` raises comes out of the method that needed
        the bytes.
        """
        self = cls.from_bytes(b"", own_headers, envelope)
        del self._raw
        self._load = load
        return self

    @classmethod
    def _from_part(cls, buffer: Buffer, place: mime.Part) -> Message:
        self = cls.__new__(cls)
        self._raw = buffer
        self._place = place
        if place.default_type != "text/plain":
            self._default_type = place.default_type
        return self

    # -- bytes -------------------------------------------------------------------------------------

    def _buffer(self) -> Buffer | None:
        """Return the bytes that arrived, in their own form; ``None`` for a composed message."""
        if self._raw is None and self._load is not None:
            self._raw = self._load()
            self._load = None
        return self._raw

    def _span(self) -> tuple[Buffer, int, int]:
        """Return a buffer and where in it the message starts and ends."""
        buffer = self._buffer()
        if buffer is None:
            buffer = self.as_bytes()
        if self._place is not None:
            return buffer, self._place.start, self._place.stop
        return buffer, 0, len(buffer)

    @property
    def raw(self) -> bytes:
        """What arrived, byte for byte; of a composed message its :meth:`as_bytes`."""
        buffer, start, end = self._span()
        if isinstance(buffer, bytes) and start == 0 and end == len(buffer):
            return buffer
        return bytes(buffer[start:end])

    @property
    def buffer(self) -> Buffer:
        """What arrived, in the form in which it was given: bytes, or a map or view of them."""
        buffer = self._buffer()
        return self.as_bytes() if buffer is None else buffer

    @property
    def header_end(self) -> int:
        """The offset in :attr:`raw` at which the body starts."""
        if self._buffer() is not None:
            return self._block().end - (self._place.start if self._place else 0)
        return headers.slice_header(self.as_bytes()).end

    @property
    def body_view(self) -> memoryview:
        """The body as it lies in :attr:`raw`, without a copy."""
        buffer, start, end = self._span()
        return memoryview(buffer)[start + self.header_end : end]

    # -- lazy state --------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Fill in what the standard library's methods keep in attributes."""
        value: Any
        if name == "_headers":
            value = self._list_headers()
            self._headers = value
        elif name == "_unixfrom":
            value = self._block().unixfrom
            self._unixfrom = value
        elif name in ("_payload", "preamble", "epilogue", "defects"):
            self._fill()
            value = self.__dict__[name]
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return value

    def _block(self) -> headers.Header:
        """Return the sliced header of the raw bytes."""
        block = self.__dict__.get("_sliced")
        if block is None:
            if self._place is not None:
                block = self._place.header
            else:
                block = headers.slice_header(self._buffer() or b"")
            self._sliced = block
        return block

    def _parts(self) -> mime.Part:
        """Return the found parts of the raw bytes."""
        place = self._place or self.__dict__.get("_tree")
        if place is None:
            place = self._tree = mime.parse(
                self._buffer() or b"", self._block(), self._default_type
            )
        return place

    def _fill(self) -> None:
        """Set the attributes that the standard library's parser would have set."""
        state = self.__dict__
        buffer = self._buffer() or b""
        place = self._parts()

        def text(span: tuple[int, int] | None) -> str | None:
            if span is None:
                return None
            return bytes(buffer[span[0] : span[1]]).decode("ascii", "surrogateescape")

        payload: Any
        if place.parts is None:
            payload = text((place.body, place.end))
            given: Any = payload
        else:
            payload = [self._child(buffer, part) for part in place.parts]
            given = tuple(payload)
        found = {
            "_payload": payload,
            "preamble": text(place.preamble),
            "epilogue": text(place.epilogue),
            "defects": list(place.defects),
        }
        if "_payload" not in state:
            self._given = (given, found["preamble"], found["epilogue"])
        for name, value in found.items():
            state.setdefault(name, value)

    @staticmethod
    def _child(buffer: Buffer, place: mime.Part) -> Message:
        return Message._from_part(buffer, place)

    def _untouched_payload(self) -> bool:
        """Whether the payload is what arrived."""
        state = self.__dict__
        if "_payload" not in state:
            return self._buffer() is not None
        if "_given" not in state:
            return False
        given, preamble, epilogue = state["_given"]
        if self.preamble is not preamble or self.epilogue is not epilogue:
            return False
        payload = self._payload
        if not isinstance(given, tuple):
            return payload is given
        return (
            isinstance(payload, list)
            and len(payload) == len(given)
            and all(
                one is other and one.is_untouched()
                for one, other in zip(payload, given, strict=True)
            )
        )

    def is_untouched(self) -> bool:
        """Whether the message is what arrived: no field and no part was changed."""
        return "_headers" not in self.__dict__ and self._untouched_payload()

    # -- the header --------------------------------------------------------------------------------

    def _fields(self) -> _Fields:
        state = self.__dict__
        if "_headers" in state:
            pairs = [(name, headers.unfold(str(value))) for name, value in state["_headers"]]
            keys = [f"{name.lower()}: " for name, _ in pairs]
            return _Fields(keys, [f"{name}: {value}" for name, value in pairs], False)
        fields = state.get("_seen")
        if fields is None:
            fields = self._seen = self._see()
        return fields

    def _see(self) -> _Fields:
        block = self._block()
        keys, lines = block.keys, block.lines
        if self.own_headers is not None:
            if _FORGED in "".join(keys):
                kept = [i for i, key in enumerate(keys) if not key.startswith(_FORGED)]
                keys, lines = [keys[i] for i in kept], [lines[i] for i in kept]
            if self.own_headers:
                keys = [f"{name.lower()}: " for name, _ in self.own_headers] + keys
                own = [f"{name}: {clean(value)}" for name, value in self.own_headers]
                lines = own + lines
        return _Fields(keys, lines, block.plain)

    def written(self, name: str) -> list[str]:
        """Return the decoded values of all fields of the name that arrived, forged ones too.

        Forged is what is named like ours and was not set by us; no other method shows it.
        """
        if self._buffer() is None:
            return self.get_all(name) or []
        block = self._block()
        key = f"{name.lower()}: "
        found = zip(block.keys, block.lines, strict=True)
        return [decode_header(line[len(key) :]) or "" for other, line in found if other == key]

    def header_texts(self) -> list[str]:
        """Return ``Name: decoded value`` of each visible field in order, ours first.

        Folds are undone, encoded words and raw 8-bit decoded; no text holds a line break.
        """
        return self._fields().all_texts().copy()

    def first_raw(self, name: str) -> str | None:
        """Return the topmost field's value, unfolded but with its encoded words undecoded."""
        fields = self._fields()
        try:
            return fields.raw(fields.keys.index(f"{name.lower()}: "))
        except ValueError:
            return None

    def topmost(self, name: str) -> str | None:
        """Return the topmost field's decoded value, or ``None``."""
        value: str | None = self.get(name)
        return value

    def get(self, name: str, failobj: Any = None) -> Any:
        """Return the topmost field's decoded value, or ``failobj``."""
        fields = self._fields()
        try:
            index = fields.keys.index(f"{name.lower()}: ")
        except ValueError:
            return failobj
        return fields.text(index)

    def get_all(self, name: str, failobj: Any = None) -> Any:
        """Return the decoded values of all fields of the name, or ``failobj``."""
        fields = self._fields()
        key = f"{name.lower()}: "
        found = [fields.text(i) for i, other in enumerate(fields.keys) if other == key]
        return found or failobj

    def keys(self) -> list[str]:
        """Return the names of all fields, in order, as they are written."""
        fields = self._fields()
        return [line[: len(key) - 2] for key, line in zip(fields.keys, fields.lines, strict=True)]

    def values(self) -> list[str]:
        """Return the decoded values of all fields, in order."""
        fields = self._fields()
        return [fields.text(i) for i in range(len(fields.keys))]

    def items(self) -> list[tuple[str, str]]:
        """Return name and decoded value of all fields, in order."""
        return list(zip(self.keys(), self.values(), strict=True))

    def __getitem__(self, name: str) -> Any:
        """Return the topmost field's decoded value, or ``None``."""
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is a field of this name."""
        return isinstance(name, str) and f"{name.lower()}: " in self._fields().keys

    def __len__(self) -> int:
        """Return the number of fields, repeated ones included."""
        return len(self._fields().keys)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the fields."""
        return iter(self.keys())

    def raw_items(self) -> Iterator[tuple[str, Any]]:
        """Iterate over name and unencoded value of all fields, for a generator."""
        return iter(self._pairs())

    def _pairs(self) -> list[tuple[str, Any]]:
        """Return the fields as the standard library keeps them, without keeping them."""
        state = self.__dict__
        return list(state["_headers"]) if "_headers" in state else self._list_headers()

    def _list_headers(self) -> list[tuple[str, Any]]:
        """Return the fields as the standard library keeps them."""
        if self._buffer() is None:
            return []
        made: list[tuple[str, Any]] = [
            (name, encode_header(name, clean(value))) for name, value in self.own_headers or ()
        ]
        buffer, start, _ = self._span()
        block = self._block()
        lines = iter(zip(block.keys, block.lines, strict=True))
        lines_end, _ = headers.header_end(buffer, start, block.end)
        spans = headers.field_spans(buffer, start, lines_end)
        for name, begin, end in islice(spans, headers.MAX_FIELDS):
            if not name:
                continue
            pair = next(lines, None)
            if pair is None:
                break
            key, line = pair
            if self.own_headers is not None and key.startswith(_FORGED):
                continue
            source = bytes(buffer[begin:end])
            value = clean(line[len(key) :])
            made.append((line[: len(key) - 2], _Source.of(value, source)))
        return made

    # -- changes to the header ---------------------------------------------------------------------

    def _encoded(self, name: str, value: Any) -> str:
        if not isinstance(name, str) or not headers.is_name(name):
            raise ValueError(f"not a name of a field: {name!r}")
        encoded = encode_header(name, value)
        if encoded is None:
            raise TypeError(f"the value of {name} is None")
        return encoded

    def __setitem__(self, name: str, value: Any) -> None:
        """Append a field.

        :raises ValueError: for a line break or NUL in the value, or a name that is none.
        """
        encoded = self._encoded(name, value)
        self._headers = [*self._pairs(), (name, encoded)]

    def __delitem__(self, name: str) -> None:
        """Remove all fields of the name; none is no error."""
        if name in self:
            name = name.lower()
            self._headers = [pair for pair in self._pairs() if pair[0].lower() != name]

    def replace_header(self, _name: str, _value: Any) -> None:
        """Replace the topmost field of the name, in its place and case.

        :raises KeyError: if there is none.
        :raises ValueError: as for setting an item.
        """
        pairs = self._pairs()
        for index, (name, _) in enumerate(pairs):
            if name.lower() == _name.lower():
                pairs[index] = (name, self._encoded(name, _value))
                self._headers = pairs
                return
        raise KeyError(_name)

    def set_raw(self, name: str, value: Any) -> None:
        """Append a field unchecked: for a parser."""
        self._headers = [*self._pairs(), (name, value)]

    # -- parameters --------------------------------------------------------------------------------

    def _get_params_preserve(self, failobj: Any, header: str) -> Any:
        value = self.first_raw(header)
        return failobj if value is None else parameters(value)

    def get_params(
        self, failobj: Any = None, header: str = "content-type", unquote: bool = True
    ) -> Any:
        """Return the parameters of a field, encoded words in their values decoded."""
        params = self._get_params_preserve(None, header)
        if params is None:
            return failobj
        if not unquote:
            return params
        return [(name, _plain_value(value)) for name, value in params]

    def get_param(
        self,
        param: str,
        failobj: Any = None,
        header: str = "content-type",
        unquote: bool = True,
    ) -> Any:
        """Return one parameter of a field: text, or a tuple where RFC 2231 was used."""
        for name, value in self._get_params_preserve((), header):
            if name.lower() == param.lower():
                return _plain_value(value) if unquote else value
        return failobj

    def get_content_type(self) -> str:
        """Return maintype/subtype in lower case; ``text/plain`` for anything malformed."""
        value = self.first_raw("content-type")
        return self.get_default_type() if value is None else mime.content_type(value).type

    def get_filename(self, failobj: Any = None) -> Any:
        """Return the file's name from Content-Disposition, else from Content-Type, decoded."""
        for header, param in (("content-disposition", "filename"), ("content-type", "name")):
            value = self.get_param(param, None, header)
            if value is not None:
                text = mime.parameter_text(value)
                return clean(text).strip()
        return failobj

    def get_boundary(self, failobj: Any = None) -> Any:
        """Return the boundary of a multipart."""
        for name, value in self._get_params_preserve((), "content-type"):
            if name.lower() == "boundary":
                return mime.parameter_text(value).rstrip()
        return failobj

    def set_boundary(self, boundary: str) -> None:
        """Set the boundary of a multipart.

        :raises email.errors.HeaderParseError: if there is no Content-Type.
        """
        value = self.first_raw("content-type")
        if value is None:
            raise errors.HeaderParseError("No Content-Type header found")
        texts = [value.partition(";")[0].strip()]
        for name, text in parameters(value)[1:]:
            if name.lower() == "boundary":
                continue
            if isinstance(text, str):
                texts.append(f"{name}={text}")
            else:
                charset, language, plain = text
                quoted = email.utils.encode_rfc2231(mime.unquote(plain), charset, language)
                texts.append(f"{name}*={quoted}")
        texts.append(f'boundary="{boundary}"')
        self.replace_header("content-type", "; ".join(texts))

    def get_content_charset(self, failobj: Any = None) -> Any:
        """Return the charset in lower case."""
        charset = self.get_param("charset")
        if charset is None:
            return failobj
        text = mime.parameter_text(charset)
        return text.lower() if text.isascii() else failobj

    def walk(self) -> Generator[Any, None, None]:
        """Yield the message and all its parts, depth first."""
        stack: list[Any] = [self]
        while stack:
            part = stack.pop()
            yield part
            if part.is_multipart():
                stack.extend(reversed(part.get_payload()))

    # -- the payload -------------------------------------------------------------------------------

    def get_payload(self, i: int | None = None, decode: bool = False) -> Any:
        """Return the parts, or the body as text, or with ``decode`` the body as bytes.

        As in the standard library; nothing in a message makes it raise, but an index out of range
        does.
        """
        payload = self._payload
        if isinstance(payload, list):
            if decode:
                return None
            return payload if i is None else payload[i]
        if i is not None:
            raise TypeError(f"Expected list, got {type(payload)}")
        if not isinstance(payload, str):
            return payload
        if not decode:
            if payload.isascii():
                return payload
            return self._text_payload(payload)
        encoding = str(self.get("content-transfer-encoding", "")).strip().lower()
        data = _payload_bytes(payload)
        if encoding == "base64":
            value, defects = mime.decode_base64(data)
            self.defects.extend(defects)
            return value
        return bytes(mime.decode_transfer(data, encoding))

    def _text_payload(self, payload: str) -> str:
        try:
            data = payload.encode("ascii", "surrogateescape")
        except UnicodeError:
            return payload
        name = codec(self.get_content_charset() or "ascii") or "ascii"
        try:
            return data.decode(name, "replace")
        except (UnicodeError, ValueError):
            return data.decode("ascii", "replace")

    def text_parts(self) -> Iterator[str]:
        """Yield the text of each ``text/*`` part, attached ones and those of attached messages too.

        Transfer encoding and charset are undone (else UTF-8, else Latin-1), CRLF becomes LF.
        """
        if self.is_untouched():
            yield from mime.texts(self._buffer() or b"", self._parts())
            return
        for part in self.walk():
            if part.is_multipart() or part.get_content_maintype() != "text":
                continue
            data = part.get_payload(decode=True)
            if isinstance(data, bytes):
                yield mime.text_of(data, None, part.get_content_charset())

    # -- the whole ---------------------------------------------------------------------------------

    def as_bytes(self, unixfrom: bool = False, policy: Policy | None = None) -> bytes:
        """Return the message as bytes.

        Our headers first, then what arrived with only the forged fields cut out, byte for byte; of
        a changed message, the untouched fields and parts are as they arrived.  ``policy`` has the
        standard library's generator write the message.
        """
        if policy is None and self._buffer() is not None and self._untouched_payload():
            data = self._assembled()
        else:
            data = self._generated(policy)
        if unixfrom and not data.startswith(b"From "):
            line = self.get_unixfrom() or "From nobody " + time.ctime()
            data = line.encode("utf-8", "replace") + b"\n" + data
        return data

    def _assembled(self) -> bytes:
        """Put the message together from its fields and the body that arrived."""
        buffer, start, end = self._span()
        changed = "_headers" in self.__dict__
        if self.own_headers is None and not changed:
            return bytes(buffer[start:end])
        linesep = _linesep(buffer, start, end)
        block = self._block()
        if block.regular and not changed and _FORGED not in "".join(block.keys):
            return b"".join((*self._own_fields(linesep), buffer[start:end]))
        lines_end, _ = headers.header_end(buffer, start, block.end)
        out: list[Any] = []
        at = start
        name, first, after = next(
            headers.field_spans(buffer, start, lines_end), (b"", start, start)
        )
        lead = b"" if name else bytes(buffer[first : min(first + 5, after)])
        if lead[:1] in (b" ", b"\t") and (changed or self.own_headers):
            # It would continue the last of our fields.
            at = after
        elif lead == b"From " and changed and not self.own_headers:
            # An mbox line is no field, and stays in front.
            out.append(bytes(buffer[first:after]))
            at = after
        if changed:
            out.extend(self._field_bytes(name, value, linesep) for name, value in self._headers)
            # What is beyond the limits is not in the list of fields.
            looked = islice(headers.field_spans(buffer, start, lines_end), headers.MAX_FIELDS)
            for _, _, after in looked:
                at = after
        else:
            out.extend(self._own_fields(linesep))
        if self.own_headers is not None:
            for begin, after in headers.forged_spans(buffer, at, lines_end):
                out.append(buffer[at:begin])
                at = after
        out.append(buffer[at:end])
        return b"".join(out)

    def _own_fields(self, linesep: str) -> list[bytes]:
        return [
            self._field_bytes(name, encode_header(name, clean(value)), linesep)
            for name, value in self.own_headers or ()
        ]

    @staticmethod
    def _field_bytes(name: str, value: Any, linesep: str) -> bytes:
        if isinstance(value, _Source):
            source = value.source
            return source if source[-1:] in b"\r\n" else source + linesep.encode()
        text = clean(headers.unfold(str(value)))
        return headers.fold(name, text, linesep).encode("utf-8", "replace")

    def _generated(self, policy: Policy | None) -> bytes:
        """Have the standard library's generator write the message."""
        out = BytesIO()
        if policy is not None:
            _Generator(out, mangle_from_=False, policy=policy).flatten(self)
            return out.getvalue()
        policy = self.policy
        if self._buffer() is not None:
            policy = policy.clone(linesep=_linesep(*self._span()))
        # The message itself is never untouched here.
        _Generator(out, mangle_from_=False, policy=policy).keeping().flatten(self)
        return out.getvalue()

    def _write_headers(self, writer: generator.Generator) -> None:
        """Write the header for the standard library's generator."""
        linesep = writer._NL  # type: ignore[attr-defined]  # not in the stubs
        for name, value in self._pairs():
            data = self._field_bytes(name, value, linesep)
            text = re.sub("\r\n|\r|\n", linesep, data.decode("ascii", "surrogateescape"))
            if not isinstance(writer, generator.BytesGenerator):
                text = decode_charset(text.encode("ascii", "surrogateescape"), None)
            writer.write(text)
        writer.write(linesep)

    def as_string(
        self, unixfrom: bool = False, maxheaderlen: int = 0, policy: Policy | None = None
    ) -> str:
        """Return :meth:`as_bytes` as text, with U+FFFD for what is not UTF-8."""
        return self.as_bytes(unixfrom, policy).decode("utf-8", "replace")

    def __str__(self) -> str:
        """Return :meth:`as_string`."""
        return self.as_string()

    def __bytes__(self) -> bytes:
        """Return :meth:`as_bytes`."""
        return self.as_bytes()

    # -- addresses and identity --------------------------------------------------------------------

    def _address_values(self, name: str) -> Sequence[str]:
        key = f"{name.lower()}: "
        if key in _TRACE:
            envelope = self.envelope
            if envelope is not None:
                if key != "return-path: ":
                    if envelope.recipients:
                        return envelope.recipients
                elif envelope.sender is not None:
                    return (envelope.sender,)
            value = self.first_raw(name)
            return () if value is None else (value,)
        fields = self._fields()
        if key not in fields.keys:
            return ()
        return [
            line[len(key) :]
            for other, line in zip(fields.keys, fields.lines, strict=True)
            if other == key
        ]

    def _boxes(self, name: str) -> Mailboxes:
        key = f"{name.lower()}: "
        boxes = self._fields().boxes if key not in _TRACE else {}
        found = boxes.get(key)
        if found is None:
            found = boxes[key] = all_mailboxes(self._address_values(name))
        return found

    def addresses(self, name: str) -> tuple[str, ...]:
        """Return the addr-specs in all fields of the name (RFC 5322, 3.4).

        What cannot be parsed gives none.  Of X-Original-To, Delivered-To and Return-Path only the
        topmost field counts, and a known envelope goes before it.
        """
        return self._boxes(name).addresses

    def hostnames(self, name: str) -> tuple[str, ...]:
        """Return the domains of :meth:`addresses`, in the form in which they are compared.

        Lower case, no trailing dot, A-labels for international names; address literals as they are.
        """
        return self._boxes(name).hosts

    @property
    def message_id(self) -> str:
        """The topmost Message-ID; where there is none, one made from the content.

        Two deliveries of one mail get the same.
        """
        value = self.get("message-id")
        if value is not None and value.strip():
            return str(value.strip())
        buffer, start, end = self._span()
        lines_end, body = headers.header_end(buffer, start, end)
        digest = hashlib.sha256()
        spans = headers.field_spans(buffer, start, lines_end)
        at = start
        for name, begin, at in islice(spans, headers.MAX_FIELDS):
            label = name.lower()
            if label and label not in _PER_DELIVERY and not label.startswith(_FORGED.encode()):
                digest.update(buffer[begin:at])
        digest.update(buffer[at:lines_end])
        digest.update(b"\n")
        with memoryview(buffer) as view:
            digest.update(view[body:end])
        return f"<{digest.hexdigest()[:32]}@postoffice.invalid>"

    # -- copies ------------------------------------------------------------------------------------

    _CACHES = frozenset(["entry", "_sliced", "_seen", "_tree", "_load", "_given", "_place"])
    _PARSED = frozenset(["_payload", "preamble", "epilogue", "defects"])

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: what arrived, and what was changed since."""
        state = {key: value for key, value in self.__dict__.items() if key not in self._CACHES}
        if self._buffer() is not None:
            state["_raw"] = self.raw
            if self._untouched_payload():
                for key in self._PARSED:
                    state.pop(key, None)
        if state.get("policy") is compat32:
            del state["policy"]
        if "_headers" in state:
            # Plain values, so that no pickle names a class that is not public.
            state["_headers"] = [
                (name, str(value), value.source if isinstance(value, _Source) else None)
                for name, value in state["_headers"]
            ]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled."""
        self.__dict__.update(state)
        if "_headers" in state:
            self._headers = [
                (name, value if source is None else _Source.of(value, source))
                for name, value, source in state["_headers"]
            ]

    def __copy__(self) -> Message:
        """Return a copy that shares what arrived and the parts, but not the list of fields."""
        made = self.__class__.__new__(self.__class__)
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Message:
        """Return a copy of its own; the bytes that arrived are shared, being immutable."""
        made = copy(self)
        memo[id(self)] = made
        state = made.__dict__
        if self._buffer() is not None and self._untouched_payload():
            for key in (*self._PARSED, "_given"):
                state.pop(key, None)
        else:
            state.pop("_given", None)
            for key in self._PARSED:
                if key in state:
                    state[key] = deepcopy(state[key], memo)
        return made


class _Generator(generator.BytesGenerator):
    """Writes any payload, and the parts that were not changed as they arrived."""

    _fp: Any
    _write_lines: Any
    _keep = False

    def flatten(self, msg: Any, unixfrom: bool = False, linesep: str | None = None) -> None:
        """Write a message, or one of its parts."""
        if self._keep and isinstance(msg, Message) and msg.is_untouched():
            self._fp.write(msg.raw)
        elif not isinstance(msg, email.message.Message):
            self.write(str(msg))
        else:
            super().flatten(msg, unixfrom, linesep)

    def clone(self, fp: Any) -> _Generator:
        """Return the generator for a part."""
        made = super().clone(fp)
        made._keep = self._keep
        return made

    def keeping(self) -> _Generator:
        """Write the unchanged parts as they arrived, whatever the policy."""
        self._keep = True
        return self

    def write(self, s: str) -> None:
        """Write text, 8-bit where it is not ASCII."""
        self._fp.write(_to_bytes(s))

    def _encode(self, s: str) -> bytes:
        return _to_bytes(s)

    def _handle_text(self, msg: Any) -> None:
        payload = msg._payload
        if payload is not None:
            self._write_lines(payload if isinstance(payload, str) else str(payload))

    _writeBody = _handle_text

    def _handle_message(self, msg: Any) -> None:
        if isinstance(msg._payload, list) and msg._payload:
            super()._handle_message(msg)  # type: ignore[misc]  # the stubs do not list it
        elif not isinstance(msg._payload, list):
            self._handle_text(msg)

    def _handle_message_delivery_status(self, msg: Any) -> None:
        if isinstance(msg._payload, list):
            super()._handle_message_delivery_status(msg)  # type: ignore[misc]  # as above
        else:
            self._handle_text(msg)


def _to_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeError:
        return text.encode("utf-8", "replace")


def _linesep(buffer: Buffer, start: int, end: int) -> str:
    found = re.compile(rb"[^\n]*\n").match(buffer, start, min(end, start + 4096))
    return "\r\n" if found and found[0].endswith(b"\r\n") else "\n"


def _payload_bytes(payload: str) -> bytes:
    try:
        return payload.encode("ascii", "surrogateescape")
    except UnicodeError:
        return payload.encode("raw-unicode-escape", "replace")


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0], value[1], mime.unquote(value[2])
    text = mime.unquote(value)
    return decode_header(text) if "=?" in text else clean(text)


class MIMEMultipart(Message, _StandardMultipart):
    """A message that starts as a multipart: see :class:`email.mime.multipart.MIMEMultipart`."""

    def __init__(
        self,
        _subtype: str = "mixed",
        boundary: str | None = None,
        _subparts: Sequence[Message] | None = None,
        *,
        policy: Policy = compat32,
        **_params: Any,
    ) -> None:
        """Make a multipart of the subtype, of the parts given."""
        _StandardMultipart.__init__(self, _subtype, boundary, _subparts, policy=policy, **_params)
