"""The deposit: what came over connections, into the depot, with one commit for all that is there.

Nothing is acknowledged before it is durable: messages in the database, and the original bytes of
what is not queued in the archive.  A receipt for each recipient is committed with the message, so
that what comes again, because its acknowledgement was lost, is known.  That also settles a commit
that seemed to fail: it is done again, and finds its own receipts.
"""

from __future__ import annotations

import enum
import logging
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from typing import Any

from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.POSException import ConflictError, POSError

from postoffice.delivery import Intake, Prepared, Result
from postoffice.depot.folder import QueuesFolder
from postoffice.depot.lane import LANES
from postoffice.depot.receipts import ReceiptIndex, Receipts
from postoffice.display import one_line, printable
from postoffice.exceptions import (
    DepotUnavailable,
    PermanentError,
    PostofficeError,
    TemporaryError,
)
from postoffice.intake.archive import Archive, Failure, local_day
from postoffice.intake.commit import commit, give_up, rehearse
from postoffice.intake.consignment import Consignment
from postoffice.intake.conversation import Reply
from postoffice.intake.report import report
from postoffice.routing import Decision

__all__ = ["TRY_LATER", "UNROUTED", "Deposit", "Unrouted"]

log = logging.getLogger("postoffice")

#: For whatever is not known to be for good.
TRY_LATER = Reply(451, "4.3.0", "try again later")
_KNOWN = Reply(250, "2.0.0", "received before")
_SET_ASIDE = Reply(250, "2.0.0", "kept for the administrator")
#: For a message that no queue takes.
UNROUTED = Reply(550, "5.1.1", "nobody here takes mail for this recipient")

_ATTEMPTS = 10


class Unrouted(enum.Enum):
    """What becomes of a message that no queue takes."""

    DISCARD = "discard"
    REJECT = "reject"


class Deposit:
    """Commits consignments; belongs to one thread, and to one connection.

    :ivar failed: whether the last messages could not be stored.  A storage may have closed itself
        then for good: deposit and database are to be opened anew.
    :ivar reason: why, in one line.
    """

    def __init__(
        self,
        connection: Any,
        folder: QueuesFolder,
        intake: Intake,
        archive: Archive,
        fingerprint: str,
        unrouted: Unrouted,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Deposit through this connection, which has an explicit transaction manager of its own.

        :param folder: the depot, in that connection.
        :param fingerprint: names version and configuration; kept with what is set aside.
        :param unrouted: what becomes of a message that no queue takes.
        :param clock: the time, in nanoseconds since the epoch.
        """
        self._connection = connection
        self._manager = connection.transaction_manager
        self._folder = folder
        self._intake = intake
        self._archive = archive
        self._fingerprint = fingerprint
        self._rejects_unrouted = unrouted is Unrouted.REJECT
        self._clock = clock
        self._index: ReceiptIndex | None = None
        self.failed = False
        self.reason = ""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def rehearse(self) -> None:
        """See whether messages can be stored: see :func:`postoffice.intake.commit.rehearse`."""
        rehearse(self._manager, self._connection)

    def store(self, consignments: Sequence[Consignment]) -> list[list[Reply]]:
        """Store some messages; return for each the replies to its recipients.

        What cannot be stored now has replies that say so.  Never raises on what a message holds.
        """
        self.failed = False
        try:
            return self._store(consignments)
        except (TemporaryError, TransientError, POSError, OSError) as error:
            # Who sent them sends them again, and if they were stored after all, that is known.
            self.failed, self.reason = True, one_line(error)
            return [[TRY_LATER] * len(one.parcel.recipients) for one in consignments]
        except Exception as error:
            # A queue that is gone, or a defect of ours which one of the messages has brought out.
            log.error("a batch could not be stored: %r; each message is tried alone", error)
        return [self._store_alone(one) for one in consignments]

    def _store_alone(self, consignment: Consignment) -> list[Reply]:
        source = printable(consignment.parcel.source)
        try:
            return self._store([consignment])[0]
        except PermanentError as error:
            log.error("%s cannot be stored now: %s", source, one_line(error))
        except (PostofficeError, TransientError, POSError, OSError) as error:
            log.error("%s cannot be stored now: %s", source, one_line(error))
            self.failed, self.reason = True, one_line(error)
        except Exception as error:
            log.exception("%s could not be stored", source)
            self.failed, self.reason = True, f"{type(error).__name__}: {one_line(error)}"
        return [TRY_LATER] * len(consignment.parcel.recipients)

    def _store(self, consignments: Sequence[Consignment]) -> list[list[Reply]]:
        for attempt in range(_ATTEMPTS):
            try:
                self._manager.begin()
                outcomes = self._deliver(consignments)
                self._archive.sync()
                commit(self._manager)
            except ConflictError as error:
                give_up(self._manager, self._intake)
                if attempt == _ATTEMPTS - 1:
                    raise DepotUnavailable(f"the database refuses: {one_line(error)}") from error
                time.sleep(random.uniform(0.5, 1) * 0.01 * 2**attempt)  # noqa: S311  # no secret
            except BaseException:
                give_up(self._manager, self._intake)
                raise
            else:
                break
        self._intake.forget_bodies()
        return [
            [self._told(outcome, one, number) for number, outcome in enumerate(found)]
            for one, found in zip(consignments, outcomes, strict=True)
        ]

    def _deliver(self, consignments: Sequence[Consignment]) -> list[list[Result | Reply]]:
        """Store messages in the transaction; return what became of each, for each recipient."""
        index, now = self._receipts(), self._clock()
        day = local_day(now / 1e9)
        files = {}
        wanted: list[tuple[int, int, Prepared]] = []
        outcomes: list[list[Result | Reply]] = []
        coming: set[bytes] = set()
        for which, one in enumerate(consignments):
            outcomes.append([_KNOWN] * len(one.receipts))
            for number, receipt in enumerate(one.receipts):
                if receipt in coming or index.seen(receipt, now // 1_000_000_000):
                    continue
                if one.reason or not self._is_refused(one.prepared[number].decision):
                    # What is refused is here for nobody, and refused as often as it comes.
                    coming.add(receipt)
                if one.reason:
                    self._set_aside(one, number, now)
                    outcomes[which][number] = _SET_ASIDE
                else:
                    prepared = one.prepared[number]
                    files[prepared.source] = one.parcel.path
                    wanted.append((which, number, prepared))
        results = self._intake.deliver(
            [prepared for _, _, prepared in wanted],
            now,
            lambda one: self._place(one, day) if one.values.get("oversize") else "",
            lambda one, blob: self._fill(files[one.source], blob),
        )
        for (which, number, prepared), result in zip(wanted, results, strict=True):
            outcomes[which][number] = result
            if result.id is None or prepared.values.get("oversize"):
                parcel = consignments[which].parcel
                self._archive.keep(self._place(prepared, day), parcel.pieces(number))
        for one, found in zip(consignments, outcomes, strict=True):
            for receipt, outcome in zip(one.receipts, found, strict=True):
                if outcome is not _KNOWN and not (
                    isinstance(outcome, Result) and self._is_refused(outcome.decision)
                ):
                    index.add(receipt, now // 1_000_000_000)
        return outcomes

    def _place(self, prepared: Prepared, day: date) -> str:
        return self._archive.place(prepared.source, day)

    def _receipts(self) -> ReceiptIndex:
        receipts = self._folder.receipts
        if receipts is None:
            receipts = self._folder.receipts = Receipts()
        if self._index is None or self._index.history is not receipts:
            self._index = ReceiptIndex(receipts, LANES)
        self._index.begin()
        return self._index

    def _set_aside(self, consignment: Consignment, number: int, now: int) -> None:
        parcel = consignment.parcel
        name = consignment.name(number)
        log.warning(
            "%s is set aside: %s; it is %s in %s",
            printable(parcel.source),
            printable(consignment.reason),
            printable(name),
            self._archive.failed,
        )
        failure = Failure(name, consignment.reason, self._fingerprint, now // 1_000_000_000)
        self._archive.keep_failure(failure, parcel.pieces(number))

    def _fill(self, path: str, blob: Blob) -> None:
        """Make a file a blob; the file itself stays until it is acknowledged."""
        folder = self._connection.db().storage.temporaryDirectory()
        target = os.path.join(folder, f"postoffice-{os.getpid()}-{uuid.uuid4().hex}")
        try:
            try:
                _link_target(path, target)
            except OSError:
                # Another file system, or one without hard links.
                shutil.copyfile(path, target)
            blob.consumeFile(target)
        except BaseException:
            # On a full disk a piece that is of no use would be in the way of everything.
            with suppress(OSError):
                os.unlink(target)
            raise

    def _is_refused(self, decision: Decision) -> bool:
        return self._rejects_unrouted and decision.reason == "no-queue"

    def _told(self, outcome: Result | Reply, consignment: Consignment, number: int) -> Reply:
        """Report what became of a message, and return what the client is told of it."""
        if outcome is _KNOWN:
            log.info("%s: received before", printable(consignment.name(number)))
        if isinstance(outcome, Reply):
            return outcome
        if self._is_refused(outcome.decision):
            report(outcome, "refused")
            return UNROUTED
        report(outcome)
        if outcome.id is not None:
            return Reply(250, "2.0.0", f"queued as {outcome.id}")
        return Reply(250, "2.0.0", f"not queued: {outcome.decision.reason}")


def _link_target(path: str, target: str) -> None:
    """Give another name to the file that a link leads to, which may have none of its own."""
    descriptor = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Only with a folder's descriptor does it follow the link.
        os.link(path, target, src_dir_fd=descriptor, follow_symlinks=True)
    finally:
        os.close(descriptor)
