"""postoffice: delivered mail, sorted by rules into a queue in ZODB for each application.

What an application needs is here: :func:`open_queue` or :func:`find_queue`, the
:class:`Message` that a queue gives, and the errors.
"""

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
    "TemporaryError",
    "find_queue",
    "open_queue",
]
