"""The commit of an intake: what a storage may raise at its end, and what is let go of then."""

from __future__ import annotations

import errno
import logging
from typing import Any

from transaction.interfaces import NoTransaction, TransientError
from ZEO.Exceptions import ServerException
from ZODB.POSException import POSError

from postoffice.delivery import Intake
from postoffice.depot.entry import Body

__all__ = ["commit", "give_up", "lacks_room", "rehearse"]

log = logging.getLogger("postoffice")

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Bytes: more than most messages have.
_REHEARSED_SIZE = 1 << 18


def commit(manager: Any) -> None:
    """Commit; whatever a storage raises then is a failure of the database.

    :param manager: the transaction manager of the connection.
    :raises transaction.interfaces.TransientError: the transaction can be run again.
    :raises ZODB.POSException.POSError: the database failed; it may have the transaction all the
        same.
    :raises OSError: likewise.
    """
    try:
        manager.commit()
    except (TransientError, POSError, OSError):
        raise
    except Exception as error:
        # ZODB asserts that it could make a folder for a blob, which a full disk forbids.
        raise OSError(f"{type(error).__name__}: {error}") from error


def lacks_room(error: BaseException) -> bool:
    """Tell whether a failure comes of a disk without room, this machine's or a ZEO server's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return True
        # What ZEO has for an error of its server's: the name of the class, and the arguments.
        if isinstance(cause, ServerException) and len(cause.args) == 2:
            name, values = cause.args
            if name == "builtins.OSError" and values and values[0] in _NO_ROOM:
                return True
        cause = cause.__cause__
    return False


def rehearse(manager: Any, connection: Any) -> None:
    """Take a message's commit up to its last step, and back: nothing of it stays.

    That shows whether a database that failed can be written to again, before a message does.

    :param manager: the transaction manager of the connection, which has no transaction.
    :raises transaction.interfaces.TransientError: as :func:`commit`.
    :raises ZODB.POSException.POSError: likewise.
    :raises OSError: likewise.
    """
    manager.begin()
    try:
        connection.add(Body(bytes(_REHEARSED_SIZE)))
        manager.get().join(_Curtain(manager))
        commit(manager)
    except _Rehearsed:
        log.debug("a commit went well up to its last step")
    finally:
        manager.abort()


class _Rehearsed(TransientError):  # type: ignore[misc]  # transaction has no types
    """All but the last step went well."""


class _Curtain:
    """Ends a transaction when all others in it have voted."""

    def __init__(self, manager: Any) -> None:
        self.transaction_manager = manager

    def sortKey(self) -> str:
        """Come behind the database."""
        return "~postoffice"

    def tpc_vote(self, transaction: object) -> None:
        """Vote against.

        :raises _Rehearsed: always.
        """
        raise _Rehearsed

    def _nothing(self, transaction: object) -> None:
        """Have no part in this step."""

    abort = commit = tpc_begin = tpc_finish = tpc_abort = _nothing


def give_up(manager: Any, intake: Intake) -> None:
    """Abort a transaction of this intake that cannot be committed, or could not.

    :param manager: the transaction manager of the connection.
    """
    intake.forget_queues()
    try:
        manager.abort()
    except NoTransaction:
        # It ended with a commit that failed.
        return
    except (POSError, OSError) as error:
        # The storage is gone, and with it what the transaction was about to do.
        log.debug("abort failed too: %s", error)
