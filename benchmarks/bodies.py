"""What bodies cost as records and as blobs: written, taken, and in memory.

Takes some ten minutes; ``docs/concepts.rst`` has what it printed, and why the line is where it is.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from postoffice import queue as queues
from postoffice.api import PostOffice

INI = """\
[post office]
zodb_uri = file://%(here)s/depot.fs?blobstorage_dir=%(here)s/blobs
maildir = %(here)s/Maildir
[queue:app]
filters =
    to_hostname: example.com
"""
LINE = b"0123456789abcdef" * 4 + b"\n"
KINDS = ("record", "blob")
ROUNDS = 9


def measure(kind: str, size: int, count: int) -> tuple[float, float, float]:
    """Return milliseconds a message written and taken, and the megabytes of this process."""
    queues.BLOB_SIZE = 0 if kind == "blob" else 1 << 60
    body = LINE * (size // len(LINE))
    # Removed by whoever started all rounds: making files is slow after many were deleted.
    with nullcontext(tempfile.mkdtemp(dir=sys.argv[4])) as folder:
        ini = Path(folder) / "postoffice.ini"
        ini.write_text(INI)
        with PostOffice(ini) as office:
            office.reconcile_queues()
            with office.connection() as connection:
                queue = queues.Queue(office.folder(connection).get("app"))
                manager = connection.transaction_manager
                started = time.perf_counter()
                for number in range(count):
                    queue.add(b"From: a@example.com\nSubject: %d\n\n" % number + body)
                    if number % 50 == 49:
                        manager.commit()
                        queue.forget_bodies()
                        manager.begin()
                manager.commit()
                written = time.perf_counter() - started
        with PostOffice(ini) as office, office.connection() as connection:
            queue = queues.Queue(office.folder(connection).get("app"))
            manager = connection.transaction_manager
            started = time.perf_counter()
            while queue:
                assert queue.pop_next().raw
                manager.commit()
                manager.begin()
            taken = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return written / count * 1000, taken / count * 1000, memory


def main() -> None:
    """Measure each size in a process of its own, in interleaved rounds; print the medians."""
    if len(sys.argv) == 5:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
        return
    found: dict[tuple[int, str], list[list[float]]] = {}
    sizes = (16, 64, 128, 256, 512, 1024, 2048)
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(ROUNDS):
            for size in sizes:
                for kind in KINDS:
                    count = "200" if size <= 512 else "100"
                    words = [sys.executable, __file__, kind, str(size * 1024), count, scratch]
                    run = subprocess.run(words, check=True, capture_output=True, text=True)
                    found.setdefault((size, kind), []).append(json.loads(run.stdout))
    for size in sizes:
        for kind in KINDS:
            written, taken, memory = map(statistics.median, zip(*found[size, kind], strict=True))
            print(
                f"{size:5} KiB {kind:7} written {written:6.2f} ms  taken {taken:5.2f} ms  "
                f"{memory:4.0f} MB"
            )


if __name__ == "__main__":
    main()
