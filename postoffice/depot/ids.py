"""Ids: one for each message for its life, and one for each place in a queue."""

from __future__ import annotations

import os
import random
import threading
import time

__all__ = ["ID_BITS", "IdGenerator", "new_id", "producer_number"]

ID_BITS = 63
_PRODUCER_BITS = 14
_SEQUENCE_BITS = 10
_TICK_NS = 10_000_000


class IdGenerator:
    """Makes 63-bit ids that grow in a process and hardly ever meet those of another.

    From the top: the time in ticks of 10 ms since the epoch (39 bits, until 2144), a random number
    of the process (14 bits) and a sequence (10 bits).  When more than 1,024 are asked for in one
    tick, or the clock is set back, ids run ahead of the clock.  Safe to call from several threads.
    """

    def __init__(self, producer: int) -> None:
        """Make ids for the producer of this number, of which the lowest 14 bits count."""
        self.producer = producer & ((1 << _PRODUCER_BITS) - 1)
        self._tick = 0
        self._sequence = 0
        self._lock = threading.Lock()

    def next(self, now_ns: int) -> int:
        """Return an id greater than all that came before; `now_ns` is the time in nanoseconds."""
        tick = now_ns // _TICK_NS
        with self._lock:
            if tick > self._tick:
                self._tick = tick
                self._sequence = 0
            else:
                self._sequence += 1
                if self._sequence >> _SEQUENCE_BITS:
                    self._tick += 1
                    self._sequence = 0
            return (
                self._tick << (_PRODUCER_BITS + _SEQUENCE_BITS)
                | self.producer << _SEQUENCE_BITS
                | self._sequence
            )


_generator = IdGenerator(random.SystemRandom().getrandbits(_PRODUCER_BITS))


def _after_fork() -> None:
    global _generator
    _generator = IdGenerator(random.SystemRandom().getrandbits(_PRODUCER_BITS))


os.register_at_fork(after_in_child=_after_fork)


def new_id() -> int:
    """Return a new id of this process."""
    return _generator.next(time.time_ns())


def producer_number() -> int:
    """Return the random number of this process that its ids carry."""
    return _generator.producer
