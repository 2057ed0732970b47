"""A soak: mail at a steady rate through Postfix, the daemon and two applications, and all is hit.

::

    python -m tests.soak --minutes 10 --rate 10

Half of the mail goes to the Maildir, half by LMTP; half to an application that keeps up, half to
one that is slow.  Meanwhile each part of the daemon is killed, and the daemon itself; it is
reloaded and restarted; its storage stands still for a while; the disk is full for a while; Postfix
is restarted.  In the end it is told how long messages took from SMTP's ``250`` to the application,
how much memory and how many descriptors each part had, and whether any message was lost or doubled.
"""

from __future__ import annotations

import argparse
import os
import signal
import smtplib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from tests.lmtp_service import wait_until
from tests.serving import children
from tests.spools import mail
from tests.wired_daemon import DOMAINS, QUEUES, WiredDaemon

__all__ = ["Sample", "Soak", "Summary"]

_DISK_MEGABYTES = 192
_SAMPLE_SECONDS = 2.0
_FAST, _SLOW = QUEUES
_PROCESSING = {_FAST: 0.0, _SLOW: 0.1}
# For how long after a blow messages may still be late by it.
_LEE_SECONDS = 20.0
_DRAIN_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process used at some time.

    :ivar role: the part, or ``serve`` for the daemon's first process.
    :ivar at: seconds since the beginning.
    :ivar memory: resident bytes that are its own.
    :ivar descriptors: how many it had open.
    """

    role: str
    at: float
    memory: int
    descriptors: int


@dataclass(slots=True)
class Summary:
    """What a soak came to.

    :ivar sent: how many messages Postfix took.
    :ivar lost: subjects that no application got.
    :ivar doubled: subjects that an application got more than once.
    :ivar calm: seconds from ``250`` to the application that keeps up, while nothing was hit, by the
        way that messages went.
    :ivar rough: the same of all messages to it.
    """

    sent: int
    lost: list[str]
    doubled: list[str]
    calm: dict[str, list[float]]
    rough: list[float]
    samples: list[Sample]

    def lines(self) -> Iterator[str]:
        """Yield what is told of it."""
        lost, doubled = self.lost or "none", self.doubled or "none"
        yield f"{self.sent} messages; lost: {lost}; doubled: {doubled}"
        groups = {f"undisturbed, by {way}": found for way, found in self.calm.items()}
        for name, found in {**groups, "all": self.rough}.items():
            if len(found) > 1:
                last = quantiles(found, n=100)[98]
                yield (
                    f"from 250 to the application, {name}: {len(found)} messages, "
                    f"median {1000 * median(found):.0f} ms, 99th percentile {1000 * last:.0f} ms, "
                    f"longest {max(found):.1f} s"
                )
        for role in sorted({one.role for one in self.samples}):
            first, last_ones = self.thirds(role)
            yield (
                f"{role}: memory {_told(first, 'memory')} at first, {_told(last_ones, 'memory')} "
                f"in the end; descriptors {_told(first, 'descriptors')}, then "
                f"{_told(last_ones, 'descriptors')}"
            )

    def thirds(self, role: str) -> tuple[list[Sample], list[Sample]]:
        """Return the samples of a role in the first third of the time, and in the last."""
        end = max(one.at for one in self.samples)
        mine = [one for one in self.samples if one.role == role]
        return (
            [one for one in mine if one.at < end / 3],
            [one for one in mine if one.at > 2 * end / 3],
        )


def _told(samples: list[Sample], what: str) -> str:
    values = [getattr(one, what) for one in samples]
    if not values:
        return "unknown"
    if what == "memory":
        return f"{median(values) / 1e6:.1f} MB ({max(values) / 1e6:.1f} at most)"
    return f"{median(values):.0f} ({max(values)} at most)"


@dataclass(slots=True)
class Soak:
    """One soak.

    :ivar seconds: how long mail comes.
    :ivar rate: messages a second.
    :ivar say: takes lines that tell how it goes.
    """

    seconds: float
    rate: float
    say: Callable[[str], object]
    _wired: WiredDaemon = field(init=False)
    _began: float = field(init=False, default=0.0)
    _sent: dict[str, float] = field(init=False, default_factory=dict)
    _samples: list[Sample] = field(init=False, default_factory=list)
    _blows: list[tuple[float, float]] = field(init=False, default_factory=list)
    _ended: threading.Event = field(init=False, default_factory=threading.Event)

    def run(self) -> Summary:
        """Do it all; return what it came to."""
        self._wired = wired = WiredDaemon()
        wired.mount_data(_DISK_MEGABYTES)
        with wired:
            wired.lay_out(*QUEUES)
            for name in QUEUES:
                wired.application(name, name, _PROCESSING[name])
            self._began = time.monotonic()
            threads = [threading.Thread(target=one) for one in (self._send, self._sample)]
            for thread in threads:
                thread.start()
            try:
                for share, blow in self._plan():
                    self._wait_until(share * self.seconds)
                    self._hit(blow)
                threads[0].join()
                wait_until(wired.is_delivered, _DRAIN_SECONDS)
                wait_until(lambda: self._is_complete(), _DRAIN_SECONDS)
            finally:
                self._ended.set()
                for thread in threads:
                    thread.join()
            summary = self._summary()
            assert wired.serving.stop() == 0
        return summary

    def _is_complete(self) -> bool:
        time.sleep(1.0)
        return len(self._wired.taken()) >= len(self._sent)

    def _wait_until(self, seconds: float) -> None:
        time.sleep(max(0.0, self._began + seconds - time.monotonic()))

    # -- mail --------------------------------------------------------------------------------------

    def _send(self) -> None:
        number = 0
        while time.monotonic() < self._began + self.seconds:
            due = self._began + number / self.rate
            time.sleep(max(0.0, due - time.monotonic()))
            queue = QUEUES[number % 2]
            domain = DOMAINS[number // 2 % 2]
            address = f"{queue}@{domain}"
            subject = f"{queue} {domain} {number:06}"
            try:
                self._wired.postfix.send("ann@example.org", [address], mail(subject, To=address))
            except (smtplib.SMTPException, OSError):
                # Postfix is away, and whoever sends keeps its mail.
                time.sleep(0.1)
                continue
            self._sent[subject] = time.time()
            number += 1

    # -- what happens ------------------------------------------------------------------------------

    def _plan(self) -> list[tuple[float, Callable[[], None]]]:
        """Return what happens when, as a share of the time."""
        return [
            (0.10, self.kill_storage),
            (0.18, self.kill_lmtp),
            (0.26, self.kill_spool),
            (0.34, self.reload),
            (0.42, self.fill_the_disk),
            (0.54, self.stop_the_storage),
            (0.66, self.restart),
            (0.74, self.kill_all),
            (0.82, self.restart_postfix),
        ]

    def _hit(self, blow: Callable[[], None]) -> None:
        self.say(f"{time.monotonic() - self._began:5.0f} s  {blow.__name__.replace('_', ' ')}")
        began = time.time()
        blow()
        self._blows.append((began, time.time() + _LEE_SECONDS))

    def kill_storage(self) -> None:
        """Kill the process that serves the file."""
        self._wired.serving.kill("storage")

    def kill_lmtp(self) -> None:
        """Kill the process that stores what comes by LMTP."""
        self._wired.serving.kill("lmtp")

    def kill_spool(self) -> None:
        """Kill the process that imports."""
        self._wired.serving.kill("spool")

    def reload(self) -> None:
        """Have the daemon read its configuration again."""
        self._wired.serving.reload()

    def restart(self) -> None:
        """Stop the daemon as systemd does, and start it again."""
        assert self._wired.serving.stop() == 0
        self._wired.serve()

    def kill_all(self) -> None:
        """Kill the daemon's first process, and start it again."""
        self._wired.serving.stop(signal.SIGKILL)
        self._wired.serve()

    def restart_postfix(self) -> None:
        """Stop Postfix, and start it again."""
        self._wired.postfix.restart()

    def fill_the_disk(self) -> None:
        """Have no room on the disk for a while."""
        filler = self._wired.data / "filler"
        with open(filler, "wb", buffering=0) as file:
            for piece in (1 << 20, 4096):
                try:
                    while file.write(bytes(piece)) == piece:
                        pass
                except OSError:
                    # As it should be.
                    continue
        time.sleep(0.025 * self.seconds)
        filler.unlink()

    def stop_the_storage(self) -> None:
        """Have the storage stand still for a while."""
        pid = self._wired.serving.strike("storage", signal.SIGSTOP)
        time.sleep(0.025 * self.seconds)
        os.kill(pid, signal.SIGCONT)

    # -- what it costs -----------------------------------------------------------------------------

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            at = time.monotonic() - self._began
            serving = self._wired.serving
            try:
                pids = {"serve": serving.process.pid}
                for part in serving.state.parts:
                    pids[part.name] = part.process
                for receiver in children(pids.get("lmtp", 0)):
                    pids["lmtp receiver"] = receiver
                self._samples += [_used(role, at, pid) for role, pid in pids.items() if pid]
            except (OSError, AssertionError):
                # It is just being restarted.
                continue

    def _summary(self) -> Summary:
        taken = self._wired.taken()
        rough: list[float] = []
        calm: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
        for subject, sent in self._sent.items():
            if subject.startswith(_FAST) and subject in taken:
                late = taken[subject][0] - sent
                rough.append(late)
                if not any(began - _SAMPLE_SECONDS <= sent <= over for began, over in self._blows):
                    calm[subject.split()[1]].append(late)
        return Summary(
            len(self._sent),
            sorted(self._sent.keys() - taken.keys()),
            sorted(subject for subject, times in taken.items() if len(times) > 1),
            calm,
            rough,
            self._samples,
        )


def _used(role: str, at: float, pid: int) -> Sample:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private = sum(
        1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")
    )
    return Sample(role, at, private, len(os.listdir(f"/proc/{pid}/fd")))


def main() -> None:
    """Soak as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=10.0, help="messages a second")
    options = parser.parse_args()
    summary = Soak(60 * options.minutes, options.rate, print).run()
    print(*summary.lines(), sep="\n")
    sys.exit(bool(summary.lost or summary.doubled))


if __name__ == "__main__":
    main()
