"""The commit of an intake: what a storage may raise at its end, and what is let go of then."""

from __future__ import annotations

import logging
from typing import Any

from transaction.interfaces import NoTransaction, TransientError
from ZODB.POSException import POSError

from postoffice.delivery import Intake

__all__ = ["commit", "give_up"]

log = logging.getLogger("postoffice")


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
