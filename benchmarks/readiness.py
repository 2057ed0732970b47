"""How long ``postoffice serve`` takes to be ready, with many messages in a database file.

The depot is built once, and kept in a folder if one is named.  Each time the daemon is started it
is asked, as systemd asks, when all of its parts are at work; then it is told to end, and the next
time killed instead, with all of its parts.

    python benchmarks/readiness.py                               # 1,000,000 messages; minutes
    python benchmarks/readiness.py --size 100000 --times 6 --folder /srv/readiness

Printed are the seconds from the start of the process to readiness: median, least and most, after
an end in order and after a kill.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from growth import build

from postoffice.daemon.state import read_state
from postoffice.database_uri import database_file

_INI = """
[post office]
zodb_uri = {uri}
maildir = {folder}/Maildir
lmtp = unix:{folder}/lmtp
[queue:app]
filters =
    to_hostname: app.example.com
"""


def start(ini: Path) -> tuple[subprocess.Popen[bytes], float]:
    """Start the daemon; return it, and how long it took to be ready and well."""
    address = f"postoffice-readiness-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0{address}")
        told.settimeout(600)
        words = [sys.executable, "-m", "postoffice.cli", "-C", str(ini), "serve"]
        since = time.monotonic()
        process = subprocess.Popen(words, env=os.environ | {"NOTIFY_SOCKET": f"@{address}"})
        while not (note := told.recv(65536)).startswith(b"READY=1\n"):
            pass
    seconds = time.monotonic() - since
    if b"failing" in note or b"down" in note:
        raise SystemExit(f"not well: {note.decode()}")
    return process, seconds


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="readiness") as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        for name in ("new", "cur", "tmp"):
            (folder / "Maildir" / name).mkdir(parents=True, exist_ok=True)
        uri = f"file://{folder}/depot.fs?blobstorage_dir={folder}/blobs"
        path = database_file(uri)
        assert path is not None
        if not Path(path).exists():
            build(uri, options.size)
        ini = folder / "postoffice.ini"
        ini.write_text(_INI.format(uri=uri, folder=folder))
        measure(ini, options.times, Path(f"{path}.serve"))


def measure(ini: Path, times: int, place: Path) -> None:
    """Start it so many times, and print how long it took."""
    # The first one makes the queue, and finds the file as whoever built it left it.
    end(*start(ini), signal.SIGTERM, place)
    after: dict[signal.Signals, list[float]] = {signal.SIGTERM: [], signal.SIGKILL: []}
    before = signal.SIGTERM
    for number in range(times):
        how = signal.SIGKILL if number % 2 == 0 else signal.SIGTERM
        process, seconds = start(ini)
        after[before].append(seconds)
        end(process, seconds, how, place)
        before = how
    for how, name in ((signal.SIGTERM, "an end in order"), (signal.SIGKILL, "a kill")):
        if found := after[how]:
            median = statistics.median(found)
            print(f"after {name:16} {median:.2f} s ({min(found):.2f} to {max(found):.2f})")


def end(process: subprocess.Popen[bytes], seconds: float, how: signal.Signals, place: Path) -> None:
    """End the daemon; with SIGKILL, each of its processes."""
    state = read_state(place)
    assert state is not None
    process.send_signal(how)
    if how == signal.SIGKILL:
        for part in state.parts:
            os.kill(part.process, how)
    process.wait()


if __name__ == "__main__":
    main()
