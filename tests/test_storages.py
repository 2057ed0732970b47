"""What docs/storages.rst tells administrators to do is done here, line by line, and works."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import transaction

from postoffice.database import open_database
from postoffice.exceptions import DepotUnavailable
from postoffice.queue import Queue, open_queue
from tests.postgresql import PostgreSQL, ServerMissing, shared_server
from tests.sites import QUEUES, Site, mail
from tests.test_docs import PLACE, captioned, named
from tests.zeo_server import free_port

BIN = Path(sys.executable).parent
EXAMPLE_ID = "3011981123281022979"
LARGE = "0123456789\n" * 30_000  # a blob
LONG_SECONDS = 30
# What the page's commands need that is neither ours nor in every Debian.
TOOLS = ("openssl", "pg_dump", "pg_restore", "rsync", "sqlite3")


class Folder:
    """The machine of the page: a site in ``/srv/postoffice``, ``/backup`` and all else elsewhere.

    :ivar words: what stands here for words of the page.
    """

    def __init__(self, root: Path) -> None:
        """Lay out the site."""
        self.root = root
        self.place = root / "post"
        self.site = Site(self.place)
        self.words = {
            PLACE: str(self.place),
            "/backup": f"{root}/backup",
            "/var/cache/myapp": f"{root}/cache",
            "/opt/postoffice/bin": str(BIN),
        }
        self.path = [str(BIN), os.environ["PATH"]]

    def here(self, text: str) -> str:
        """Return a text of the page with the words of this machine."""
        for word, own in self.words.items():
            text = text.replace(word, own)
        return text

    def block(self, name: str) -> str:
        """Return a block of the page in the words of this machine."""
        return self.here(named(name).text)

    def write(self, path: str, *names: str) -> Path:
        """Write blocks into a file of the site."""
        file = self.place / path
        file.write_text("".join(map(self.block, names)))
        return file

    def run(self, name: str) -> str:
        """Run a block of commands as the shell does; return what they print."""
        lines = [
            line[2:] if line.startswith(("$ ", "# ")) else line
            for line in self.block(name).splitlines()
        ]
        return self.shell("\n".join(lines))

    def shell(self, commands: str) -> str:
        """Run commands in the site's folder; return what they print."""
        for tool in TOOLS:
            if f"{tool} " in commands and shutil.which(tool, path=":".join(self.path)) is None:
                pytest.skip(f"{tool} is not installed")
        done = subprocess.run(
            ["bash", "-e", "-u", "-c", commands],
            cwd=self.place,
            env=os.environ | {"PATH": ":".join(self.path), "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def configure(self, name: str) -> None:
        """Write a block of the page into postoffice.ini."""
        self.site.configure(main=self.block(name) + "maildir = %(here)s/Maildir\n", queues=QUEUES)

    @contextmanager
    def server(self) -> Iterator[None]:
        """Run the ZEO server as the unit of the page does, but as whom we are."""
        unit = configparser.ConfigParser()
        unit.optionxform = str  # type: ignore[assignment,method-assign]  # as its documents say
        unit.read_string(self.here(captioned("/etc/systemd/system/postoffice-zeo.service").text))
        service = unit["Service"]
        with (
            open(self.root / "runzeo.out", "ab") as output,
            subprocess.Popen(
                shlex.split(service["ExecStart"]),
                umask=int(service["UMask"], 8),
                stdout=output,
                stderr=output,
            ) as process,
        ):
            try:
                self._await(process)
                yield
            finally:
                process.terminate()

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        conf = (self.place / "zeo.conf").read_text()
        (address,) = [line.split()[1] for line in conf.splitlines() if "  address " in line]
        unix = address.startswith("/")
        host, _, port = address.partition(":")
        until = time.monotonic() + LONG_SECONDS
        while True:
            with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as one:
                if one.connect_ex(address if unix else (host, int(port))) == 0:
                    return
            assert process.poll() is None, (self.root / "runzeo.out").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.fixture
def machine() -> Iterator[Folder]:
    """A machine as the page has it, in a folder with a short name, for the sockets' sake."""
    root = Path(tempfile.mkdtemp(prefix="po-"))
    try:
        yield Folder(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def postgresql(machine: Folder) -> Iterator[PostgreSQL]:
    """A PostgreSQL that is the page's db.example.com, with the page's role and database."""
    try:
        server = shared_server()
    except ServerMissing as error:
        pytest.skip(str(error))
    machine.words |= {"db.example.com": "127.0.0.1", "5432": str(server.port)}
    machine.path.insert(0, str(server._programs))
    create_database(server)
    password = machine.write("pgpass", "postgresql-password")
    password.chmod(0o600)
    try:
        yield server
    finally:
        drop_database(server)
        server.execute("DROP ROLE depot")


def create_database(server: PostgreSQL) -> None:
    """Do what the page says in SQL; the role stays when a database is dropped."""
    for statement in named("postgresql-database").text.split(";"):
        if statement.strip():
            with suppress(psycopg2.errors.DuplicateObject):
                server.execute(statement)


def drop_database(server: PostgreSQL) -> None:
    """Remove the page's database."""
    server.execute("DROP DATABASE depot WITH (FORCE)")


# -- what a depot holds ----------------------------------------------------------------------------


def bill(number: int) -> bytes:
    """Return a mail for the queue of bills; each tenth is large."""
    return mail(f"{number}", body=f"{number}\n" + (LARGE if number % 10 == 3 else "small\n"))


def contents(site: Site) -> dict[str, list[tuple[Any, ...]]]:
    """Return all that is known of each message in the queues and their quarantine, in order."""
    found = {}
    for name in ("billing", "rest"):
        with open_queue(site_uri(site), name) as queue:
            bodies = {message.id: message.raw for message in queue}
            bodies |= {one.id: one.raw for one, _ in queue.get_quarantined_messages()}
            entries = [*queue.entries(), *queue.entries(state="quarantined")]
            found[name] = [
                (one.id, one.arrived, one.subject, one.size, one.digest, one.state, one.attempts,
                 one.last_error, bodies[one.id])
                for one in entries
            ]  # fmt: skip
            assert len(bodies) == len(entries)
    return found


def site_uri(site: Site) -> str:
    """Return the URI in the site's configuration."""
    parser = configparser.ConfigParser(defaults={"here": str(site.folder)})
    parser.read(site.ini)
    return parser["post office"]["zodb_uri"]


def use(site: Site, *numbers: int) -> dict[str, list[tuple[Any, ...]]]:
    """Import bills; take one, put one to quarantine; return what there is."""
    site.deliver(*map(bill, numbers))
    site.done()
    with open_queue(site_uri(site), "billing") as queue:
        queue.pop_next()
        transaction.commit()
        queue.quarantine(queue.pop_next(), "no such customer")
        transaction.commit()
    return contents(site)


def remembers(site: Site, number: int) -> bool:
    """Tell whether a bill that was imported once is known as a duplicate."""
    before = contents(site)
    site.deliver(bill(number))
    site.done()
    return contents(site) == before


def large_id(site: Site) -> str:
    """Return the id of a large message that waits."""
    ((id, *_), *_) = [one for one in contents(site)["billing"] if one[3] > len(LARGE)]
    return str(id)


# -- growing, and back -----------------------------------------------------------------------------


def note(machine: Folder) -> dict[str, list[tuple[Any, ...]]]:
    """Note what there is as the page says, before a depot is moved; return all of it."""
    machine.words[EXAMPLE_ID] = large_id(machine.site)
    machine.run("move-note")
    return contents(machine.site)


def move(machine: Folder, description: str) -> None:
    """Copy the depot as the page says."""
    (machine.place / "move.conf").write_text(description)
    machine.run("move")


def test_growing_from_a_file_to_zeo_to_postgresql_and_back(
    machine: Folder, postgresql: PostgreSQL
) -> None:
    """A depot grows from storage to storage with all that it holds, and goes back to a file."""
    site = machine.site
    machine.configure("file-ini")
    there = use(site, *range(8))
    ids = {one[0] for one in there["billing"]}

    machine.configure("zeo-ini")
    with machine.server():
        assert contents(site) == there
        use(site, *range(10, 15))
        assert remembers(site, 3)
        there = note(machine)
        machine.run("pack")

    move(machine, machine.block("move-to-postgresql"))
    machine.write("zodb.conf", "postgresql-conf")
    machine.configure("zconfig-ini")
    machine.run("move-compare")
    assert contents(site) == there
    assert remembers(site, 3)
    use(site, *range(20, 25))
    machine.run("pack")
    there = note(machine)
    all_ids = [one[0] for one in there["billing"]]
    assert ids & {*all_ids}
    assert len({*all_ids}) == len(all_ids)

    for name in ("depot.fs", "blobs"):
        (machine.place / "var" / name).rename(machine.root / name)
    move(machine, machine.block("move-to-file"))
    machine.configure("file-ini")
    machine.run("move-compare")
    assert contents(site) == there
    assert remembers(site, 23)
    use(site, *range(30, 35))
    assert site.done("requeue", "billing", "--all") == "4 messages requeued in billing\n"


def test_moving_to_sqlite(machine: Folder) -> None:
    """A depot moves from a file to SQLite with all that it holds, and goes on there."""
    site = machine.site
    machine.configure("file-ini")
    use(site, *range(8))
    there = note(machine)
    source = machine.block("move-to-postgresql").partition("<relstorage")[0]
    move(machine, source + machine.block("move-to-sqlite"))
    machine.write("zodb.conf", "sqlite-conf")
    machine.configure("zconfig-ini")
    machine.run("move-compare")
    assert contents(site) == there
    assert remembers(site, 3)
    after = use(site, *range(10, 30))["billing"]
    assert len({one[0] for one in after}) == len(after) == len(there["billing"]) + 20 - 1
    machine.run("pack")
    assert contents(site)["billing"] == after


# -- backup and restore ----------------------------------------------------------------------------


class Traffic:
    """Somebody who adds messages and somebody who takes half of them, until it ends.

    :ivar added: the subjects that were committed to the queue, in order.
    :ivar taken: those that were taken and are gone; the others are in quarantine.
    """

    def __init__(self, uri: str) -> None:
        """Prepare; it begins with ``with``."""
        self.added: list[str] = []
        self.taken: list[str] = []
        self._failed: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, uri))
            for work in (self._add, self._take)
        ]

    def _guarded(self, work: Callable[[Any], None], uri: str) -> None:
        try:
            with open_queue(uri, "billing") as queue:
                while not self._stop.is_set():
                    for attempt in transaction.manager.attempts(10):
                        with attempt:
                            work(queue)
                    time.sleep(0.002)
        except BaseException as error:
            self._failed.append(error)

    def _add(self, queue: Queue) -> None:
        number = 1000 + len(self.added)
        queue.add(bill(number))
        transaction.commit()
        self.added.append(f"{number}")

    def _take(self, queue: Queue) -> None:
        """Take every second message, and put the others to quarantine."""
        if not queue:
            return
        message = queue.pop_next()
        subject = str(message["Subject"])
        if int(subject) % 2:
            queue.quarantine(message, "odd")
        transaction.commit()
        if not int(subject) % 2:
            self.taken.append(subject)

    def __enter__(self) -> Traffic:
        """Begin."""
        for thread in self._threads:
            thread.start()
        self.wait(30)
        return self

    def wait(self, more: int) -> None:
        """Wait until so many more messages have come."""
        goal, until = len(self.added) + more, time.monotonic() + LONG_SECONDS
        while len(self.added) < goal:
            assert not self._failed
            assert time.monotonic() < until
            time.sleep(0.01)

    def __exit__(self, *error: object) -> None:
        """End."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self._failed


def back_up(machine: Folder, traffic: Traffic, name: str) -> tuple[set[str], set[str]]:
    """Make a backup meanwhile; return what is to be in it for certain, and what is not."""
    added, taken = set(traffic.added), set(traffic.taken)
    machine.run(name)
    traffic.wait(3)
    return added - set(traffic.taken), taken


def check_restored(site: Site, there: set[str], gone: set[str]) -> None:
    """See that a restored depot is of the backup's time, each message whole, and goes on."""
    restored = {one[2]: one[8] for one in contents(site)["billing"]}
    assert there
    assert there <= restored.keys()
    assert not gone & restored.keys()
    assert all(raw == bill(int(subject)) for subject, raw in restored.items())
    assert any(len(raw) > len(LARGE) for raw in restored.values())
    waiting = len(restored)
    assert len(use(site, *range(5))["billing"]) == waiting + 4


def test_backup_of_a_file_in_use(machine: Folder) -> None:
    """Backups made while messages come and go restore the state of the last, blobs and all."""
    site = machine.site
    machine.configure("zeo-ini")
    with machine.server():
        site.done()
        with Traffic(site_uri(site)) as traffic:
            back_up(machine, traffic, "file-backup")
            second = int(time.time())
            traffic.wait(20)
            while int(time.time()) == second:
                time.sleep(0.05)
            there, gone = back_up(machine, traffic, "file-backup")
            traffic.wait(20)
    files = [path.suffix for path in (machine.root / "backup" / "depot").iterdir()]
    assert sorted(files) == [".dat", ".deltafsz", ".fsz", ".index", ".index"]
    shutil.rmtree(machine.place / "var" / "blobs")
    machine.run("file-restore")
    machine.configure("file-ini")
    check_restored(site, there, gone)


def test_backup_of_sqlite_in_use(machine: Folder) -> None:
    """A backup made while messages come and go is restored over a database that was in use."""
    site = machine.site
    machine.write("zodb.conf", "sqlite-conf")
    machine.configure("zconfig-ini")
    site.done()
    with Traffic(site_uri(site)) as traffic:
        there, gone = back_up(machine, traffic, "sqlite-backup")
        traffic.wait(20)
    machine.run("sqlite-restore")
    check_restored(site, there, gone)


def test_backup_of_postgresql_in_use(machine: Folder, postgresql: PostgreSQL) -> None:
    """A dump made while messages come and go is restored into a new database."""
    site = machine.site
    machine.write("zodb.conf", "postgresql-conf")
    machine.configure("zconfig-ini")
    site.done()
    (machine.root / "backup").mkdir()
    with Traffic(site_uri(site)) as traffic:
        there, gone = back_up(machine, traffic, "postgresql-backup")
        traffic.wait(20)
    drop_database(postgresql)
    create_database(postgresql)
    machine.run("postgresql-restore")
    check_restored(site, there, gone)


# -- who is let in ---------------------------------------------------------------------------------


def may_connect(path: Path, user: int, groups: list[int]) -> bool:
    """Tell whether a process of this user and of these groups reaches a socket."""
    # Not Python, which another user may not be able to run; perl-base is in every Debian.
    program = "exit(IO::Socket::UNIX->new(Peer => shift) ? 0 : 10 + ($!{EACCES} ? 1 : 0))"
    modules = ["-MIO::Socket::UNIX", "-MErrno"]
    done = subprocess.run(
        ["perl", *modules, "-e", program, str(path)],
        cwd="/",
        user=user,
        group=user,
        extra_groups=groups,
        check=False,
    )
    assert done.returncode in (0, 11)
    return done.returncode == 0


def test_socket_is_for_its_group(machine: Folder) -> None:
    """Another user does not reach the socket at first; then one of the group does, and no other."""
    if os.geteuid() != 0 or shutil.which("perl") is None:
        pytest.skip("only root can be another user, and perl is to be that")
    machine.root.chmod(0o711)
    machine.configure("zeo-ini")
    user, var = 12345, machine.place / "var"
    with machine.server():
        group = [var.stat().st_gid]
        assert not may_connect(var / "zeo.sock", user, [])
        assert not may_connect(var / "zeo.sock", user, group)
        (line,) = [one for one in machine.block("socket-group").splitlines() if "chmod" in one]
        machine.shell(line.removeprefix("# "))
        assert may_connect(var / "zeo.sock", user, group)
        assert not may_connect(var / "zeo.sock", user, [])

        machine.site.deliver(bill(3))
        machine.site.done()
        with open_queue(machine.block("socket-uri").strip(), "billing") as queue:
            assert queue.peek().raw == bill(3)
        assert list((machine.root / "cache" / "blobs").rglob("*.blob"))


@pytest.fixture
def certificates(machine: Folder) -> Folder:
    """A machine with the page's certificates."""
    machine.words |= {"db.example.com": "localhost", "9999": str(free_port())}
    machine.run("tls-certificates")
    return machine


def test_tls_lets_in_who_has_a_certificate(certificates: Folder) -> None:
    """A client with a certificate of the authority gets in, however large its messages."""
    machine, site = certificates, certificates.site
    serve_by_tls(machine)
    # The import's own file is that of the page, with the server's folder of blobs.
    lines = machine.block("tls-client").splitlines()
    own = [line for line in lines if "blob" not in line]
    own[3:3] = machine.block("tls-shared-blobs").splitlines()
    (machine.place / "import.conf").write_text("\n".join(own))
    main = machine.block("zconfig-ini").replace("zodb.conf", "import.conf")
    site.configure(main=main + "maildir = %(here)s/Maildir\n", queues=QUEUES)
    machine.write("zodb.conf", "tls-client")
    with machine.server():
        site.deliver(bill(3))
        site.done()
        with open_queue(machine.block("tls-uri").strip(), "billing") as queue:
            assert queue.pop_next().raw == bill(3)
            queue.add(bill(13))
            transaction.commit()
        assert [one[8] for one in contents(site)["billing"]] == [bill(13)]


def serve_by_tls(machine: Folder) -> None:
    """Write the page's section into the configuration of the server."""
    conf = machine.place / "zeo.conf"
    before, _, rest = conf.read_text().partition("<zeo>")
    conf.write_text(before + machine.block("tls-server") + rest.partition("</zeo>")[2])


def greeting(port: int, context: ssl.SSLContext) -> bytes:
    """Return the first byte that the server says to a client; none if it does not let it in."""
    with socket.create_connection(("localhost", port)) as bare:
        try:
            with context.wrap_socket(bare, server_hostname="localhost") as wrapped:
                return wrapped.recv(1)
        except (ssl.SSLError, ConnectionError):
            return b""


def test_tls_keeps_out_who_has_none(certificates: Folder) -> None:
    """Without TLS, without a certificate, or with one of another authority nobody gets in."""
    machine = certificates
    serve_by_tls(machine)
    port = machine.words["9999"]
    with machine.server():
        plain = f"zeo://localhost:{port}?wait_timeout=1&blob_dir={machine.root}/blobs"
        with pytest.raises(DepotUnavailable, match="TLS"):
            open_database(plain)

        authority = ssl.create_default_context(cafile=str(machine.place / "tls" / "ca.pem"))
        assert greeting(int(port), authority) == b""
        tls = machine.place / "tls"
        authority.load_cert_chain(tls / "client.pem", tls / "client.key")
        assert greeting(int(port), authority) != b""

        # The same names, by another authority; the server's own is still the one to trust.
        (machine.place / "tls").rename(machine.place / "true")
        machine.run("tls-certificates")
        shutil.copy(machine.place / "true" / "ca.pem", machine.place / "tls")
        file = machine.write("zodb.conf", "tls-client")
        file.write_text(file.read_text().replace("    <ssl>", "    wait-timeout 1\n    <ssl>"))
        with pytest.raises(DepotUnavailable):
            open_database(machine.block("tls-uri").strip())


def test_sqlite_by_a_uri(machine: Folder) -> None:
    """The URI that the page shows opens the database that the file opens."""
    machine.configure("sqlite-ini")
    there = use(machine.site, *range(5))
    machine.write("zodb.conf", "sqlite-conf")
    machine.configure("zconfig-ini")
    assert contents(machine.site) == there


def test_postgresql_by_a_uri(machine: Folder, postgresql: PostgreSQL) -> None:
    """The URI that the page shows opens the database."""
    machine.configure("postgresql-ini")
    use(machine.site, *range(5))


def test_postgresql_lets_in_whom_the_page_names(postgresql: PostgreSQL) -> None:
    """PostgreSQL understands the line of pg_hba.conf."""
    path = postgresql.folder / "data" / "pg_hba.conf"
    before = path.read_text()
    path.write_text(before + named("postgresql-hba").text)
    try:
        with closing(postgresql.connect("postgres")) as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT type, database, user_name, address, auth_method "
                "FROM pg_hba_file_rules ORDER BY line_number DESC LIMIT 1"
            )
            assert cursor.fetchone() == (
                "hostssl",
                ["depot"],
                ["depot"],
                "192.0.2.0",
                "scram-sha-256",
            )
    finally:
        path.write_text(before)
