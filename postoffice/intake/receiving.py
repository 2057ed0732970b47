"""Receiving: the process that talks to LMTP clients and decides on their messages.

It touches no database.  Each message goes, with the decision for each recipient, over a channel to
the process that commits, and the replies come back; see :mod:`postoffice.intake.service`.  A
message that kills this process costs the sessions that there are, whose clients try again, and
nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import marshal
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from postoffice.delivery import Prepared
from postoffice.display import one_line, printable
from postoffice.exceptions import PostofficeError
from postoffice.intake.arrival import Arrival
from postoffice.intake.consignment import Consignment, Parcel, consign, parcel_of
from postoffice.intake.conversation import Limits, Reply
from postoffice.intake.deposit import TRY_LATER, UNROUTED
from postoffice.intake.listener import Listener, ListenerLimits, TCPAddress, UnixAddress
from postoffice.loops import LoopRule
from postoffice.queue import BLOB_SIZE
from postoffice.routing import Routing, is_for_nobody

__all__ = ["ALIVE", "LENGTH", "Frames", "Receiver", "consignment_of", "frame"]

log = logging.getLogger("postoffice")

#: What stands in front of each value on the channel: its length in bytes.
LENGTH = struct.Struct("!Q")
#: Says, from time to time, that the receiver goes on.
ALIVE = ("alive", "")
_GRACE_SECONDS = 30.0
# Bytes: a disk has an end, and no mail that anybody waits for is larger.
_LARGEST = 1 << 30
_PIECE = 1 << 18
_SIGN_SECONDS = 5.0
_FIRST = asyncio.FIRST_COMPLETED


def frame(value: Any) -> bytes:
    """Return plain values as they go over the channel."""
    data = marshal.dumps(value)
    return LENGTH.pack(len(data)) + data


class Frames:
    """Makes values again of what comes over the channel; belongs to one side of it.

    What comes is read to where :meth:`room` says, and then given to :meth:`take`.  A large value
    is read to where it stays.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._piece = memoryview(bytearray(_PIECE))
        self._kept = 0
        # What has come of a value that is longer than a piece, and all the room for it.
        self._large: memoryview | None = None
        self._filled = 0

    def room(self) -> memoryview:
        """Return where to read to."""
        if self._large is not None:
            return self._large[self._filled :]
        return self._piece[self._kept :]

    def take(self, length: int) -> list[Any]:
        """Return the values that are complete with so many more bytes."""
        if self._large is not None:
            self._filled += length
            if self._filled < len(self._large):
                return []
            large, self._large = self._large, None
            return [marshal.loads(large)]  # noqa: S302  # of our own process
        data = self._piece[: self._kept + length]
        values = []
        while len(data) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(data)
            data = data[LENGTH.size :]
            if len(data) < size:
                self._large = memoryview(bytearray(size))
                self._filled = len(data)
                self._large[: self._filled] = data
                data = data[:0]
                break
            values.append(marshal.loads(data[:size]))  # noqa: S302  # likewise
            data = data[size:]
        self._kept = len(data)
        self._piece[: self._kept] = bytes(data)
        return values


def consignment_of(wire: Sequence[Any]) -> Consignment:
    """Make a consignment again of what came over the channel."""
    parcel, prepared, receipts, reason = wire
    return Consignment(
        Parcel(*parcel), tuple(map(Prepared.from_wire, prepared)), tuple(receipts), reason
    )


@dataclass(frozen=True, slots=True)
class Receiver:
    """What the process does.

    :ivar routing: the rules.
    :ivar loop: what is asked of senders who write too often.
    :ivar address: where clients connect; or a socket that listens there already.
    :ivar hostname: this machine's name, for the greeting.
    :ivar folder: where large messages are kept until they are stored.
    :ivar rejects_unrouted: whether a recipient for whom no queue can be is refused at once.
    """

    routing: Routing
    loop: LoopRule | None
    address: UnixAddress | TCPAddress | socket.socket
    hostname: str
    folder: str
    rejects_unrouted: bool

    @property
    def descriptors(self) -> set[int]:
        """What the process inherits, the channel left out."""
        return {self.address.fileno()} if isinstance(self.address, socket.socket) else set()

    def run(self, channel: socket.socket) -> None:
        """Serve clients until the channel is closed, or SIGTERM comes."""
        asyncio.run(_Session(self, channel).serve())


class _Session:
    """One life of the process."""

    def __init__(self, receiver: Receiver, channel: socket.socket) -> None:
        self._receiver = receiver
        self._channel = channel
        self._waiting: dict[int, tuple[asyncio.Future[Sequence[Reply]], int]] = {}
        self._number = 0
        self._complete: list[tuple[int, tuple[object, ...]]] = []
        self._link: _Link
        self._listener = Listener(
            receiver.address,
            receiver.hostname,
            self._accept,
            self._deliver,
            receiver.folder,
            # What will be a blob is a file from the beginning: it becomes one without a copy.
            ListenerLimits(message_memory=BLOB_SIZE),
            session_limits=Limits(max_size=_LARGEST),
        )

    async def serve(self) -> None:
        """Listen until told to stop; then let those finish that are within a message."""
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        self._link = _Link(self._take_answers)
        await loop.create_connection(lambda: self._link, sock=self._channel)
        try:
            await self._listener.start()
        except (OSError, PostofficeError) as error:
            self._link.send([frame(("refused", _reason(error, self._receiver.address)))])
            self._link.close()
            await self._link.lost.wait()
            return
        self._link.send([frame(("ready", ""))])
        waits = [loop.create_task(one.wait()) for one in (stopping, self._link.lost)]
        while not (await asyncio.wait(waits, timeout=_SIGN_SECONDS, return_when=_FIRST))[0]:
            self._link.send([frame(ALIVE)])
        if self._link.lost.is_set():
            self._give_up()
        await self._listener.stop(_GRACE_SECONDS)
        for task in waits:
            task.cancel()
        self._link.close()

    def _take_answers(self, answers: list[tuple[int, list[tuple[Any, ...]]]]) -> None:
        for number, replies in answers:
            waiting, _ = self._waiting.pop(number)
            if not waiting.done():
                waiting.set_result([Reply(*one) for one in replies])

    def _give_up(self) -> None:
        """Answer all that waits when the other process is gone: nothing can be stored."""
        for one, recipients in self._waiting.values():
            if not one.done():
                one.set_result([TRY_LATER] * recipients)
        self._waiting.clear()

    def _accept(self, sender: str, recipient: str) -> Reply | None:
        receiver = self._receiver
        if receiver.rejects_unrouted and is_for_nobody(receiver.routing, recipient):
            log.info(
                "recipient %s refused: no-queue: sender <%s>",
                printable(recipient),
                printable(sender),
            )
            return UNROUTED
        return None

    def _deliver(self, arrival: Arrival) -> asyncio.Future[Sequence[Reply]]:
        now = time.time_ns()
        self._number += 1
        number = self._number
        parcel = parcel_of(arrival, now, number, "lmtp")
        consignment = consign(self._receiver.routing, self._receiver.loop, parcel)
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Sequence[Reply]] = loop.create_future()
        if self._link.lost.is_set():
            answered.set_result([TRY_LATER] * len(arrival.recipients))
            return answered
        self._waiting[number] = answered, len(arrival.recipients)
        if not self._complete:
            # Those that are complete by now go with it: who commits them wakes up once.
            loop.call_soon(self._hand_over)
        self._complete.append((number, _to_wire(consignment)))
        return answered

    def _hand_over(self) -> None:
        receiving = self._listener.receiving
        self._link.send([frame((number, receiving, wire)) for number, wire in self._complete])
        self._complete.clear()


class _Link(asyncio.BufferedProtocol):
    """This process's side of the channel.

    :ivar lost: set when the channel is closed, from either side.
    """

    def __init__(self, take: Callable[[list[Any]], None]) -> None:
        """Give each value that comes to `take`."""
        self.lost = asyncio.Event()
        self._take = take
        self._transport: asyncio.Transport
        self._frames = Frames()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        for value in self._frames.take(nbytes):
            self._take(value)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()

    def send(self, frames: Sequence[bytes]) -> None:
        """Send frames, short ones at once."""
        if sum(map(len, frames)) <= _PIECE:
            self._transport.write(b"".join(frames))
        else:
            for one in frames:
                self._transport.write(one)

    def close(self) -> None:
        """Close the channel once all is sent."""
        self._transport.close()


def _reason(error: Exception, address: UnixAddress | TCPAddress | socket.socket) -> str:
    if not isinstance(error, OSError) or not error.strerror or isinstance(address, socket.socket):
        return one_line(error)
    place = address.path if isinstance(address, UnixAddress) else f"port {address.port}"
    return f"{place}: {error.strerror}"


def _to_wire(consignment: Consignment) -> tuple[object, ...]:
    parcel = consignment.parcel
    plain = (
        *(parcel.source, parcel.sender, parcel.recipients, parcel.raw, parcel.path),
        *(parcel.size, parcel.arrived, parcel.way),
    )
    # The values may be of a kind of their own, which is not written; recipients share the bytes.
    prepared = tuple(one.to_wire() for one in consignment.prepared)
    return plain, prepared, consignment.receipts, consignment.reason
