"""What README.rst shows works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from persistent.mapping import PersistentMapping

from tests.depots import QUEUE, zeo_depot
from tests.sites import Site, mail

README = (Path(__file__).resolve().parent.parent / "README.rst").read_text(encoding="utf-8")


def blocks(directive: str) -> list[str]:
    """Return the indented blocks behind a line that ends so."""
    found = re.findall(rf"{re.escape(directive)}\n\n((?:    .*\n|\n)+)", README)
    return [textwrap.dedent(block) for block in found]


def test_consumer(tmp_path: Path) -> None:
    """The consumer works with each message's leaving the queue, until it is told to end."""
    (consumer,) = blocks(".. code-block:: python")
    assert "A consumer in four lines" in README
    assert len([line for line in consumer.splitlines() if line]) == 4
    # The very text that readers copy.
    program = f"import sys\nuri = sys.argv[1]\n{consumer.replace('billing', QUEUE)}"
    with zeo_depot(tmp_path) as depot:
        seat = depot.seat()
        seat.connection.root()["bills"] = PersistentMapping()
        seat.commit()
        ids = seat.add("one", "two", "three")
        process = subprocess.Popen([sys.executable, "-c", program, depot.uri])
        try:
            for _ in range(400):
                time.sleep(0.05)
                seat.begin()
                if not len(seat.queue):
                    break
        finally:
            process.terminate()
            assert process.wait(20) == 0
        seat.begin()
        assert dict(seat.connection.root()["bills"]) == dict(
            zip(ids, ("one", "two", "three"), strict=True)
        )


def test_queue_of_the_readme(tmp_path: Path) -> None:
    """The queue that the README writes into the configuration gets the mail of its domain."""
    site = Site(tmp_path / "site")
    (queue,) = [block for block in blocks("::") if block.startswith("[queue:")]
    site.configure(queues=queue)
    site.deliver(mail("one", to="anyone@billing.example.com"))
    site.done()
    assert len(site.ids("billing")) == 1


def test_paths_and_commands_of_the_readme_exist() -> None:
    """Each file that the README names is there, and each target of make."""
    root = Path(__file__).resolve().parent.parent
    for name in ("docs", "etc/postoffice.ini.sample", "CHANGES.rst", "LICENSE"):
        assert f"``{name}" in README
        assert (root / name).exists()
    targets = re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:``|^    )make ([a-z]+)", README, re.MULTILINE)) <= {*targets}
