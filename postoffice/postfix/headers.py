"""The header fields of a queued message, by their own names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["MailHeaders"]


class MailHeaders(Mapping[str, list[str]]):
    """The values of each header field, as lists, in the order in which they stand in the message.

    A field is an attribute of its own name, with its own case: ``head.From``, ``head.Received``,
    ``getattr(head, "Reply-To")``; and an item, ``head["From"]``.  Both know only what the message
    has.  A value is what the message holds: encoded words stay encoded, and a folded value has its
    line breaks.  Bytes that are no UTF-8 become U+FFFD.  To look for a text, :meth:`get_all` is
    better: it knows no case of names, and no folding.

    Nothing that a message names its fields can hide an attribute that every Python object has, or
    a method of a mapping: such a field is an item only.
    """

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, list[str]] | None = None) -> None:
        """Hold these values by name; none without an argument."""
        self._fields: dict[str, list[str]] = dict(fields) if fields is not None else {}

    @classmethod
    def from_bytes(cls, block: bytes) -> MailHeaders:
        """Read a message's header block; what follows its first empty line is left out.

        Never raises.  A line that is neither a field nor the continuation of one is left out.
        """
        text = block.decode("utf-8", "replace")
        fields: dict[str, list[str]] = {}
        parts: list[str] | None = None
        name = ""
        for line in text.split("\n"):
            bare = line.removesuffix("\r")
            if not bare:
                break
            if bare[0] in " \t":
                if parts is not None:
                    parts.append(bare)
                continue
            if parts is not None:
                fields.setdefault(name, []).append("\n".join(parts))
            name, colon, value = bare.partition(":")
            name = name.rstrip(" \t")
            parts = [value.lstrip(" \t")] if colon and name else None
        if parts is not None:
            fields.setdefault(name, []).append("\n".join(parts))
        return cls(fields)

    def get_all(self, name: str) -> list[str]:
        """Return the values of all fields of this name, in any case of letters; maybe none.

        They are unfolded (RFC 5322 section 2.2.3): the line breaks are gone, all else stays.
        """
        sought = name.lower()
        return [
            value.replace("\n", "")
            for field, values in self._fields.items()
            if field.lower() == sought
            for value in values
        ]

    def __getattr__(self, name: str) -> list[str]:
        # Python looks such names up on its own account: for copies and pickles.
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._fields[name]
        except KeyError:
            raise AttributeError(f"the message has no header field {name!r}") from None

    def __getitem__(self, name: str) -> list[str]:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"MailHeaders({self._fields!r})"
