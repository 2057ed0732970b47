"""Addresses as Postfix's listings write them, of what its queue files hold."""

from __future__ import annotations

import re

__all__ = ["NULL_SENDER", "listed"]

#: How the listings write the null sender.
NULL_SENDER = "MAILER-DAEMON"

# RFC 822 section 6.1: atoms with single dots between; beyond ASCII nothing is special.
_DOT_STRING = re.compile(
    rb"[^\x00-\x20\x7f()<>@,;:\\\"\[\].]+(?:\.[^\x00-\x20\x7f()<>@,;:\\\"\[\].]+)*"
)
_TO_ESCAPE = re.compile(rb"[\"\\\r]")
_CONTROLS = dict.fromkeys((*range(32), 127), "?")


def listed(address: bytes) -> str:
    """Return an address as ``postqueue`` prints it: quoted, and with ``?`` for what is no text.

    A queue file holds the local part bare: ``a b@example.com`` is listed as
    ``"a b"@example.com``.

    :param address: as it stands in the queue file; empty for the null sender, which stays empty.
    """
    if not address or address == NULL_SENDER.encode():
        return ""
    route, local, domain = b"", address, b""
    if address.startswith(b"@") and b":" in address:
        route, _, local = address.partition(b":")
        route += b":"
    place = local.rfind(b"@")
    if place >= 0:
        local, domain = local[:place], local[place:]
    if not _DOT_STRING.fullmatch(local):
        local = b'"' + _TO_ESCAPE.sub(rb"\\\g<0>", local) + b'"'
    return _printable(route + local + domain)


def _printable(raw: bytes) -> str:
    if raw.isascii():
        text = raw.decode("ascii")
        return text if text.isprintable() else text.translate(_CONTROLS)
    text = raw.decode("utf-8", "surrogateescape").translate(_CONTROLS)
    return re.sub("[\udc80-\udcff]", "?", text)
