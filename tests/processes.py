"""A consumer in a process of its own, which may be killed at any moment.

Called as ``python -m tests.processes KIND URI QUEUE NAME SEED``.  It takes messages of the queue
until SIGTERM, in one of the ways in which applications do (:data:`KINDS`).  In the transaction that
takes a message it counts the message's subject in a tree of its own in the database; some
transactions it aborts, and some messages it puts into quarantine.

It runs a transaction again on ``TransientError`` and on nothing else, as docs/consuming says, so
that any other error ends it, with the status 1 and a last line that names the error.
"""

from __future__ import annotations

import faulthandler
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transaction
from transaction.interfaces import TransientError

from postoffice import DepotUnavailable, MessageTaken, PermanentError, QueueEmpty, open_queue
from postoffice.claimed import ClaimedMessage
from postoffice.consumer import consume
from postoffice.message import Message

__all__ = ["KINDS", "TAKEN", "Consumer", "main"]

#: The key in the root of the database of the consumers' trees, by their names.
TAKEN = "taken"

_IDLE_SECONDS = 0.05
_AWAY_SECONDS = 0.02
EX_TEMPFAIL = 75


class _Stop:
    """Becomes true when SIGTERM comes."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


@dataclass(frozen=True, slots=True)
class Consumer:
    """One consumer: where it consumes, and what it shall do.

    :ivar name: of its tree.
    :ivar chance: decides what it aborts, and so on.
    :ivar stop: tells whether to end.
    """

    uri: str
    queue_name: str
    name: str
    chance: random.Random
    stop: Callable[[], bool]

    def count(self, connection: Any, message: Message) -> None:
        """Count a message in this consumer's tree, in the current transaction."""
        taken = connection.root()[TAKEN][self.name]
        subject = str(message["Subject"])
        taken[subject] = taken.get(subject, 0) + 1
        if self.chance.random() < 0.1:
            # Something to be killed in, with a message in hand.
            time.sleep(0.02)

    def pop(self) -> None:
        """Take each message in the transaction that processes it."""
        with open_queue(self.uri, self.queue_name) as queue:
            while not self.stop():
                try:
                    transaction.begin()
                    message = queue.pop_next()
                    self.count(queue.record._p_jar, message)
                    if self.chance.random() < 0.1:
                        transaction.abort()
                        if self.chance.random() < 0.5:
                            queue.quarantine(message, "chance")
                            transaction.commit()
                        continue
                    transaction.commit()
                except QueueEmpty:
                    transaction.abort()
                    time.sleep(_IDLE_SECONDS)
                except TransientError:
                    transaction.abort()
                    time.sleep(_AWAY_SECONDS)

    def claim(self) -> None:
        """Claim some messages at once, and work them off in a transaction each."""
        with open_queue(self.uri, self.queue_name) as queue:
            while not self.stop():
                # Leases that end too early make two consumers work on one message.
                lease = 0.01 if self.chance.random() < 0.1 else None
                try:
                    held = queue.claim(self.chance.randint(1, 5), lease)
                except TransientError:
                    time.sleep(_AWAY_SECONDS)
                    continue
                for one in held:
                    self._work_off(queue.record._p_jar, one)
                if not held:
                    time.sleep(_IDLE_SECONDS)

    def _work_off(self, connection: Any, one: ClaimedMessage) -> None:
        """Do something with a claimed message, and again while that fails for a while."""
        while True:
            chance = self.chance.random()
            try:
                transaction.begin()
                if chance < 0.05:
                    one.release()
                elif chance < 0.1:
                    one.defer(0.05, "chance")
                else:
                    self.count(connection, one.message)
                    if chance < 0.15:
                        # It is still claimed.
                        transaction.abort()
                        continue
                    if chance < 0.18:
                        transaction.abort()
                        transaction.begin()
                        one.quarantine("chance")
                    else:
                        one.ack()
                transaction.commit()
            except MessageTaken:
                transaction.abort()
            except TransientError:
                transaction.abort()
                time.sleep(_AWAY_SECONDS)
                continue
            return

    def consume(self) -> None:
        """Leave it all to the loop that postoffice has."""
        consume(
            self.uri,
            self.queue_name,
            self.handle,
            max_attempts=3,
            retry_delay=0.05,
            stop=self.stop,
        )

    def handle(self, message: Message, connection: Any) -> None:
        """Process a message, or fail."""
        self.count(connection, message)
        chance = self.chance.random()
        if chance < 0.1:
            raise ValueError("chance")
        if chance < 0.13:
            raise PermanentError("chance")


#: The ways of consuming, by their names on the command line.
KINDS: dict[str, Callable[[Consumer], None]] = {
    "pop": Consumer.pop,
    "claim": Consumer.claim,
    "consume": Consumer.consume,
}


def _escaped(error: BaseException) -> str:
    """Say in one line which errors came out of which calls of this file's, the first one first."""
    said: list[str] = []
    one: BaseException | None = error
    while one is not None:
        frames = traceback.extract_tb(one.__traceback__)
        call = next((frame.line for frame in reversed(frames) if frame.filename == __file__), None)
        if call is not None:
            said.insert(0, f"{type(one).__module__}.{type(one).__qualname__} out of `{call}`")
        one = one.__context__
    return ", then ".join(said)


def main() -> None:
    """Consume as the command line says, until SIGTERM."""
    faulthandler.register(signal.SIGUSR1)
    stop = _Stop()
    kind, uri, queue_name, name, seed = sys.argv[1:]
    try:
        KINDS[kind](Consumer(uri, queue_name, name, random.Random(int(seed)), stop))
    except DepotUnavailable as error:
        # Whoever has started it starts it again.
        sys.stderr.write(f"{error}\n")
        sys.exit(EX_TEMPFAIL)
    except Exception as error:
        traceback.print_exc()
        sys.exit(_escaped(error))


if __name__ == "__main__":
    main()
