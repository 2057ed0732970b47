"""The demonstration: three dozen messages from a Maildir, by rules, into queues and out of them.

``python demo/run.py [--keep]``; with ``--keep`` the scratch folder stays for a look around.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mail import MESSAGES

HERE = Path(__file__).resolve().parent
PLACES = ("billing", "orders", "alarms", "support", "rejected", "discarded")
LOGGED = re.compile(
    r" INFO (?P<name>\S+) (?:to queue '(?P<queue>[^']+)'|(?P<verdict>\w+)): "
    r"(?P<reason>[\w-]+)(?P<marks>(?: \[[^]]+\])*): (?P<detail>.*?) From: "
)
ANSWER = re.compile(r"(\w+): \S.*? matches ")


def tell(text: str) -> None:
    """Print an explanation, set off from what commands print."""
    print(f"\n--- {text}", flush=True)


def run(folder: Path, *arguments: str, shown: str = "") -> str:
    """Run ``postoffice`` on the folder's configuration; return what it printed, logs included."""
    if shown:
        print(f"$ {shown}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "postoffice.cli", "-C", "postoffice.ini", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"postoffice {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def deliver(maildir: Path) -> None:
    """Put the messages into the Maildir, as a mail server would: each a file with its time."""
    now = time.time()
    for number, sample in enumerate(MESSAGES, 1):
        path = maildir / "tmp" / f"{number:03}.demo"
        path.write_bytes(sample.raw)
        os.utime(path, (now - sample.ago, now - sample.ago))
        path.rename(maildir / "new" / path.name)


def show_outcome(log: str) -> None:
    """Print a line for each message, by places: what it was, and what became of it."""
    rows: Counter[tuple[str, str, str]] = Counter()
    for line in log.splitlines():
        found = LOGGED.search(line)
        if found is None:
            continue
        about = MESSAGES[int(found["name"][:3]) - 1].about
        why = found["marks"].strip() or ANSWER.sub(r"\1: ", found["detail"])
        if not found["queue"]:
            why = f"{found['reason']}: {why}"
        rows[found["queue"] or found["verdict"], about, why] += 1
    last = ""
    for place, about, why in sorted(rows, key=lambda row: PLACES.index(row[0])):
        times = rows[place, about, why]
        shown = about if times == 1 else f"{about} ({times})"
        print(f"{place if place != last else '':<10} {shown:<38} {why}")
        last = place


def demonstrate(folder: Path) -> None:
    """Go through the steps."""
    deliver(folder / "Maildir")
    tell(f"{len(MESSAGES)} messages wait in {folder}/Maildir/new; these are the rules:")
    rules = (folder / "postoffice.ini").read_text(encoding="utf-8").partition("reject_filters")
    print("\n".join(filter(None, "".join(rules[1:]).splitlines())))

    tell("The import takes them all in, in order of arrival. With -v, it logs a line for each:")
    log = run(folder, "-v", shown="postoffice -v")
    lines = [line for line in log.splitlines() if LOGGED.search(line)]
    print("\n".join(line[:98] for line in lines[:2]) + "\n...\n" + log.splitlines()[-1])

    tell("In other words: where each message went, and why, or which mark it bears there")
    show_outcome(log)

    tell("Nothing is left in the Maildir's new; the originals are in its archive. The queues:")
    print(run(folder, "queues", shown="postoffice queues"), end="")

    tell("This application takes bills, each in a transaction of its own (demo/application.py):")
    source = (HERE / "application.py").read_text(encoding="utf-8").partition("\n\n")[2]
    print(source.strip() + "\n")
    uri = f"file://{folder}/var/depot.fs?blobstorage_dir={folder}/var/blobs"
    print("$ python demo/application.py file://...", flush=True)
    subprocess.run([sys.executable, str(HERE / "application.py"), uri], check=True)

    tell("It did not understand one bill. That one is in quarantine, with the error:")
    listing = ["messages", "billing", "--quarantined"]
    listed = run(folder, *listing, shown=f"postoffice {' '.join(listing)}")
    print(listed, end="")
    id = listed.splitlines()[1].split()[0]
    facts = run(folder, "show", "billing", id, shown=f"postoffice show billing {id}")
    print(facts.partition("\n\n")[0] + "\n[and the message itself]")

    tell("Once the application is mended, the message goes back into its queue:")
    print(
        run(folder, "requeue", "billing", "--all", shown="postoffice requeue billing --all"), end=""
    )


def main() -> None:
    """Lay out a scratch folder, go through the steps in it, and remove it."""
    keep = "--keep" in sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="postoffice-demo-"))
    try:
        run(folder.parent, "init", str(folder / "po"))
        shutil.copyfile(HERE / "postoffice.ini", folder / "po" / "postoffice.ini")
        demonstrate(folder / "po")
        if keep:
            tell(f"All of it is in {folder / 'po'}: cd there, and try `postoffice -h`.")
        else:
            tell("That was all; --keep leaves the scratch folder for a look around.")
    finally:
        if not keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
