"""RelStorage, as trustworthy as ZODB's own storages.

When the server of a RelStorage goes away, each use of the storage raises an error of the database
driver, of which neither a transaction manager nor an application knows that it passes.  Here such
an error becomes a :exc:`postoffice.exceptions.DepotDisconnected`, which is a transient error.

With SQLite, RelStorage 4.3 does not wait for a commit to be on the disk, and counts the ids of
objects in a file apart, ``oids.sqlite3``, that is not written to the disk at all: when it has
fallen back, new objects would take the place of old ones.  Here commits are waited for, and the
counter is raised to what the database has.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any
from urllib.parse import parse_qsl, quote

from relstorage.adapters.sqlite.adapter import Sqlite3Adapter
from relstorage.storage import RelStorage
from relstorage.zodburi_resolver import RelStorageURIResolver, SqliteAdapterHelper

from postoffice.display import one_line
from postoffice.exceptions import DepotDisconnected

__all__ = [
    "TransientRelStorage",
    "history_fault",
    "make_outages_transient",
    "raise_ids",
    "sqlite_factory",
]

# What a connection calls.  RelStorage puts many of these into each instance, and exchanges them.
_METHODS = (
    *("load", "loadBefore", "loadSerial", "loadBlob", "openCommittedBlobFile", "prefetch"),
    *("store", "storeBlob", "new_oid", "checkCurrentSerialInTransaction", "readCurrent"),
    *("tpc_begin", "tpc_vote", "tpc_finish", "tpc_abort"),
    *("sync", "afterCompletion", "new_instance", "lastTransaction"),
)


class _Method:
    """A method of the storage whose driver's errors are translated.

    Has precedence over the one that the instance has under this name, which it calls.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._inherited = getattr(RelStorage, name, None)

    def __get__(self, storage: Any, owner: type) -> Any:
        if storage is None:
            return self._inherited
        method = storage.__dict__.get(self._name)
        if method is None:
            if self._inherited is None:
                raise AttributeError(self._name)
            method = self._inherited.__get__(storage, owner)
        return _Translated(method, storage._adapter.driver.disconnected_exceptions)

    def __set__(self, storage: Any, method: Any) -> None:
        storage.__dict__[self._name] = method

    def __delete__(self, storage: Any) -> None:
        del storage.__dict__[self._name]


class _Translated:
    """A call that raises the driver's errors as transient ones."""

    __slots__ = ("_errors", "_method")

    def __init__(self, method: Callable[..., Any], errors: tuple[type[Exception], ...]) -> None:
        self._method = method
        self._errors = errors

    def __call__(self, *args: Any, **options: Any) -> Any:
        try:
            return self._method(*args, **options)
        except self._errors as error:
            raise DepotDisconnected(f"the database server failed: {one_line(error)}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)


class TransientRelStorage(RelStorage):  # type: ignore[misc]  # RelStorage has no types
    """A RelStorage whose outages are transient errors; so are those of its instances."""

    def poll_invalidations(self) -> Any:
        """Return what has changed; without a server ``None``: whatever is cached may have.

        A transaction begins, and one that failed is aborted, without the server, as with ZEO.
        The first object that is read then is read from the server, or the reading fails.
        """
        try:
            return super().poll_invalidations()
        except self._adapter.driver.disconnected_exceptions:
            return None


for _name in _METHODS:
    setattr(TransientRelStorage, _name, _Method(_name))


def make_outages_transient(storage: Any) -> None:
    """Have a RelStorage, and the instances that it makes from now on, raise transient errors."""
    # Whoever resolves URIs makes the storage, and an instance makes others of its own class.
    if type(storage) is RelStorage:
        storage.__class__ = TransientRelStorage


class _DurableSqlite(SqliteAdapterHelper):  # type: ignore[misc]  # RelStorage has no types
    """What RelStorage makes of a URI, but that a commit is on the disk when it returns."""

    def __call__(self, parsed_uri: Any, kw: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
        named, unused = self.interpret_kwargs(kw)

        def make(options: Any) -> Sqlite3Adapter:
            return Sqlite3Adapter(options=options, pragmas={"synchronous": "full"}, **named)

        return make, unused


def sqlite_factory(uri: str) -> Callable[[], Any]:
    """Return a function that opens the storage of a ``sqlite://`` URI.

    :raises KeyError: the URI lacks what it needs.
    """
    factory: Callable[[], Any] = RelStorageURIResolver(_DurableSqlite())(uri)[0]
    return factory


def history_fault(uri: str) -> tuple[str, str] | None:
    """Return what is wrong with ``keep_history`` of a ``sqlite://`` URI, and what would be right.

    Opened with the other value, the database would get tables that make it unusable.
    """
    options = dict(parse_qsl(uri.partition("?")[2]))
    path = os.path.join(options.get("data_dir", ""), "main.sqlite3")
    if not os.path.exists(path):
        return None
    with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(object_state)")]
    if not columns:
        return None
    kept = "prev_tid" in columns
    wanted = options.get("keep_history", "true").lower() in ("on", "yes", "true")
    if kept is wanted:
        return None
    return (
        f"its database was made {'with' if kept else 'without'} history, which stays so",
        "leave keep_history out" if kept else "write keep_history=false",
    )


def raise_ids(storage: Any) -> None:
    """Have a RelStorage on SQLite give new objects ids beyond those that its database has.

    To be called before anything is stored; what others allocate meanwhile is as good.
    """
    adapter = getattr(storage, "_adapter", None)
    if not isinstance(adapter, Sqlite3Adapter):
        return
    path = os.path.join(adapter.data_dir, "main.sqlite3")
    with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as database:
        (largest,) = database.execute("SELECT MAX(zoid) FROM object_state").fetchone()
    adapter.oidallocator.set_min_oid(None, largest or 0)
