"""``postoffice serve`` behind a real Postfix, two applications behind it, and all of it is hit."""

from __future__ import annotations

import signal
import time

from tests.lmtp_service import wait_until
from tests.spools import mail
from tests.wired_daemon import DOMAINS, QUEUES, WiredDaemon


def test_each_message_once_whatever_happens() -> None:
    """Mail flows from SMTP to applications while the daemon is killed, reloaded and restarted."""
    with WiredDaemon() as wired:
        wired.lay_out(*QUEUES)
        for name in QUEUES:
            wired.application(name, name, 0.005)
        sent: list[str] = []

        def send(count: int) -> None:
            for _ in range(count):
                for domain in DOMAINS:
                    for queue in QUEUES:
                        subject = f"{len(sent):04}"
                        sent.append(subject)
                        wired.postfix.send(
                            "ann@example.org", [f"{queue}@{domain}"], mail(subject, To=queue)
                        )

        send(1)
        wait_until(lambda: sorted(wired.taken()) == sent)
        for part in ("storage", "lmtp", "spool"):
            wired.serving.strike(part)
            send(3)
        wired.configure("[queue:more]\nfilters =\n    envelope_to: more@.example.com\n")
        wired.serving.reload()
        send(3)
        for how in (signal.SIGKILL, signal.SIGTERM):
            send(2)
            wired.serving.stop(how)
            send(2)
            wired.serve()
        send(3)
        wait_until(wired.is_delivered, 120)
        wait_until(lambda: sorted(wired.taken()) == sent)
        time.sleep(0.5)
        twice = {name: times for name, times in wired.taken().items() if len(times) > 1}
        assert twice == {}
        assert wired.serving.stop() == 0
