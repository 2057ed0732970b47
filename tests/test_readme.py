"""What README.rst shows works as it stands there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from postoffice.message import Message
from postoffice.queue import open_queue
from tests.sites import Site, mail

README = (Path(__file__).resolve().parent.parent / "README.rst").read_text(encoding="utf-8")


def blocks(directive: str) -> list[str]:
    """Return the indented blocks behind a line that ends so."""
    found = re.findall(rf"{re.escape(directive)}\n\n((?:    .*\n|\n)+)", README)
    return [textwrap.dedent(block) for block in found]


def test_consumer(tmp_path: Path) -> None:
    """The consumer processes what it can, and leaves the rest in quarantine with its error."""
    site = Site(tmp_path / "site")
    site.deliver(mail("one"), mail("two"), mail("three"))
    site.done()
    processed = []

    def process(message: Message) -> None:
        if message["Subject"] == "two":
            raise ValueError("an odd number is expected")
        processed.append(message["Subject"])

    (consumer,) = blocks(".. code-block:: python")
    # The very text that readers copy.
    exec(compile(consumer, "README.rst", "exec"), {"uri": site.uri, "process": process})  # noqa: S102
    assert processed == ["one", "three"]
    with open_queue(site.uri, "billing") as queue:
        assert len(queue) == 0
        ((message, error),) = queue.get_quarantined_messages()
        assert (message["Subject"], error.message) == ("two", "an odd number is expected")
    assert "A consumer in eleven lines" in README
    assert len([line for line in consumer.splitlines() if line]) == 11


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
