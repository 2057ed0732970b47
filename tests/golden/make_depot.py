"""Makes the golden depot of the present format: ``python tests/golden/make_depot.py FOLDER``.

Run once for each format that was released; what it wrote is kept, and opened by test_folder.py
with every later release.  It holds two queues: one with a small message, a large one, a requeued
one and one taken; the other with a message in quarantine.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import transaction
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from postoffice.depot.folder import make_folder
from postoffice.message import Envelope, Message
from postoffice.queue import BLOB_SIZE, find_queue

__all__ = ["main"]


def message(name: str, body: str = "body") -> Message:
    """Return a message with an envelope."""
    raw = f"From: a@example.com\nTo: b@example.org\nSubject: {name}\nMessage-ID: <{name}@x>\n\n"
    envelope = Envelope("a@example.com", ("b@example.org",), 1_700_000_000 * 10**9, "4XyZ")
    return Message.from_bytes(f"{raw}{body}\n".encode(), envelope=envelope)


def main() -> None:
    """Write the depot into the folder that the command line names."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    database = DB(FileStorage(str(folder / "depot.fs"), blob_dir=str(folder / "blobs")))
    connection = database.open()
    depot = make_folder(connection.root(), "mail/postoffice")
    depot.make("first")
    depot.make("second queue")
    depot.journal("spool").names["1.M1.host"] = "cur/1.M1.host"
    transaction.commit()
    first = find_queue(connection.root(), "first", "mail/postoffice")
    second = find_queue(connection.root(), "second queue", "mail/postoffice")
    for name in ("taken", "again", "small"):
        first.add(message(name))
    first.add(message("large", "x" * BLOB_SIZE))
    second.add(message("bad"))
    first.collect_frequency_data(message("small"), ("Subject",))
    transaction.commit()
    first.pop_next()
    transaction.commit()
    first.quarantine(first.pop_next(), "first error")
    transaction.commit()
    first.requeue_quarantined_messages()
    second.quarantine(second.pop_next(), ValueError("second error"))
    transaction.commit()
    connection.close()
    database.pack()
    database.close()
    for name in ("depot.fs.index", "depot.fs.lock", "depot.fs.tmp", "depot.fs.old", "blobs/.lock"):
        (folder / name).unlink(missing_ok=True)
    for name in ("blobs/tmp", "blobs.old"):
        shutil.rmtree(folder / name, ignore_errors=True)


if __name__ == "__main__":
    main()
