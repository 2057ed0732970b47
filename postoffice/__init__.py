"""postoffice: delivered mail, sorted by rules into a queue in ZODB for each application.

What an application needs is here: :func:`open_queue` or :func:`find_queue`, the
:class:`Message` that a queue gives, and the errors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from postoffice.exceptions import (
        ConfigurationError,
        DepotError,
        DepotFormatError,
        DepotUnavailable,
        FolderMissing,
        LimitExceeded,
        MatchTimeout,
        MessageMissing,
        MessageTaken,
        PermanentError,
        PostofficeError,
        QueueEmpty,
        QueueMissing,
        QueueNotEmpty,
        QueueRemoved,
        TemporaryError,
    )
    from postoffice.message import Message
    from postoffice.queue import Queue, find_queue, open_queue

__all__ = [
    "ConfigurationError",
    "DepotError",
    "DepotFormatError",
    "DepotUnavailable",
    "FolderMissing",
    "LimitExceeded",
    "MatchTimeout",
    "Message",
    "MessageMissing",
    "MessageTaken",
    "PermanentError",
    "PostofficeError",
    "Queue",
    "QueueEmpty",
    "QueueMissing",
    "QueueNotEmpty",
    "QueueRemoved",
    "TemporaryError",
    "find_queue",
    "open_queue",
]

_HOMES = dict.fromkeys(__all__, "postoffice.exceptions") | {
    "Message": "postoffice.message",
    "Queue": "postoffice.queue",
    "find_queue": "postoffice.queue",
    "open_queue": "postoffice.queue",
}


def __getattr__(name: str) -> object:
    """Import what is asked for: a command that reads mail need not load a database (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names that there are to import."""
    return sorted({*globals(), *__all__})
