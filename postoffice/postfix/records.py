"""Queue files as postcat(1) shows them, many to a process, and what in its output is true.

A sender decides what stands in a queue file, and some of it comes back with line breaks in it: an
ORCPT of RFC 3461 may hold any character, so whoever may send mail can write lines that look like
postcat's own.  With ``-v`` each line of a message is marked as one, and with ``-o`` each record
tells its place in the file: a record's length gives the place of the next, and a line that is not
at its place is part of the value before it.  A forger can give such a line the place that it would
have, but then the true record that follows is not at its own, and the file is known for a forgery.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from postoffice.postfix.directories import CORRUPT, scan
from postoffice.postfix.errors import PostfixError
from postoffice.postfix.program import Program, failure
from postoffice.postfix.quoting import listed
from postoffice.postfix.settings import PostfixSettings

__all__ = ["QueueFile", "read_envelopes", "read_files", "read_queue_files"]

#: As many ids or files are given to one process: some 20 KB of arguments.
_BATCH = 1000
#: As much of a message's header is kept.
_MOST_HEADER = 1 << 18
#: As much of a file that is shown without its body may come before lines are looked at one by one.
_UNWATCHED = 1 << 16
# A record, or one of the marks between the parts of a file; each with its place in the file.
_RECORD = re.compile(rb" *([0-9]{1,18}) (?:([a-z_]+): (.*)|(\*\*\* [A-Z ]{1,20}) .* \*\*\*)")
_RECORDS = re.compile(rb"^%b$" % _RECORD.pattern, re.MULTILINE)
_START = b"*** ENVELOPE RECORDS "
_CONTENTS = b"*** MESSAGE CONTENTS"
_EXTRACTED = b"*** HEADER EXTRACTED"
_END = b"*** MESSAGE FILE END"
_STARS = b" ***"
_TEXT = frozenset({b"regular_text", b"unterminated_text"})
_TEXT_LINE = re.compile(rb" *[0-9]+ (?:regular|unterminated)_text: ")
_UNTERMINATED_LINE = re.compile(rb" *[0-9]+ unterminated_text: ")
_BLANK_LINE = re.compile(rb" *[0-9]+ regular_text: ")
# The recipients that a queue file has ever had.
_RECIPIENTS = frozenset({b"recipient", b"done_recipient", b"canceled_recipient"})
_TOLD = _TEXT | _RECIPIENTS | {b"sender", b"message_arrival_time", b"message_size", _CONTENTS}
# Those whose length is not that of what postcat shows.
_ODD = frozenset({b"create_time", b"message_arrival_time", b"pointer_record"})
# The longest record behind message_arrival_time: seconds and microseconds.
_TIMES = 34
# The record behind create_time: ten digits, which postcat shows as a date.
_CREATE_TIME = len(b"create_time=") + 10
_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"
_CTIME = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) +(\d{1,2}) (\d\d):(\d\d):(\d\d) (\d{4})")
_OPENING = re.compile(r"fatal: open (?:queue file )?(\S+): (.*)")
_NO_SUCH_FILE = "No such file or directory"
_GONE = "it is not in Postfix's queue any more"
_DOUBT = "its queue file holds text that looks like Postfix's own; what it tells is uncertain"
_TOO_LONG = "its header is longer than 256 KB; the rest was left out"


@dataclass(frozen=True, slots=True)
class QueueFile:
    """What one queue file tells.

    :ivar name: what was asked for, an id or a path.
    :ivar queue: the queue directory in which it was found, as ``deferred``; empty if it was not.
    :ivar size: bytes of the message; ``None`` where the file does not tell, as in ``maildrop``.
    :ivar arrival: local time and naive, to the second; ``None`` if unknown.
    :ivar sender: the envelope's sender as Postfix's listings write it; empty for the null sender.
    :ivar recipients: to whom it has still to be delivered, as Postfix's listings write them.
    :ivar header: the header block of the message; empty if it was not asked for.
    :ivar fault: why it could not be read, or not all of it be believed; empty otherwise.
    """

    name: str
    queue: str = ""
    size: int | None = None
    arrival: datetime | None = None
    sender: str = ""
    recipients: tuple[str, ...] = ()
    header: bytes = b""
    fault: str = ""


def read_envelopes(settings: PostfixSettings, ids: Sequence[str]) -> Iterator[QueueFile]:
    """Read the envelopes of these messages; all else is as with :func:`read_queue_files`."""
    for batch in _batches(ids):
        yield from _read(settings, batch, "-eovq")


def read_queue_files(settings: PostfixSettings, ids: Sequence[str]) -> Iterator[QueueFile]:
    """Read the envelopes and headers of these messages, a thousand to a process.

    Yields an answer for each id, in their order.  What is not in the queue (any more) says so in
    its ``fault``, and costs the others nothing.

    :param ids: ids of messages; :func:`postoffice.postfix.ids.is_queue_id` is true of each.
    :raises PostfixMissing: there is no postcat.
    :raises PostfixRefused: this user may not read the queue.
    :raises PostfixSilent: postcat said nothing for too long.
    """
    for batch in _batches(ids):
        yield from _with_headers(settings, batch, "q")


def read_files(settings: PostfixSettings, paths: Sequence[str]) -> Iterator[QueueFile]:
    """Read the envelopes and headers of the queue files at these absolute paths.

    postcat looks for an id in every queue directory but ``corrupt``: what is there has to be named
    by its path.
    """
    for batch in _batches(paths):
        yield from _with_headers(settings, batch, "")


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), _BATCH):
        yield names[start : start + _BATCH]


def _with_headers(settings: PostfixSettings, names: Sequence[str], by: str) -> list[QueueFile]:
    found = _read(settings, names, f"-ehov{by}")
    # Behind a line of the header that is longer than a record, postcat sees no header any more,
    # unless it shows the body too.
    cut = [index for index, one in enumerate(found) if one.header and one.header[-1:] != b"\n"]
    if cut:
        whole = _read(settings, [names[index] for index in cut], f"-ehbov{by}")
        for index, one in zip(cut, whole, strict=True):
            found[index] = one
    return found


def _read(settings: PostfixSettings, names: Sequence[str], options: str) -> list[QueueFile]:
    """Read files by one process, and by another one what is behind a file that ended it."""
    found: dict[str, QueueFile] = {}
    waiting = list(names)
    failures = 0
    while waiting:
        words = settings.command("cat_message", options, *waiting)
        output = _Output(waiting, 0 if "b" in options else _UNWATCHED)
        with Program(words, settings.timeout) as program:
            for line in program.lines():
                output.take(line)
            ending = program.ended()
        parts = output.parts
        opening = _OPENING.search(ending.said)
        failed = opening[1] if opening is not None else None
        if len(waiting) > 1 and (
            output.foreseen or (failed in waiting and failed not in waiting[len(parts) :][:1])
        ):
            # Somebody knew what would stand behind his message; apart, they do each other no harm.
            half = len(waiting) // 2
            for some in (waiting[:half], waiting[half:]):
                found.update({one.name: one for one in _read(settings, some, options)})
            break
        for name, part in zip(waiting, parts, strict=False):
            found[name] = _file(name, part)
        if ending.status == 0 and len(parts) == len(waiting):
            break
        failures += 1
        if opening is not None and opening[2] == _NO_SUCH_FILE and len(parts) < len(waiting):
            found[waiting[len(parts)]] = QueueFile(waiting[len(parts)], fault=_GONE)
            waiting = waiting[len(parts) + 1 :]
        elif opening is None and output.is_cut:
            name = waiting[len(parts) - 1]
            error = failure(words, ending.status, ending.said)
            found[name] = replace(found[name], fault=str(error))
            waiting = waiting[len(parts) :]
        else:
            raise failure(words, ending.status, ending.said)
        # Where many have gone, each would cost a process: look first which are still there.
        if failures & (failures - 1) == 0 and "q" in options:
            there = _there(settings)
            if there is not None:
                gone = [name for name in waiting if name not in there]
                found.update({name: QueueFile(name, fault=_GONE) for name in gone})
                waiting = [name for name in waiting if name in there]
    return [found[name] for name in names]


def _there(settings: PostfixSettings) -> Container[str] | None:
    """Return the ids that are in the queue; ``None`` if this user may not look."""
    try:
        return scan(settings.spool_path)
    except PostfixError:
        return None


class _Part:
    """What postcat wrote of one file.

    :ivar path: the path by which postcat calls it, in the spool or absolute.
    :ivar lines: its lines, those of the message's body left out.
    :ivar is_long: whether lines of the header were left out too.
    """

    def __init__(self, path: bytes, unwatched: int) -> None:
        """Take lines, `unwatched` bytes of them without looking for the end of the header."""
        self.path = path
        self.lines: list[bytes] = []
        self.is_long = False
        self._unwatched = unwatched
        self._left = _MOST_HEADER
        self._in_body = False

    @property
    def has_ended(self) -> bool:
        """Whether its last line is the one with which a file's part ends."""
        last = self.lines[-1] if self.lines else b""
        return last.endswith(b" %b %b%b" % (_END, self.path, _STARS))

    def take(self, line: bytes) -> None:
        """Take the next line."""
        if self._unwatched > 0:
            self._unwatched -= len(line)
        elif _TEXT_LINE.match(line):
            if self._in_body or self.is_long:
                return
            self._in_body = bool(_BLANK_LINE.fullmatch(line)) and not (
                self.lines and _UNTERMINATED_LINE.match(self.lines[-1])
            )
            self._left -= len(line)
            self.is_long = self._left < 0
        self.lines.append(line)


class _Output:
    """The lines of postcat, taken apart into the files that they tell of.

    :ivar parts: the files that were shown, in the order in which they were asked for.
    :ivar foreseen: whether a message holds the line with which another one's part begins.
    """

    def __init__(self, asked: Sequence[str], unwatched: int) -> None:
        self.parts: list[_Part] = []
        self._unwatched = unwatched
        self.foreseen = False
        self._asked = [name.encode() for name in asked]
        self._known = frozenset(self._asked)

    @property
    def is_cut(self) -> bool:
        """Whether the last part has no end."""
        return bool(self.parts) and not self.parts[-1].has_ended

    def take(self, line: bytes) -> None:
        """Take the next line."""
        if line.startswith(_START) and line.endswith(_STARS):
            path = line[len(_START) : -len(_STARS)]
            names = (path, path.rpartition(b"/")[2])
            place = len(self.parts)
            begins = place == 0 or self.parts[-1].has_ended
            if begins and place < len(self._asked) and self._asked[place] in names:
                self.parts.append(_Part(path, self._unwatched))
                return
            if not self._known.isdisjoint(names):
                self.foreseen = True
        if self.parts:
            self.parts[-1].take(line)


def _file(name: str, part: _Part) -> QueueFile:
    """Return what a file tells."""
    facts = _Facts()
    chained = _plainly_chained(part.lines) or _chained(part.lines)
    for label, value in _unchained(part.lines) if chained is None else chained:
        if label in _TOLD:
            facts.take(label, value)
    fault = ""
    if part.is_long:
        fault = _TOO_LONG
    if chained is None or not facts.has_all_recipients:
        fault = _DOUBT
    folders = part.path.split(b"/")
    return QueueFile(
        name=name,
        queue=folders[0].decode("ascii", "replace") if folders[0] else CORRUPT,
        size=facts.size,
        arrival=facts.arrival,
        sender=facts.sender or "",
        recipients=tuple(facts.recipients),
        header=b"".join(facts.header),
        fault=fault,
    )


def _unchained(lines: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield what looks like a record, as label and value."""
    for line in lines:
        record = _RECORD.match(line)
        if record:
            yield record[4] or record[2], record[3] or b""


def _plainly_chained(lines: Sequence[bytes]) -> list[tuple[bytes, bytes]] | None:
    """Return what :func:`_chained` does, faster, of a file without oddities; else ``None``."""
    found = _RECORDS.findall(b"\n".join(lines))
    if len(found) != len(lines):
        return None
    records: list[tuple[bytes, bytes]] = []
    low = high = 0
    for number, label, value, mark in found:
        place = int(number)
        if not low <= place <= high and mark != _EXTRACTED:
            return None
        if label in _ODD:
            if label == b"create_time" and len(records) == 2:
                low = high = place + 2 + _CREATE_TIME
            elif label == b"message_arrival_time" and _begins_with(records):
                low, high = place + 3, place + _TIMES
            else:
                return None
        else:
            length = len(value)
            low = high = place + 2 + length if length < 128 else _end(place, length)
        records.append((label or mark, value))
    return records if records and records[-1][0] == _END else None


def _chained(lines: Sequence[bytes]) -> list[tuple[bytes, bytes]] | None:
    """Return the records, each at the place where the one before it ends.

    ``None`` if that does not work out, or may have been made to: where a line that is taken for
    text has the place that it would have as a record.
    """
    records: list[tuple[bytes, bytes]] = []
    label = b""
    place = low = high = length = 0
    values: list[bytes] = []
    is_fixed = has_sender = has_contents = has_pointer = has_lookalike = False
    nearest = None
    for line in lines:
        record = _RECORD.match(line)
        claimed = int(record[1]) if record else -1
        if record and (
            low <= claimed <= high
            # What is not shown of the contents is skipped.
            or (record[4] == _EXTRACTED and has_contents and claimed >= low)
        ):
            if nearest is not None and nearest < low:
                return None
            if label:
                records.append((label, b"\n".join(values)))
            nearest = None
            place = claimed
            label = record[4] or record[2]
            value = record[3] or b""
            values, length = [value], len(value)
            low = high = _end(place, length)
            # The lengths of these are not those of what is shown; for one of a message itself, or
            # of its sender, a forger would be free to choose a place.
            is_fixed = True
            if label == b"message_arrival_time" and _begins_with(records):
                low, high = place + 3, place + _TIMES
            elif label == b"create_time" and not has_sender:
                low = high = _end(place, _CREATE_TIME)
            elif label == b"pointer_record":
                has_pointer = True
                if value.strip(b" 0").isdigit():
                    low = high = int(value)
            else:
                is_fixed = False
                has_sender = has_sender or label == b"sender"
                has_contents = has_contents or label == _CONTENTS
            continue
        if is_fixed or not label:
            return None
        if record:
            has_lookalike = True
            if claimed > place and (nearest is None or claimed < nearest):
                nearest = claimed
        values.append(line)
        length += 1 + len(line)
        low = high = _end(place, length)
    if label != _END or len(values) != 1 or (has_pointer and has_lookalike):
        return None
    records.append((label, b""))
    return records


def _begins_with(records: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return whether these are what Postfix writes above the time of arrival.

    That is the size, and nothing in a file of ``maildrop``.
    """
    return not records or (len(records) == 1 and records[0][0] == b"message_size")


def _end(place: int, length: int) -> int:
    """Return where a record ends: behind its type, its length in groups of 7 bits, its value."""
    groups = max(1, (length.bit_length() + 6) // 7)
    return place + 1 + groups + length


class _Facts:
    """What records tell, gathered."""

    def __init__(self) -> None:
        self.size: int | None = None
        self.arrival: datetime | None = None
        self.sender: str | None = None
        self.recipients: list[str] = []
        self.header: list[bytes] = []
        self._expected: int | None = None
        self._had = 0
        self._in_contents = self._in_body = False

    @property
    def has_all_recipients(self) -> bool:
        """Whether there are as many as the file's first record counts, if it does."""
        return self._expected is None or self._expected == self._had

    def take(self, label: bytes, value: bytes) -> None:
        """Take the next record."""
        if label in _TEXT:
            self._take_text(label, value)
        elif label in _RECIPIENTS:
            self._had += 1
            if label == b"recipient":
                self.recipients.append(listed(value))
        elif label == b"sender" and self.sender is None:
            self.sender = listed(value)
        elif label == b"message_arrival_time" and self.arrival is None:
            self.arrival = _time(value.decode("ascii", "replace"))
        elif label == b"message_size" and self.size is None:
            numbers = value.split()
            if len(numbers) >= 3 and all(one.isdigit() for one in numbers):
                self.size = int(numbers[0])
                self._expected = int(numbers[2])
        elif label == _CONTENTS:
            self._in_contents = True

    def _take_text(self, label: bytes, value: bytes) -> None:
        if not self._in_contents or self._in_body:
            return
        starts = not self.header or self.header[-1].endswith(b"\n")
        if not value and starts and label == b"regular_text":
            self._in_body = True
            return
        self.header.append(value + b"\n" if label == b"regular_text" else value)


def _time(text: str) -> datetime | None:
    found = _CTIME.fullmatch(text)
    if found is None:
        return None
    month, *numbers = found.groups()
    day, hour, minute, second, year = map(int, numbers)
    try:
        # As it is documented: local and naive, and so postcat shows it.
        return datetime(year, _MONTHS.index(month) // 4 + 1, day, hour, minute, second)  # noqa: DTZ001
    except ValueError:
        return None
