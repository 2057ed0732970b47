"""Paths and parameters of MAIL and RCPT (RFC 5321, 4.1.2; RFC 6531, 3.3).

Functions are pure, take any text in linear time, and are safe to call from several threads.
"""

from __future__ import annotations

import re

__all__ = ["PathError", "read_parameters", "read_path"]

# RFC 6531 adds what is not ASCII to each; controls and separators of lines are left out.
_WIDE = "\xa0-\u2027\u202a-\U0010ffff"
_ATOM = rf"[0-9A-Za-z!#$%&'*+/=?^_`{{|}}~{_WIDE}-]+"
_DOT_STRING = rf"{_ATOM}(?:\.{_ATOM})*"
_QUOTED = rf'"(?:[ !#-\[\]-~{_WIDE}]|\\[ -~])*"'
# Underscores and hyphens stand anywhere in names that are in use.
_LABEL = rf"[0-9A-Za-z_{_WIDE}-]+"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"
_LITERAL = r"\[[!-Z^-~]+\]"
_ROUTE = rf"@{_DOMAIN}(?:,@{_DOMAIN})*:"
_PATH = re.compile(
    rf"<(?:(?:{_ROUTE})?(?P<local>{_DOT_STRING}|{_QUOTED})@(?P<domain>{_DOMAIN}|{_LITERAL})"
    rf"|(?P<postmaster>[Pp][Oo][Ss][Tt][Mm][Aa][Ss][Tt][Ee][Rr])|(?P<null>))>"
)
_PARAMETER = re.compile(r"([0-9A-Za-z][0-9A-Za-z-]*)(?:=([^\x00-\x20=\x7f]+))?")
_BARE = re.compile(_DOT_STRING)
_ESCAPED = re.compile(r"\\(.)")
_SPECIAL = re.compile(r'(["\\])')


class PathError(ValueError):
    """The text does not follow the grammar."""


def read_path(text: str) -> tuple[str, str]:
    """Return the address of the path at the start of `text`, and what follows the path.

    ``""`` is the null path.  A source route is left out (RFC 5321, appendix C); a local part is
    quoted only where it has to be, since both ways of writing name one mailbox (4.1.2);
    ``Postmaster`` is the one name that may lack a domain (4.1.1.3).

    :raises PathError: there is no path.
    """
    found = _PATH.match(text)
    if found is None:
        raise PathError
    local = found["local"]
    if local is None:
        return found["postmaster"] or "", text[found.end() :]
    if local.startswith('"'):
        plain = _ESCAPED.sub(r"\1", local[1:-1])
        local = plain if _BARE.fullmatch(plain) else '"' + _SPECIAL.sub(r"\\\1", plain) + '"'
    return f"{local}@{found['domain']}", text[found.end() :]


def read_parameters(text: str) -> dict[str, str | None]:
    """Return the ESMTP parameters that follow a path: values by keywords in upper case.

    A keyword without a value has ``None``.

    :raises PathError: there is something else, or a keyword twice.
    """
    if not text:
        return {}
    if not text.startswith(" "):
        raise PathError
    parameters: dict[str, str | None] = {}
    for word in filter(None, text.split(" ")):
        found = _PARAMETER.fullmatch(word)
        if found is None or found[1].upper() in parameters:
            raise PathError
        parameters[found[1].upper()] = found[2]
    return parameters
