"""``postoffice lmtp``: real processes, real clients, and what they bear."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ZODB.FileStorage import FileIterator

from postoffice.api import PostOffice
from postoffice.intake import handover
from postoffice.intake.archive import local_day
from postoffice.queue import BLOB_SIZE
from tests.deposits import ANN, BILLING, QUEUES, SALES
from tests.disks import small_disk
from tests.lmtp_client import Client
from tests.lmtp_service import NAP_SECONDS, Running, crlf, is_alive, wait_until
from tests.spools import FILE_STORAGE, Spool, digest, large, mail
from tests.zeo_server import ZeoServer, free_port

COMMAND = (sys.executable, "-m", "postoffice.cli")
STORED, LATER, NOBODY = "250 2.0.0", "451 4.3.0", "550 5.1.1"
SHUTTING_DOWN = b"421 4.3.2"


def site(
    folder: Path, options: str = "", *, uri: str = FILE_STORAGE, queues: str = QUEUES
) -> tuple[Spool, str]:
    """Return a site, and the socket on which its service is to listen."""
    socket = str(folder / "s")
    return Spool(
        folder / "site", f"lmtp = unix:{socket}\n{options}", queues=queues, uri=uri
    ), socket


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    """A running service on a FileStorage."""
    with Running(*site(tmp_path)) as running:
        yield running


@pytest.fixture
def hazardous(tmp_path: Path) -> Iterator[Running]:
    """A running service that some messages harm."""
    with Running(*site(tmp_path), hazards=True) as running:
        yield running


@pytest.fixture
def zeo(tmp_path: Path) -> Iterator[ZeoServer]:
    """A ZEO server that runs."""
    with ZeoServer(tmp_path / "zeo", tmp_path / "z") as server:
        yield server


@pytest.fixture
def client_of_zeo(tmp_path: Path, zeo: ZeoServer) -> Iterator[Running]:
    """A running service on that server's storage."""
    with Running(*site(tmp_path, uri=zeo.uri(1))) as running:
        yield running


def big(subject: str, size: int = BLOB_SIZE + 1000) -> bytes:
    """Return a message of so many bytes whose last line has an end."""
    return large(subject, size - 1) + b"\n"


# -- what comes, and where it goes -----------------------------------------------------------------


def test_a_message_is_in_its_queue(service: Running) -> None:
    """What is acknowledged is in the queues of its recipients, and all goes on to the end."""
    assert service.deliver(mail("one"), BILLING, SALES) == [STORED] * 2
    assert service.deliver(big("two", 2_000_000), BILLING) == [STORED]
    assert service.deliver(mail("three"), "in@elsewhere.example") == [STORED]
    assert "lmtp: listening at unix:" in service.said
    assert "to queue 'billing': matched" in service.said
    assert service.stop() == 0
    assert service.raws() == [mail("one"), big("two", 2_000_000)]
    assert service.raws("sales") == [mail("one")]
    (archived,) = service.spool.archived()
    assert archived.read_bytes().endswith(mail("three"))
    assert not os.path.lexists(str(service.address))
    assert "Traceback" not in service.said


def test_a_port(tmp_path: Path) -> None:
    """A service can listen on a port of the machine."""
    port = free_port()
    spool = Spool(tmp_path / "site", f"lmtp = 127.0.0.1:{port}\n", queues=QUEUES)
    with Running(spool, ("127.0.0.1", port)) as running:
        assert running.deliver(mail("one"), BILLING) == [STORED]
        assert running.stop() == 0
        assert running.raws() == [mail("one")]


def test_the_way_in_of_what_is_handed_over(service: Running) -> None:
    """What ``deliver`` hands over came by a pipe; what a client of its own sends, by LMTP."""
    assert service.deliver(mail("one"), BILLING) == [STORED]
    client = handover.__file__
    words = [sys.executable, "-I", "-S", client, str(service.address), "20", "-f", ANN]
    subprocess.run([*words, "--", BILLING], input=mail("two"), check=True, capture_output=True)
    assert service.stop() == 0
    with PostOffice(service.spool.ini) as office, office.queue("billing") as queue:
        assert [(one.subject, one.way) for one in queue.entries()] == [
            ("one", "lmtp"),
            ("two", "pipe"),
        ]


def test_again(service: Running) -> None:
    """What comes again is acknowledged and stored once, after a restart too."""
    for raw in (mail("one"), big("two", 2_000_000)):
        for _ in range(2):
            assert service.deliver(raw, BILLING) == [STORED]
    assert service.stop() == 0
    with Running(service.spool, service.address) as again:
        assert again.deliver(mail("one"), BILLING) == [STORED]
        assert again.stop() == 0
    assert again.raws() == [mail("one"), big("two", 2_000_000)]


def test_recipients_are_refused_at_once(tmp_path: Path) -> None:
    """With ``unrouted = reject`` a recipient that no queue can take is refused at RCPT."""
    with Running(*site(tmp_path, "unrouted = reject\n")) as running:
        with running.client() as client:
            assert client.begin(ANN, ["in@elsewhere.example", BILLING]) == [
                "250 2.1.0",
                NOBODY,
                "250 2.1.5",
                "354",
            ]
            client.send(crlf(mail("one")) + b".\r\n")
            assert client.codes(1) == [STORED]
        assert running.stop() == 0
        assert running.raws() == [mail("one")]


def test_messages_are_refused_after_data(tmp_path: Path) -> None:
    """Where the message decides, too, who is unrouted is refused when it has come."""
    queues = "[queue:list]\nfilters =\n    header_regexp: ^List-Id:\n"
    with Running(*site(tmp_path, "unrouted = reject\n", queues=queues)) as running:
        assert running.deliver(mail("one"), BILLING) == [NOBODY]
        assert running.deliver(mail("one"), BILLING) == [NOBODY]
        assert running.deliver(mail("two", List_Id="<l.example>"), BILLING) == [STORED]


# -- one commit for several ------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["file", "zeo"])
def test_sessions_share_a_commit(tmp_path: Path, storage: str) -> None:
    """What comes from many sessions while a commit is made is one commit, the next one."""
    with ExitStack() as stack:
        folder, uri = tmp_path / "site", FILE_STORAGE
        if storage == "zeo":
            server = stack.enter_context(ZeoServer(tmp_path / "zeo", tmp_path / "z"))
            folder, uri = server.folder, server.uri()
        running = stack.enter_context(Running(*site(tmp_path, uri=uri)))
        assert running.deliver(mail("first"), BILLING) == [STORED]
        before = transactions(folder)
        clients = [stack.enter_context(running.client()) for _ in range(20)]
        # Whatever takes the process that commits so long.
        running.process.send_signal(signal.SIGSTOP)
        for number, client in enumerate(clients):
            assert client.begin(ANN, [BILLING])[-1] == "354"
            client.send(crlf(mail(f"mail {number}")) + b".\r\n")
        with running.client() as last:
            # Once this one is greeted, the messages of the others have been read.
            last.command(b"NOOP")
        time.sleep(0.2)
        running.process.send_signal(signal.SIGCONT)
        assert [client.codes(1) for client in clients] == [[STORED]] * 20
        # The first may have been read before the others were written.
        assert transactions(folder) - before <= 2
        assert running.stop() == 0
        expected = {mail(f"mail {number}") for number in range(20)} | {mail("first")}
        assert set(running.raws()) == expected


def transactions(folder: Path) -> int:
    """Return how many transactions the FileStorage in a folder has."""
    return sum(1 for _ in FileIterator(str(folder / "depot.fs")))


def test_who_waits_for_whom(service: Running, tmp_path: Path) -> None:
    """A lone message waits for nobody, and none waits for a client that stopped in its message."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: what is waited for cannot be seen")
    service.deliver(mail("first"), BILLING)
    log = tmp_path / "calls"
    with (
        service.client() as client,
        service.client() as stalled,
        subprocess.Popen(
            [
                *("strace", "-p", str(service.process.pid), "-o", str(log)),
                *("-e", "trace=select,pselect6,poll,ppoll,clock_nanosleep"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        ) as tracer,
    ):
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        for number in range(5):
            assert client.deliver(ANN, [BILLING], crlf(mail(f"mail {number}"))) == [STORED]
        assert stalled.begin(ANN, [BILLING])[-1] == "354"
        stalled.send(b"Subject: never\r\n")
        time.sleep(0.1)
        for number in range(5, 10):
            assert client.deliver(ANN, [BILLING], crlf(mail(f"mail {number}"))) == [STORED]
        tracer.send_signal(signal.SIGINT)
    calls = log.read_text()
    assert calls.count("select") + calls.count("poll") >= 10
    assert re.findall(r"(?:tv_u?sec|tv_nsec)=[1-9]\d*|, [1-9]\d*\) = 0", calls) == []


# -- stopping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stopping_finishes_what_is_in_hand(service: Running, how: signal.Signals) -> None:
    """Told to stop, it takes no new client and lets the messages that have begun be finished."""
    service.deliver(mail("first"), BILLING)
    with service.client() as busy, service.client() as idle:
        assert busy.begin(ANN, [BILLING])[-1] == "354"
        busy.send(crlf(mail("one"))[:30])
        service.process.send_signal(how)
        assert idle.line().startswith(SHUTTING_DOWN)
        assert not service.accepts()
        assert service.process.poll() is None
        busy.send(crlf(mail("one"))[30:] + b".\r\n")
        assert busy.codes(1) == [STORED]
        assert busy.line().startswith(SHUTTING_DOWN)
    assert service.process.wait(60) == 0
    assert service.raws() == [mail("first"), mail("one")]
    assert "Traceback" not in service.said


def test_stopping_before_anything_has_come(service: Running) -> None:
    """A service to which nothing has come stops as well, and others can have its database."""
    assert service.stop() == 0
    assert service.raws() == []


def test_an_interrupt_at_the_terminal(tmp_path: Path) -> None:
    """An interrupt that reaches both processes at once is no other than one that is passed on."""
    spool, socket = site(tmp_path)
    with Running(spool, socket, new_session=True) as service, service.client() as busy:
        assert busy.begin(ANN, [BILLING])[-1] == "354"
        os.killpg(service.process.pid, signal.SIGINT)
        wait_until(lambda: not service.accepts())
        busy.send(crlf(mail("one")) + b".\r\n")
        assert busy.codes(1) == [STORED]
        assert service.process.wait(60) == 0
        assert service.raws() == [mail("one")]


# -- processes that die ----------------------------------------------------------------------------


def test_the_receiver_is_killed(service: Running) -> None:
    """Its sessions end; the next ones are served, and what comes again is stored once."""
    service.deliver(mail("first"), BILLING)
    with service.client() as busy, service.client() as idle:
        assert busy.begin(ANN, [BILLING])[-1] == "354"
        service.kill_receiver()
        assert (busy.line(), idle.line()) == (b"", b"")
    assert "the receiver ended: SIGKILL; another is started" in service.said
    for raw in (mail("one"), mail("first")):
        assert service.deliver(raw, BILLING) == [STORED]
    assert service.stop() == 0
    assert service.raws() == [mail("first"), mail("one")]


def test_a_deadly_message(hazardous: Running) -> None:
    """A message at which the receiver dies, every time, costs the sessions of that moment only."""
    hazardous.deliver(mail("first"), BILLING)
    for number in range(2):
        pid = hazardous.receiver
        with hazardous.client() as client:
            assert client.begin(ANN, [BILLING])[-1] == "354"
            client.send(crlf(mail("deadly")) + b".\r\n")
            assert client.line() == b""
        hazardous.wait_for_another(pid)
        assert hazardous.deliver(mail(f"mail {number}"), BILLING) == [STORED]
    assert hazardous.stop() == 0
    assert hazardous.raws() == [mail("first"), mail("mail 0"), mail("mail 1")]


def test_random_kills_of_the_receiver(service: Running) -> None:
    """Clients that send again what was not acknowledged have each message stored once."""
    chance = random.Random(1)
    names = [[f"mail {which} {number}" for number in range(40)] for which in range(3)]
    raws = {
        name: big(name) if chance.random() < 0.1 else mail(name) for one in names for name in one
    }

    def send(mine: list[str]) -> None:
        for name in mine:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    if service.deliver(raws[name], BILLING, SALES) == [STORED] * 2:
                        break
                except (OSError, AssertionError):
                    time.sleep(0.02)

    threads = [threading.Thread(target=send, args=(one,)) for one in names]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(chance.uniform(0.1, 0.4))
        service.kill_receiver()
    for thread in threads:
        thread.join()
    assert service.stop() == 0
    expected = Counter(digest(raw) for raw in raws.values())
    assert Counter(map(digest, service.raws())) == expected
    assert Counter(map(digest, service.raws("sales"))) == expected


def test_the_service_is_killed(service: Running) -> None:
    """Its receiver ends, messages in hand come again, and another service can start at once."""
    service.deliver(mail("first"), BILLING)
    service.kill_receiver()
    service.deliver(mail("second"), BILLING)
    receiver = service.receiver
    with service.client() as busy, service.client() as idle:
        assert busy.begin(ANN, [BILLING])[-1] == "354"
        busy.send(crlf(mail("one")))
        service.process.kill()
        service.process.wait()
        assert idle.line().startswith(SHUTTING_DOWN)
        with Running(service.spool, service.address) as other:
            assert other.deliver(mail("other"), BILLING) == [STORED]
            busy.send(b".\r\n")
            assert busy.codes(1) == [LATER]
            wait_until(lambda: not is_alive(receiver))
            assert other.deliver(mail("one"), BILLING) == [STORED]
            assert other.stop() == 0
        names = ("first", "second", "other", "one")
        assert other.raws() == [mail(name) for name in names]


# -- storages that are away ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ZeoServer.how)
def test_a_storage_that_is_gone(zeo: ZeoServer, client_of_zeo: Running, how: str) -> None:
    """While the database is away clients are told to try again; when it is back all is well."""
    service = client_of_zeo
    assert service.deliver(mail("before"), BILLING) == [STORED]
    zeo.stop(how)
    with service.client() as client:
        for raw in (mail("one"), big("two")):
            assert client.deliver(ANN, [BILLING, SALES], crlf(raw)) == [LATER] * 2
        assert "nothing can be stored now" in service.said
        zeo.start()
        for raw in (mail("one"), big("two")):
            stored_at_last(client, raw)
    assert service.stop() == 0
    assert service.raws() == [mail("before"), mail("one"), big("two")]
    assert service.raws("sales") == [mail("one"), big("two")]
    assert "Traceback" not in service.said


def stored_at_last(client: Client, raw: bytes) -> None:
    """Deliver a message until it is stored."""
    until = time.monotonic() + 60
    while (codes := client.deliver(ANN, [BILLING, SALES], crlf(raw))) != [STORED] * 2:
        assert codes == [LATER] * 2
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_storage_that_is_not_there_yet(tmp_path: Path) -> None:
    """A service starts, and tells clients to try again, before its database is there."""
    zeo = ZeoServer(tmp_path / "zeo", tmp_path / "z")
    with Running(*site(tmp_path, uri=zeo.uri(1))) as service, service.client() as client:
        for _ in range(2):
            assert client.deliver(ANN, [BILLING], crlf(mail("one"))) == [LATER]
        with zeo:
            stored_at_last(client, mail("one"))
            assert service.stop() == 0
            assert service.raws() == service.raws("sales") == [mail("one")]
    assert "Traceback" not in service.said


def test_a_start_without_the_database(tmp_path: Path) -> None:
    """A service that starts before its database says so at once, and says when it is there."""
    zeo = ZeoServer(tmp_path / "zeo", tmp_path / "z")
    lines = ["ERROR nothing can be stored", "lmtp: listening at", "WARNING the database can be"]
    with Running(*site(tmp_path, uri=zeo.uri(1)), quiet=True) as service:
        wait_until(lambda: lines[1] in service.said)
        with zeo:
            wait_until(lambda: lines[2] in service.said)
            assert service.stop() == 0
    said = service.said.splitlines()
    assert len(said) == len(lines)
    for wanted, line in zip(lines, said, strict=True):
        assert wanted in line


def test_a_full_disk_that_is_freed(tmp_path: Path) -> None:
    """Once there is room again it is noticed and said, though no message comes meanwhile."""
    disk = tmp_path / "disk"
    waste = disk / "waste"
    uri = f"file://{disk}/depot.fs?blobstorage_dir={disk}/blobs"
    with small_disk(disk), Running(*site(tmp_path, uri=uri), quiet=True) as service:
        waste.write_bytes(b"x" * 900_000)
        assert service.deliver(big("one", 200_000), BILLING) == ["451 4.3.0"]
        said = "ERROR nothing can be stored now: "
        wait_until(lambda: said in service.said)
        # The first rehearsals fail too.
        time.sleep(2)
        assert "can be stored again" not in service.said
        waste.unlink()
        wait_until(lambda: "WARNING messages can be stored again" in service.said)
        assert service.said.count(said) == 1
        assert service.deliver(big("one", 200_000), BILLING) == [STORED]
        assert service.stop() == 0
        assert service.raws() == [big("one", 200_000)]


def test_the_archive_expires(tmp_path: Path) -> None:
    """A service removes what has expired in the archive, and stores what comes meanwhile."""
    spool, socket = site(tmp_path, "archive_keep = 30d\n")
    today, failed = f".{local_day(time.time()):%Y.%m.%d}", ".failed"
    for day in (".2020.01.01", ".2020.01.02", today, failed):
        for number in range(60):
            path = spool.maildir / day / "cur" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"raw")
    with Running(spool, socket) as service:
        assert service.deliver(mail("one"), BILLING) == [STORED]
        wait_until(lambda: not list(spool.maildir.glob(".2020*")))
        assert service.deliver(mail("two"), BILLING) == [STORED]
        assert service.stop() == 0
    for day in (today, failed):
        assert len(os.listdir(spool.maildir / day / "cur")) == 60
    assert "archive of .2020.01.02 has expired" in service.said


def test_a_file_that_another_process_has(tmp_path: Path) -> None:
    """While another process has the FileStorage open, clients are told to try again."""
    spool, socket = site(tmp_path)
    with ExitStack() as stack:
        with PostOffice(spool.ini) as office:
            office.reconcile_queues()
            service = stack.enter_context(Running(spool, socket))
            client = stack.enter_context(service.client())
            assert client.deliver(ANN, [BILLING, SALES], crlf(mail("one"))) == [LATER] * 2
            assert "is locked by process" in service.said
        stored_at_last(client, mail("one"))


def test_random_kills_of_the_server(zeo: ZeoServer, client_of_zeo: Running) -> None:
    """A database server that is killed in the midst of commits doubles and loses nothing."""
    service = client_of_zeo
    chance = random.Random(2)
    raws = [[mail(f"mail {which} {number}") for number in range(60)] for which in range(2)]

    def send(mine: list[bytes]) -> None:
        with service.client() as client:
            for raw in mine:
                stored_at_last(client, raw)

    threads = [threading.Thread(target=send, args=(one,)) for one in raws]
    for thread in threads:
        thread.start()
    for _ in range(2):
        time.sleep(chance.uniform(0.05, 0.3))
        zeo.stop("SIGKILL")
        zeo.start()
    for thread in threads:
        thread.join()
    assert service.stop() == 0
    expected = Counter(digest(raw) for one in raws for raw in one)
    for queue in ("billing", "sales"):
        assert Counter(map(digest, service.raws(queue))) == expected


# -- messages that take their time -----------------------------------------------------------------


def test_a_slow_message(hazardous: Running) -> None:
    """A message that is long decided on is stored, and so are those that wait for it."""
    hazardous.deliver(mail("first"), BILLING)
    with ExitStack() as stack:
        clients = [stack.enter_context(hazardous.client()) for _ in range(4)]
        for client, subject in zip(clients, ("slow", "one", "two", "three"), strict=True):
            assert client.begin(ANN, [BILLING])[-1] == "354"
            client.send(crlf(mail(subject)))
        for client in clients:
            client.send(b".\r\n")
        # No client waits for as long as ten seconds.
        assert NAP_SECONDS < 10
        assert [client.codes(1) for client in clients] == [[STORED]] * 4
    assert hazardous.stop() == 0
    assert len(hazardous.raws()) == 5


def test_an_expression_without_end(tmp_path: Path) -> None:
    """A message on which an expression takes for ever is set aside; the others are stored."""
    rules = "reject_filters =\n    body_regexp: ^(a|aa)+(?=$)\\1b\n"
    with Running(*site(tmp_path, rules)) as running:
        hanging = mail("hanging", "a" * 40_000 + "c\n")
        with running.client() as one, running.client() as two:
            assert one.begin(ANN, [BILLING])[-1] == two.begin(ANN, [BILLING])[-1] == "354"
            one.send(crlf(hanging) + b".\r\n")
            two.send(crlf(mail("well")) + b".\r\n")
            assert (one.codes(1), two.codes(1)) == ([STORED], [STORED])
        assert running.stop() == 0
        assert running.raws() == [mail("well")]
        (name,) = running.spool.set_aside()
        assert (running.spool.failed / name).read_bytes().endswith(hanging)
        assert "is set aside: limit exceeded" in running.said


def test_a_defect_is_set_aside(hazardous: Running) -> None:
    """A message that brings out a defect of a filter is kept for the administrator."""
    assert hazardous.deliver(mail("defect"), BILLING) == [STORED]
    assert hazardous.deliver(mail("one"), BILLING) == [STORED]
    assert hazardous.stop() == 0
    assert hazardous.raws() == [mail("one")]
    assert len(hazardous.spool.set_aside()) == 1


def test_memory_is_bounded(service: Running) -> None:
    """Sixty clients with as many large messages under way take no more memory than a few."""
    service.deliver(mail("first"), BILLING)
    raws = [big(f"mail {number}", 1_000_000) for number in range(60)]
    with ExitStack() as stack:
        clients = [stack.enter_context(service.client()) for _ in raws]
        for client, raw in zip(clients, raws, strict=True):
            assert client.begin(ANN, [BILLING])[-1] == "354"
            client.send(crlf(raw))
        for client in clients:
            client.send(b".\r\n")
        assert [client.codes(1) for client in clients] == [[STORED]] * 60
        most = sum(map(most_memory, (service.process.pid, service.receiver)))
    assert service.stop() == 0
    assert len(service.raws()) == 61
    assert most < 160_000_000


def most_memory(pid: int) -> int:
    """Return the most bytes of memory that a process has had."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


# -- what is wrong at the start --------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a file", "a listener", "no folder"])
def test_an_address_that_cannot_be_had(tmp_path: Path, what: str) -> None:
    """A service that cannot listen says why, and ends."""
    spool, socket = site(tmp_path)
    said = {
        "a file": f"{socket} is there and no socket",
        "a listener": f"another process listens on {socket}",
        "no folder": "there is no folder",
    }[what]
    with ExitStack() as stack:
        if what == "a file":
            Path(socket).touch()
        elif what == "a listener":
            stack.enter_context(Running(*site(tmp_path)))
        else:
            (tmp_path / "gone").mkdir()
            spool.configure(f"lmtp = unix:{tmp_path}/gone/s\n", QUEUES)
            (tmp_path / "gone").rmdir()
        done = subprocess.run(
            [*COMMAND, "-C", str(spool.ini), "lmtp"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode in (2, 69, 75)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


# -- what is logged --------------------------------------------------------------------------------

LOGGING = """
[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys = plain
[logger_root]
level = INFO
handlers = file
[handler_file]
class = FileHandler
args = ("%(here)s/log",)
formatter = plain
[formatter_plain]
format = %(message)s
"""


def test_both_processes_write_to_the_log(tmp_path: Path) -> None:
    """What the receiver logs comes into the file that the configuration names, and to no client."""
    with Running(*site(tmp_path, queues=QUEUES + LOGGING)) as running:
        log = running.spool.folder / "log"
        done: list[bytes] = []
        for _ in range(3):
            with ExitStack() as stack:
                clients = [stack.enter_context(running.client()) for _ in range(5)]
                with running.client() as leaver:
                    assert leaver.begin(ANN, [BILLING])[-1] == "354"
                    leaver.send(b"Subject: never\r\n\r\n")
                wait_until(lambda: log.read_text().count("left within a message") == len(done) + 1)
                assert [client.command(b"NOOP") for client in clients] == [STORED] * 5
            done.append(mail(f"mail {len(done)}"))
            assert running.deliver(done[-1], BILLING) == [STORED]
            running.kill_receiver()
        assert log.read_text().count("to queue 'billing'") == 3
