"""A postcat(1) for tests: it shows queue files that are made up, as Postfix 3.7 shows real ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from postoffice.postfix import PostfixSettings

__all__ = ["Postcat", "records_of", "shown"]

# After options, each argument is an id; what it cannot open ends it.
_SCRIPT = """\
#!/bin/sh
echo run >> "$0.runs"
for one in "$@"; do
    case "$one" in
    -*) ;;
    *)  if [ -f "$0.files/$one" ]; then cat "$0.files/$one"; else
            echo "postcat: fatal: open queue file $one: No such file or directory" >&2
            exit 1
        fi ;;
    esac
done
"""

ARRIVAL = b"1795270544 123456"
ARRIVED = b"Sat Nov 21 14:15:44 2026"
CREATED = b"create_time=1795270544"

Record = tuple[bytes, bytes]


def records_of(
    recipients: Iterable[tuple[bytes, bytes]] = ((b"", b"x@y.example"),),
    header: Iterable[bytes] = (b"Subject: hello",),
    sender: bytes = b"a@b.example",
) -> list[Record]:
    """Return the records of a queue file, by the labels that postcat gives them.

    :param recipients: the original address by ORCPT, and the address, of each.
    """
    recipients = list(recipients)
    content = sum(_length(len(line)) for line in header)
    numbers = (content, 500, len(recipients), 0, content, 0)
    records = [
        (b"message_size", b" ".join(b"%15d" % number for number in numbers)),
        (b"message_arrival_time", ARRIVAL),
        (b"create_time", CREATED),
        (b"named_attribute", b"rewrite_context=local"),
        (b"sender", sender),
    ]
    for original, address in recipients:
        records.append((b"named_attribute", b"dsn_orig_rcpt=rfc822;" + original))
        records.append((b"original_recipient", address))
        records.append((b"recipient", address))
    records.append((b"*** MESSAGE CONTENTS", b""))
    records += [(b"regular_text", line) for line in header]
    records.append((b"*** HEADER EXTRACTED", b""))
    records.append((b"*** MESSAGE FILE END", b""))
    return records


def _length(size: int) -> int:
    groups = 1
    while size >> 7 * groups:
        groups += 1
    return 1 + groups + size


def shown(qid: str, records: Iterable[Record], queue: str = "deferred") -> bytes:
    """Return what ``postcat -ehov`` prints of a file with these records."""
    path = f"{queue}/{qid}".encode()
    lines = [b"*** ENVELOPE RECORDS %b ***" % path]
    place = 0
    for label, value in records:
        if label.startswith(b"***"):
            lines.append(b"%9d %b %b ***" % (place, label, path))
        elif label == b"message_arrival_time" or label == b"create_time":
            lines.append(b"%9d %b: %b" % (place, label, ARRIVED))
        else:
            lines.append(b"%9d %b: %b" % (place, label, value))
        place += _length(len(value))
    return b"".join(line + b"\n" for line in lines)


class Postcat:
    """The command, and the files that it shows."""

    def __init__(self, folder: Path) -> None:
        """Put it into this folder."""
        self._path = folder / "postcat"
        self._path.write_text(_SCRIPT)
        self._path.chmod(0o755)
        self._files = folder / "postcat.files"
        self._files.mkdir()
        self.settings = PostfixSettings(
            cat_message=(str(self._path),), spool_path=str(folder / "spool")
        )

    def show(self, qid: str, output: bytes) -> None:
        """Have it show a file by this output."""
        (self._files / qid).write_bytes(output)

    @property
    def runs(self) -> int:
        """How often it was run."""
        return len((self._path.parent / "postcat.runs").read_text().splitlines())
