"""Opening a database by its URI, and saying in one line why that does not work."""

from __future__ import annotations

import fcntl
import os
import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import zc.lockfile
import ZConfig
import zodburi
from ZODB.blob import LAYOUT_MARKER
from ZODB.DB import DB
from ZODB.FileStorage.FileStorage import FileStorageFormatError
from ZODB.POSException import POSError, ReadOnlyError

from postoffice.display import one_line, printable
from postoffice.exceptions import DepotUnavailable

__all__ = [
    "DatabaseMissing",
    "blob_folder",
    "database_file",
    "open_database",
    "open_for_inspection",
]

_LOCKED = re.compile(r"Couldn't lock '(.+)\.lock'", re.DOTALL)
_STORAGE_PATH = re.compile(r"<filestorage[^>]*>[^<]*?^[ \t]*path[ \t]+(\S+)", re.I | re.M)
_SOON = 5


class DatabaseMissing(DepotUnavailable):
    """There is no database at this place yet."""


def open_database(uri: str) -> DB:
    """Open the database that a zodburi URI names.

    While it is open, its server may go away and come back: what is under way then fails with a
    :exc:`transaction.interfaces.TransientError`, whatever the storage.

    :raises DepotUnavailable: it is locked, unreachable or unreadable; the text says what and,
        for a locked file, which process holds it and how to let several processes in.
    """
    try:
        _mend_blob_folder(uri)
    except OSError as error:
        raise DepotUnavailable(f"the blob folder: {_one_line(error)}") from error
    return _open(uri, _shown(uri))


def _mend_blob_folder(uri: str) -> None:
    """Write the marker of a blob folder that a process was killed while making.

    ZODB does not open a blob folder with an empty marker, and takes an empty folder without one for
    that of an old release, which has a layout that is slow with many blobs.
    """
    folder = blob_folder(uri)
    if folder is None or not os.path.isdir(folder):
        return
    marker = os.path.join(folder, LAYOUT_MARKER)
    if {*os.listdir(folder)} <= {LAYOUT_MARKER, "tmp"} and (
        not os.path.exists(marker) or os.path.getsize(marker) == 0
    ):
        with open(marker, "w", encoding="ascii") as file:
            file.write("bushy")


def _open(uri: str, shown: str) -> DB:
    """Open a database; in errors it is called `shown`."""
    try:
        storage_factory, options = zodburi.resolve_uri(uri)
    except KeyError as error:
        fault = str(error.args[0]) if error.args else ""
        if not fault.startswith("Unrecognized"):
            fault = f"no such kind of database: {fault}"
        raise DepotUnavailable(f"zodb_uri {shown}: {fault}") from error
    except (OSError, ValueError, ImportError, ZConfig.ConfigurationError) as error:
        raise DepotUnavailable(f"zodb_uri {shown}: {_one_line(error)}") from error
    storage = None
    try:
        storage = storage_factory()
        if type(storage).__module__.startswith("relstorage."):
            from postoffice.relational import make_outages_transient

            make_outages_transient(storage)
        return DB(storage, **options)
    except zc.lockfile.LockError as error:
        found = _LOCKED.search(str(error))
        raise DepotUnavailable(_locked(found[1] if found else urlsplit(uri).path, uri)) from error
    except ReadOnlyError:
        # A database of which not even the root is there is written to when it is opened.
        _close(storage)
        raise DatabaseMissing(f"database {shown} is empty") from None
    except FileStorageFormatError as error:
        raise DepotUnavailable(
            f"database {shown}: {error} is no FileStorage, or is damaged; name another file, or "
            "restore a backup"
        ) from error
    except (POSError, OSError) as error:
        _close(storage)
        raise DepotUnavailable(f"database {shown}: {_one_line(error)}{_mend(uri)}") from error
    except Exception as error:
        # A storage's own driver raises errors of its own; which, only it knows.  What is not
        # known is temporary.
        _close(storage)
        raise DepotUnavailable(
            f"database {shown}: {type(error).__name__}: {_one_line(error)}"
        ) from error


def open_for_inspection(uri: str) -> DB:
    """Open a database to look at it once, and change as little as its kind allows.

    Of a file nothing is written, and none is made; for a server that is not there it waits some
    seconds only.

    :raises DatabaseMissing: there is none yet.
    :raises DepotUnavailable: as :func:`open_database`; also when another process has locked it.
    """
    path = database_file(uri)
    if path is not None:
        try:
            os.stat(path)
        except FileNotFoundError:
            raise DatabaseMissing(f"there is no database {path} yet") from None
        except OSError as error:
            raise DepotUnavailable(f"database {path}: {error.strerror}") from error
        if _is_locked(f"{path}.lock"):
            raise DepotUnavailable(_locked(path, uri))
        return _open(f"file://{path}?read_only=1", path)
    if uri.startswith("sqlite://"):
        folder = dict(parse_qsl(uri.partition("?")[2])).get("data_dir", "")
        if not os.path.exists(os.path.join(folder, "main.sqlite3")):
            raise DatabaseMissing(f"there is no database in {folder or 'data_dir'} yet")
    missing = _missing_file(uri)
    if missing is not None:
        raise DatabaseMissing(f"there is no database {missing} yet")
    if uri.startswith("zeo://"):
        joint = "&" if "?" in uri else "?"
        options = dict(parse_qsl(uri.partition("?")[2]))
        limit = "" if "wait_timeout" in options else f"&wait_timeout={_SOON}"
        return _open(f"{uri}{joint}read_only=1{limit}", _shown(uri))
    return open_database(uri)


def _missing_file(uri: str) -> str | None:
    """Return the file of a FileStorage that a ``zconfig://`` URI would make, if it is not there."""
    if not uri.startswith("zconfig://"):
        return None
    try:
        with open(urlsplit(uri).path, encoding="utf-8") as file:
            found = _STORAGE_PATH.findall(file.read())
    except (OSError, UnicodeDecodeError):
        # Opening it says what is wrong.
        return None
    return next((path for path in found if "$" not in path and not os.path.exists(path)), None)


def database_file(uri: str) -> str | None:
    """Return the path of the file of a ``file://`` URI; ``None`` for any other."""
    if not uri.startswith("file://"):
        return None
    return os.path.abspath(uri.removeprefix("file://").partition("?")[0])


def blob_folder(uri: str) -> str | None:
    """Return the path of the folder of blobs of a ``file://`` URI; ``None`` for any other."""
    if not uri.startswith("file://"):
        return None
    named = dict(parse_qsl(uri.partition("?")[2])).get("blobstorage_dir")
    return os.path.abspath(named) if named else None


def _is_locked(lock_path: str) -> bool:
    try:
        descriptor = os.open(lock_path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _close(storage: Any) -> None:
    if storage is not None:
        storage.close()


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return one_line(error)


def _mend(uri: str) -> str:
    return "; is its server running?" if uri.startswith("zeo://") else ""


def _shown(uri: str) -> str:
    """Return the URI without a password."""
    parts = urlsplit(uri)
    if parts.password:
        return uri.replace(f":{parts.password}@", ":***@", 1)
    return uri


def _locked(path: str, uri: str) -> str:
    folder = os.path.dirname(path)
    blobs = blob_folder(uri) or f"{folder}/blobs"
    return (
        f"database {path} is locked by {_holder(path + '.lock')}; a FileStorage serves one "
        "process at a time.  To share it, stop that process, run the first line, and write the "
        "second into postoffice.ini and wherever the application names the database:\n"
        f"    runzeo -C {_server_configuration(folder)}\n"
        f"    zodb_uri = zeo://{folder}/zeo.sock?blob_dir={blobs}&shared_blob_dir=true"
    )


def _server_configuration(folder: str) -> str:
    for place in (os.path.dirname(folder), folder):
        path = os.path.join(place, "zeo.conf")
        if os.path.exists(path):
            return path
    return "zeo.conf    (`postoffice init DIR` writes one to start from)"


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
    shown = printable(words.strip()[:80])
    return f"process {pid} ({shown})" if shown else f"process {pid}"
