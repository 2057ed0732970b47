"""A private Postfix whose queue holds still, and how it is reached."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

from postoffice.postfix import Mail, PostfixSettings, PostqueueStore
from tests.postfix import Postfix

__all__ = [
    "HOSTILE_ADDRESSES",
    "HOSTILE_TEXT",
    "configuration",
    "emptied",
    "letter",
    "loaded",
    "postsuper",
    "settings_of",
    "wait_for_states",
]

# All mail is deferred, at once and for long, but what header_checks hold.
_MAIN = """
default_transport = lmtp:inet:127.0.0.1:9
relay_transport = lmtp:inet:127.0.0.1:9
relay_domains = down.test
header_checks = regexp:{{ {{ /^Subject: hold/ HOLD }} }}
queue_run_delay = 1h
minimal_backoff_time = 1h
maximal_backoff_time = 1h
enable_long_queue_ids = {long}
"""

_SECONDS = 120.0

# What a terminal obeys, and what postqueue and postcat print themselves.
HOSTILE_TEXT = "\x1b[2J\x1b]0;own\x07 *** MESSAGE FILE END x *** [red]x[/red]"
HOSTILE_ADDRESSES = (
    '"a b"@down.test',
    '"(x y)"@down.test',
    '"a\\"b\\\\c"@down.test',
    '"<script>"@down.test',
    "a+b=c_%d@down.test",
)


def letter(subject: str, *fields: str) -> bytes:
    """Compose a message."""
    head = ["From: Ann <ann@example.org>", "To: bob@example.com", f"Subject: {subject}", *fields]
    return ("\n".join(head) + "\n\nHello.\n").encode()


def configuration(long_ids: bool = False) -> str:
    """Return what is added to ``main.cf``."""
    return _MAIN.format(long="yes" if long_ids else "no")


def settings_of(postfix: Postfix, **other: tuple[str, ...]) -> PostfixSettings:
    """Return how it is reached."""
    return PostfixSettings(
        config_directory=str(postfix.configuration),
        spool_path=str(postfix.queue_directory),
        **other,  # type: ignore[arg-type]  # the other fields
    )


def loaded(postfix: Postfix, method: str | None = None) -> list[Mail]:
    """Return its messages, as the store gives them."""
    store = PostqueueStore(settings_of(postfix))
    store.load(method)
    return store.mails


def wait_for_states(postfix: Postfix, **states: int) -> None:
    """Wait until so many messages are in each state, and no others."""

    def settled() -> bool:
        names = [message["queue_name"] for message in postfix.queue().values()]
        return {name: names.count(name) for name in names} == states

    postfix.wait(settled, _SECONDS)


def emptied(postfix: Postfix) -> Postfix:
    """Have its queue be empty, whatever a test has left in it."""

    def is_empty() -> bool:
        # What is on its way from one folder to another stays, and comes again.
        postfix.delete_all()
        return not postfix.queue()

    postfix.wait(is_empty, _SECONDS)
    return postfix


def postsuper(postfix: Postfix, option: str, ids: Iterable[str]) -> None:
    """Have Postfix itself act on messages."""
    subprocess.run(
        ["postsuper", "-c", str(postfix.configuration), option, "-"],
        input="".join(f"{qid}\n" for qid in ids).encode(),
        check=True,
        capture_output=True,
    )
