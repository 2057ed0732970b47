"""A producer or a consumer in a process of its own, for test_processes.py.

Called as ``python -m tests.processes ROLE URI NAME SEED COUNT``.  A producer adds COUNT messages.
A consumer takes messages until "stop" stands in the root of the database and nothing is left.  In
the transaction that takes a message it puts the subject into a tree of its own in the database; it
aborts some, and puts some to quarantine.
"""

from __future__ import annotations

import os
import random
import sys
import time

import transaction
from transaction.interfaces import TransientError

from postoffice import MessageTaken, QueueEmpty, open_queue

__all__ = ["main"]


def produce(uri: str, name: str, seed: int, count: int) -> None:
    """Add messages, a few a transaction, some of them aborted first."""
    chance = random.Random(seed)
    with open_queue(uri, "app") as queue:
        number = 0
        while number < count:
            batch = min(chance.randint(1, 5), count - number)
            transaction.begin()
            try:
                for offset in range(batch):
                    body = "x" * (200_000 if chance.random() < 0.02 else 20)
                    queue.add(
                        f"Subject: {name}-{number + offset}\n"
                        f"Message-ID: <{name}-{number + offset}@x>\n\n{body}\n".encode()
                    )
                if chance.random() < 0.1:
                    transaction.abort()
                    continue
                transaction.commit()
            except TransientError:
                transaction.abort()
                continue
            number += batch


def consume(uri: str, name: str, seed: int) -> None:
    """Take messages; what is committed goes into a tree of the database in the same transaction."""
    chance = random.Random(seed)
    with open_queue(uri, "app") as queue:
        root = queue.record._p_jar.root()
        while True:
            transaction.begin()
            try:
                if not queue:
                    if "stop" in root:
                        return
                    time.sleep(0.005)
                    continue
                message = queue.pop_next()
                subject = str(message["Subject"])
                taken = root[name]
                taken[subject] = taken.get(subject, 0) + 1
                if chance.random() < 0.1:
                    # Something to be killed in, with a message in hand.
                    time.sleep(0.02)
                if chance.random() < 0.1:
                    transaction.abort()
                    if chance.random() < 0.5:
                        queue.quarantine(message, "chance")
                        transaction.commit()
                    continue
                transaction.commit()
            except (TransientError, MessageTaken, QueueEmpty):
                transaction.abort()


def main() -> None:
    """Play the part that the command line gives."""
    role, uri, name, seed, count = sys.argv[1:]
    if role == "produce":
        produce(uri, name, int(seed), int(count))
    else:
        consume(uri, name, int(seed))
    sys.stdout.write(f"{os.getpid()} is done\n")


if __name__ == "__main__":
    main()
