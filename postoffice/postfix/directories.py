"""The queue directories of Postfix's spool: which messages there are, by the names of their files.

Only names and file attributes are read here; what is in the files, postcat tells
(:mod:`postoffice.postfix.records`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from postoffice.postfix.errors import PostfixError, PostfixRefused
from postoffice.postfix.ids import is_queue_id

__all__ = ["CORRUPT", "Found", "scan"]

CORRUPT = "corrupt"
# In the direction in which messages move; those that go on while others are read, and come back
# into active, are looked for again.
_QUEUES = ("maildrop", "incoming", "active", "deferred", "hold", CORRUPT, "incoming", "active")
# hash_queue_depth may be more, but one character of the id names each folder.
_DEEPEST = 16


@dataclass(frozen=True, slots=True)
class Found:
    """A file in a queue directory.

    :ivar qid: the id of its message.
    :ivar queue: the directory: ``maildrop``, ``incoming``, ``active``, ``deferred``, ``hold`` or
        ``corrupt``.
    :ivar path: its path.
    :ivar size: bytes of the file, which has the envelope in it too.
    :ivar forced_expire: whether ``postsuper -e`` has marked it.
    """

    qid: str
    queue: str
    path: str
    size: int
    forced_expire: bool


def scan(spool_path: str) -> dict[str, Found]:
    """Return the messages in the queue directories by id, each where it was seen last.

    Mail that Postfix has not finished receiving is left out, as Postfix's listings do.

    :raises PostfixRefused: this user may not read the directories.
    :raises PostfixError: there is no queue at this path.
    """
    found = {}
    for queue in _QUEUES:
        try:
            for one in _files(os.path.join(spool_path, queue), queue, _DEEPEST):
                found[one.qid] = one
        except PermissionError as error:
            raise PostfixRefused(
                f"{error.filename}: {error.strerror}; reading the queue directories needs root, "
                "the methods json and postqueue do not"
            ) from error
        except OSError as error:
            # corrupt is made when it is first needed.
            if queue == CORRUPT and isinstance(error, FileNotFoundError):
                continue
            raise PostfixError(
                f"{error.filename}: {error.strerror}; spool_path is to be Postfix's queue_directory"
            ) from error
    return found


def _files(folder: str, queue: str, deepest: int) -> Iterator[Found]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if len(name) == 1 and deepest and entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, queue, deepest - 1)
                continue
            if not is_queue_id(name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                # It moved on meanwhile.
                continue
            mode = status.st_mode
            # Postfix marks a file that it has received in full by the owner's right to run it.
            complete = mode & stat.S_IXUSR or queue == CORRUPT
            if stat.S_ISREG(mode) and complete:
                expired = bool(mode & stat.S_IXGRP)
                yield Found(name, queue, entry.path, status.st_size, expired)
