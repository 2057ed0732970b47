"""The archive: the original bytes of what was taken from the spool.

A folder for each day, as a Maildir folder inside the spool or in a place of its own, and a folder
``failed`` for what could not be processed, with the reason beside each file.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from postoffice.depot.durability import sync_folder

__all__ = ["Archive", "Failure"]

log = logging.getLogger("postoffice")

_DAY = re.compile(r"\.?(\d{4})\.(\d\d)\.(\d\d)")
_REASON = ".reason"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a file was set aside.

    :ivar name: the file's name, in the spool and in ``failed``.
    :ivar reason: one line.
    :ivar fingerprint: the version and configuration that could not process it.
    :ivar when: seconds since the epoch.
    """

    name: str
    reason: str
    fingerprint: str
    when: int


class Archive:
    """Where files go when they leave the spool.

    All moves are by the holder of the spool's lock.  None replaces a file, and none is durable
    before :meth:`sync`.

    :ivar keeps: whether imported originals are kept at all.
    """

    def __init__(self, spool: Path, folder: Path | None, keeps: bool) -> None:
        """Archive the files of a spool.

        :param folder: the archive's folder; ``None`` for folders of the Maildir.
        :param keeps: ``False`` for ``archive = none``.
        """
        self._spool = spool
        self._folder = folder
        self.keeps = keeps
        self._touched: set[str] = set()
        self._made: set[str] = set()
        failed = spool / ".failed" if folder is None else folder / "failed"
        self.failed = str(failed)

    def place(self, name: str, day: date) -> str:
        """Return where a file of this name goes that is archived on this day, or ``""``."""
        return f"{day:%Y.%m.%d}/{name}" if self.keeps else ""

    def path(self, place: str) -> str:
        """Return the path of a place that :meth:`place` named."""
        day, _, name = place.partition("/")
        if self._folder is None:
            return f"{self._spool}/.{day}/cur/{name}"
        return f"{self._folder}/{day}/{name}"

    def take(self, source: str, place: str) -> None:
        """Take a file out of the spool: to its place, or away when that is ``""``.

        :raises OSError: it cannot be done now; the file is still in the spool.
        """
        if place:
            self._move(source, self.path(place))
        else:
            try:
                os.unlink(source)
            except FileNotFoundError:
                return
        self._touched.add(os.path.dirname(source))

    def _move(self, source: str, target: str) -> None:
        folder = os.path.dirname(target)
        if folder not in self._made:
            self._make(folder)
        if os.path.lexists(target):
            if _same_file(source, target):
                os.unlink(source)
                return
            number = 2
            while os.path.lexists(f"{target}.{number}"):
                number += 1
            target = f"{target}.{number}"
        try:
            os.rename(source, target)
        except FileNotFoundError:
            # Somebody else took it out of the spool; there is nothing left to keep.
            log.warning("%s vanished before it was archived", source)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy(source, target)
            os.unlink(source)
        self._touched.add(folder)

    def _make(self, folder: str) -> None:
        path = Path(folder)
        missing = [path, *path.parents]
        missing = [one for one in missing if not one.exists()]
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder is None and path.name == "cur":
            for name in ("new", "tmp"):
                (path.parent / name).mkdir(mode=0o700, exist_ok=True)
            (path.parent / "maildirfolder").touch(mode=0o600)
        for one in missing:
            self._touched.add(str(one.parent))
        self._made.add(folder)

    def sync(self) -> None:
        """Make the moves so far durable.

        :raises OSError: the disk does not take them.
        """
        for folder in self._touched:
            sync_folder(folder)
        self._touched.clear()

    def set_aside(self, source: str, failure: Failure) -> None:
        """Put a file that cannot be processed into ``failed``, with its reason beside it.

        :raises OSError: it cannot be done now; the file is still in the spool.
        """
        os.makedirs(self.failed, mode=0o700, exist_ok=True)
        note = os.path.join(self.failed, failure.name + _REASON)
        text = json.dumps(
            {
                "reason": failure.reason,
                "fingerprint": failure.fingerprint,
                "when": failure.when,
            },
            indent=1,
        )
        with open(note, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        target = os.path.join(self.failed, failure.name)
        if source != target:
            self._made.add(self.failed)
            self._move(source, target)
            self._touched.add(os.path.dirname(source))
        self._touched.add(self.failed)

    def failures(self) -> Iterator[Failure]:
        """Iterate over what is set aside, in order of names."""
        try:
            names = sorted(os.listdir(self.failed))
        except FileNotFoundError:
            return
        for name in names:
            if name.endswith(_REASON) or name.startswith("."):
                continue
            reason, fingerprint, when = "", "", 0
            try:
                with open(os.path.join(self.failed, name + _REASON), encoding="utf-8") as file:
                    note = json.load(file)
                reason, fingerprint = str(note["reason"]), str(note["fingerprint"])
                when = int(note["when"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = f"its reason cannot be read: {error}"
            yield Failure(name, reason, fingerprint, when)

    def forget_failure(self, name: str) -> None:
        """Remove the reason of a file that was processed after all."""
        try:
            os.unlink(os.path.join(self.failed, name + _REASON))
        except FileNotFoundError:
            return
        self._touched.add(self.failed)

    def expire(self, keep: float, now: float) -> list[str]:
        """Remove the folders of days that ended more than `keep` seconds ago; return their names.

        What cannot be removed is logged and tried again by the next import.
        """
        parent = str(self._spool if self._folder is None else self._folder)
        last = date.fromtimestamp(now - keep) - timedelta(days=1)
        removed = []
        try:
            names = sorted(os.listdir(parent))
        except FileNotFoundError:
            return []
        for name in names:
            found = _DAY.fullmatch(name)
            if found is None or name.startswith(".") is not (self._folder is None):
                continue
            try:
                day = date(int(found[1]), int(found[2]), int(found[3]))
            except ValueError:
                continue
            path = os.path.join(parent, name)
            if day > last or os.path.islink(path) or not os.path.isdir(path):
                continue
            try:
                shutil.rmtree(path)
            except OSError as error:
                log.warning("archive of %s cannot be removed: %s", name, error)
            else:
                removed.append(name)
        return removed


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except FileNotFoundError:
        return False


def _copy(source: str, target: str) -> None:
    """Copy a file to another file system; the target appears complete, or not at all."""
    partial = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.partial")
    with open(source, "rb") as reader, open(partial, "wb") as writer:
        os.fchmod(writer.fileno(), 0o600)
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
    modified = os.stat(source).st_mtime_ns
    os.utime(partial, ns=(modified, modified))
    os.rename(partial, target)


