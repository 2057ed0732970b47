"""How fast mail is imported, as a ratio to the least that any program would have to do.

The floor, in name order: read each file, parse its sliced header with BytesHeaderParser, append
its bytes to one file, one fsync for every hundred, rename those hundred.  Both sides run in turn,
each time in a process of its own on a Maildir of its own; the median of the rounds counts.

    python benchmarks/import.py                      # 5,000 mails, 5 rounds
    python benchmarks/import.py --behind 200000      # behind a queue of 200,000
    python benchmarks/import.py --duplicates 200000  # with so many digests remembered
    python benchmarks/import.py --memory             # 200,000 files and a 50 MB attachment
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from email.parser import BytesHeaderParser
from pathlib import Path

from corpus import fill

CONFIGURATION = """\
[post office]
zodb_uri = file://%(here)s/depot.fs?blobstorage_dir=%(here)s/blobs
maildir = %(here)s/Maildir
ooo_loop_frequency = 60
ooo_loop_headers = Subject
reject_filters =
    header_regexp: Subject:\\s*Cheap watches

[queue:app]
filters =
    to_hostname: app.example.com

[queue:tickets]
filters =
    to_hostname: tickets.example.com
    header_regexp: Subject:.*\\[ticket #\\d+\\]
    body_regexp: ^.*regards

[queue:rest]
filters =
    to_hostname: .example.com lists.example.net customer.example.org
"""


def floor(maildir: Path) -> float:
    """Do the least; return the seconds that it took."""
    started = time.perf_counter()
    new, done = maildir / "new", maildir / "done"
    done.mkdir()
    parser = BytesHeaderParser()
    names = sorted(os.listdir(new))
    with open(maildir / "all", "ab", buffering=0) as out:
        for first in range(0, len(names), 100):
            batch = names[first : first + 100]
            for name in batch:
                with open(new / name, "rb") as file:
                    raw = file.read()
                parser.parsebytes(raw[: raw.find(b"\n\n") + 2])
                out.write(raw)
            os.fsync(out.fileno())
            for name in batch:
                os.rename(new / name, done / name)
    return time.perf_counter() - started


def imported(folder: Path) -> tuple[float, dict[str, int]]:
    """Import; return the seconds that it took and how many messages by verdict."""
    from postoffice.api import PostOffice

    started = time.perf_counter()
    with PostOffice(folder / "postoffice.ini") as office:
        outcome = office.import_messages()
    return time.perf_counter() - started, outcome.counts


def prefill(folder: Path, waiting: int, remembered: int) -> None:
    """Put messages and remembered digests into the depot beforehand."""
    from postoffice.api import PostOffice
    from postoffice.queue import Queue

    with PostOffice(folder / "postoffice.ini") as office:
        office.reconcile_queues()
        with office.connection() as connection:
            manager = connection.transaction_manager
            queue = Queue(office.folder(connection).get("app"))
            for number in range(max(waiting, remembered)):
                if number < waiting:
                    queue.add_entry(
                        {"arrived": 1, "size": 60, "digest": b"", "way": "benchmark"},
                        b"Subject: %d\n\nwaiting\n" % number,
                    )
                if number < remembered:
                    queue.histories.remember(os.urandom(16), int(time.time()))
                if number % 500 == 499:
                    manager.commit()
                    queue.forget_bodies()
                    connection.cacheMinimize()
                    manager.begin()
            manager.commit()


def child(what: str, folder: Path) -> None:
    """Run one side and print what it took."""
    counts: dict[str, int] = {}
    if what == "floor":
        seconds = floor(folder / "Maildir")
    else:
        seconds, counts = imported(folder)
    reader = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "s": seconds,
        "cpu": own.ru_utime + own.ru_stime,
        "mb": own.ru_maxrss / 1024,
        "child_cpu": reader.ru_utime + reader.ru_stime,
        "child_mb": reader.ru_maxrss / 1024,
    }
    print(json.dumps(figures | counts))


def run(what: str, folder: Path) -> dict[str, float]:
    """Run one side in a process of its own, with the disk at rest."""
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, "--child", what, str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def lay_out(folder: Path, count: int, seed: int) -> Path:
    """Make a folder with a configuration and a full Maildir."""
    folder.mkdir()
    (folder / "postoffice.ini").write_text(CONFIGURATION)
    fill(folder / "Maildir", count, seed)
    return folder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mails", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--behind", type=int, default=0, help="messages waiting in a queue")
    parser.add_argument("--duplicates", type=int, default=0, help="digests remembered")
    parser.add_argument("--memory", action="store_true", help="200,000 files and one of 50 MB")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; on a real disk")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    # Deleting between rounds would slow the next ones down; all goes at the end.
    scratch = Path(tempfile.mkdtemp(prefix="postoffice-benchmark-", dir=options.folder))
    try:
        if options.memory:
            memory(scratch)
        else:
            compare(scratch, options)
    finally:
        shutil.rmtree(scratch)


def compare(scratch: Path, options: argparse.Namespace) -> None:
    """Run both sides in turn and print the ratio."""
    ratios, ours, floors, peaks = [], [], [], []
    print(f"{options.mails} mails a round, {options.behind} waiting, {options.duplicates} digests")
    for number in range(options.rounds):
        least = run("floor", lay_out(scratch / f"floor{number}", options.mails, number))
        folder = lay_out(scratch / f"ours{number}", options.mails, number)
        if options.behind or options.duplicates:
            prefill(folder, options.behind, options.duplicates)
        found = run("ours", folder)
        ratios.append(found["s"] / least["s"])
        ours.append(found["s"])
        floors.append(least["s"])
        peaks.append(max(found["mb"], found["child_mb"]))
        print(
            f"round {number + 1}: floor {least['s'] / options.mails * 1e6:5.0f} us a mail, "
            f"import {found['s'] / options.mails * 1e6:5.0f} us, ratio {ratios[-1]:.2f}, "
            f"cpu {found['cpu']:.2f} s and reader {found['child_cpu']:.2f} s, "
            f"peak {found['mb']:.0f} MB and reader {found['child_mb']:.0f} MB"
        )
    print(
        f"median: floor {options.mails / statistics.median(floors):.0f} mails/s, "
        f"import {options.mails / statistics.median(ours):.0f} mails/s, "
        f"ratio {statistics.median(ratios):.2f}, peak {max(peaks):.0f} MB"
    )


def memory(scratch: Path) -> None:
    """Print the peak memory with many files, and with a large one."""
    folder = scratch / "many"
    folder.mkdir()
    (folder / "postoffice.ini").write_text(CONFIGURATION)
    for name in ("new", "cur", "tmp"):
        (folder / "Maildir" / name).mkdir(parents=True)
    for number in range(200_000):
        (folder / "Maildir" / "new" / f"17{number:08}.M{number}P1.mx.example.com").write_bytes(
            b"From: a@example.net\nTo: b@app.example.com\nSubject: %d\n\nbody\n" % number
        )
    large = folder / "Maildir" / "new" / "1800000000.M1P1.mx.example.com"
    header = b"From: a@example.net\nTo: b@app.example.com\nMIME-Version: 1.0\n"
    header += b'Content-Type: multipart/mixed; boundary="x"\n\n--x\n\nhello\n--x\n'
    header += b"Content-Type: application/pdf\nContent-Transfer-Encoding: base64\n\n"
    large.write_bytes(header + b"QUJDREVGR0hJSktM" * (50_000_000 // 16) + b"\n--x--\n")
    found = run("ours", folder)
    print(
        f"200,001 files, one of 50 MB: {200_001 / found['s']:.0f} mails/s, "
        f"peak {found['mb']:.0f} MB, reader {found['child_mb']:.0f} MB"
    )


if __name__ == "__main__":
    main()
