"""The LMTP listener: sockets around conversations, and messages handed over for delivery.

::

    listener = Listener(UnixAddress("/run/postoffice/lmtp"), "mail.example.com", accept, deliver,
                        "/var/lib/postoffice/tmp")
    await listener.start()
    ...
    await listener.stop(grace=30.0)

All runs in one event loop.  What a client does, or leaves undone, costs the other sessions nothing
but its share of the processor: every session has limits of time, memory is bounded by
:class:`ListenerLimits`, and sessions wait for nothing of one another.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

from postoffice.display import one_line
from postoffice.intake.arrival import Arrival, Incoming, Memory
from postoffice.intake.conversation import (
    Abandon,
    Accept,
    Begin,
    Chunk,
    Close,
    Complete,
    Conversation,
    Event,
    Limits,
    Reply,
    Send,
)
from postoffice.intake.sockets import Listening, TCPAddress, UnixAddress, listen

__all__ = ["Arrival", "Deliver", "Listener", "ListenerLimits", "TCPAddress", "UnixAddress"]

log = logging.getLogger("postoffice")

#: Delivers a message and returns one reply for each of its recipients, in their order.
Deliver: TypeAlias = Callable[[Arrival], Awaitable[Sequence[Reply]]]

_PIECE = 1 << 16
# Seconds that a client has to take what was sent to it before its connection is closed.
_FAREWELL = 5.0
_LONGEST_SWEEP = 1.0
# Who sends nothing for so many seconds is not waited for, nor who is at it for so long already.
_MOMENT = 0.01
_SOON = 0.1

_BUSY = Reply(421, "4.3.2", "too many connections, try again later")
_STOPPING = Reply(421, "4.3.2", "service is shutting down, try again later")
_TIMEOUT = Reply(421, "4.4.2", "timeout")
_FAILURE = Reply(451, "4.3.0", "temporary failure, try again later")
_NO_SPACE = Reply(452, "4.3.1", "no space for the message, try again later")


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """What clients may take of time and memory.

    :ivar connections: at a time; more get 421 4.3.2.
    :ivar idle_timeout: seconds without a sign of the client; RFC 5321 (4.5.3.2.7) asks for 300.
    :ivar message_timeout: seconds from the session's start, or its last answer, to the beginning of
        a message, and from there to its end.
    :ivar message_memory: bytes of one message in memory; a larger one goes to a file.
    :ivar memory: bytes in memory of all messages together; beyond, they go to files.
    """

    connections: int = 100
    idle_timeout: float = 300.0
    message_timeout: float = 600.0
    message_memory: int = 1 << 20
    memory: int = 32 << 20


class Listener:
    """Listens for LMTP clients, and has their messages delivered."""

    def __init__(
        self,
        address: UnixAddress | TCPAddress | socket.socket,
        hostname: str,
        accept: Accept,
        deliver: Deliver,
        folder: str,
        limits: ListenerLimits | None = None,
        session_limits: Limits | None = None,
    ) -> None:
        """Prepare to listen; nothing is opened yet.

        :param address: where to listen; or a socket that listens there already, and that another
            process has, too.
        :param hostname: the server's name for itself.
        :param accept: decides on each recipient at RCPT, without waiting; where it raises, the
            recipient is deferred.
        :param deliver: is awaited once for each message, for several sessions at a time; where it
            raises, or returns a wrong number of replies, the recipients are deferred (451 4.3.0).
            It runs to its end also when the client is gone, since nobody knows then how much is
            done; only :meth:`stop` cancels it.
        :param folder: for files of large messages, which have no names there.
        :param session_limits: what one session may ask for.
        """
        self.address = address
        self.hostname = hostname
        self.folder = folder
        self.limits = limits or ListenerLimits()
        self.session_limits = session_limits or Limits()
        self.memory = Memory(self.limits.memory)
        # All sessions read into the same buffer, one after the other.
        self.buffer = memoryview(bytearray(_PIECE))
        self.stopping = False
        self._accept = accept
        self._deliver = deliver
        self._sessions: set[_Session] = set()
        self._deliveries: set[asyncio.Future[Sequence[Reply]]] = set()
        self._quiet = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._listening: Listening | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._crowded = False

    @property
    def port(self) -> int:
        """The port that is listened on; 0 for a unix socket, and while nothing is."""
        return 0 if self._listening is None else self._listening.port

    @property
    def receiving(self) -> int:
        """How many messages are coming: clients within one that have just gone on with it."""
        now = asyncio.get_running_loop().time()
        return sum(one.is_receiving(now) for one in self._sessions)

    async def start(self) -> None:
        """Listen.

        A unix socket that a dead process left is replaced; the new one has its mode and its group
        before any client can find it.

        :raises postoffice.exceptions.TemporaryError: another process listens there.
        :raises postoffice.exceptions.PermanentError: something that is no socket is in its place.
        :raises OSError: the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        if isinstance(self.address, socket.socket):
            self._listening = Listening(self.address, None)
        else:
            self._listening = listen(self.address)
        sock = self._listening.socket
        if isinstance(self.address, UnixAddress):
            self._server = await loop.create_unix_server(self._session, sock=sock)
        else:
            self._server = await loop.create_server(self._session, sock=sock)
        self._sweeper = loop.create_task(self._sweep())

    async def stop(self, grace: float) -> None:
        """Listen no more; return when all sessions have ended.

        Those within no message are told so at once (421 4.3.2), others when their message has its
        answer.

        :param grace: seconds after which the rest is broken off, deliveries among it.
        """
        self.stopping = True
        if self._server is not None:
            self._server.close()
        if self._listening is not None:
            self._listening.remove()
        for session in list(self._sessions):
            session.stop()
        if not await self._ended(grace):
            for session in list(self._sessions):
                session.abort()
            for delivery in self._deliveries:
                delivery.cancel()
            await self._ended(_FAREWELL)
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper

    async def _ended(self, seconds: float) -> bool:
        """Wait until no session and no delivery is left; return whether none is."""
        try:
            async with asyncio.timeout(seconds):
                while self._sessions or self._deliveries:
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            return False
        return True

    def _session(self) -> _Session:
        return _Session(self)

    def accept(self, sender: str, recipient: str) -> Reply | None:
        """Decide on a recipient; one that cannot be decided on is deferred."""
        try:
            return self._accept(sender, recipient)
        # Whatever it is, it is this recipient's alone, and may be over when the client comes again.
        except Exception:
            log.exception("whether to accept a recipient cannot be decided")
            return _FAILURE

    def admit(self, session: _Session) -> bool:
        """Note a new session; return whether there is room for it."""
        if self.stopping or len(self._sessions) >= self.limits.connections:
            if not self._crowded and not self.stopping:
                self._crowded = True
                log.warning("lmtp: %d connections, others are turned away", len(self._sessions))
            return False
        self._sessions.add(session)
        return True

    def forget(self, session: _Session) -> None:
        """Note that a session has ended."""
        if session in self._sessions:
            self._sessions.remove(session)
            self._crowded = False
            self._quiet.set()

    def hand_over(self, session: _Session, message: Incoming) -> None:
        """Have a message delivered, and the session told what became of it."""
        delivery: asyncio.Future[Sequence[Reply]]
        try:
            delivery = asyncio.ensure_future(self._deliver(message.arrival()))
        # Whatever it is, the client still has the message, and tries again.
        except Exception as error:
            delivery = asyncio.get_running_loop().create_future()
            delivery.set_exception(error)
        self._deliveries.add(delivery)
        delivery.add_done_callback(partial(self._delivered, session, message))

    def _delivered(
        self, session: _Session, message: Incoming, delivery: asyncio.Future[Sequence[Reply]]
    ) -> None:
        self._deliveries.discard(delivery)
        self._quiet.set()
        message.discard()
        if delivery.cancelled():
            return
        try:
            session.answer(_replies(delivery, len(message.begin.recipients)))
        # Without an answer the client sends it again, and it is known by its receipt.
        except Exception:
            log.exception("lmtp: a client cannot be told what became of its message")
            session.abort()

    async def _sweep(self) -> None:
        """Break off the sessions that take too long."""
        limits = self.limits
        seconds = min(_LONGEST_SWEEP, limits.idle_timeout / 4, limits.message_timeout / 4)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(seconds)
            now = loop.time()
            for session in list(self._sessions):
                session.check(now)


def _replies(delivery: asyncio.Future[Sequence[Reply]], count: int) -> Sequence[Reply]:
    """Return what a delivery has to say to so many recipients."""
    error = delivery.exception()
    if error is not None:
        log.error("lmtp: a message cannot be delivered", exc_info=error)
        return [_FAILURE] * count
    replies = delivery.result()
    if len(replies) != count:
        log.error("lmtp: %d replies for %d recipients", len(replies), count)
        return [_FAILURE] * count
    return replies


class _Session(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._conversation = Conversation(
            listener.session_limits, listener.hostname, listener.accept
        )
        self._transport: asyncio.Transport | None = None
        self._message: Incoming | None = None
        # Why the message that comes cannot be stored, and how many are to be told.
        self._refusal = _FAILURE
        self._recipients = 0
        self._congested = False
        self._early = False
        self._reading = True
        self._active = self._since = self._loop.time()
        self._closed: float | None = None

    # -- what asyncio calls ------------------------------------------------------------------------

    def is_receiving(self, now: float) -> bool:
        """Tell whether a message comes, some of it a moment ago; `now` is the loop's time."""
        recent = now - self._active < _MOMENT and now - self._since < _SOON
        return recent and self._conversation.sending

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._listener.admit(self):
            self._follow(self._conversation.greet())
        else:
            self._follow(self._conversation.end(_STOPPING if self._listener.stopping else _BUSY))

    def get_buffer(self, sizehint: int) -> memoryview:
        # Its bytes are copied before any other session is asked.
        return self._listener.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._active = self._loop.time()
        self._early = self._conversation.waiting
        self._follow(self._conversation.receive(bytes(self._listener.buffer[:nbytes])))

    def eof_received(self) -> None:
        """Close, as the client has: without a message's end there is no message."""

    def pause_writing(self) -> None:
        self._congested = True
        self._control_flow()

    def resume_writing(self) -> None:
        self._congested = False
        self._active = self._loop.time()
        self._control_flow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._message is not None:
            log.info("lmtp: a client left within a message, after %d bytes", self._message.size)
        self._drop()
        self._listener.forget(self)

    # -- what the listener calls -------------------------------------------------------------------

    def answer(self, replies: Sequence[Reply]) -> None:
        """Tell the client what became of its message."""
        if self._transport is None or self._closed is not None:
            return
        self._active = self._since = self._loop.time()
        self._follow(self._conversation.answer(replies))

    def stop(self) -> None:
        """End the session once it is within no message."""
        if not self._conversation.within_message:
            self._follow(self._conversation.end(_STOPPING))

    def check(self, now: float) -> None:
        """Break the session off if it has taken too long."""
        limits = self._listener.limits
        if self._closed is not None:
            if now - self._closed > min(_FAREWELL, limits.idle_timeout):
                self.abort()
            return
        if self._conversation.waiting:
            return
        if now - self._active > limits.idle_timeout or now - self._since > limits.message_timeout:
            self._follow(self._conversation.end(_TIMEOUT))

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    # -- events ------------------------------------------------------------------------------------

    def _follow(self, events: list[Event]) -> None:
        while events:
            events = self._act(events)
        if self._listener.stopping and not self._conversation.within_message:
            self._act(self._conversation.end(_STOPPING))
        self._control_flow()

    def _act(self, events: list[Event]) -> list[Event]:
        """Do what the events say; return those that follow at once."""
        transport = self._transport
        if transport is None:
            return []
        for event in events:
            if isinstance(event, Send):
                transport.write(event.data)
            elif isinstance(event, Chunk):
                self._store(event.data)
            elif isinstance(event, Begin):
                self._begin(event)
            elif isinstance(event, Complete):
                return self._complete()
            elif isinstance(event, Abandon):
                self._drop()
            elif isinstance(event, Close):
                self._drop()
                self._closed = self._loop.time()
                transport.close()
        return []

    def _begin(self, begin: Begin) -> None:
        listener = self._listener
        self._since = self._loop.time()
        self._recipients = len(begin.recipients)
        self._message = Incoming(
            begin, listener.folder, listener.memory, listener.limits.message_memory
        )

    def _store(self, data: bytes) -> None:
        if self._message is None:
            return
        try:
            self._message.add(data)
        except OSError as error:
            log.error("lmtp: a message cannot be stored: %s", one_line(error))
            self._refusal = _NO_SPACE
            self._drop()

    def _complete(self) -> list[Event]:
        message, self._message = self._message, None
        if message is None:
            return self._conversation.answer([self._refusal] * self._recipients)
        self._listener.hand_over(self, message)
        return []

    def _drop(self) -> None:
        if self._message is not None:
            self._message.discard()
            self._message = None

    def _control_flow(self) -> None:
        """Read only while there is something to do with what is read, and room for replies.

        Most clients say nothing while their message waits, and to stop reading costs something: it
        is done when one has.
        """
        reading = not (self._congested or (self._early and self._conversation.waiting))
        if reading is self._reading or self._transport is None:
            return
        self._reading = reading
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()
