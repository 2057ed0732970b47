"""Packing gives space back, loses nothing, and when it cannot be done says so in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import transaction
import zc.lockfile
from transaction.interfaces import TransientError
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError

from postoffice.cli.output import size
from postoffice.database import open_database
from postoffice.packing import Packing
from postoffice.queue import open_queue
from tests.postgresql import PostgreSQL, ServerMissing, shared_server
from tests.sites import Site, mail
from tests.test_cli import on_terminal
from tests.zeo_server import ZeoServer

LARGE = "0123456789\n" * 30_000  # a blob
LONG_SECONDS = 30
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site whose database is a file."""
    return Site(tmp_path / "site")


def fill(site: Site, uri: str, count: int = 20) -> dict[str, bytes]:
    """Import messages, large ones among them, and take half of them; return what waits, by id."""
    site.deliver(*(mail(f"{number}", body=f"{number}\n" * 1000) for number in range(count)))
    site.deliver(mail("large", body=LARGE), mail("larger", body=LARGE * 2))
    assert site.run().exit_code == 0
    with open_queue(uri, "billing") as queue:
        for _ in range(count // 2):
            queue.pop_next()
            transaction.commit()
        queue.quarantine(queue.pop_next(), "no such customer")
        transaction.commit()
    return held(uri)


def held(uri: str) -> dict[str, bytes]:
    """Return what is in the queue and its quarantine: all bytes, by id."""
    with open_queue(uri, "billing") as queue:
        failed = [message for message, _ in queue.get_quarantined_messages()]
        return {str(message.id): message.raw for message in [*queue, *failed]}


def refused(site: Site) -> str:
    """Pack, which is to fail for a while; return the one line."""
    done = site.run("pack", "--days", "0")
    assert done.exit_code == 75, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line.removeprefix("postoffice: ")


@contextmanager
def started(site: Site) -> Iterator[subprocess.Popen[bytes]]:
    """Pack in a process of its own, which is gone in the end."""
    with site.process("pack", "--days", "0") as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def served(site: Site, more: str = "") -> Iterator[ZeoServer]:
    """Let a ZEO server have the site's database; `more` goes into its section of the storage."""
    server = ZeoServer(site.folder / "server", site.folder / "zeo.sock")
    conf = server.folder / "zeo.conf"
    conf.write_text(conf.read_text().replace("</filestorage>", f"{more}\n</filestorage>"))
    site.configure(main=main_section(server.uri()))
    with server:
        yield server


def main_section(uri: str) -> str:
    return f"[post office]\nzodb_uri = {uri}\nmaildir = %(here)s/Maildir\n"


@contextmanager
def postgresql(site: Site) -> Iterator[tuple[PostgreSQL, str, str]]:
    """Let a database of PostgreSQL be the site's; give the server, its name, and its URI."""
    try:
        server = shared_server()
    except ServerMissing as error:
        pytest.skip(str(error))
    name = server.new_database()
    uri = server.uri(name, site.folder / "blobs")
    site.configure(main=main_section(uri))
    try:
        yield server, name, uri
    finally:
        if not server.running:
            server.start()


@contextmanager
def sqlite(site: Site) -> Iterator[str]:
    """Let a database of SQLite be the site's; give its URI."""
    var = site.folder / "var"
    uri = f"sqlite:///?data_dir={var}&blob_dir={var}/blobs"
    site.configure(main=main_section(uri))
    yield uri


@contextmanager
def zeo_uri(site: Site) -> Iterator[str]:
    """Let a ZEO server have the site's database; give its URI."""
    with served(site) as server:
        yield server.uri()


@contextmanager
def postgresql_uri(site: Site) -> Iterator[str]:
    """Let a database of PostgreSQL be the site's; give its URI."""
    with postgresql(site) as (_, _, uri):
        yield uri


# -- a file ----------------------------------------------------------------------------------------


def test_space_comes_back(site: Site) -> None:
    """Packing a file gives back the space of what was taken, blobs too, and nothing else goes."""
    before = fill(site, site.uri)
    with open_queue(site.uri, "billing") as queue:
        (large,) = [one for one in queue if one["Subject"] == "large"]
        queue.quarantine(large, "too large")
        queue.remove_from_quarantine(large)
        transaction.commit()
    del before[str(large.id)]
    file, blobs = site.folder / "var" / "depot.fs", site.folder / "var" / "blobs"
    was = file.stat().st_size
    assert len(list(blobs.rglob("*.blob"))) == 2
    said = site.done("pack", "--days", "0").splitlines()
    now = file.stat().st_size
    assert now < was * 0.8
    assert len(list(blobs.rglob("*.blob"))) == 1
    assert re.fullmatch(rf"packed in \d+\.\d s: {size(now)}, was {size(was)}", said[0])
    assert said[1:] == [f"{file}.old has the state before; the next packing replaces it"]
    assert Path(f"{file}.old").stat().st_size == was
    assert held(site.uri) == before


def test_days_are_kept(site: Site) -> None:
    """Without --days, what was current within the last day stays."""
    fill(site, site.uri)
    file = site.folder / "var" / "depot.fs"
    was = file.stat().st_size
    assert f": {size(was)}, was {size(was)}" in site.done("pack")
    assert file.stat().st_size == was
    assert site.run("pack", "--days", "-1").exit_code == 2


def test_mode_and_owner_stay(site: Site) -> None:
    """The packed file has the mode of the one before, and as root its owner."""
    fill(site, site.uri, 4)
    file = site.folder / "var" / "depot.fs"
    file.chmod(0o600)
    owner = os.getuid()
    if owner == 0:
        owner = 12345
        os.chown(file, owner, owner)
    site.done("pack", "--days", "0")
    assert file.with_suffix(".fs.old").exists()
    assert (file.stat().st_mode & 0o777, file.stat().st_uid) == (0o600, owner)


def test_file_in_use(site: Site) -> None:
    """A file that another process has open is not packed: the known lines say who has it."""
    fill(site, site.uri, 2)
    program = (
        "import sys; from postoffice.database import open_database;"
        "opened = open_database(sys.argv[1]); print(); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, site.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        done = site.run("pack")
        other.communicate()
    assert done.exit_code == 75
    assert f"is locked by process {other.pid} " in done.stderr


def test_no_database_yet(site: Site) -> None:
    """Where no database is, there is none to pack, and none is made."""
    done = site.run("pack")
    assert done.exit_code == 69
    assert "there is no database" in done.stderr
    assert not list((site.folder / "var").iterdir())


def under_strace(site: Site, *options: str) -> subprocess.CompletedProcess[str]:
    """Pack in a process in which strace makes a call fail, or sends a signal."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    command = [sys.executable, "-m", "postoffice.cli", "-C", str(site.ini), "pack", "--days", "0"]
    trace = ["strace", "-f", "-qq", "-o", str(site.folder / "trace"), *options]
    return subprocess.run([*trace, *command], cwd=ROOT, capture_output=True, text=True, check=False)


def test_full_disk(site: Site) -> None:
    """A disk that is full ends it with one line; the depot is whole, and no copy is left."""
    before = fill(site, site.uri)
    copy = site.folder / "var" / "depot.fs.pack"
    done = under_strace(site, "-P", str(copy), "-e", "inject=write:error=ENOSPC:when=2+")
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == (
        "postoffice: packing failed: No space left on device; nothing is lost, and it may be "
        "packed again\n"
    )
    assert not copy.exists()
    assert held(site.uri) == before
    site.done("pack", "--days", "0")


def test_copy_is_on_the_disk_before_it_counts(site: Site) -> None:
    """A disk that fails to take the copy down ends it before anything is renamed."""
    before = fill(site, site.uri)
    file = site.folder / "var" / "depot.fs"
    done = under_strace(site, "-P", f"{file}.pack", "-e", "inject=fsync:error=EIO")
    assert (done.returncode, done.stdout) == (75, "")
    assert "packing failed: Input/output error;" in done.stderr
    assert not Path(f"{file}.old").exists()
    assert not Path(f"{file}.pack").exists()
    assert held(site.uri) == before


@pytest.mark.parametrize("call", [1, 2])
def test_interrupted_at_the_renames(site: Site, call: int) -> None:
    """An interrupt, even between the two renames of a packing, leaves the depot in its place."""
    before = fill(site, site.uri)
    inject = f"inject=rename:signal=INT:when={call}"
    file = site.folder / "var" / "depot.fs"
    done = under_strace(site, "-P", f"{file}", "-P", f"{file}.pack", "-e", inject)
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "postoffice: interrupted"
    assert not Path(f"{file}.pack").exists()
    assert held(site.uri) == before
    site.done("pack", "--days", "0")


def test_killed_while_it_copies(site: Site) -> None:
    """A packing that is killed while it copies leaves the depot as it was."""
    before = fill(site, site.uri)
    file = site.folder / "var" / "depot.fs"
    under_strace(site, "-P", f"{file}.pack", "-e", "inject=fsync:signal=KILL")
    assert Path(f"{file}.pack").exists()
    assert held(site.uri) == before
    site.done("pack", "--days", "0")
    assert not Path(f"{file}.pack").exists()
    assert held(site.uri) == before


def test_killed_between_the_renames(site: Site) -> None:
    """A packing that is killed when the file has lost its name leaves all to who opens it next."""
    before = fill(site, site.uri)
    file = site.folder / "var" / "depot.fs"
    inject = "inject=rename:signal=KILL:when=2"
    under_strace(site, "-P", f"{file}", "-P", f"{file}.pack", "-e", inject)
    assert not file.exists()
    assert held(site.uri) == before
    site.done("pack", "--days", "0")


def test_copied_is_the_growing_copy(site: Site) -> None:
    """While a file is packed the size of its copy can be asked for, and only then."""
    fill(site, site.uri)
    seen: list[int | None] = []
    with closing(open_database(site.uri)) as database:
        packing = Packing(database)
        references = database.references
        assert packing.copied() is None

        def packer(storage: Any, *arguments: Any) -> Any:
            result = FileStorage.packer(storage, *arguments)
            seen.append(packing.copied())
            return result

        (file,) = [one for one in vars(database.storage).values() if isinstance(one, FileStorage)]
        file.packer = packer
        packing.run(time.time())
        assert file.packer is packer
        assert database.references == references
        assert seen == [packing.size()]
        assert packing.copied() is None


def test_bar_on_a_terminal(site: Site) -> None:
    """On a terminal a bar shows meanwhile, and goes when the line at the end comes."""
    fill(site, site.uri)
    output = on_terminal(site, "pack", "--days", "0")
    assert "packing " in output
    (last,) = re.findall(r"packed in .*", output)
    assert "was" in last


# -- servers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_site", [zeo_uri, postgresql_uri, sqlite])
def test_others_go_on_meanwhile(site: Site, open_site: Callable[[Site], Any]) -> None:
    """While messages come and go, packing to this very moment loses none and doubles none."""
    taken: Counter[str] = Counter()
    added: list[str] = []
    failed: list[BaseException] = []
    stop, all_added = threading.Event(), threading.Event()

    def produce(uri: str) -> None:
        with open_queue(uri, "billing") as queue:
            while not stop.is_set() or len(added) < 30:
                body = LARGE if len(added) % 10 == 7 else "small\n"
                try:
                    transaction.begin()
                    queue.add(mail(f"{len(added)}", body=body))
                    transaction.commit()
                except TransientError:
                    transaction.abort()
                else:
                    added.append(f"{len(added)}")
                time.sleep(0.002)
        all_added.set()

    def consume(uri: str) -> None:
        until = time.monotonic() + LONG_SECONDS
        with open_queue(uri, "billing") as queue:
            while not all_added.is_set() or len(taken) < len(added):
                assert time.monotonic() < until
                try:
                    transaction.begin()
                    if not queue:
                        time.sleep(0.005)
                        continue
                    message = queue.pop_next()
                    assert len(message.raw) > 10
                    transaction.commit()
                except TransientError:
                    transaction.abort()
                else:
                    taken[str(message["Subject"])] += 1

    def guarded(work: Callable[[str], None], uri: str) -> None:
        try:
            work(uri)
        except BaseException as error:
            failed.append(error)

    with open_site(site) as uri:
        assert site.run().exit_code == 0
        threads = [
            threading.Thread(target=guarded, args=(work, uri)) for work in (produce, consume)
        ]
        for thread in threads:
            thread.start()
        for _ in range(2):
            time.sleep(0.1)
            done = site.run("pack", "--days", "0")
            assert (done.exit_code, done.stderr) == (0, "")
        stop.set()
        for thread in threads:
            thread.join()
        assert not failed
        assert taken == Counter(added)


@pytest.mark.parametrize(
    ("open_site", "said"),
    [
        (zeo_uri, "the server keeps the state before in depot.fs.old and blobs.old"),
        (postgresql_uri, "the database keeps what is free now for what comes"),
        (sqlite, "the database keeps what is free now for what comes"),
    ],
)
def test_every_storage_is_packed(site: Site, open_site: Callable[[Site], Any], said: str) -> None:
    """Every storage can be packed, says what becomes of the space, and has all that it had."""
    with open_site(site) as uri:
        before = fill(site, uri)
        gone = first_entry(uri)
        assert is_stored(uri, gone)
        with open_queue(uri, "billing") as queue:
            del before[str(queue.pop_next().id)]
            transaction.commit()
        output = site.done("pack", "--days", "0")
        assert re.match(r"packed in \d+\.\d s: [\d.]+ [KM]?B, was [\d.]+ [KM]?B", output)
        assert said in output
        assert not is_stored(uri, gone)
        assert held(uri) == before


def first_entry(uri: str) -> bytes:
    """Return the number in the database of the entry at the head of the queue."""
    with open_queue(uri, "billing") as queue:
        number: bytes = next(iter(queue.entries()))._p_oid
        return number


def is_stored(uri: str, number: bytes) -> bool:
    """Tell whether the database has an object of this number."""
    with closing(open_database(uri)) as database, closing(database.open()) as connection:
        try:
            connection.get(number)
        except POSKeyError:
            return False
        return True


# What a ZEO server of these tests packs with; `packer` in its configuration names one of them.


def waiting(storage: FileStorage, *arguments: Any) -> Any:
    """Pack once there is a file that says so."""
    folder = Path(storage.getName()).parent
    (folder / "packing").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    return FileStorage.packer(storage, *arguments)


def dying(storage: FileStorage, *arguments: Any) -> NoReturn:
    """Kill the server."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def on_a_full_disk(storage: FileStorage, *arguments: Any) -> NoReturn:
    """Find the server's disk full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), storage.getName())


def test_server_packs_already(site: Site) -> None:
    """While the server packs, it cannot be told to once more, and works on."""
    with served(site, "packer tests.test_packing:waiting") as server:
        before = fill(site, server.uri())
        with started(site) as first:
            while not (server.folder / "packing").exists():
                assert first.poll() is None
                time.sleep(0.01)
            assert refused(site) == (
                "another packing of this database is under way; that one is enough"
            )
            assert held(server.uri()) == before
            (server.folder / "go").touch()
            output, said = first.communicate()
        assert (first.returncode, said) == (0, b"")
        assert output.startswith(b"packed in ")


def test_server_goes_away(site: Site) -> None:
    """A server that dies while it packs is one line, and has the whole depot when it is back."""
    with served(site, "packer tests.test_packing:dying") as server:
        before = fill(site, server.uri())
        assert refused(site) == (
            "packing failed: the server went away; nothing is lost, and it may be packed again"
        )
        server.stop()
        server.start()
        assert held(server.uri()) == before


def test_full_disk_of_the_server(site: Site) -> None:
    """A server whose disk is full says so to who packs, and serves on."""
    with served(site, "packer tests.test_packing:on_a_full_disk") as server:
        before = fill(site, server.uri())
        assert refused(site) == (
            "packing failed: No space left on device; nothing is lost, and it may be packed again"
        )
        assert held(server.uri()) == before


def test_postgresql_is_packed_already(site: Site) -> None:
    """While somebody packs a database of PostgreSQL, a second packing is refused."""
    with postgresql(site) as (server, name, uri):
        fill(site, uri, 4)
        with closing(server.connect(name)) as connection, connection.cursor() as cursor:
            # What RelStorage holds while it packs.
            cursor.execute("SELECT pg_advisory_lock(-2)")
            assert refused(site).startswith("another packing of this database is under way;")
        site.done("pack")


def test_sqlite_is_packed_already(site: Site) -> None:
    """While somebody packs a database of SQLite, a second packing is refused."""
    with sqlite(site) as uri:
        fill(site, uri, 4)
        with closing(zc.lockfile.LockFile(str(site.folder / "var" / "pack.lock"))):
            assert refused(site).startswith("another packing of this database is under way;")
        site.done("pack")


def test_postgresql_goes_away(site: Site) -> None:
    """PostgreSQL stopped in the midst of a packing is one line, and the depot is whole."""
    with postgresql(site) as (server, name, uri):
        before = fill(site, uri)
        with closing(server.connect(name)) as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN; LOCK TABLE object_ref IN ACCESS EXCLUSIVE MODE")
            with started(site) as packer:
                waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
                until = time.monotonic() + LONG_SECONDS
                while True:
                    cursor.execute(waits)
                    if cursor.fetchone()[0]:
                        break
                    assert packer.poll() is None, packer.communicate()
                    assert time.monotonic() < until
                    time.sleep(0.02)
                server.stop("immediate")
                output, said = packer.communicate()
        server.start()
        assert (packer.returncode, output) == (75, b"")
        assert said.count(b"\n") == 1, said
        assert b"nothing is lost, and it may be packed again" in said
        assert held(uri) == before
        site.done("pack", "--days", "0")
