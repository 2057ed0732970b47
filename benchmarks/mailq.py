"""How fast Postfix's queue of 10,000 deferred messages is loaded, beside pymailq 0.9.0.

A private Postfix, which needs root and what the tests need, is given the messages by smtp-source
and defers them all.  The queue is loaded by pymailq's way, ``postqueue -p``, by ours of the same
and by ``postqueue -j``, in turn: from Postfix, which takes much of that time to list its queue, and
from a script that prints what Postfix printed, which leaves the reading.  Then headers are read:
pymailq has one ``postcat`` for each message, and does it for some of them, spread over the queue;
ours reads all from the queue directories.  What was read is compared, or the run fails.

    python benchmarks/mailq.py                                   # 2 minutes; as root
    python benchmarks/mailq.py --messages 2000 --rounds 3

The columns: seconds, the median of the rounds with the least and the most; pymailq's time in
relation to the row's, as the median of the rounds' ratios: 2 is twice as fast.  The same for
processor time of the loading process alone, in which neither Postfix nor other processes show.

pymailq 0.9.0 cannot load a sender in quotes with a space, and loses recipients that are not ASCII:
there are none here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pymailq
from pymailq.store import PostqueueStore as TheirStore

from postoffice.postfix import Mail, PostfixSettings, PostqueueStore

_ROOT = Path(__file__).resolve().parents[1]
# Nothing of it is delivered, and nothing is tried again while we look.
_MAIN = """
relay_domains = one.test, two.test, three.test
transport_maps = inline:{ { one.test = lmtp:inet:127.0.0.1:9 }
    { two.test = lmtp:inet:127.0.0.1:9 } { three.test = lmtp:inet:127.0.0.1:9 } }
queue_run_delay = 1d
minimal_backoff_time = 1d
maximal_backoff_time = 1d
bounce_queue_lifetime = 5d
"""
# Sender, recipient, recipients a message, and bytes of it; each a third of the messages.
_KINDS = (
    ("alice@sender.test", "ann@one.test", 1, 1_000),
    ("bulk+owner=x.y@lists.test", "reader@two.test", 5, 5_000),
    ("bob@sender.test", "bo@three.test", 1, 20_000),
)
_PATIENCE = 600.0
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

_Load = Callable[[], object]


class Times(NamedTuple):
    """What one load took, in seconds.

    :ivar clock: by the clock.
    :ivar processor: of the processor, in this process.
    """

    clock: float
    processor: float


def fill(port: int, messages: int, count: Callable[[], int]) -> None:
    """Have Postfix defer so many messages."""
    for number, (sender, recipient, recipients, size) in enumerate(_KINDS):
        share = messages // len(_KINDS) + (number < messages % len(_KINDS))
        words = ["smtp-source", "-s", "8", "-m", str(share), "-l", str(size), "-f", sender]
        words += ["-r", str(recipients), "-t", recipient, f"inet:127.0.0.1:{port}"]
        subprocess.run(words, check=True, env={"PATH": _PATH})
    deadline = time.monotonic() + _PATIENCE
    while count() < messages:
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {_PATIENCE:.0f} s {count()} of {messages} are deferred")
        time.sleep(1)


def theirs(listing: list[str], spool: str) -> TheirStore:
    """Load by pymailq."""
    pymailq.CONFIG["commands"]["list_queue"] = listing
    pymailq.CONFIG["core"]["postfix_spool"] = spool
    store = TheirStore()
    store.load("postqueue")
    return store


def ours(settings: PostfixSettings, method: str) -> PostqueueStore:
    """Load by ours."""
    store = PostqueueStore(settings)
    store.load(method)
    return store


def facts(mails: Iterable[Mail]) -> dict[str, tuple[object, ...]]:
    """Return what both know of messages."""
    return {
        mail.qid: (mail.size, mail.date, mail.sender, mail.status, list(map(str, mail.recipients)))
        for mail in mails
    }


def measure(rows: Mapping[str, _Load], rounds: int) -> dict[str, list[Times]]:
    """Return the times of each row in each round; a first round is not counted.

    Each round begins with another row.
    """
    times: dict[str, list[Times]] = {name: [] for name in rows}
    names = list(rows)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            clock, processor = time.perf_counter(), time.process_time()
            rows[name]()
            taken = Times(time.perf_counter() - clock, time.process_time() - processor)
            if number:
                times[name].append(taken)
    return times


def report(title: str, times: Mapping[str, list[Times]]) -> None:
    """Print a table; the first row is what the others are compared with."""
    print(f"\n{title}")
    base = next(iter(times.values()))
    for name, row in times.items():
        columns = []
        for kind in Times._fields:
            seconds = [getattr(one, kind) for one in row]
            bases = [getattr(one, kind) for one in base]
            ratio = statistics.median(a / b for a, b in zip(bases, seconds, strict=True))
            columns.append(
                f"{kind} {statistics.median(seconds):.3f} s"
                f" ({min(seconds):.3f} to {max(seconds):.3f}) {ratio:.2f}"
            )
        print(f"  {name:<18} {'   '.join(columns)}")


def compare_loading(title: str, settings: PostfixSettings, rounds: int) -> None:
    """Load by all three, and compare what they found."""
    words = settings.command("list_queue", "-p")
    rows: dict[str, _Load] = {
        "pymailq postqueue": lambda: theirs(words, settings.spool_path),
        "ours postqueue": lambda: ours(settings, "postqueue"),
        "ours json": lambda: ours(settings, "json"),
    }
    known = facts(theirs(words, settings.spool_path).mails)
    for method in ("postqueue", "json"):
        if facts(ours(settings, method).mails) != known:
            raise RuntimeError(f"{method} gives other messages than pymailq")
    report(f"{title}: {len(known)} messages", measure(rows, rounds))


def compare_headers(settings: PostfixSettings, rounds: int, sample: int) -> None:
    """Read the headers of some by pymailq and of all by ours; print the ratio for each message."""
    store = ours(settings, "json")
    some = store.mails[:: max(1, len(store.mails) // sample)][:sample]
    pymailq.CONFIG["commands"]["cat_message"] = settings.command("cat_message", "-qv")
    by_id = {
        mail.qid: mail
        for mail in theirs(settings.command("list_queue", "-p"), settings.spool_path).mails
    }
    ratios, alone, together = [], [], []
    for number in range(rounds + 1):
        started = time.perf_counter()
        for mail in some:
            by_id[mail.qid].parse()
        alone.append((time.perf_counter() - started) / len(some))
        started = time.perf_counter()
        loaded = PostqueueStore(settings)
        loaded.load("spool", parse=True)
        together.append((time.perf_counter() - started) / len(loaded.mails))
        ratios.append(alone[-1] / together[-1])
        if number == 0:
            _same_headers(loaded, by_id, some)
    print(
        f"\nheaders, a message: pymailq {statistics.median(alone[1:]) * 1e6:.0f} us"
        f" (a postcat each, for {len(some)});"
        f" ours {statistics.median(together[1:]) * 1e6:.0f} us"
        f" (spool, all {len(store.mails)}); {statistics.median(ratios[1:]):.1f} times as fast"
        f" ({min(ratios[1:]):.1f} to {max(ratios[1:]):.1f})"
    )


def _same_headers(loaded: PostqueueStore, by_id: Mapping[str, Mail], some: list[Mail]) -> None:
    found = {mail.qid: mail for mail in loaded.mails}
    if not all(mail.parsed for mail in loaded.mails):
        raise RuntimeError("not every message has its headers")
    for mail in some:
        if dict(found[mail.qid].head) != by_id[mail.qid].dump()["headers"]:
            raise RuntimeError(f"{mail.qid} has other headers than with pymailq")


def recorded(settings: PostfixSettings, folder: Path) -> PostfixSettings:
    """Return settings whose postqueue prints what the real one printed."""
    for option in ("-j", "-p"):
        words = settings.command("list_queue", option)
        with (folder / f"output{option}").open("wb") as output:
            subprocess.run(words, stdout=output, check=True)
    script = folder / "postqueue"
    script.write_text(f'#!/bin/sh\nexec cat {shlex.quote(str(folder))}/output"$1"\n')
    script.chmod(0o755)
    return PostfixSettings(list_queue=(str(script),), spool_path=settings.spool_path)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sample", type=int, default=300, help="messages that pymailq parses")
    options = parser.parse_args()
    if os.getuid() or not shutil.which("smtp-source", path=_PATH):
        print("needs root and Postfix with its smtp-source: nothing was measured")
        return
    # The tests are no package that is installed.
    sys.path.insert(0, str(_ROOT))
    from tests.postfix import Postfix

    with Postfix(_MAIN) as postfix, tempfile.TemporaryDirectory() as scratch:
        settings = PostfixSettings(
            config_directory=str(postfix.configuration), spool_path=str(postfix.queue_directory)
        )

        def deferred() -> int:
            return sum(mail.status == "deferred" for mail in ours(settings, "json").mails)

        fill(postfix.smtp_port, options.messages, deferred)
        compare_loading("from Postfix", settings, options.rounds)
        compare_loading("from its output", recorded(settings, Path(scratch)), options.rounds)
        compare_headers(settings, options.rounds, options.sample)


if __name__ == "__main__":
    main()
