"""What can go wrong with Postfix's own queue: each in one line that also says what would be right.

All are temporary: nothing was lost, and the same call may be made again once the cause is mended.
"""

from __future__ import annotations

from postoffice.exceptions import EX_UNAVAILABLE, TemporaryError

__all__ = [
    "OutputCut",
    "PostfixDown",
    "PostfixError",
    "PostfixMissing",
    "PostfixRefused",
    "PostfixSilent",
]

_EX_NOPERM = 77


class PostfixError(TemporaryError):
    """A command of Postfix did not do what it was asked; the text holds what it said."""


class PostfixMissing(PostfixError):
    """There is no such command on this machine."""

    exit_status = EX_UNAVAILABLE


class PostfixDown(PostfixError):
    """The mail system is down, and who asks may not read the queue without it."""


class PostfixRefused(PostfixError):
    """Who asks has no right to this."""

    exit_status = _EX_NOPERM


class PostfixSilent(PostfixError):
    """A command said nothing for as long as the settings allow, and was ended."""


class OutputCut(PostfixError):
    """A listing ends too early, or has a line that no Postfix writes."""
