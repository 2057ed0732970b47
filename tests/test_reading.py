"""Reading spool files, and reading them in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from zope.interface import implementer

from postoffice.delivery import Prepared
from postoffice.exceptions import LimitExceeded
from postoffice.intake.reader import Reader, SpoolFile, Unreadable
from postoffice.intake.reading import ReaderProcess
from postoffice.interfaces import IFilter
from postoffice.message import Message
from postoffice.queue import BLOB_SIZE
from postoffice.routing import QueueRule, Routing, Verdict

MAILS = sorted((Path(__file__).parent / "mail").glob("*.eml"))
HEADER = b"From: a@example.net\nTo: b@example.com\nMessage-ID: <1@x>\nSubject: hello\n\n"


@implementer(IFilter)
class Misbehaving:
    """A filter that does what the Subject says, as a defect in any filter might."""

    description = "misbehaving"

    def __call__(self, message: Message) -> str | None:
        """Match, or not come back."""
        subject = message["Subject"] or ""
        if subject == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif subject == "kill once":
            marker = Path(str(message["X-Marker"]))
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        elif subject == "sleep":
            time.sleep(60)
        elif subject == "raise":
            raise ZeroDivisionError("a defect\nof two lines")
        elif subject == "memory":
            raise MemoryError
        elif subject == "limit":
            raise LimitExceeded("too much of it")
        return "matches"


ROUTING = Routing((), (QueueRule("app", (Misbehaving(),)),), max_message_size=1_000_000)


def spool_file(path: Path) -> SpoolFile:
    """Return what the spool's listing would say of a file."""
    status = path.lstat()
    return SpoolFile(str(path), path.name, status.st_mtime_ns, status.st_size)


def put(
    folder: Path, name: str, subject: str, body: bytes = b"body\n", more: str = ""
) -> SpoolFile:
    """Write a message and return its file."""
    path = folder / name
    path.write_bytes(
        f"From: a@example.net\nTo: b@example.com\nSubject: {subject}\n{more}\n".encode() + body
    )
    return spool_file(path)


@pytest.fixture
def reader() -> Reader:
    """Return a reader that queues everything that does not misbehave."""
    return Reader(ROUTING, None)


@pytest.fixture
def process(reader: Reader) -> Iterator[ReaderProcess]:
    """Return a reader process that gives a message two seconds."""
    process = ReaderProcess(reader, longest=2.0)
    yield process
    process.close()


def described(found: list[Prepared | Unreadable | None]) -> list[str]:
    """Return a word for each answer."""
    return [
        "nothing" if one is None else one.reason if isinstance(one, Unreadable) else one.source
        for one in found
    ]


def test_a_message_is_read_with_its_bytes_and_its_arrival(tmp_path: Path, reader: Reader) -> None:
    """What is read is the file's bytes, and its modification time is the arrival."""
    file = put(tmp_path, "1", "hello")
    os.utime(file.path, ns=(1_700_000_000_123_456_789,) * 2)
    found = reader.read(file)
    assert isinstance(found, Prepared)
    assert found.raw == Path(file.path).read_bytes()
    assert found.values["arrived"] == 1_700_000_000_123_456_789
    assert found.decision.verdict is Verdict.QUEUE


def test_what_is_no_message_is_not_there(tmp_path: Path, reader: Reader) -> None:
    """A symbolic link, a FIFO, a folder, a socket and a vanished file are passed over at once."""
    (tmp_path / "target").write_bytes(HEADER)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("link", "fifo", "folder", "socket"):
            assert reader.read(SpoolFile(str(tmp_path / name), name, 0, 0)) is None
    assert reader.read(SpoolFile(str(tmp_path / "vanished"), "vanished", 0, 0)) is None


@pytest.mark.parametrize("size", [0, BLOB_SIZE - 1, BLOB_SIZE, BLOB_SIZE + 1])
def test_large_messages_stay_in_their_file(tmp_path: Path, reader: Reader, size: int) -> None:
    """From the blob size on, the bytes are left in the file, and their digest is the same."""
    path = tmp_path / "1"
    raw = HEADER + b"x" * max(0, size - len(HEADER)) if size else b""
    path.write_bytes(raw)
    found = reader.read(spool_file(path))
    assert isinstance(found, Prepared)
    if size:
        assert found.raw == (raw if size < BLOB_SIZE else None)
        again = Reader(ROUTING, None).read(spool_file(path))
        assert isinstance(again, Prepared)
        assert found.duplicate == again.duplicate
    else:
        assert found.decision.reason == "no-sender"


@pytest.mark.parametrize("linesep", [b"\n", b"\r\n"])
def test_an_oversize_message_keeps_its_header(
    tmp_path: Path, reader: Reader, linesep: bytes
) -> None:
    """By size alone: the header stays, a notice stands for the body, and the mark says so."""
    raw = (
        HEADER.replace(b"\n\n", b'\nContent-Type: text/html;\n charset="x"\n\n') + b"x" * 1_000_000
    )
    (tmp_path / "1").write_bytes(raw.replace(b"\n", linesep))
    found = reader.read(spool_file(tmp_path / "1"))
    assert isinstance(found, Prepared)
    assert found.raw is not None
    kept = Message.from_bytes(found.raw)
    assert kept["Subject"] == "hello"
    assert "Content-Type" not in kept
    assert "larger than the limit of 1000000 bytes" in kept.get_payload()
    assert len(found.raw) < 1000
    assert found.decision.marks == ("Maximum Message Size Exceeded",)
    assert found.values["size"] == len(raw.replace(b"\n", linesep))
    assert found.raw.count(b"\r\n") == (found.raw.count(b"\n") if linesep == b"\r\n" else 0)


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        ("raise", "ZeroDivisionError in test_reading.py"),
        ("memory", "more memory"),
        ("limit", "limit exceeded: too much of it"),
    ],
)
def test_a_defect_costs_one_message(
    tmp_path: Path, reader: Reader, subject: str, reason: str
) -> None:
    """Whatever a filter raises, the message is unreadable with one line that says why."""
    found = reader.read_safely(put(tmp_path, "1", subject))
    assert isinstance(found, Unreadable)
    assert reason in found.reason
    assert "\n" not in found.reason


def test_every_mail_crosses_to_the_importer_unchanged(
    tmp_path: Path, reader: Reader, process: ReaderProcess
) -> None:
    """The process answers for each mail of tests/mail what reading it here answers."""
    files = [spool_file(path) for path in MAILS]
    process.submit(files)
    for file, found in zip(files, process.collect(), strict=True):
        here = reader.read_safely(file)
        if isinstance(here, Prepared) and isinstance(found, Prepared):
            assert found.to_wire() == here.to_wire()
        else:
            assert found == here


def test_batches_are_answered_in_order_one_ahead(tmp_path: Path, process: ReaderProcess) -> None:
    """A batch may be submitted before the one before is collected."""
    batches = [
        [put(tmp_path, f"{number}.{index}", "hello") for index in range(3)] for number in range(4)
    ]
    process.submit(batches[0])
    seen = []
    for ahead in [*batches[1:], None]:
        if ahead is not None:
            process.submit(ahead)
        seen.append(described(process.collect()))
    assert seen == [[file.name for file in batch] for batch in batches]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_message_that_kills_the_reader_is_set_aside_alone(
    tmp_path: Path, process: ReaderProcess, place: int
) -> None:
    """The others of its batch, and the batch behind, are read all the same."""
    names = [str(number) for number in range(5)]
    first = [put(tmp_path, name, "kill" if name == str(place) else "hello") for name in names]
    second = [put(tmp_path, "behind", "hello")]
    process.submit(first)
    process.submit(second)
    found = described(process.collect())
    assert found[place] == "reading it ended the reader: SIGKILL"
    assert [name for name in found if name in names] == [n for n in names if n != str(place)]
    assert described(process.collect()) == ["behind"]


def test_several_killers_in_one_batch(tmp_path: Path, process: ReaderProcess) -> None:
    """Each is found by itself."""
    files = [put(tmp_path, str(number), "kill" if number % 2 else "hello") for number in range(6)]
    process.submit(files)
    found = described(process.collect())
    assert found[::2] == ["0", "2", "4"]
    assert found[1::2] == ["reading it ended the reader: SIGKILL"] * 3


def test_a_message_is_not_blamed_for_one_death(tmp_path: Path, process: ReaderProcess) -> None:
    """A reader that was killed once, by whomever, reads the message again."""
    file = put(tmp_path, "1", "kill once", more=f"X-Marker: {tmp_path / 'marker'}\n")
    process.submit([file])
    assert described(process.collect()) == ["1"]


def test_a_message_that_never_ends_is_set_aside(tmp_path: Path, process: ReaderProcess) -> None:
    """After its time it is unreadable, and the next message is read."""
    process.submit([put(tmp_path, "1", "sleep"), put(tmp_path, "2", "hello")])
    found = described(process.collect())
    assert found == ["reading it ended the reader: it took longer than 2 seconds", "2"]


def test_a_file_that_the_machine_cannot_read_fails_the_run(
    tmp_path: Path, process: ReaderProcess
) -> None:
    """What is not the file's own fault is raised where the run is."""
    (tmp_path / "no folder").touch()
    process.submit([SpoolFile(str(tmp_path / "no folder" / "1"), "1", 0, 0)])
    with pytest.raises(NotADirectoryError):
        process.collect()


def test_the_process_ends_with_its_importer(tmp_path: Path, reader: Reader) -> None:
    """Closing ends it, and a second close does no harm."""
    process = ReaderProcess(reader)
    process.submit([put(tmp_path, "1", "hello")])
    process.collect()
    pid = process._pid
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_process_holds_no_lock_of_the_importer(tmp_path: Path, reader: Reader) -> None:
    """A descriptor of the importer, as its locks are, is closed in the reader."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    process = ReaderProcess(reader)
    process.submit([put(tmp_path, "1", "hello")])
    process.collect()
    held = {os.readlink(entry) for entry in Path(f"/proc/{process._pid}/fd").iterdir()}
    process.close()
    os.close(descriptor)
    assert str(tmp_path) not in held


@pytest.mark.parametrize("kind", ["link", "fifo", "other bytes"])
def test_a_file_that_was_swapped_meanwhile_is_left(
    tmp_path: Path, process: ReaderProcess, kind: str
) -> None:
    """What another put into the file's place after it was read is neither followed nor awaited."""
    body = b"x" * 100_000
    file = put(tmp_path, "1", "hello", body)
    process.submit([file])
    while process._progress[:] != b"\0" * len(process._progress):
        time.sleep(0.01)
    time.sleep(0.3)
    path = Path(file.path)
    (tmp_path / "foreign").write_bytes(b"y" * file.size)
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "foreign")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b"z" * file.size)
    assert process.collect() == [None]


@pytest.mark.parametrize("when", [-(10**18), 2 * 10**19 // 4])
def test_an_impossible_time_is_brought_to_a_possible_one(
    tmp_path: Path, reader: Reader, when: int
) -> None:
    """A modification time before 1970, or far in the future, is no obstacle."""
    file = put(tmp_path, "1", "hello")
    os.utime(file.path, ns=(when, when))
    found = reader.read(file)
    assert isinstance(found, Prepared)
    assert 0 <= found.values["arrived"] < 1 << 63
