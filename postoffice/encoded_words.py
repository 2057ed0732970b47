"""Encoded words (RFC 2047): text in ASCII header fields.

Any text can be decoded: nothing raises, and time and memory are linear in the text's length.
Functions are pure and safe to call from several threads.
"""

from __future__ import annotations

import binascii
import re

from postoffice.charsets import decode_charset

__all__ = ["decode_words", "encode_text", "encode_words", "needs_encoding"]


def _bytes_of_base64(text: str) -> bytes:
    data = text.encode("ascii", "ignore")
    try:
        return binascii.a2b_base64(data)
    except binascii.Error:
        data = re.sub(rb"[^A-Za-z0-9+/]", b"", data)
        if len(data) % 4 == 1:
            data = data[:-1]
        return binascii.a2b_base64(data + b"==")


def decode_words(value: str) -> str:
    """Decode the encoded words in a value, malformed ones as far as they go.

    The white space between two of them is dropped (RFC 2047, 6.2).
    """
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


_Q_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/")
_Q_TABLE = [chr(code) if code in _Q_SAFE else f"={code:02X}" for code in range(256)]
_Q_TABLE[32] = "_"
# An encoded word has at most 75 characters (RFC 2047, 2), of which 12 are =?utf-8?q??=; these are
# shorter, so that a first line with the field's name stays within 78.
_WORD_ROOM = 52


def encode_words(text: str) -> str:
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


def needs_encoding(text: str) -> bool:
    """Whether the text is more than printable ASCII and tabs."""
    return not text.isascii() or not text.replace("\t", "").isprintable()


def encode_text(text: str) -> str:
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
    return text[:begin] + encode_words(text[begin:end]) + text[end:]
