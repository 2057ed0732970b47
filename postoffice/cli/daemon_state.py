"""What ``postoffice queues --all`` says of ``postoffice serve``: whether it runs, and how it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from postoffice.cli.output import age, count, iso_time, say
from postoffice.daemon.state import PartState, read_state, state_place

if TYPE_CHECKING:
    from postoffice.config import Settings

__all__ = ["daemon_json", "tell_daemon"]

_NANOSECONDS = 1_000_000_000


def daemon_json(settings: Settings) -> dict[str, object] | None:
    """Return how the daemon of a configuration is, as JSON has it; ``None``: it does not run.

    Where this user may not know, there is a ``fault`` only.
    """
    try:
        state = read_state(state_place(settings))
    except OSError as error:
        return {"fault": f"{error.filename}: {error.strerror}"}
    if state is None:
        return None
    return {
        "fault": None,
        "process": state.process,
        "version": state.version,
        "since": _iso(state.since),
        "configuration": state.configuration,
        "reload_error": state.reload_error,
        "parts": [
            {
                "name": part.name,
                "state": part.state,
                "since": _iso(part.since),
                "process": part.process or None,
                "restarts": part.restarts,
                "error": part.error,
                "next_try": None if part.next_try is None else _iso(part.next_try),
            }
            for part in state.parts
        ],
    }


def tell_daemon(settings: Settings) -> None:
    """Print how the daemon of a configuration is: a line for it, and one for each of its parts."""
    try:
        state = read_state(state_place(settings))
    except OSError as error:
        say(f"daemon: unknown: {error.filename}: {error.strerror}")
        return
    if state is None:
        say("daemon: not running")
        return
    now = time.time()
    say(f"daemon: process {state.process}, for {_age(state.since, now)}")
    if state.reload_error:
        say(f"  the configuration could not be read again: {state.reload_error}")
    width = max(len(part.name) for part in state.parts)
    for part in state.parts:
        say(f"  {part.name:{width}}  {_told(part, now)}")


def _told(part: PartState, now: float) -> str:
    words = f"{part.state} for {_age(part.since, now)}"
    if part.state in ("failing", "down"):
        words += f": {part.error}"
    if part.next_try is not None:
        words += f"; tried again in {max(0.0, part.next_try - now):.0f} s"
    if part.restarts:
        words += f"; {count(part.restarts, 'restart')}"
    return words


def _age(since: float, now: float) -> str:
    return age(int(since * _NANOSECONDS), int(now * _NANOSECONDS))


def _iso(seconds: float) -> str | None:
    return iso_time(int(seconds * _NANOSECONDS))
