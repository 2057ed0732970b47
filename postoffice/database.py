"""Opening a database by its URI, and saying in one line why that does not work."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import zc.lockfile
import ZConfig
import zodburi
from ZEO.ClientStorage import ClientStorage
from ZEO.Exceptions import ClientDisconnected
from ZODB.blob import LAYOUT_MARKER
from ZODB.DB import DB
from ZODB.FileStorage.FileStorage import FileStorageFormatError
from ZODB.POSException import ConflictError, POSError, ReadOnlyError
from zodburi.resolvers import FileStorageURIResolver

from postoffice.database_uri import (
    blob_folder_named,
    database_file,
    shown,
    split_uri,
    uri_fault,
)
from postoffice.display import one_line
from postoffice.exceptions import DepotMisconfigured, DepotUnavailable, PostofficeError
from postoffice.storage_socket import await_server, holder, is_locked, is_there, remove_dead
from postoffice.zeo_client import ask_for_new_ids, client_of

__all__ = [
    "DatabaseMissing",
    "blob_folder",
    "database_file",
    "explained",
    "is_served",
    "locked_text",
    "mend_files",
    "missing_file",
    "open_database",
    "open_for_inspection",
    "open_soon",
    "quota",
    "remove_unfinished_blobs",
]

_LOCKED = re.compile(r"Couldn't lock '(.+)\.lock'", re.DOTALL)
_STORAGE_PATH = re.compile(r"<filestorage[^>]*>[^<]*?^[ \t]*path[ \t]+(\S+)", re.I | re.M)
_SOON = 5
# Seconds between attempts to find the root that another process makes.
_ROOT_PAUSES = (0.01, 0.1, 1.0)
# Seconds to wait for the server of a file that is being restarted.
_PATIENCE = 10
# Of a zeo:// URI without one.
_ZEO_PORT = 9991
# Loggers of RelStorage's that tell of each failure to connect.
_TALKATIVE = ("postgresql.connmanager", "sqlite.drivers")

_OTHER_HISTORY = (
    "keep_history stays what it was when the database was made: the URI has the other one"
)
_INSTALL = "run pip install 'postoffice[relstorage]'"

# What PostgreSQL and its client library say, and what would be right.
_POSTGRESQL_MENDS = (
    ("Connection refused", "is PostgreSQL running there, and are host and port right?"),
    ("timeout expired", "is PostgreSQL running there, and are host and port right?"),
    ("could not translate host name", "is the host's name right?"),
    (
        "password authentication failed",
        "are user and password right? They are sent as they are written: %40 is no @",
    ),
    ("no password supplied", "write one, or name a passfile that is there and has mode 0600"),
    ("there is no unique constraint matching", _OTHER_HISTORY),
    ("no pg_hba.conf entry", "let this user in from this machine, in the server's pg_hba.conf"),
    ("database .* does not exist", "make it: createdb --owner=USER DATABASE"),
    ("role .* does not exist", "make the user: createuser --pwprompt USER"),
    (
        "permission denied for schema",
        "make the user the owner: ALTER DATABASE name OWNER TO user",
    ),
    ("starting up|shutting down|recovery mode", "try again in a moment"),
    ("too many clients|connection slots", "raise max_connections in postgresql.conf"),
    ("Schema mismatch", _OTHER_HISTORY),
)


class DatabaseMissing(DepotUnavailable):
    """There is no database at this place yet."""


def open_database(uri: str) -> DB:
    """Open the database that a zodburi URI names.

    A file that is served, as by ``postoffice serve``, is opened by way of its server.  One whose
    server is being restarted is waited for, for 10 s at most.

    While it is open, its server may go away and come back: what is under way then fails with a
    :exc:`transaction.interfaces.TransientError`, whatever the storage.

    :raises DepotUnavailable: it is locked, unreachable or unreadable; the text says what and,
        for a locked file, which process holds it and how to let several processes in.
    """
    return _open_by_anybody(uri)


def open_soon(uri: str) -> DB:
    """Open a database for somebody who waits for it: for its server, some seconds at most.

    Unless the URI says how long.

    :raises DepotUnavailable: as :func:`open_database`.
    """
    return _open_by_anybody(uri, _SOON)


def _with_limit(uri: str) -> str:
    """Return the URI with a time in which its server has to answer."""
    option = {"zeo": "wait_timeout", "postgres": "connect_timeout"}.get(uri.partition(":")[0])
    place, _, query = uri.partition("?")
    if option is None or option in dict(parse_qsl(query)):
        return uri
    return f"{place}?{query}&{option}={_SOON}" if query else f"{place}?{option}={_SOON}"


def _open_by_anybody(uri: str, seconds: float | None = None) -> DB:
    """Open a database, a file by its server where it has one.

    :param seconds: how long to wait for a server; ``None``: the usual time.
    """
    path = database_file(uri)
    if path is None:
        return _open(uri if seconds is None else _with_limit(uri), shown(uri))
    while True:
        address = await_server(path, seconds or _PATIENCE)
        if address is not None:
            return _open_served(uri, address, seconds)
        try:
            with explained(uri):
                mend_files(uri)
            opened = _open(uri, shown(uri))
        except DepotUnavailable as error:
            if isinstance(error.__cause__, zc.lockfile.LockError) and is_there(path):
                # A server came first.
                continue
            raise
        remove_dead(path)
        return opened


def _open_served(uri: str, address: str, seconds: float | None, *, read_only: bool = False) -> DB:
    """Open the database of a file by its server.

    :param seconds: how long to wait for it, now and whenever it is away; ``None``: the usual time.
    """
    _, options = _resolved(uri, shown(uri))
    with explained(uri), ExitStack() as opened:
        storage = client_of(address, blob_folder(uri), seconds, read_only=read_only)
        opened.callback(storage.close)
        database = _database(storage, options)
        opened.pop_all()
        return database


def is_served(database: DB) -> bool:
    """Say whether an open database is that of a server of ZEO's, by which its files are made."""
    return isinstance(database.storage, ClientStorage)


def mend_files(uri: str) -> None:
    """Make good what a process that was killed has left of a file, which is not in use.

    :raises OSError: it cannot be looked at.
    """
    _mend_packed_file(uri)
    _mend_blob_folder(uri)


def quota(uri: str) -> int | None:
    """Return how large a server lets the file of a URI become, in bytes; ``None``: any size.

    :raises DepotMisconfigured: the URI asks for what is not for a server.
    """
    _resolved(uri, shown(uri))
    options: dict[str, Any] = dict(parse_qsl(uri.partition("?")[2]))
    for option in ("create", "read_only", "demostorage"):
        if option in options:
            raise DepotMisconfigured(
                f"zodb_uri {shown(uri)}: a file with the option {option} cannot be served; "
                "leave it out"
            )
    options, _ = FileStorageURIResolver().interpret_kwargs(options)
    found: int | None = options.get("quota")
    return found


def _mend_packed_file(uri: str) -> None:
    """Put a FileStorage back that was renamed when the process that packed it was killed.

    ZODB would make a new, empty one in its place.
    """
    path = database_file(uri)
    if path is None or os.path.lexists(path):
        return
    if os.path.exists(f"{path}.old") and os.path.exists(f"{path}.pack"):
        os.rename(f"{path}.old", path)


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


def _check_blob_folder(uri: str) -> None:
    """Fail where the folder of blobs cannot be: a storage that finds out stays open, and locked.

    :raises OSError: it cannot be.
    """
    named = blob_folder_named(uri)
    if named is None:
        return
    folder = Path(named)
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), named)
    if there != folder and not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), named)


def _open(uri: str, name: str) -> DB:
    """Open a database; in errors it is called `name`."""
    storage_factory, options = _resolved(uri, name)
    with explained(uri, name), ExitStack() as opened:
        _check_blob_folder(uri)
        with _without_warnings_of_relstorage():
            storage = storage_factory()
            opened.callback(storage.close)
            _adopt(storage)
            remove_unfinished_blobs(uri, storage, 0)
            database = _database(storage, options)
        opened.pop_all()
        return database


def _database(storage: Any, options: dict[str, Any]) -> DB:
    """Return the database of a storage, also where another process is just making its root."""
    for pause in _ROOT_PAUSES:
        with suppress(ConflictError):
            return DB(storage, **options)
        time.sleep(pause)
    return DB(storage, **options)


def _resolved(uri: str, name: str) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return what makes the storage of a URI, and the options of its database."""
    fault = uri_fault(uri)
    if fault is not None:
        raise DepotMisconfigured(f"zodb_uri {name}: {fault[0]}; {fault[1]}")
    try:
        storage_factory, options = zodburi.resolve_uri(uri)
        if uri.startswith("sqlite:"):
            relational = _relational()
            storage_factory = relational.sqlite_factory(uri)
            other = relational.history_fault(uri)
            if other is not None:
                raise DepotMisconfigured(f"zodb_uri {name}: {other[0]}; {other[1]}")
    except KeyError as error:
        raise DepotMisconfigured(f"zodb_uri {name}: {error.args[0]}") from error
    except OSError as error:
        raise DepotUnavailable(f"zodb_uri {name}: {_one_line(error)}") from error
    except (ValueError, ImportError, ZConfig.ConfigurationError) as error:
        raise DepotMisconfigured(f"zodb_uri {name}: {_configuration_fault(error)}") from error
    return storage_factory, options


@contextmanager
def explained(uri: str, name: str | None = None) -> Iterator[None]:
    """Turn what a storage raises when it is opened into one line.

    :param name: what the database is called in it; ``None``: its URI.
    :raises DepotUnavailable: it was.
    """
    name = name or shown(uri)
    try:
        yield
    except PostofficeError:
        raise
    except zc.lockfile.LockError as error:
        found = _LOCKED.search(str(error))
        raise DepotUnavailable(
            locked_text(found[1] if found else urlsplit(uri).path, uri)
        ) from error
    except ReadOnlyError:
        # A database of which not even the root is there is written to when it is opened.
        raise DatabaseMissing(f"database {name} is empty") from None
    except FileStorageFormatError as error:
        raise DepotUnavailable(
            f"database {name}: {error} is no FileStorage, or is damaged; name another file, or "
            "restore a backup"
        ) from error
    except Exception as error:
        # A storage's own driver raises errors of its own; which, only it knows.  What is not
        # known is temporary.
        raise DepotUnavailable(f"database {name}: {_what_is_wrong(error, uri)}") from error


def _configuration_fault(error: Exception) -> str:
    """Return, in one line, what is wrong with a URI or its file, and what would be right."""
    text = _one_line(error)
    if "could not load package relstorage" in text:
        return "it needs RelStorage, which is not installed; " + _INSTALL
    return text


def _adopt(storage: Any) -> None:
    """Make good what a kind of storage lacks; its module is imported only where it is used."""
    kind = type(storage).__module__.partition(".")[0]
    if kind == "relstorage":
        relational = _relational()
        relational.make_outages_transient(storage)
        relational.raise_ids(storage)
    elif kind == "ZEO":
        ask_for_new_ids(storage)


def remove_unfinished_blobs(uri: str, storage: Any, seconds: float) -> None:
    """Remove what processes that were killed have left of blobs.

    :param storage: of the URI's file, with its lock; any other is left alone.
    :param seconds: for how long nobody has written to what is removed.  Where others than this
        process may have been at work with the blobs, some of it is theirs.
    """
    folder = blob_folder(uri)
    if folder is None or database_file(uri) is None or storage.isReadOnly():
        return
    oldest = time.time() - seconds
    for one in os.scandir(os.path.join(folder, "tmp")):
        # What cannot be removed takes its place, and is no reason to stay away.
        with suppress(OSError):
            if one.stat(follow_symlinks=False).st_mtime <= oldest:
                os.unlink(one.path)


def _relational() -> ModuleType:
    from postoffice import relational

    return relational


@contextmanager
def _without_warnings_of_relstorage() -> Iterator[None]:
    """Keep RelStorage from logging, over several lines, what is raised and told anyway."""
    here = threading.get_ident()

    def is_of_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != here

    loggers = [logging.getLogger(f"relstorage.adapters.{name}") for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(is_of_another_thread)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_of_another_thread)


def _what_is_wrong(error: Exception, uri: str) -> str:
    """Return, in one line, what a storage met when it was opened, and what would be right."""
    folder = _folder_at_fault(error, uri)
    if folder is not None:
        return f"{folder} cannot be used ({_reason(error)}); name one that this user can write to"
    if isinstance(error, ClientDisconnected):
        if uri.startswith("file://"):
            return "its server does not answer; `postoffice serve` may hang, or is being restarted"
        return _what_is_wrong_at(uri) if uri.startswith("zeo://") else "its ZEO server is not there"
    said = _one_line(error)
    if type(error).__name__ == "NoDriversAvailableError":
        return "the module that talks to its server is not installed; " + _INSTALL
    if isinstance(error, POSError | OSError) or type(error).__module__.startswith("psycopg2"):
        said = re.sub(r"^connection to server .*? failed: ", "", said).replace("FATAL: ", "")
        said = re.split(" Is the server running| LINE 1:", said)[0]
        for pattern, mend in _POSTGRESQL_MENDS:
            if re.search(pattern, said):
                return f"{said}; {mend}"
        return said
    return f"{type(error).__name__}: {said}"


def _folder_at_fault(error: Exception, uri: str) -> str | None:
    """Return the folder that an error is about, if the URI names it."""
    data = dict(parse_qsl(uri.partition("?")[2])).get("data_dir", "")
    of_sqlite = type(error).__module__.startswith(("sqlite3", "relstorage.adapters.sqlite"))
    if of_sqlite and data and "locked" not in str(error):
        return f"the folder of data {data}"
    if isinstance(error, OSError) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        folders = {"blobs": blob_folder_named(uri), "data": data}
        for kind, folder in folders.items():
            if folder and path.is_relative_to(folder):
                return f"the folder of {kind} {folder}"
        for kind, folder in reversed(folders.items()):
            if folder and Path(folder).is_relative_to(path):
                return f"the folder of {kind} {folder}"
    return None


def _reason(error: Exception) -> str:
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or one_line(error)


def _what_is_wrong_at(uri: str) -> str:
    """Return why a ZEO server could not be reached, and what would be right."""
    parts = split_uri(uri)
    unix = not parts.netloc
    where = parts.path if unix else f"{parts.hostname}:{parts.port or _ZEO_PORT}"
    try:
        if unix:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_SOON)
                connection.connect(where)
        else:
            address = (parts.hostname or "", parts.port or _ZEO_PORT)
            socket.create_connection(address, _SOON).close()
    except OSError as error:
        said = _reason(error)
        return (
            f"no ZEO server at {where} ({said}); is the address right, and is its server running?"
        )
    return (
        f"what answers at {where} is no ZEO server, or one that this client cannot talk to, or "
        "asks for TLS; is the address right?"
    )


def open_for_inspection(uri: str) -> DB:
    """Open a database to look at it once, and change as little as its kind allows.

    Of a file nothing is written, and none is made; for a server that is not there it waits some
    seconds only.

    :raises DatabaseMissing: there is none yet.
    :raises DepotUnavailable: as :func:`open_database`; also when another process has locked it.
    """
    path = database_file(uri)
    if path is not None:
        return _open_file_for_inspection(uri, path)
    missing = missing_file(uri)
    if missing is not None:
        raise DatabaseMissing(f"there is no database {missing} yet")
    if uri.startswith("zeo://"):
        joint = "&" if "?" in uri else "?"
        return _open(_with_limit(f"{uri}{joint}read_only=1"), shown(uri))
    return open_soon(uri)


def _open_file_for_inspection(uri: str, path: str) -> DB:
    while True:
        address = await_server(path, _SOON)
        if address is not None:
            return _open_served(uri, address, _SOON, read_only=True)
        try:
            os.stat(path)
        except FileNotFoundError:
            raise DatabaseMissing(f"there is no database {path} yet") from None
        except OSError as error:
            raise DepotUnavailable(f"database {path}: {error.strerror}") from error
        if not is_locked(path):
            return _open(f"file://{path}?read_only=1", path)
        if not is_there(path):
            raise DepotUnavailable(locked_text(path, uri))


def missing_file(uri: str) -> str | None:
    """Return the file that opening a database would make, since it is not there; or ``None``.

    :raises OSError: its folder cannot be looked into.
    """
    path = database_file(uri)
    if uri.startswith("sqlite://"):
        folder = dict(parse_qsl(uri.partition("?")[2])).get("data_dir", "")
        path = os.path.join(folder, "main.sqlite3")
    if path is not None:
        try:
            os.stat(path)
        except FileNotFoundError:
            # While its server packs a file, there is none for an instant.
            return None if is_there(path) else path
        return None
    if not uri.startswith("zconfig://"):
        return None
    try:
        with open(urlsplit(uri).path, encoding="utf-8") as file:
            found = _STORAGE_PATH.findall(file.read())
    except (OSError, UnicodeDecodeError):
        # Opening it says what is wrong.
        return None
    return next((path for path in found if "$" not in path and not os.path.exists(path)), None)


def blob_folder(uri: str) -> str | None:
    """Return the path of the folder of blobs of a ``file://`` URI; ``None`` for any other."""
    if not uri.startswith("file://"):
        return None
    named = dict(parse_qsl(uri.partition("?")[2])).get("blobstorage_dir")
    return os.path.abspath(named) if named else None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return one_line(error)


def locked_text(path: str, uri: str) -> str:
    """Return by whom the file of a URI is locked, and how several processes can use it."""
    folder = os.path.dirname(path)
    blobs = blob_folder(uri) or f"{folder}/blobs"
    process = holder(path)
    if "runzeo" in process:
        return (
            f"database {path} is served by {process}.  Write what reaches that into postoffice.ini "
            "and wherever the application names the database:\n"
            f"    zodb_uri = zeo://{folder}/zeo.sock?blob_dir={blobs}&shared_blob_dir=true"
        )
    return (
        f"database {path} is locked by {process}; a file can be opened by one process at a time.  "
        "To share it, stop that process, start `postoffice serve`, and then start that process "
        "again, which will find the server by the same URI"
    )
