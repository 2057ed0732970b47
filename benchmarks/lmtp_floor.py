"""The least that a server of this shape does: LMTP by our protocol machine, one record a message.

No rules, no queues, no duplicates, no receipts, and one process: what all messages that are there
at a time come to is one commit of a FileStorage.  ``benchmarks/lmtp.py`` starts it.

    python benchmarks/lmtp_floor.py SOCKET FOLDER
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence

import transaction
from BTrees.LOBTree import LOBTree
from persistent import Persistent
from ZODB.DB import DB
from ZODB.FileStorage.FileStorage import FileStorage

from postoffice.intake.arrival import Arrival
from postoffice.intake.conversation import Reply
from postoffice.intake.listener import Listener, ListenerLimits, UnixAddress

_STORED = Reply(250, "2.0.0", "stored")


class Record(Persistent):
    """A message."""

    def __init__(self, raw: bytes | None) -> None:
        """Keep its bytes."""
        self.raw = raw


class Floor:
    """Stores what comes, all that is there at a time with one commit."""

    def __init__(self, folder: str) -> None:
        """Make a database there."""
        self._manager = transaction.TransactionManager(explicit=True)
        self._connection = DB(FileStorage(f"{folder}/floor.fs")).open(self._manager)
        self._manager.begin()
        self._tree = self._connection.root()["messages"] = LOBTree()
        self._manager.commit()
        self._number = 0
        self._there: list[tuple[asyncio.Future[Sequence[Reply]], Arrival]] = []

    def deliver(self, arrival: Arrival) -> asyncio.Future[Sequence[Reply]]:
        """Store a message soon."""
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[Sequence[Reply]] = loop.create_future()
        if not self._there:
            loop.call_soon(self._commit)
        self._there.append((stored, arrival))
        return stored

    def _commit(self) -> None:
        there, self._there = self._there, []
        self._manager.begin()
        for _, arrival in there:
            self._number += 1
            self._tree[self._number] = Record(arrival.raw)
        self._manager.commit()
        for stored, arrival in there:
            stored.set_result([_STORED] * len(arrival.recipients))


async def serve(path: str, folder: str) -> None:
    """Serve until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    limits = ListenerLimits(message_memory=1 << 30)
    floor = Floor(folder)
    listener = Listener(
        UnixAddress(path), "floor", lambda sender, recipient: None, floor.deliver, folder, limits
    )
    await listener.start()
    await stopped.wait()
    await listener.stop(1.0)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
