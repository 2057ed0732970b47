"""Charsets by the names that mail gives them, and the characters that text may hold.

Functions take any bytes or text, raise nothing, need time and memory linear in what they are given,
and are safe to call from several threads.
"""

from __future__ import annotations

import encodings
import re
from encodings import aliases as _aliases
from encodings import normalize_encoding
from functools import lru_cache

__all__ = ["CONTROLS", "clean", "codec", "decode_charset"]

_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What :func:`clean` replaces."""


def _replace_control(found: re.Match[str]) -> str:
    return " " if found[0] in _BREAKS else "\ufffd"


def clean(text: str) -> str:
    """Return ``text`` without what could forge a line or drive a terminal.

    Line breaks of any kind become a space; other control characters except the tab, and lone
    surrogates, become U+FFFD.
    """
    if text.isprintable():
        return text
    return CONTROLS.sub(_replace_control, text)


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
