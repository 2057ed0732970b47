"""Deposits of real configurations in real databases, and what they left there."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from transaction import TransactionManager
from ZODB.blob import Blob

from postoffice.api import PostOffice
from postoffice.database import open_database
from postoffice.delivery import Intake
from postoffice.intake.arrival import Arrival
from postoffice.intake.consignment import Consignment, consign, parcel_of
from postoffice.intake.deposit import Deposit, Unrouted
from postoffice.interfaces import IEventSink
from postoffice.queue import Queue
from tests.spools import EPOCH, Spool, post_office

__all__ = ["ANN", "BILLING", "QUEUES", "SALES", "SECOND", "Counter", "Held"]

SECOND = 1_000_000_000
ANN = "ann@example.org"
BILLING = "in@billing.example.com"
SALES = "in@sales.example.com"
QUEUES = """\
[queue:billing]
filters =
    envelope_to: @billing.example.com
[queue:sales]
filters =
    envelope_to: @sales.example.com
    header_regexp: ^Subject:
"""

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Held:
    """A message in a queue.

    :ivar in_file: its body is a blob.
    :ivar body: tells one body from another.
    """

    source: str
    sender: str | None
    recipients: tuple[str, ...]
    mta_queue_id: str
    way: str
    arrived: int
    size: int
    marks: tuple[str, ...]
    archive: str
    raw: bytes
    in_file: bool
    body: object


class Counter:
    """A deposit, the rules that it stores by, and the database that it stores in.

    :ivar now: the deposit's time, in nanoseconds since the epoch; a test may set it.
    :ivar routing: the rules; a test may replace them.
    """

    def __init__(
        self,
        spool: Spool,
        opener: Callable[[str], Any] = open_database,
        *,
        now: int = EPOCH,
        event_sink: IEventSink | None = None,
    ) -> None:
        """Open the database of a spool's configuration, and a deposit in it."""
        settings = post_office(spool.ini).settings
        self.spool = spool
        self.now = now
        self.routing, self.loop = settings.routing, settings.loop
        self.office = PostOffice(settings, opener)
        self.office.reconcile_queues()
        self.connection = self.office.database.open(TransactionManager(explicit=True))
        manager = self.connection.transaction_manager
        manager.begin()
        folder = self.office.folder(self.connection)
        manager.abort()
        self.deposit = Deposit(
            self.connection,
            folder,
            Intake(folder, settings.loop, event_sink),
            self.office.archive(),
            self.office.fingerprint,
            Unrouted.REJECT if settings.rejects_unrouted else Unrouted.DISCARD,
            lambda: self.now,
        )

    def close(self) -> None:
        """Close all of it."""
        self.deposit.close()
        self.office.close()

    def __enter__(self) -> Counter:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    # -- storing -----------------------------------------------------------------------------------

    def consignment(
        self, raw: bytes, *recipients: str, sender: str = ANN, arrived: int = 0
    ) -> Consignment:
        """Return a message that came in memory, read and decided on."""
        to = recipients or (BILLING,)
        return self._consigned(Arrival(sender, to, False, raw, None, len(raw)), arrived)

    @contextmanager
    def filed(
        self, raw: bytes, *recipients: str, folder: Path | None = None
    ) -> Iterator[Consignment]:
        """Give a message that came in a file, which goes at the end, read and decided on.

        :param folder: where the file is; by default beside the database.
        """
        with tempfile.TemporaryFile(dir=folder or self.spool.folder) as file:
            file.write(raw)
            file.flush()
            to = recipients or (BILLING,)
            yield self._consigned(Arrival(ANN, to, False, None, cast(BinaryIO, file), len(raw)), 0)

    def _consigned(self, arrival: Arrival, arrived: int) -> Consignment:
        parcel = parcel_of(arrival, arrived or self.now, next(_numbers), "lmtp")
        return consign(self.routing, self.loop, parcel)

    def told(self, *consignments: Consignment) -> list[list[str]]:
        """Store messages; return for each what its recipients are told, ids left out."""
        replies = self.deposit.store(consignments)
        return [[_without_id(reply.line().decode().strip()) for reply in one] for one in replies]

    # -- looking -----------------------------------------------------------------------------------

    def held(self, queue: str) -> list[Held]:
        """Return what waits in a queue, in order, as another process sees it."""
        with self.office.connection() as connection:
            record = Queue(self.office.folder(connection).get(queue))
            return [
                Held(
                    entry.source,
                    entry.sender,
                    entry.recipients,
                    entry.mta_queue_id,
                    entry.way,
                    entry.arrived,
                    entry.size,
                    entry.marks,
                    entry.archive,
                    bytes(message.raw),
                    isinstance(entry.body, Blob),
                    entry.body._p_oid,
                )
                for entry, message in zip(record.entries(), record, strict=True)
            ]

    def raws(self, queue: str = "billing") -> list[bytes]:
        """Return the bytes of what waits in a queue, in order."""
        return [one.raw for one in self.held(queue)]

    def transactions(self) -> int:
        """Return how many transactions the FileStorage has."""
        return sum(1 for _ in self.office.database.storage.iterator())

    def archived(self) -> list[tuple[str, bytes]]:
        """Return names and bytes of what the archive holds, ``failed`` included."""
        return [(path.name, path.read_bytes()) for path in self.spool.archived()]


def _without_id(line: str) -> str:
    return "250 2.0.0 queued" if line.startswith("250 2.0.0 queued as ") else line
