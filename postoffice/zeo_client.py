"""A client of ZEO that asks for new object ids when its server comes back.

A client has a hundred ids of new objects in advance, and ZEO 6.2 keeps them when the server is
restarted.  The server then gives those that were not used yet to others, too, so that for a while
transactions of both fail with a conflict, or with a :exc:`ValueError`, which is not transient.
"""

from __future__ import annotations

from typing import Any

from ZEO.ClientStorage import ClientStorage

__all__ = ["FreshIdsClientStorage", "ask_for_new_ids"]


class FreshIdsClientStorage(ClientStorage):  # type: ignore[misc]  # ZEO has no types
    """A client that forgets the ids that it has in advance whenever it is connected."""

    def notify_connected(self, conn: Any, info: Any) -> None:
        """Forget the ids, and do what is to be done besides."""
        self._oids.clear()
        super().notify_connected(conn, info)


def ask_for_new_ids(storage: Any) -> None:
    """Have a client ask for new ids whenever it is connected again."""
    # Whoever resolves URIs makes the storage.
    if type(storage) is ClientStorage:
        storage.__class__ = FreshIdsClientStorage
