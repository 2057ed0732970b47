"""Database servers for the benchmarks, each a process of its own that ends with the benchmark."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "STORAGES",
    "postgresql_server",
    "serve",
    "server_seconds",
    "tree_memory",
    "tree_seconds",
]

_PATIENCE = 30.0


@contextlib.contextmanager
def _file(folder: Path) -> Iterator[str]:
    yield f"file://{folder}/depot.fs?blobstorage_dir={folder}/blobs"


@contextlib.contextmanager
def _zeo(folder: Path) -> Iterator[str]:
    socket = folder / "zeo.sock"
    socket.unlink(missing_ok=True)
    configuration = folder / "zeo.conf"
    configuration.write_text(
        f"<zeo>\naddress {socket}\n</zeo>\n"
        f"<filestorage>\npath {folder}/depot.fs\nblob-dir {folder}/blobs\n</filestorage>\n"
    )
    words = [sys.executable, "-m", "ZEO.runzeo", "-C", str(configuration)]
    with open(folder / "zeo.log", "ab") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not socket.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no ZEO server: {(folder / 'zeo.log').read_text()[-500:]}")
            time.sleep(0.02)
        yield f"zeo://{socket}?blob_dir={folder}/blobs&shared_blob_dir=true&wait_timeout=30"
    finally:
        server.terminate()
        server.wait(_PATIENCE)


@contextlib.contextmanager
def postgresql_server() -> Iterator[Any]:
    """Start a private PostgreSQL server; it is gone afterwards, with all that is in it.

    Needs what the tests need, which other storages do not.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.postgresql import PostgreSQL

    server = PostgreSQL()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@contextlib.contextmanager
def _postgresql(folder: Path) -> Iterator[str]:
    with postgresql_server() as server:
        yield server.uri(server.new_database(), folder / "blobs")


#: What opens a storage in a folder, as a context manager of its URI.
STORAGES = {"file": _file, "zeo": _zeo, "postgresql": _postgresql}


def serve(storage: str, folder: Path) -> contextlib.AbstractContextManager[str]:
    """Start what a storage needs.

    :param storage: one of :data:`STORAGES`.
    :param folder: exists; the data of all but PostgreSQL stays in it, and is found there again.
    :return: a context manager of the storage's URI.
    """
    return STORAGES[storage](folder)


def server_seconds(others: Collection[int | None]) -> float:
    """Return the processor time of all processes below this one so far.

    :param others: the processes of these numbers do not count.
    """
    return sum(
        seconds
        for process, seconds in _below(os.getpid()).items()
        if process != os.getpid() and process not in others
    )


def tree_seconds(root: int) -> float:
    """Return the processor time of a process, and of all below it, so far."""
    return sum(_below(root).values())


def tree_memory(root: int) -> float:
    """Return the memory of a process and of all below it, in MB.

    What several of them share counts once.
    """
    total = 0
    for process in _below(root):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024


def _below(root: int) -> dict[int, float]:
    """Return the processor time, in seconds, of a process and of each that stems from it."""
    found: dict[int, tuple[int, float]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            # Its own time, and that of its children that have ended.
            ticks = sum(map(int, fields[11:15]))
            found[int(name)] = (int(fields[1]), ticks / os.sysconf("SC_CLK_TCK"))
    below = {}
    for process, (_, seconds) in found.items():
        above = process
        while above in found and above != root:
            above = found[above][0]
        if above == root:
            below[process] = seconds
    return below
