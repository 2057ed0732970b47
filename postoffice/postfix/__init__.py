"""Postfix's own queue: its messages as Python values, looked up and acted upon."""

from __future__ import annotations

from postoffice.postfix.control import Outcome, QueueControl
from postoffice.postfix.errors import (
    OutputCut,
    PostfixDown,
    PostfixError,
    PostfixMissing,
    PostfixRefused,
    PostfixSilent,
)
from postoffice.postfix.headers import MailHeaders
from postoffice.postfix.mail import Mail, Recipient
from postoffice.postfix.selector import Lookup, MailSelector
from postoffice.postfix.settings import PostfixSettings
from postoffice.postfix.spool import Spool
from postoffice.postfix.store import PostqueueStore

__all__ = [
    "Lookup",
    "Mail",
    "MailHeaders",
    "MailSelector",
    "Outcome",
    "OutputCut",
    "PostfixDown",
    "PostfixError",
    "PostfixMissing",
    "PostfixRefused",
    "PostfixSettings",
    "PostfixSilent",
    "PostqueueStore",
    "QueueControl",
    "Recipient",
    "Spool",
]
