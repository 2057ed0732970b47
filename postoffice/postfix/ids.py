"""The ids of Postfix's queue: what a command may be given for one."""

from __future__ import annotations

import re

__all__ = ["is_queue_id"]

# Wider than what any Postfix makes, and nothing that a command could take for an option or a path.
_QUEUE_ID = re.compile(r"[A-Za-z0-9]{1,64}", re.ASCII)


def is_queue_id(text: str) -> bool:
    """Return whether a command of Postfix may be given this text as the id of a message.

    ``ALL``, which ``postsuper`` takes for every message, is none.
    """
    return _QUEUE_ID.fullmatch(text) is not None and text != "ALL"
