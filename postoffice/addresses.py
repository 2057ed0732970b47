"""Addresses in header fields (RFC 5322, 3.4): who is addressed, and how to write it in ASCII.

Any value can be read: nothing raises, and time and memory are linear in its length.  Functions are
pure and safe to call from several threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from postoffice.charsets import CONTROLS
from postoffice.encoded_words import encode_text, encode_words, needs_encoding

__all__ = [
    "ADDRESS_FIELDS",
    "Mailboxes",
    "all_mailboxes",
    "encode_addresses",
    "host",
    "mailboxes",
]

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
        if CONTROLS.search(local):
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
    if not needs_encoding(text):
        return text
    kinds = [token.kind for token in tokens]
    if "<" in kinds:
        angle = kinds.index("<")
        name = "".join(token.text for token in tokens[:angle])
        if needs_encoding(name):
            lead = name[: len(name) - len(name.lstrip(" \t"))]
            parts = [
                re.sub(r"\\(.)", r"\1", token.text[1:-1]) if token.kind == "quoted" else token.text
                for token in tokens[:angle]
            ]
            name = f"{lead}{encode_words(''.join(parts).strip())} "
        return name + _encode_domain(tokens[angle:])
    if "@" in kinds:
        return _encode_domain(tokens)
    return encode_text(text)


def encode_addresses(value: str) -> str:
    """Encode what needs it of an address list: names in words, domains in A-labels."""
    out: list[str] = []
    box: list[_Token] = []
    in_angle = False
    for token in _tokens(value):
        if token.kind in ("<", ">"):
            in_angle = token.kind == "<"
        if token.kind in ",;:" and not in_angle:
            out.append(_encode_mailbox(box) + token.text)
            box = []
        elif token.kind == "comment" and needs_encoding(token.text):
            box.append(token._replace(text=f"({encode_words(token.text[1:-1])})"))
        elif token.kind == "bad" and not token.text:
            box.append(token._replace(kind="atom", text=value[token.start : token.end]))
        else:
            box.append(token)
    out.append(_encode_mailbox(box))
    return "".join(out)
