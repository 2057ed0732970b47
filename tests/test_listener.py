"""The LMTP listener, with clients on real sockets."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import cast

import pytest

from postoffice.exceptions import PermanentError, TemporaryError
from postoffice.intake.conversation import Limits, Reply
from postoffice.intake.listener import (
    Arrival,
    Listener,
    ListenerLimits,
    TCPAddress,
    UnixAddress,
)
from tests.lmtp_client import Client

STORED = Reply(250, "2.6.0", "stored")


def accept(sender: str, recipient: str) -> Reply | None:
    """Take everybody but nobody; fail for a certain one."""
    if recipient.startswith("failure@"):
        raise LookupError("no such table")
    return Reply(550, "5.1.1", "nobody here") if recipient.startswith("nobody@") else None


class Post:
    """Where messages are delivered, in the listener's loop.

    :ivar arrivals: the envelope of each message, and its bytes.
    :ivar open: while it is not set, deliveries wait.
    """

    def __init__(self) -> None:
        """Begin with deliveries that do not wait."""
        self.arrivals: list[tuple[Arrival, bytes]] = []
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Semaphore(0)
        self.cancelled = 0

    async def deliver(self, arrival: Arrival) -> Sequence[Reply]:
        """Note a message, as slowly as told."""
        self.begun.release()
        try:
            while not self.open.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if arrival.file is not None:
            assert arrival.raw is None
            raw = arrival.file.read()
        else:
            assert arrival.raw is not None
            raw = arrival.raw
        assert len(raw) == arrival.size
        if b"X-Fail: yes\n" in raw:
            raise LookupError("as it was told to")
        self.arrivals.append((arrival, raw))
        if b"X-Miscount: yes\n" in raw:
            return []
        if b"X-Nonsense: yes\n" in raw:
            return cast(list[Reply], [None])
        return [STORED] * len(arrival.recipients)


class Running:
    """A listener in a thread of its own."""

    def __init__(self, listener: Listener) -> None:
        """Start it."""
        self.listener = listener
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def call(self, coroutine: Awaitable[None]) -> None:
        """Have the listener's loop run this, and wait for it."""

        async def run() -> None:
            await coroutine

        asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def stop(self, grace: float = 0.0) -> None:
        """Stop the listener."""
        self.call(self.listener.stop(grace))

    def end(self) -> None:
        """Stop the listener, and its thread."""
        try:
            self.stop()
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


Start = Callable[..., Running]


@pytest.fixture
def post() -> Post:
    """Return a place where messages are delivered."""
    return Post()


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return the path of the socket."""
    return str(tmp_path / "lmtp")


@contextmanager
def running(
    address: UnixAddress | TCPAddress,
    post: Post,
    folder: Path,
    limits: ListenerLimits | None = None,
    session_limits: Limits | None = None,
) -> Iterator[Running]:
    """Run a listener."""
    listener = Listener(
        address, "mail.example.com", accept, post.deliver, str(folder), limits, session_limits
    )
    held = Running(listener)
    try:
        held.call(listener.start())
        yield held
    finally:
        post.open.set()
        held.end()
        assert listener.memory.used == 0
        assert os.listdir(folder) == []


@pytest.fixture
def start(post: Post, path: str, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a listener on the path, with some limits."""
    folder = tmp_path / "files"
    folder.mkdir()
    with ExitStack() as stack:

        def run(
            limits: ListenerLimits | None = None,
            session_limits: Limits | None = None,
            address: UnixAddress | TCPAddress | None = None,
        ) -> Running:
            context = running(address or UnixAddress(path), post, folder, limits, session_limits)
            return stack.enter_context(context)

        yield run


def received(held: Running) -> int:
    """Return how many bytes of messages that have not ended the listener has."""
    messages = [session._message for session in list(held.listener._sessions)]
    return sum(message.size for message in messages if message is not None)


def wait_until(true: Callable[[], bool]) -> None:
    """Wait until something holds, for ten seconds at most."""
    end = time.monotonic() + 10.0
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# -- messages --------------------------------------------------------------------------------------


def test_a_message_arrives(start: Start, post: Post, path: str) -> None:
    """A message is delivered with its envelope and its bytes, and each recipient has a reply."""
    start()
    with Client(path) as client:
        client.greet()
        codes = client.begin("s@example.org", ["a@b", "nobody@b", "c@d"], " SMTPUTF8 SIZE=9")
        assert codes == ["250 2.1.0", "250 2.1.5", "550 5.1.1", "250 2.1.5", "354"]
        client.send(b"Subject: x\r\n\r\n..\r\n.\r\n")
        assert client.codes(2) == ["250 2.6.0", "250 2.6.0"]
        assert client.command(b"QUIT") == "221 2.0.0"
        assert client.line() == b""
    [(arrival, raw)] = post.arrivals
    assert raw == b"Subject: x\n\n.\n"
    assert (arrival.sender, arrival.recipients) == ("s@example.org", ("a@b", "c@d"))
    assert arrival.smtputf8


def test_who_stops_is_not_waited_for(start: Start, path: str) -> None:
    """A message that is being sent counts as coming, but not once its client has stopped."""
    held = start()

    async def ask() -> int:
        return held.listener.receiving

    def receiving() -> int:
        return asyncio.run_coroutine_threadsafe(ask(), held.loop).result(10)

    with Client(path) as client:
        client.greet()
        assert receiving() == 0

        def seen_coming() -> bool:
            client.begin("", ["a@b"])
            client.send(b"Subject: x\r\n")
            seen = receiving() == 1
            client.send(b".\r\n")
            assert client.codes(1) == ["250 2.6.0"]
            return seen

        # A moment is short, and this machine may be busy.
        wait_until(seen_coming)
        client.begin("", ["a@b"])
        client.send(b"Subject: x\r\n")
        wait_until(lambda: received(held) > 0)
        wait_until(lambda: receiving() == 0)
        client.send(b".\r\n")
        assert client.codes(1) == ["250 2.6.0"]


def _hosts() -> Iterator[str]:
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        # Many a container has no IPv6.
        with suppress(OSError):
            socket.create_server((host, 0), family=family).close()
            yield host


@pytest.mark.parametrize("host", list(_hosts()))
def test_a_port(start: Start, post: Post, host: str) -> None:
    """A port of the loopback interface serves as well as a unix socket."""
    held = start(address=TCPAddress(host, 0))
    assert held.listener.port
    with socket.create_connection((host, held.listener.port), timeout=10) as plain:
        plain.sendall(b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@b>\r\nDATA\r\nx\r\n.\r\nQUIT\r\n")
        said = b""
        while data := plain.recv(4096):
            said += data
    assert said.endswith(b"250 2.6.0 stored\r\n221 2.0.0 goodbye\r\n")
    assert [raw for _, raw in post.arrivals] == [b"x\n"]


def test_several_messages_in_one_packet(start: Start, post: Post, path: str) -> None:
    """Messages that are sent without waiting are delivered one after the other."""
    start()
    with Client(path) as client:
        client.greet()
        one = b"MAIL FROM:<>\r\nRCPT TO:<a@b>\r\nDATA\r\n%d\r\n.\r\n"
        client.send(b"".join(one % number for number in range(200)) + b"QUIT\r\n")
        assert client.codes(801)[3::4] == ["250 2.6.0"] * 200
    assert [raw for _, raw in post.arrivals] == [b"%d\n" % number for number in range(200)]


def test_many_sessions_at_once(start: Start, post: Post, path: str) -> None:
    """Sessions get along with one another, and what they send is not mixed up."""
    start()
    bodies = [b"%d " % number * 20_000 + b"\r\n" for number in range(10)]

    def send(number: int) -> None:
        with Client(path) as client:
            client.greet()
            for _ in range(10):
                assert client.deliver(f"{number}@x", ["a@b"], bodies[number]) == ["250 2.6.0"]

    threads = [threading.Thread(target=send, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(post.arrivals) == 100
    for arrival, raw in post.arrivals:
        assert raw == bodies[int(arrival.sender[:-2])][:-2] + b"\n"


def test_a_large_message_is_in_a_file(start: Start, post: Post, path: str) -> None:
    """A message beyond the threshold is handed over as a file, others as bytes."""
    held = start(ListenerLimits(message_memory=100_000))
    body = (b"y" * 98 + b"\r\n") * 50_000
    with Client(path) as client:
        client.greet()
        for part in (body, body[:100_000], body[:102_100]):
            assert client.deliver("", ["a@b"], part) == ["250 2.6.0"]
    assert [raw for _, raw in post.arrivals] == [
        part.replace(b"\r\n", b"\n") for part in (body, body[:100_000], body[:102_100])
    ]
    assert [arrival.raw is None for arrival, _ in post.arrivals] == [True, False, True]
    for arrival, _ in post.arrivals:
        assert arrival.file is None or arrival.file.closed
    assert held.listener.memory.used == 0


def test_memory_of_all_messages_is_bounded(start: Start, post: Post, path: str) -> None:
    """Beyond the memory for all messages they go to files, and nobody waits for anybody."""
    held = start(ListenerLimits(message_memory=100_000, memory=250_000))
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(path)) for _ in range(5)]
        for client in clients:
            client.greet()
            assert client.begin("", ["a@b"])[-1] == "354"
            client.send(b"x" * 90_000)
        wait_until(lambda: received(held) == 450_000)
        assert held.listener.memory.used == 180_000
        for client in clients:
            client.send(b"\r\n.\r\n")
            assert client.codes(1) == ["250 2.6.0"]
            assert held.listener.memory.used <= 250_000
    assert sorted(arrival.raw is None for arrival, _ in post.arrivals) == [
        *(False, False, True, True, True)
    ]


def test_an_oversize_message(start: Start, post: Post, path: str) -> None:
    """A message beyond the limit is read to its end, and refused for each recipient."""
    held = start(ListenerLimits(message_memory=1000), Limits(max_size=5000))
    with Client(path) as client:
        client.greet()
        assert client.command(b"MAIL FROM:<> SIZE=5001") == "552 5.3.4"
        body = (b"z" * 98 + b"\r\n") * 100_000
        assert client.deliver("", ["a@b", "c@d"], body) == ["552 5.3.4", "552 5.3.4"]
        assert client.deliver("", ["a@b"], b"ok\r\n") == ["250 2.6.0"]
    assert [raw for _, raw in post.arrivals] == [b"ok\n"]
    assert held.listener.memory.used == 0


def test_bare_line_ends(start: Start, post: Post, path: str) -> None:
    """A message with a lone LF is refused for each recipient, and the next one arrives."""
    start()
    with Client(path) as client:
        client.greet()
        assert client.deliver("", ["a@b", "c@d"], b"a\n.\nb\r\n") == ["554 5.6.0"] * 2
        assert client.deliver("", ["a@b"], b"ok\r\n") == ["250 2.6.0"]
    assert [raw for _, raw in post.arrivals] == [b"ok\n"]


def test_long_lines(start: Start, post: Post, path: str) -> None:
    """A line of text may have any length, a command may not."""
    start()
    with Client(path) as client:
        client.greet()
        client.send(b"MAIL FROM:<" + b"x" * 3_000_000 + b"@b>\r\n")
        assert client.codes(1) == ["500 5.5.2"]
        assert client.deliver("", ["a@b"], b"x" * 3_000_000 + b"\r\n") == ["250 2.6.0"]
    assert [len(raw) for _, raw in post.arrivals] == [3_000_001]


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [b"X-Fail: yes", b"X-Miscount: yes"])
def test_a_failed_delivery(
    start: Start, post: Post, path: str, caplog: pytest.LogCaptureFixture, header: bytes
) -> None:
    """A delivery that fails defers each recipient, is logged, and the session goes on."""
    start()
    with caplog.at_level(logging.ERROR), Client(path) as client:
        client.greet()
        assert client.deliver("", ["a@b", "c@d"], header + b"\r\n") == ["451 4.3.0"] * 2
        assert client.deliver("", ["a@b"], b"ok\r\n") == ["250 2.6.0"]
    assert len(caplog.records) == 1


def test_a_defect_of_the_delivery(
    start: Start, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the client cannot be told what became of its message, it is logged and cut off."""
    held = start()
    with caplog.at_level(logging.ERROR), Client(path) as client:
        client.greet()
        client.begin("", ["a@b"])
        client.send(b"X-Nonsense: yes\r\n.\r\n")
        assert client.line() == b""
        wait_until(lambda: not held.listener._sessions)
    assert len(caplog.records) == 1


def test_a_recipient_that_cannot_be_decided_on(
    start: Start, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where accepting raises, the recipient is deferred, it is logged, and others are accepted."""
    start()
    with caplog.at_level(logging.ERROR), Client(path) as client:
        client.greet()
        codes = client.begin("", ["failure@b", "a@b"])
        assert codes == ["250 2.1.0", "451 4.3.0", "250 2.1.5", "354"]
    assert len(caplog.records) == 1


def test_no_space(
    start: Start, post: Post, path: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A message that cannot be stored is deferred at its end; small ones still arrive."""
    start(ListenerLimits(message_memory=10))
    (tmp_path / "files").rmdir()
    try:
        with Client(path) as client:
            client.greet()
            body = b"x" * 20 + b"\r\n"
            assert client.deliver("", ["a@b", "c@d"], body * 10_000) == ["452 4.3.1"] * 2
            one = b"MAIL FROM:<>\r\nRCPT TO:<a@b>\r\nDATA\r\n" + body + b".\r\n"
            client.send(one * 2000)
            assert client.codes(8000)[3::4] == ["452 4.3.1"] * 2000
            assert client.deliver("", ["a@b"], b"ok\r\n") == ["250 2.6.0"]
    finally:
        (tmp_path / "files").mkdir()
    assert [raw for _, raw in post.arrivals] == [b"ok\n"]
    assert "No such file" in caplog.text


def test_files_that_cannot_grow(start: Start, post: Post, path: str) -> None:
    """A message that the file system has no room for is deferred, and the next one arrives."""
    start(ListenerLimits(message_memory=1000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with Client(path) as client:
            client.greet()
            body = b"x" * 998 + b"\r\n"
            assert client.deliver("", ["a@b"], body * 1000) == ["452 4.3.1"]
            assert client.deliver("", ["a@b"], body * 100) == ["250 2.6.0"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [len(raw) for _, raw in post.arrivals] == [99_900]


# -- clients that misbehave ------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [1 << 20, 10])
def test_a_client_that_leaves_within_a_message(
    start: Start, post: Post, path: str, threshold: int
) -> None:
    """Without its end there is no message, and what had come of it is freed."""
    held = start(ListenerLimits(message_memory=threshold))
    with Client(path) as client:
        client.greet()
        assert client.begin("", ["a@b"])[-1] == "354"
        client.send(b"some of it\r\n.\r")
        wait_until(lambda: held.listener.memory.used > 0 or threshold == 10)
    wait_until(lambda: not held.listener._sessions)
    assert held.listener.memory.used == 0
    with Client(path) as client:
        client.greet()
        assert client.deliver("", ["a@b"], b"ok\r\n") == ["250 2.6.0"]
    assert [raw for _, raw in post.arrivals] == [b"ok\n"]


def test_a_client_that_leaves_before_the_answer(start: Start, post: Post, path: str) -> None:
    """The delivery of a complete message goes on when the client does not wait for it."""
    held = start()
    post.open.clear()
    with Client(path) as client:
        client.greet()
        client.begin("", ["a@b"])
        client.send(b"x\r\n.\r\n")
        assert post.begun.acquire(timeout=10)
    wait_until(lambda: not held.listener._sessions)
    assert post.arrivals == []
    post.open.set()
    wait_until(lambda: not held.listener._deliveries)
    assert [raw for _, raw in post.arrivals] == [b"x\n"]


def test_idle_clients(start: Start, path: str) -> None:
    """A client that says nothing for too long is told so, and is gone, within a message too."""
    start(ListenerLimits(idle_timeout=0.2))
    with Client(path) as idle, Client(path) as within:
        within.greet()
        assert within.begin("", ["a@b"])[-1] == "354"
        within.send(b"something")
        assert idle.codes(2) == ["220 mail.", "421 4.4.2"]
        assert within.codes(1) == ["421 4.4.2"]
        assert idle.line() == within.line() == b""


def test_slow_clients(start: Start, post: Post, path: str) -> None:
    """A client that sends a byte now and then has no longer than others for its message."""
    start(ListenerLimits(message_timeout=0.5))
    with Client(path) as client:
        client.greet()
        assert client.begin("", ["a@b"])[-1] == "354"
        client.socket.settimeout(0.02)
        said = b""
        while not said:
            client.send(b"x")
            try:
                said = client.line()
            except TimeoutError:
                said = b""
        assert said.startswith(b"421 4.4.2")
    assert post.arrivals == []


def test_the_answer_may_take_its_time(start: Start, post: Post, path: str) -> None:
    """While a message is being delivered no time-out strikes, and the client's time begins anew."""
    start(ListenerLimits(idle_timeout=0.2, message_timeout=0.3))
    post.open.clear()
    with Client(path) as client:
        client.greet()
        client.begin("", ["a@b"])
        client.send(b"x\r\n.\r\n")
        time.sleep(0.6)
        post.open.set()
        assert client.codes(1) == ["250 2.6.0"]
        assert client.command(b"NOOP") == "250 2.0.0"


def test_a_client_that_does_not_listen(start: Start, path: str) -> None:
    """Replies that nobody takes stop the reading, and then end the session."""
    held = start(
        ListenerLimits(idle_timeout=0.5), Limits(max_idle_commands=10**9, max_errors=10**9)
    )
    with Client(path) as client:
        client.greet()
        client.socket.settimeout(0.2)
        commands = b"HELP\r\n" * 1_000_000
        with pytest.raises(TimeoutError):
            client.send(commands)
        wait_until(lambda: not held.listener._sessions)


def test_a_client_that_listens_late(start: Start, path: str) -> None:
    """Replies that wait for the client all arrive when it takes them."""
    start(None, Limits(max_idle_commands=10**9))
    with Client(path) as client:
        client.greet()
        sending = threading.Thread(target=client.send, args=(b"HELP\r\n" * 100_000,))
        sending.start()
        time.sleep(0.3)
        assert client.codes(100_000) == ["214 2.0.0"] * 100_000
        sending.join()


def test_a_stalled_client_costs_the_others_nothing(start: Start, post: Post, path: str) -> None:
    """While clients stall in every state, another one's messages arrive."""
    start(ListenerLimits(connections=10, message_memory=10_000, memory=20_000))
    with ExitStack() as stack:
        for sent in (b"", b"LH", b"LHLO x\r\n", b"LHLO x\r\nMAIL FROM:<>\r\n"):
            stack.enter_context(Client(path)).send(sent)
        for size in (10, 9_000, 9_000, 9_000, 100_000):
            client = stack.enter_context(Client(path))
            client.greet()
            assert client.begin("", ["a@b"])[-1] == "354"
            client.send(b"x" * size)
        with Client(path) as client:
            client.greet()
            for _ in range(20):
                assert client.deliver("", ["a@b"], b"y" * 9_000 + b"\r\n") == ["250 2.6.0"]
    assert len(post.arrivals) == 20


def test_a_flood_of_connections(start: Start, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Connections beyond the limit are turned away with 421, and the others go on."""
    held = start(ListenerLimits(connections=5))
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(path)) for _ in range(5)]
        for client in clients:
            client.greet()
        for _ in range(50):
            with Client(path) as other:
                assert other.codes(1) == ["421 4.3.2"]
                assert other.line() == b""
        for client in clients:
            assert client.deliver("", ["a@b"], b"ok\r\n") == ["250 2.6.0"]
        assert clients[0].command(b"QUIT") == "221 2.0.0"
        wait_until(lambda: len(held.listener._sessions) == 4)
        with Client(path) as client:
            client.greet()
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


# -- stopping --------------------------------------------------------------------------------------


def test_stopping(start: Start, post: Post, path: str) -> None:
    """Idle sessions end at once, those within a message with its answer, and nobody comes in."""
    held = start()
    with Client(path) as idle, Client(path) as within, Client(path) as waiting:
        for client in (idle, within, waiting):
            client.greet()
        assert within.begin("", ["a@b"])[-1] == "354"
        within.send(b"x")
        waiting.begin("", ["a@b"])
        post.open.clear()
        waiting.send(b"y\r\n.\r\n")
        assert post.begun.acquire(timeout=10)
        stopping = threading.Thread(target=held.stop, args=(20.0,))
        stopping.start()
        assert idle.codes(1) == ["421 4.3.2"]
        assert idle.line() == b""
        with pytest.raises(FileNotFoundError):
            Client(path)
        post.open.set()
        assert waiting.codes(2) == ["250 2.6.0", "421 4.3.2"]
        within.send(b"\r\n.\r\nMAIL FROM:<>\r\n")
        assert within.codes(1) == ["250 2.6.0"]
        assert within.line()[:3] in (b"250", b"421")
        stopping.join()
    assert sorted(raw for _, raw in post.arrivals) == [b"x\n", b"y\n"]


def test_stopping_has_an_end(start: Start, post: Post, path: str) -> None:
    """Sessions that outlast the grace are broken off, and the delivery of one is cancelled."""
    held = start()
    with Client(path) as within, Client(path) as waiting:
        for client in (within, waiting):
            client.greet()
            assert client.begin("", ["a@b"])[-1] == "354"
        post.open.clear()
        waiting.send(b"y\r\n.\r\n")
        assert post.begun.acquire(timeout=10)
        held.stop(0.2)
        assert within.line() == waiting.line() == b""
    assert post.cancelled == 1
    assert post.arrivals == []


# -- addresses -------------------------------------------------------------------------------------


def test_the_sockets_mode_and_group(start: Start, path: str) -> None:
    """The socket has the mode and the group that were asked for, whatever the umask."""
    group = 4242 if os.geteuid() == 0 else os.getgid()
    before = os.umask(0)
    try:
        start(address=UnixAddress(path, 0o620, group))
    finally:
        os.umask(before)
    status = os.stat(path)
    assert stat.S_IMODE(status.st_mode) == 0o620
    assert status.st_gid == group


def test_a_stale_socket_is_replaced(start: Start, path: str) -> None:
    """A socket that a dead process left, and a half-made one, do not stand in the way."""
    for stale in (path, path + ".new"):
        left = socket.socket(socket.AF_UNIX)
        left.bind(stale)
        left.close()
    start()
    with Client(path) as client:
        client.greet()
    assert not os.path.exists(path + ".new")


def test_a_live_socket_is_left_alone(start: Start, path: str) -> None:
    """A socket that another process listens on is not taken away from it."""
    start()
    with pytest.raises(TemporaryError, match="another process listens"):
        start()
    with Client(path) as client:
        client.greet()


def test_a_busy_socket_is_left_alone(start: Start, path: str) -> None:
    """A socket whose process has no time to accept is not taken for a stale one."""
    with ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(path)
        busy.listen(0)
        with pytest.raises(BlockingIOError):  # noqa: PT012  # the one that finds no room
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        with pytest.raises(TemporaryError, match="another process listens"):
            start()


def test_two_that_start_at_once(start: Start, path: str) -> None:
    """While another process prepares its socket in the folder, ours is refused."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(TemporaryError, match="about to listen"):
            start()
    finally:
        os.close(folder)


def test_a_path_that_is_too_long(start: Start, tmp_path: Path) -> None:
    """A path that no socket can have is refused, and leaves nothing behind."""
    with pytest.raises(OSError, match="too long"):
        start(address=UnixAddress(str(tmp_path / ("x" * 108))))
    assert os.listdir(tmp_path) == ["files"]


def test_what_is_no_socket_is_left_alone(start: Start, path: str) -> None:
    """A file in the socket's place is not removed."""
    Path(path).write_text("precious")
    with pytest.raises(PermanentError, match="no socket"):
        start()
    assert Path(path).read_text() == "precious"


def test_a_socket_that_was_replaced_is_not_removed(start: Start, path: str) -> None:
    """On stopping, a socket that another process has put in the place of ours stays."""
    held = start()
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        held.stop()
        assert os.path.exists(path)


def test_a_port_in_use(start: Start) -> None:
    """A port that another process listens on is refused in one line."""
    held = start(address=TCPAddress("127.0.0.1", 0))
    with pytest.raises(TemporaryError, match="another process listens on"):
        start(address=TCPAddress("127.0.0.1", held.listener.port))


@pytest.mark.parametrize("host", ["0.0.0.1", "192.0.2.1", "::", "mail.example.com"])
def test_only_loopback(host: str) -> None:
    """An address that other machines can reach is refused."""
    with pytest.raises(ValueError, match="address"):
        TCPAddress(host, 2424)
