"""The server of a database file: real processes, killed and started again, and who finds it."""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transaction
from persistent.mapping import PersistentMapping
from transaction.interfaces import TransientError
from ZEO.ClientStorage import ClientStorage
from ZEO.Exceptions import ServerException
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from postoffice.database import DatabaseMissing, open_database, open_for_inspection, open_soon
from postoffice.display import one_line
from postoffice.exceptions import DepotUnavailable
from postoffice.packing import Packing
from postoffice.storage_server import save_index
from postoffice.storage_socket import Presence, look
from postoffice.zeo_client import client_of
from tests.file_server import FileServer
from tests.sites import Site, mail

LONGEST = 30.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="file") as place:
        yield Path(place)


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    """The server of a file in that folder, not started yet."""
    prepared = FileServer(folder)
    try:
        yield prepared
    finally:
        prepared.stop("SIGKILL")


@contextlib.contextmanager
def opened(uri: str, opener: Callable[[str], DB] = open_database) -> Iterator[DB]:
    """Open a database, and close it."""
    database = opener(uri)
    try:
        yield database
    finally:
        transaction.abort()
        database.close()


def store(uri: str, name: str, value: object = True) -> None:
    """Store something below the root, in a transaction."""
    with opened(uri) as database:
        connection = database.open()
        connection.root()[name] = value
        transaction.commit()
        connection.close()


def names(uri: str, opener: Callable[[str], DB] = open_database) -> set[str]:
    """Return what is below the root."""
    with opened(uri, opener) as database:
        connection = database.open()
        found = set(connection.root())
        connection.close()
        return found


@contextlib.contextmanager
def run(program: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program of Python's in a process of its own, which is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_everybody_finds_the_server(server: FileServer) -> None:
    """While the server has the file, all that open its URI go through it, be it to look only."""
    store(server.uri, "before")
    with server:
        store(server.uri, "meanwhile")
        for opener in (open_database, open_soon, open_for_inspection):
            assert {"before", "meanwhile"} <= names(server.uri, opener)
            with opened(server.uri, opener) as database:
                assert isinstance(database.storage, ClientStorage)
        server.stop()
        assert not os.path.lexists(server.name)
    assert {"before", "meanwhile"} <= names(server.uri)


def test_options_of_the_uri_hold_for_the_client(server: FileServer) -> None:
    """What the URI says of the database holds, though the file is opened by somebody else."""
    with server, opened(f"{server.uri}&connection_cache_size=7&database_name=depot") as database:
        assert (database.getCacheSize(), database.database_name) == (7, "depot")


def test_a_new_database_is_made_by_its_server(server: FileServer) -> None:
    """A server makes the file that is not there, and what looks at it then finds it empty."""
    with server:
        with pytest.raises(DatabaseMissing, match="is empty"):
            open_for_inspection(server.uri)
        store(server.uri, "first")
        assert names(server.uri, open_for_inspection) == {"first"}


def test_the_socket_has_its_mode_and_its_group(folder: Path) -> None:
    """Mode and group are those that were asked for, whatever the umask."""
    group = os.getgroups()[0] if os.getuid() else grp.getgrall()[-1].gr_gid
    before = os.umask(0o022)
    try:
        with FileServer(folder, mode=0o620, group=group) as server:
            status = server.address.stat()
            assert stat.S_IMODE(status.st_mode) == 0o620
            assert status.st_gid == group
    finally:
        os.umask(before)


def test_another_place_has_a_link_beside_the_file(folder: Path) -> None:
    """A socket elsewhere is found by a link beside the file, and both go with the server."""
    with tempfile.TemporaryDirectory(prefix="zeo") as place:
        with FileServer(folder, Path(place) / "depot.zeo") as server:
            assert os.readlink(server.name) == str(server.address)
            store(server.uri, "linked")
            assert names(server.uri) == {"linked"}
            server.stop()
            assert not os.path.lexists(server.name)
            assert not os.path.lexists(server.address)
        assert os.listdir(place) == []


def test_a_server_is_closed_in_order(server: FileServer) -> None:
    """On SIGTERM a server ends with status 0, and the index of the file is up to date."""
    server.start()
    store(server.uri, "kept")
    index = Path(f"{server.file}.index")
    before = index.stat().st_mtime_ns
    assert server.stop("SIGTERM") == 0
    assert index.stat().st_mtime_ns > before
    storage = FileStorage(str(server.file))
    assert storage._used_index == 1
    storage.close()


def test_an_index_that_ends_with_a_blob_is_used(server: FileServer) -> None:
    """The record of a blob comes twice in its transaction, and the index is believed all the same.

    Otherwise a server of a large file would read all of it at each start.
    """
    server.start()
    store(server.uri, "blob", Blob(b"large"))
    server.stop()
    server.start()
    assert names(server.uri) == {"blob"}
    server.stop()
    assert "Ignoring index" not in server.errors


def test_the_index_is_saved_without_closing(folder: Path) -> None:
    """An index that was saved meanwhile is one that FileStorage uses, with what came since."""
    path = str(folder / "depot.fs")
    with contextlib.closing(DB(FileStorage(path))) as database:
        connection = database.open()
        connection.root()["one"] = 1
        transaction.commit()
        position = save_index(database.storage)
        assert position == os.stat(path).st_size
        connection.root()["two"] = 2
        transaction.commit()
        for name in ("depot.fs", "depot.fs.index"):
            shutil.copy(folder / name, folder / f"copy-{name}")
        connection.close()
    (folder / "copy-depot.fs").rename(folder / "copy.fs")
    (folder / "copy-depot.fs.index").rename(folder / "copy.fs.index")
    storage = FileStorage(str(folder / "copy.fs"))
    assert storage._used_index == 1
    with contextlib.closing(DB(storage)) as database:
        assert set(database.open().root()) == {"one", "two"}
        transaction.abort()


def test_an_index_of_the_time_before_packing_is_not_kept(folder: Path) -> None:
    """An index that is being saved while the file is packed does not take the new one's place."""
    path = folder / "depot.fs"
    with contextlib.closing(DB(FileStorage(str(path)))) as database:
        connection = database.open()
        for number in range(20):
            connection.root()["number"] = number
            transaction.commit()
        storage = database.storage
        copied = threading.Event()
        packed = threading.Event()

        class Slow:
            """The lock of the storage, which lets a packing in before it is taken again."""

            def __enter__(self) -> None:
                if copied.is_set():
                    packed.wait()
                lock.acquire()

            def __exit__(self, *error: object) -> None:
                lock.release()
                copied.set()

        lock = storage._lock
        storage._lock = Slow()
        saving = threading.Thread(target=save_index, args=(storage,))
        saving.start()
        copied.wait()
        storage._lock = lock
        database.pack(time.time())
        index = Path(f"{path}.index").read_bytes()
        packed.set()
        saving.join()
        assert Path(f"{path}.index").read_bytes() == index
        connection.close()


def test_a_dead_servers_socket_is_replaced(server: FileServer) -> None:
    """After SIGKILL the socket stays, nobody answers, and the next server is found there."""
    server.start()
    store(server.uri, "one")
    server.stop("SIGKILL")
    assert look(str(server.name)) is Presence.SILENT
    server.start()
    assert names(server.uri) == {"one"}


def test_a_living_server_is_left_alone(server: FileServer, folder: Path) -> None:
    """A second server of the same file ends, names the first one, and takes nothing from it."""
    with server:
        socket_before = server.name.stat().st_ino
        said, status = FileServer(folder).refused()
        assert said.startswith("DepotUnavailable: ")
        assert server.process is not None
        assert f"locked by process {server.process.pid} " in said
        assert status == 75
        assert server.name.stat().st_ino == socket_before
        store(server.uri, "one")


def test_what_is_no_socket_is_left_alone(server: FileServer) -> None:
    """A file of somebody else's at the server's name stays, and is not taken for a server."""
    server.name.write_text("notes")
    assert server.refused() == (
        f"PermanentError: {server.name} is no socket, and is left alone",
        65,
    )
    store(server.uri, "one")
    assert server.name.read_text() == "notes"


def test_somebody_who_has_the_file_open_is_named(server: FileServer) -> None:
    """A server whose file an application has open says which process that is, and leaves nothing.

    Meanwhile the application works on.
    """
    with opened(server.uri):
        said, status = server.refused()
        assert f"is locked by process {os.getpid()} " in said
        assert status == 75
        assert not os.path.lexists(server.name)
    server.start()


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("memory://", ["only a file:// can be served"]),
        ("file://{folder}/depot.fs?read_only=1", ["option read_only", "leave it out"]),
        ("file://{folder}/depot.fs?create=1", ["option create", "leave it out"]),
        ("file://{folder}/missing/depot.fs", ["{folder}/missing"]),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    folder: Path, uri: str, parts: list[str]
) -> None:
    """A URI that cannot be served is refused before anything is made, in one line."""
    said, status = FileServer(folder, folder / "zeo", uri=uri.format(folder=folder)).refused()
    for part in parts:
        assert part.format(folder=folder) in said
    assert "\n" not in said
    assert status in (2, 75)
    assert os.listdir(folder) == ["server.err"]


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + LONGEST
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_that_is_being_restarted_is_waited_for(
    server: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Who finds a dead server's socket waits for the next server, and says so once."""
    server.start()
    store(server.uri, "one")
    server.stop("SIGKILL")
    with caplog.at_level(logging.WARNING, "postoffice"):
        found: list[set[str]] = []
        opening = threading.Thread(target=lambda: found.append(names(server.uri)))
        opening.start()
        until(lambda: bool(caplog.records))
        server.start()
        opening.join()
    assert found == [{"one"}]
    said = [record.getMessage() for record in caplog.records if record.name == "postoffice"]
    assert said == [
        f"database {server.file}: its server does not answer; waiting 10 s for it at most"
    ]


@pytest.mark.parametrize("opener", [open_database, open_soon])
def test_a_server_that_never_comes_back(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, opener: Callable[[str], DB]
) -> None:
    """After the time to wait, the file is opened without a server, and the dead socket removed."""
    monkeypatch.setattr("postoffice.database._PATIENCE", 0.2)
    monkeypatch.setattr("postoffice.database._SOON", 0.2)
    server.start()
    store(server.uri, "one")
    server.stop("SIGKILL")
    assert names(server.uri, open_for_inspection) == {"one"}
    assert os.path.lexists(server.name)
    with opened(server.uri, opener) as database:
        assert not isinstance(database.storage, ClientStorage)
        assert not os.path.lexists(server.name)


def test_a_link_to_nowhere_is_a_dead_server(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link whose socket is gone, as after a boot, is waited for and removed like a socket."""
    monkeypatch.setattr("postoffice.database._PATIENCE", 0.2)
    server.name.symlink_to("/nowhere/depot.zeo")
    store(server.uri, "one")
    assert not os.path.lexists(server.name)


SLOW = """
    import sys, time
    from pathlib import Path
    from postoffice import storage_server
    from postoffice.config import UnixPlace

    uri, address, gate = sys.argv[1:]
    opened = storage_server._opened

    def slowly(*arguments):
        file = opened(*arguments)
        print("locked", flush=True)
        while not Path(gate).exists():
            time.sleep(0.01)
        return file

    storage_server._opened = slowly
    storage_server.serve_storage(uri, UnixPlace(Path(address)))
"""


def test_a_server_that_is_starting_is_waited_for(
    server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the lock of the file and the first answer nobody takes the file for a locked one."""
    gate = folder / "gate"
    with run(SLOW, server.uri, str(server.address), str(gate)) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            monkeypatch.setattr("postoffice.database._PATIENCE", 0.2)
            with pytest.raises(DepotUnavailable, match="it is still starting: try again"):
                open_database(server.uri)
            monkeypatch.undo()
            opening = threading.Timer(0.3, gate.touch)
            opening.start()
            store(server.uri, "one")
            opening.join()
        finally:
            process.terminate()
        assert process.wait(LONGEST) == 0


def test_a_server_that_is_starting_stops(server: FileServer, folder: Path) -> None:
    """SIGTERM ends a server that has not opened the file yet, and its socket goes."""
    with run(SLOW, server.uri, str(server.address), str(folder / "gate")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert look(str(server.name)) is Presence.SILENT
        process.terminate()
        assert process.wait(LONGEST) == 0
    assert not os.path.lexists(server.name)


PARENT = """
    import os, sys
    from pathlib import Path
    from postoffice.config import UnixPlace
    from postoffice.storage_server import serve_storage

    if os.fork() == 0:
        serve_storage(sys.argv[1], UnixPlace(Path(sys.argv[2])), lambda: print("ready", flush=True))
        print("closed", flush=True)
        os._exit(0)
    sys.stdin.read()
"""


def test_a_server_ends_with_its_parent(server: FileServer) -> None:
    """When the process that has started the server is killed, the server closes the file."""
    with run(PARENT, server.uri, str(server.address)) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.readline() == "closed\n"
    assert not os.path.lexists(server.name)
    store(server.uri, "one")


APPLICATION = """
    import sys, time
    import transaction
    from transaction.interfaces import TransientError
    from postoffice.database import open_database

    database = open_database(sys.argv[1])
    connection = database.open()
    for number in range(int(sys.argv[2])):
        while True:
            try:
                transaction.begin()
                connection.root()[f"n{number}"] = number
                transaction.commit()
                break
            except TransientError:
                transaction.abort()
        print(number, flush=True)
        time.sleep(0.01)
    connection.close()
    database.close()
"""


@pytest.mark.parametrize("how", FileServer.how)
def test_applications_resume(server: FileServer, how: str) -> None:
    """An application runs on when the server was killed and started again, and loses nothing.

    What it had under way fails with a transient error.
    """
    server.start()
    store(server.uri, "first")
    with run(APPLICATION, server.uri, "60") as application:
        assert application.stdout is not None
        for _ in range(3):
            for _ in range(10):
                assert application.stdout.readline()
            server.stop(how)
            server.start()
        assert application.wait(LONGEST) == 0
    assert {f"n{number}" for number in range(60)} <= names(server.uri)


FAILS = """
    import errno, importlib, os, sys
    from pathlib import Path
    from postoffice.config import UnixPlace
    from postoffice.storage_server import StorageFailed, serve_storage

    fsync = os.fsync

    def failing(descriptor):
        if Path(sys.argv[3]).exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    importlib.import_module("ZODB.FileStorage.FileStorage").fsync = failing
    try:
        serve_storage(sys.argv[1], UnixPlace(Path(sys.argv[2])), lambda: print("ready", flush=True))
    except StorageFailed as error:
        print(error, flush=True)
"""


def test_a_server_whose_disk_fails_ends(server: FileServer, folder: Path) -> None:
    """When the last step of a commit fails, which closes a FileStorage, its server ends.

    The next one opens the file anew, and applications go on.
    """
    bad = folder / "bad"
    with run(FAILS, server.uri, str(server.address), str(bad)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with opened(server.uri, open_soon) as database:
            connection = database.open()
            connection.root()["good"] = True
            transaction.commit()
            bad.touch()
            connection.root()["bad"] = True
            with pytest.raises(Exception, match=r"Input/output error|disconnected"):
                transaction.commit()
            transaction.abort()
            assert "the disk failed" in process.stdout.readline()
            assert process.wait(LONGEST) == 0
            bad.unlink()
            server.start()
            while True:
                try:
                    transaction.begin()
                    connection.root()["later"] = True
                    transaction.commit()
                    break
                except TransientError:
                    transaction.abort()
            connection.close()
    assert {"good", "later"} <= names(server.uri)


def test_what_a_server_met_is_said_in_its_words() -> None:
    """An error that a server sends its client is told by its text, and not as a tuple."""
    met = ServerException("builtins.OSError", (errno.ENOSPC, "No space left on device"))
    assert one_line(met) == "No space left on device"
    assert one_line(ServerException("builtins.MemoryError", ())) == "builtins.MemoryError"


IMPATIENT = """
    import sys
    from pathlib import Path
    from postoffice import storage_server
    from postoffice.config import UnixPlace

    storage_server._COMMIT_SECONDS = 1
    storage_server.serve_storage(
        sys.argv[1], UnixPlace(Path(sys.argv[2])), lambda: print("ready", flush=True)
    )
"""


def test_a_client_that_hangs_in_a_commit_is_cut_off(server: FileServer) -> None:
    """A client that stops between its vote and its commit does not keep others from committing."""
    with run(IMPATIENT, server.uri, str(server.address)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        store(server.uri, "first")
        with opened(server.uri) as database:
            manager = transaction.TransactionManager()
            connection = database.open(manager)
            connection.root()["slow"] = True
            one = manager.get()
            for step in (connection.tpc_begin, connection.commit, connection.tpc_vote):
                step(one)
            store(server.uri, "quick")
            connection.tpc_abort(one)
            manager.abort()
            connection.close()
        assert names(server.uri) == {"first", "quick"}
        process.terminate()
        assert process.wait(LONGEST) == 0


def test_who_may_not_connect_is_told_who_may(folder: Path) -> None:
    """Somebody whom the socket keeps out is told of its user, its group and its mode."""
    with FileServer(folder, mode=0o060 if os.getuid() else 0o660) as server:
        folder.chmod(0o711)
        program = """
            import os, sys
            from postoffice.database import open_database
            from postoffice.exceptions import DepotUnavailable
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            try:
                open_database(sys.argv[1])
            except DepotUnavailable as error:
                print(error)
        """
        with run(program, server.uri) as other:
            assert other.stdout is not None
            said = other.stdout.read()
        owner, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
        assert f"its server's socket {server.name} is for user {owner} and group {group} " in said
        assert f"usermod --append --groups {group} " in said
        assert said.count("\n") == 1


def test_blobs_are_copied_for_who_cannot_share_them(
    server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cannot use the server's folder of blobs has copies, which go with it.

    What killed processes have left goes, too; what living ones have stays.
    """
    copies = folder / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    with server:
        store(server.uri, "mine", Blob(b"mine"))
        other = _storage(server)
        left = copies / f"postoffice-blobs-{os.geteuid()}-left"
        left.mkdir()
        (left / "owned").touch()
        with contextlib.closing(DB(_storage(server))) as database:
            assert not left.exists()
            assert len(os.listdir(copies)) == 2
            connection = database.open()
            with connection.root()["mine"].open() as file:
                assert file.read() == b"mine"
            connection.root()["other"] = Blob(b"other")
            transaction.commit()
            connection.close()
        other.close()
        assert os.listdir(copies) == []
        with opened(server.uri) as database:
            connection = database.open()
            with connection.root()["other"].open() as file:
                assert file.read() == b"other"
            connection.close()


def _storage(server: FileServer) -> ClientStorage:
    return client_of(str(server.address), str(server.file / "unseen"), 5, read_only=False)


def test_packing_goes_through_the_server(server: FileServer) -> None:
    """Who packs has the server pack, while it serves; all that was there is there afterwards."""
    with server:
        for number in range(100):
            store(server.uri, "number", number)
        store(server.uri, "blob", Blob(b"kept"))
        with opened(server.uri) as database:
            packing = Packing(database)
            before = packing.size()
            assert packing.at_server
            packing.run(time.time())
            assert packing.size() < before
            with database.open().root()["blob"].open() as file:
                assert file.read() == b"kept"
        assert not Path(f"{server.file}.pack").exists()
        server.stop("SIGKILL")
        server.start()
        assert names(server.uri) == {"number", "blob"}


def test_a_server_that_packs_ends(server: FileServer) -> None:
    """SIGTERM ends a server that packs; the file is as it was, and no copy is left."""
    server.start()
    with opened(server.uri) as database:
        connection = database.open()
        for number in range(100):
            connection.root()[f"big{number}"] = PersistentMapping({0: "x" * 1_000_000})
            transaction.commit()
        connection.close()
    with opened(server.uri) as database:
        packing = threading.Thread(target=_pack, args=(database,))
        packing.start()
        until(lambda: Path(f"{server.file}.pack").exists() or not packing.is_alive())
        assert server.stop("SIGTERM") == 0
        packing.join()
    assert not Path(f"{server.file}.pack").exists()
    server.start()
    assert len(names(server.uri)) == 100


def _pack(database: DB) -> None:
    # Its server goes away.
    with contextlib.suppress(DepotUnavailable):
        Packing(database).run(time.time())


HANDLER = """
from pathlib import Path

def handle(message):
    with (Path(__file__).parent / "done").open("a") as file:
        file.write(message["Subject"] + "\\n")
"""


def test_commands_go_through_the_server(folder: Path) -> None:
    """An import, workers, a check, a listing and a packing are at work at the same time."""
    site = Site(folder / "site")
    (folder / "app.py").write_text(HANDLER)
    with FileServer(site.folder / "var") as server:
        assert server.process is not None
        site.deliver(mail("one"), mail("two"))
        site.done("import")
        environment = os.environ | {"PYTHONPATH": str(folder)}
        consumers = site.process(
            *("consume", "billing", "app:handle", "--workers", "2"),
            env=environment,
            stdout=None,
            stderr=None,
        )
        try:
            done = folder / "done"
            until(lambda: done.exists() and len(done.read_text().split()) == 2)
            site.deliver(mail("three"))
            site.done("import")
            checked = site.run("check").stdout
            assert f"depot.fs, served by process {server.process.pid} " in checked
            assert site.run("queues").exit_code == 0
            assert site.run("pack").exit_code == 0
            until(lambda: len(done.read_text().split()) == 3)
        finally:
            consumers.terminate()
            assert consumers.wait(LONGEST) == 0
        assert sorted(done.read_text().split()) == ["one", "three", "two"]
