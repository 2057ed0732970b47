"""Handing a notice to whoever sends mail, so that a retried transaction sends it once."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from postoffice.interfaces import Send

if TYPE_CHECKING:
    from postoffice.bounces import Notice

__all__ = ["hand_over"]

log = logging.getLogger("postoffice")


def hand_over(notice: Notice, send: Send | Any, transaction: Any) -> None:
    """Send a notice as a part of `transaction`.

    :param send: an ``IMailDelivery`` of repoze.sendmail, or its ``send``: called now, since it
        joins the transaction and sends at its commit; or any other callable ``send(fromaddr,
        toaddrs, message)``: called once after the commit, and never after an abort.
    """
    delivery = _mail_delivery(send)
    if delivery is not None:
        delivery.send(notice.sender, list(notice.recipients), notice.message)
    else:
        transaction.addAfterCommitHook(_send_after, (send, notice))


def _send_after(committed: bool, send: Send, notice: Notice) -> None:
    if not committed:
        return
    try:
        send(notice.sender, list(notice.recipients), notice.message)
    except Exception:
        # The work that the notice is about is committed, and nobody is left to hear the error.
        log.exception("notice to %r was not sent", notice.recipients)


def _mail_delivery(send: Any) -> Any:
    # Whoever provides the interface has imported it.
    module = sys.modules.get("repoze.sendmail.interfaces")
    if module is None:
        return None
    for candidate in (send, getattr(send, "__self__", None)):
        if candidate is not None and module.IMailDelivery.providedBy(candidate):
            return candidate
    return None
