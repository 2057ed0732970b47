"""RelStorage, with its server's absence told as ZODB's own storages tell it.

When the server of a RelStorage goes away, each use of the storage raises an error of the database
driver, of which neither a transaction manager nor an application knows that it passes.  Here such
an error becomes a :exc:`postoffice.exceptions.DepotDisconnected`, which is a transient error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relstorage.storage import RelStorage

from postoffice.display import one_line
from postoffice.exceptions import DepotDisconnected

__all__ = ["TransientRelStorage", "make_outages_transient"]

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
