"""Opening a database by its URI, and saying in one line why that does not work."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

import zc.lockfile
import zodburi
from ZODB.DB import DB
from ZODB.POSException import POSError

from postoffice.exceptions import DepotUnavailable

__all__ = ["open_database"]


def open_database(uri: str) -> DB:
    """Open the database that a zodburi URI names.

    :raises DepotUnavailable: it is locked, unreachable or unreadable; the text says what and,
        for a locked file, which process holds it and how to let several processes in.
    """
    try:
        storage_factory, options = zodburi.resolve_uri(uri)
    except KeyError as error:
        raise DepotUnavailable(f"zodb_uri {_shown(uri)}: no such kind of database: {error}") from error
    except (OSError, ValueError, ImportError) as error:
        raise DepotUnavailable(f"zodb_uri {_shown(uri)}: {_one_line(error)}") from error
    storage = None
    try:
        storage = storage_factory()
        return DB(storage, **options)
    except zc.lockfile.LockError as error:
        raise DepotUnavailable(_locked(uri, error)) from error
    except (POSError, OSError) as error:
        _close(storage)
        raise DepotUnavailable(f"database {_shown(uri)}: {_one_line(error)}") from error
    except Exception as error:
        # A storage's own driver raises errors of its own; which, only it knows.  What is not
        # known is temporary.
        _close(storage)
        raise DepotUnavailable(
            f"database {_shown(uri)}: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _close(storage: Any) -> None:
    if storage is not None:
        storage.close()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _shown(uri: str) -> str:
    """Return the URI without a password."""
    parts = urlsplit(uri)
    if parts.password:
        return uri.replace(f":{parts.password}@", ":***@", 1)
    return uri


def _locked(uri: str, error: BaseException) -> str:
    path = urlsplit(uri).path
    holder = _holder(path + ".lock")
    folder = os.path.dirname(path)
    return (
        f"database {path} is locked by {holder}; a FileStorage serves one process at a time. "
        "To share it among several, serve it with ZEO and name the server in zodb_uri:\n"
        f"    runzeo -a {folder}/zeo.sock -f {path} --blob-dir {folder}/blobs\n"
        f"    zodb_uri = zeo://{folder}/zeo.sock?blob_dir={folder}/blobs&shared_blob_dir=true"
    )


def _holder(lock_path: str) -> str:
    try:
        with open(lock_path, encoding="ascii", errors="replace") as file:
            pid = file.read(64).split()[0]
    except (OSError, IndexError):
        return "another process"
    if not pid.isdigit():
        return "another process"
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return f"process {pid}"
    shown = "".join(char if char.isprintable() else "?" for char in words.strip())
    return f"process {pid} ({shown[:80]})" if shown else f"process {pid}"
