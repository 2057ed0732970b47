"""The filters: conditions on a message, as the lines of ``filters`` in ``postoffice.ini`` say.

Each is an object that, called with a message, returns one line saying what matched, or ``None``.
They are made once, never change, keep nothing between messages, and may be called from any thread
and in forked processes.  Whatever the message holds, an answer takes a bounded time; where it
would not, :exc:`postoffice.exceptions.LimitExceeded` is raised and the message is set aside.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Self

from zope.interface import implementer

from postoffice.addresses import host
from postoffice.charsets import clean
from postoffice.exceptions import LimitExceeded, MatchTimeout
from postoffice.expressions import Expression, ExpressionList
from postoffice.interfaces import IFilter
from postoffice.loops import recipients_of
from postoffice.message import Message

__all__ = [
    "FACTORIES",
    "RECIPIENT_HEADERS",
    "BodyRegexpFileFilter",
    "BodyRegexpFilter",
    "EnvelopeToFilter",
    "FilterError",
    "HeaderRegexpFileFilter",
    "HeaderRegexpFilter",
    "ToHostnameFilter",
]

RECIPIENT_HEADERS = ("To", "Cc", "X-Original-To")
"""The headers in which :class:`ToHostnameFilter` looks unless told otherwise."""

MAX_FILTER_SECONDS = 10.0
"""How long one filter may go on beginning new matches on one message."""

MAX_SHOWN = 200

_HEADERS_AT_ONCE = 200
_COMMENT = re.compile(r"(?:^|\s)#.*", re.DOTALL)
_HEADER_NAME = re.compile(r"[!-9;-~]+")
_NO_LOCAL_CHARACTERS = re.compile(r"[@,:;<>()]")
_NO_HOST_CHARACTERS = re.compile(r"[\x00-\x20\x7f,;@*/\\\"'()<>]|\.\.")


class FilterError(ValueError):
    """A filter cannot be made from what the configuration says.

    :ivar fault: what is wrong.
    :ivar mend: what would be right.
    """

    def __init__(self, fault: str, mend: str) -> None:
        """Remember both halves of the sentence."""
        super().__init__(fault, mend)
        self.fault = fault
        self.mend = mend

    def __str__(self) -> str:
        """Return both halves in one line."""
        return f"{self.fault}; {self.mend}"


def _shown(text: str) -> str:
    text = clean(text)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


# -- hosts -----------------------------------------------------------------------------------------


def _domain_of(written: str) -> tuple[str, bool]:
    """Return a configured domain as it is compared, and whether subdomains belong to it."""
    bare = written.removeprefix("*").removeprefix(".") if written[:1] in (".", "*") else written
    with_subdomains = bare != written
    normal = host(bare)
    if not normal or _NO_HOST_CHARACTERS.search(normal) or normal.startswith("."):
        raise FilterError(
            f"{written!r} is no host name",
            "write hosts like example.com, or .example.com for a domain with its subdomains, "
            "with white space between them",
        )
    if with_subdomains and not written.startswith((".", "*.")):
        raise FilterError(f"{written!r} is no host name", f"write *.{bare} or .{bare}")
    return normal, with_subdomains


@implementer(IFilter)
class ToHostnameFilter:
    """Matches the hosts of the addresses in some headers: ``to_hostname: HOST...``.

    ``example.com`` takes that host alone; ``.example.com`` and ``*.example.com``, which mean the
    same, take the domain itself and every subdomain, at a label's boundary.  Names are compared
    without regard to case, to a trailing dot, and to the form (U-labels or A-labels) of
    internationalised ones.  An address that cannot be parsed matches nothing.

    :param expr: one or more hosts, separated by white space, then perhaps ``;headers=A,B``, then
        perhaps a comment that begins with white space and ``#``.
    :param headers: the names of the headers to look in; ``expr`` wins.  Of trace headers only the
        topmost field counts, and a known envelope wins over them.
    :raises FilterError: ``expr`` is none.
    """

    def __init__(self, expr: str, headers: Sequence[str] = RECIPIENT_HEADERS) -> None:
        text = _COMMENT.sub("", expr).strip()
        hosts, *attributes = text.split(";")
        for attribute in attributes:
            name, _, value = attribute.partition("=")
            if name.strip() != "headers":
                raise FilterError(
                    f"to_hostname knows no {attribute.strip()!r}",
                    "only ;headers=NAME,NAME may follow the hosts",
                )
            headers = [header.strip() for header in value.split(",")]
        for header in headers:
            if not _HEADER_NAME.fullmatch(header):
                raise FilterError(
                    f"{header!r} is no name of a header", "write ;headers=To,Cc,X-Original-To"
                )
        if not hosts.split():
            raise FilterError("to_hostname names no host", "write at least one host")
        self.expr = expr
        self.headers = tuple(headers)
        self.domains = tuple(hosts.split())
        self.description = f"to_hostname: {' '.join(text.split())}"
        self.sources = (*self.domains, ";", *self.headers)
        self._written: dict[str, str] = {}
        self._suffix_written: dict[str, str] = {}
        for written in self.domains:
            domain, with_subdomains = _domain_of(written)
            self._written.setdefault(domain, written)
            if with_subdomains:
                self._suffix_written.setdefault("." + domain, written)
        self._suffixes = tuple(self._suffix_written)

    @classmethod
    def from_option(cls, value: str, folder: str) -> Self:
        """Make the filter from the text behind the colon; *folder* plays no part."""
        return cls(value)

    def __call__(self, message: Message) -> str | None:
        """See :class:`postoffice.interfaces.IFilter`."""
        written, suffixes = self._written, self._suffixes
        for header in self.headers:
            for name in message.hostnames(header):
                if name in written:
                    return self._answer(header, name, written[name])
                if suffixes and name.endswith(suffixes):
                    suffix = next(suffix for suffix in suffixes if name.endswith(suffix))
                    return self._answer(header, name, self._suffix_written[suffix])
        return None

    @staticmethod
    def _answer(header: str, name: str, written: str) -> str:
        return f"to_hostname: {written} matches {_shown(name)} in {header}"

    def covers(self, other: ToHostnameFilter) -> bool:
        """Say whether every message that *other* matches is matched by this one too."""
        if not {name.lower() for name in other.headers} <= {name.lower() for name in self.headers}:
            return False
        return all(self._covers_host(name) for name in other._written) and all(
            suffix.endswith(self._suffixes) for suffix in other._suffixes
        )

    def _covers_host(self, name: str) -> bool:
        return name in self._written or name.endswith(self._suffixes)


# -- recipients ------------------------------------------------------------------------------------


class _Glob:
    """A text in which each ``*`` stands for any characters.  Takes linear time per star."""

    __slots__ = ("_first", "_last", "_middle", "_shortest")

    def __init__(self, pattern: str) -> None:
        first, *rest = pattern.split("*")
        self._first = first
        self._last = rest.pop() if rest else None
        self._middle = [part for part in rest if part]
        self._shortest = len(first) + len(self._last or "")

    def __call__(self, text: str) -> bool:
        if self._last is None:
            return text == self._first
        if len(text) < self._shortest:
            return False
        if not (text.startswith(self._first) and text.endswith(self._last)):
            return False
        at, end = len(self._first), len(text) - len(self._last)
        for part in self._middle:
            at = text.find(part, at, end)
            if at < 0:
                return False
            at += len(part)
        return True


def _any_text(text: str) -> bool:
    return True


def _domain_test(written: str) -> Callable[[str], bool]:
    if written == "*":
        return _any_text
    if "*" in written.removeprefix("*."):
        return _Glob(host(written))
    domain, with_subdomains = _domain_of(written)
    if not with_subdomains:
        return _Glob(domain)
    suffix = "." + domain
    return lambda name: name == domain or name.endswith(suffix)


class _AddressPattern:
    """One recipient pattern: a local part and a domain, each perhaps with stars."""

    __slots__ = ("_takes_domain", "_takes_local", "written")

    def __init__(self, written: str) -> None:
        local, at, domain = written.rpartition("@")
        quoted = local.startswith('"')
        if not at or not domain or (not quoted and _NO_LOCAL_CHARACTERS.search(local)):
            raise FilterError(
                f"{written!r} is no pattern of addresses",
                "write support@example.com, support+*@example.com or *@example.com",
            )
        self.written = written
        self._takes_domain = _domain_test(domain)
        self._takes_local = _Glob(local.lower()) if local.strip("*") else _any_text

    def takes(self, local: str, domain: str) -> bool:
        return self._takes_domain(domain) and self._takes_local(local)


@implementer(IFilter)
class EnvelopeToFilter:
    """Matches the envelope's recipients: ``envelope_to: PATTERN...``.

    This finds mail that names its recipient in no header, as by Bcc and from mailing lists.  When
    the envelope is not known, the topmost X-Original-To counts, or else the topmost Delivered-To.

    In a pattern ``*`` stands for any characters, none included, and nothing else is special:
    ``support@example.com``, ``support+*@example.com``, ``*@example.com`` and the same in short,
    ``@example.com``.  A domain that begins with ``.`` or ``*.`` takes the domain itself and its
    subdomains, as in ``to_hostname``.  Case does not matter on either side of the ``@``, though
    RFC 5321 section 2.4 would let it matter on the left: no mail server at large makes use of it.

    :param patterns: each one pattern, or several separated by white space.
    :raises FilterError: one of them is none, or there is none.
    """

    def __init__(self, *patterns: str) -> None:
        self.patterns = tuple(written for text in patterns for written in text.split())
        if not self.patterns:
            raise FilterError(
                "envelope_to names no address", "write at least one, like support@example.com"
            )
        self.description = f"envelope_to: {' '.join(self.patterns)}"
        self.sources = self.patterns
        self._patterns = tuple(_AddressPattern(written) for written in self.patterns)

    @classmethod
    def from_option(cls, value: str, folder: str) -> Self:
        """Make the filter from the text behind the colon; *folder* plays no part."""
        return cls(value)

    def __call__(self, message: Message) -> str | None:
        """See :class:`postoffice.interfaces.IFilter`."""
        for address in recipients_of(message):
            local, at, domain = address.rpartition("@")
            if not at:
                continue
            local, domain = local.lower(), host(domain)
            for pattern in self._patterns:
                if pattern.takes(local, domain):
                    return f"envelope_to: {pattern.written} matches {_shown(address)}"
        return None


# -- regular expressions ---------------------------------------------------------------------------


def _compiled(expressions: Sequence[str], places: Sequence[str], flags: int) -> ExpressionList:
    """Compile all, or say which of them is at fault, and in which of the places it stands.

    :raises FilterError: one of them is no regular expression.
    """
    for expression, place in zip(expressions, places, strict=True):
        try:
            Expression(expression, flags)
        except re.error as error:
            raise FilterError(
                f"{place}{_shown(expression)!r} is no regular expression: {_shown(str(error))}",
                "correct it; the syntax is that of Python's re",
            ) from None
    return ExpressionList(expressions, flags)


def _read(path: str) -> bytes:
    try:
        # A FIFO would make the open wait for ever.
        regular = stat.S_ISREG(os.stat(path).st_mode)
        if regular:
            with open(path, "rb") as file:
                return file.read()
        fault = "it is no regular file"
    except OSError as error:
        fault = error.strerror or str(error)
    except ValueError as error:
        fault = str(error)
    raise FilterError(
        f"cannot read {path}: {fault}", "name a readable file with one expression a line"
    )


def _read_lines(path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the lines of a file of expressions, and the place of each for an error's text.

    Blank lines and comments are left out.

    :raises FilterError: the file cannot be read, or is not UTF-8.
    """
    data = _read(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise FilterError(
            f"{path}, line {number}: byte 0x{data[error.start]:02x} is not UTF-8",
            "save the file as UTF-8",
        ) from None
    expressions, places = [], []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if line.strip() and not line.startswith("#"):
            expressions.append(line)
            places.append(f"{path}, line {number}: ")
    return tuple(expressions), tuple(places)


def _required(name: str, value: str) -> str:
    if not value:
        raise FilterError(f"{name} has no value", f"write it behind the colon: {name}: VALUE")
    return value


def _too_long(description: str) -> MatchTimeout:
    return MatchTimeout(
        f"{_shown(description)}: longer than {MAX_FILTER_SECONDS:g} s on one message"
    )


@implementer(IFilter)
class HeaderRegexpFilter:
    """Matches any of some regular expressions against every header: ``header_regexp: EXPR``.

    An expression is matched, case-sensitively, from the start of ``Name: value``, the value
    without folds and decoded (RFC 2047, raw 8-bit).  Every field counts, repeated ones as well.

    :raises FilterError: one of the expressions is none.
    """

    _name = "header_regexp"

    def __init__(self, *exprs: str) -> None:
        self.description = f"{self._name}: {_shown(' or '.join(exprs))}"
        self.sources: tuple[str, ...] = exprs
        self._expressions = _compiled(exprs, [""] * len(exprs), 0)

    @classmethod
    def from_option(cls, value: str, folder: str) -> Self:
        """Make the filter of the one expression behind the colon; *folder* plays no part."""
        return cls(_required(cls._name, value))

    def __call__(self, message: Message) -> str | None:
        """See :class:`postoffice.interfaces.IFilter`."""
        texts = message.header_texts()
        if len(texts) <= _HEADERS_AT_ONCE:
            found = self._expressions.match_any(texts)
        else:
            found = self._match_many(texts)
        return None if found is None else self._answer(found)

    def _match_many(self, texts: Sequence[str]) -> str | None:
        deadline = time.monotonic() + MAX_FILTER_SECONDS
        for start in range(0, len(texts), _HEADERS_AT_ONCE):
            found = self._expressions.match_any(texts[start : start + _HEADERS_AT_ONCE])
            if found is not None:
                return found
            if time.monotonic() > deadline:
                raise _too_long(self.description)
        return None

    def _answer(self, expression: str) -> str:
        return f"{self._name}: {_shown(expression)} matches a header"


@implementer(IFilter)
class HeaderRegexpFileFilter(HeaderRegexpFilter):
    r"""Matches any line of a file as :class:`HeaderRegexpFilter`: ``header_regexp_file: PATH``.

    The file is UTF-8 and is read once.  Blank lines and lines that begin with ``#`` are skipped;
    a leading ``#`` is written ``\#``.  White space at either end of a line belongs to the
    expression.

    :param path: the file; relative to the configuration's folder in :meth:`from_option`.
    :raises FilterError: the file cannot be read, or one of its lines is no expression.
    """

    _name = "header_regexp_file"

    def __init__(self, path: str) -> None:
        self.path = path
        self.description = f"{self._name}: {path}"
        self.sources, places = _read_lines(path)
        self._expressions = _compiled(self.sources, places, 0)

    @classmethod
    def from_option(cls, value: str, folder: str) -> Self:
        """Make the filter from the path behind the colon, which may be relative to *folder*."""
        return cls(os.path.join(folder, _required(cls._name, value)))

    def _answer(self, expression: str) -> str:
        return f"{self._name}: {_shown(expression)} in {self.path} matches a header"


@implementer(IFilter)
class BodyRegexpFilter:
    """Searches each text part for any of some regular expressions: ``body_regexp: EXPR``.

    ``^`` and ``$`` match at every line (``re.MULTILINE``).  A part is decoded by its charset, else
    as UTF-8, else as Latin-1.  A message over the size limit has no body to search: no match.

    :raises FilterError: one of the expressions is none.
    """

    _name = "body_regexp"

    def __init__(self, *exprs: str) -> None:
        self.description = f"{self._name}: {_shown(' or '.join(exprs))}"
        self.sources: tuple[str, ...] = exprs
        self._expressions = _compiled(exprs, [""] * len(exprs), re.MULTILINE)

    @classmethod
    def from_option(cls, value: str, folder: str) -> Self:
        """Make the filter of the one expression behind the colon; *folder* plays no part."""
        return cls(_required(cls._name, value))

    def __call__(self, message: Message) -> str | None:
        """See :class:`postoffice.interfaces.IFilter`."""
        if message.oversize:
            return None
        deadline = time.monotonic() + MAX_FILTER_SECONDS
        exceeded: LimitExceeded | None = None
        for text in message.text_parts():
            try:
                found = self._expressions.search_any((text,))
            except LimitExceeded as error:
                # A later part may still match, and a match is an answer.
                exceeded = exceeded or error
                found = None
            if found is not None:
                return self._answer(found)
            if time.monotonic() > deadline:
                raise exceeded or _too_long(self.description)
        if exceeded is not None:
            raise exceeded
        return None

    def _answer(self, expression: str) -> str:
        return f"{self._name}: {_shown(expression)} matches a text part"


@implementer(IFilter)
class BodyRegexpFileFilter(BodyRegexpFilter):
    """Searches as :class:`BodyRegexpFilter` for any line of a file: ``body_regexp_file: PATH``.

    The file is written as for :class:`HeaderRegexpFileFilter`.

    :param path: the file; relative to the configuration's folder in :meth:`from_option`.
    :raises FilterError: the file cannot be read, or one of its lines is no expression.
    """

    _name = "body_regexp_file"

    def __init__(self, path: str) -> None:
        self.path = path
        self.description = f"{self._name}: {path}"
        self.sources, places = _read_lines(path)
        self._expressions = _compiled(self.sources, places, re.MULTILINE)

    @classmethod
    def from_option(cls, value: str, folder: str) -> Self:
        """Make the filter from the path behind the colon, which may be relative to *folder*."""
        return cls(os.path.join(folder, _required(cls._name, value)))

    def _answer(self, expression: str) -> str:
        return f"{self._name}: {_shown(expression)} in {self.path} matches a text part"


FACTORIES: Mapping[str, Callable[[str, str], IFilter]] = MappingProxyType(
    {
        "to_hostname": ToHostnameFilter.from_option,
        "header_regexp": HeaderRegexpFilter.from_option,
        "header_regexp_file": HeaderRegexpFileFilter.from_option,
        "body_regexp": BodyRegexpFilter.from_option,
        "body_regexp_file": BodyRegexpFileFilter.from_option,
        "envelope_to": EnvelopeToFilter.from_option,
    }
)
"""The filters of this package by the names that the configuration gives them."""
