"""The archive: the original bytes of what was taken from the spool.

A folder for each day, as a Maildir folder inside the spool or in a place of its own, and a folder
``failed`` for what could not be processed, with the reason beside each file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from postoffice.depot.durability import sync_folder

__all__ = ["Archive", "Failure", "local_day"]

log = logging.getLogger("postoffice")

_DAY = re.compile(r"\.?(\d{4})\.(\d\d)\.(\d\d)")
_REASON = ".reason"
# What a file's name may have, in bytes, so that there is room for a suffix.
_LONGEST_NAME = 240
_PIECE = 1 << 20
# How often, and after how many seconds each, a file is asked for that another process writes.
_ATTEMPTS, _PAUSE = 100, 0.01


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

    def take(self, source: str, place: str) -> bool:
        """Take a file out of the spool: to its place, or away when that is ``""``.

        :return: whether it was in the spool.
        :raises OSError: it cannot be done now; the file is still in the spool.
        """
        if place:
            taken = self._move(source, self.path(place))
        else:
            try:
                os.unlink(source)
                taken = True
            except FileNotFoundError:
                taken = False
        if taken:
            self._touched.add(os.path.dirname(source))
        return taken

    def _move(self, source: str, target: str) -> bool:
        """Move a file to a target, or beside it if another file is there; tell if it was there.

        A file whose bytes are at the target already was moved by a run that was cut off.
        """
        folder = os.path.dirname(target)
        self._make(folder)
        try:
            _rename(source, target)
        except FileNotFoundError:
            if not os.path.lexists(source):
                return False
            # Somebody has removed the folder of the target.
            self._made.discard(folder)
            self._make(folder)
            _rename(source, target)
        self._touched.add(folder)
        return True

    def _make(self, folder: str) -> None:
        """Make a folder, on the disk too, unless this object made it before."""
        if folder in self._made:
            return
        path = Path(folder)
        missing = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder is None and path.name == "cur":
            for name in ("new", "tmp"):
                (path.parent / name).mkdir(mode=0o700, exist_ok=True)
            (path.parent / "maildirfolder").touch(mode=0o600)
        for one in missing:
            sync_folder(str(one.parent))
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
        self._make(self.failed)
        name = failure.name + (".mail" if failure.name.endswith(_REASON) else "")
        target = os.path.join(self.failed, name)
        if source != target:
            # Where the file goes if another of the same name was set aside before.
            target = _free(source, target) or target
        self._write_reason(os.path.basename(target), failure)
        if source != target:
            self._move(source, target)
            self._touched.add(os.path.dirname(source))
        self._touched.add(self.failed)

    def _write_reason(self, name: str, failure: Failure) -> None:
        text = json.dumps(
            {
                "reason": failure.reason,
                "fingerprint": failure.fingerprint,
                "when": failure.when,
            },
            indent=1,
        )
        with open(self._note(name), "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep(self, place: str, pieces: Iterable[bytes]) -> None:
        """Write what is in no spool to its place; a place that is ``""`` keeps nothing.

        It is durable after :meth:`sync`.  What is there already with the same bytes stays.

        :raises OSError: it cannot be done now.
        """
        if place:
            self._write(self.path(place), pieces)

    def keep_failure(self, failure: Failure, pieces: Iterable[bytes]) -> None:
        """Write what is in no spool, and cannot be processed, into ``failed``, with its reason.

        :raises OSError: it cannot be done now.
        """
        self._make(self.failed)
        target = os.path.join(self.failed, failure.name)
        self._write_reason(os.path.basename(target), failure)
        self._write(target, pieces)

    def _write(self, target: str, pieces: Iterable[bytes]) -> None:
        folder, name = os.path.split(target)
        self._make(folder)
        partial = os.path.join(folder, f".{_short(name)}.partial")
        with open(_open_alone(partial), "wb") as file:
            try:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
                _rename(partial, target)
            except BaseException:
                # On a full disk a piece that is of no use would be in the way of everything.
                with suppress(OSError):
                    os.unlink(partial)
                raise
        self._touched.add(folder)

    def was_set_aside(self, source: str) -> bool:
        """Tell whether ``failed`` has a copy of this spool file, with the same name and bytes.

        A run that was cut off while it copied the file to another file system leaves both.
        """
        target = os.path.join(self.failed, os.path.basename(source))
        try:
            return os.path.lexists(target) and _is_same(source, target)
        except FileNotFoundError:
            return False

    def finish_setting_aside(self, source: str) -> None:
        """Remove a spool file of which ``failed`` has a copy.

        :raises OSError: it cannot be done now.
        """
        sync_folder(self.failed)
        with suppress(FileNotFoundError):
            os.unlink(source)
        self._touched.add(os.path.dirname(source))

    def _note(self, name: str) -> str:
        """Return the path of the reason of a file in ``failed``."""
        if len(os.fsencode(name)) > _LONGEST_NAME:
            name = _short(name)
        return os.path.join(self.failed, name + _REASON)

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
                with open(self._note(name), encoding="utf-8") as file:
                    note = json.load(file)
                reason, fingerprint = str(note["reason"]), str(note["fingerprint"])
                when = int(note["when"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = f"its reason cannot be read: {error}"
            yield Failure(name, reason, fingerprint, when)

    def forget_failure(self, name: str) -> None:
        """Remove the reason of a file that was processed after all."""
        try:
            os.unlink(self._note(name))
        except FileNotFoundError:
            return
        self._touched.add(self.failed)

    def expire(self, keep: float, now: float) -> list[str]:
        """Remove the folders of days that ended more than `keep` seconds ago; return their names.

        What cannot be removed is logged, for another time.

        :param now: seconds since the epoch.
        """
        return [day for day in self.expiring(keep, now) if day]

    def expiring(self, keep: float, now: float) -> Iterator[str]:
        """Do as :meth:`expire` does, while it is iterated over.

        Yields ``""`` for a file that is removed, and the name of a day that is removed with all it
        had.
        """
        parent = str(self._spool if self._folder is None else self._folder)
        last = local_day(now - keep) - timedelta(days=1)
        try:
            names = sorted(os.listdir(parent))
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("archive cannot be looked into: %s", error)
            return
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
                for _ in _removing(path):
                    yield ""
            except OSError as error:
                log.warning("archive of %s cannot be removed: %s", name, error)
            else:
                yield name


def local_day(seconds: float) -> date:
    """Return the day, where this machine is, of a time in seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).astimezone().date()


def _removing(folder: str) -> Iterator[None]:
    """Remove a folder with all that is in it, a file for each step.

    Nobody else can write to what this user keeps, so that none of it turns into a link meanwhile.

    :raises OSError: something of it cannot be removed.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _removing(entry.path)
                else:
                    with suppress(FileNotFoundError):
                        os.unlink(entry.path)
                    yield
        os.rmdir(folder)
    except FileNotFoundError:
        # Somebody else removes it too.
        return


def _short(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _open_alone(path: str) -> int:
    """Open an empty file for writing that no other process writes as long as this one has it open.

    What a process that was killed has left of it is emptied.

    :raises BlockingIOError: another process has it for longer than one can wait.
    :raises OSError: it cannot be opened.
    """
    for _ in range(_ATTEMPTS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have given the file its final name meanwhile, or removed it.
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                os.ftruncate(descriptor, 0)
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_PAUSE)
    raise BlockingIOError(errno.EAGAIN, "another process is writing it", path)


def _free(source: str, target: str) -> str | None:
    """Return the first free path of target, target.2..., or ``None`` if the file is at one of them.

    :raises FileNotFoundError: there is no source.
    """
    path, number = target, 1
    while os.path.lexists(path):
        if _is_same(source, path):
            return None
        number += 1
        folder, name = os.path.split(target)
        if len(os.fsencode(name)) > _LONGEST_NAME:
            name = _short(name)
        path = os.path.join(folder, f"{name}.{number}")
    return path


def _rename(source: str, target: str) -> None:
    """Move a file to a free path at or beside a target, unless it is there already.

    :raises FileNotFoundError: there is no source, or no folder of the target.
    """
    folder = os.path.dirname(target)
    free = _free(source, target)
    if free is None:
        sync_folder(folder)
        os.unlink(source)
        return
    try:
        os.rename(source, free)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(source, free)
        # A rename is in both folders or in neither; of a copy, the disk may have neither.
        sync_folder(folder)
        os.unlink(source)


def _is_same(source: str, target: str) -> bool:
    """Tell whether two paths are of one file, or of regular files that hold the same bytes."""
    one, other = os.lstat(source), os.lstat(target)
    if os.path.samestat(one, other):
        return True
    if not (stat.S_ISREG(one.st_mode) and stat.S_ISREG(other.st_mode)):
        return False
    if one.st_size != other.st_size:
        return False
    with open(source, "rb") as reader, open(target, "rb") as kept:
        while piece := reader.read(_PIECE):
            if piece != kept.read(_PIECE):
                return False
    return True


def _copy(source: str, target: str) -> None:
    """Copy a file to another file system; the target appears complete, or not at all."""
    folder, name = os.path.split(target)
    partial = os.path.join(folder, f".{_short(name)}.partial")
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as reader:
        try:
            with open(partial, "wb") as writer:
                os.fchmod(writer.fileno(), 0o600)
                shutil.copyfileobj(reader, writer, _PIECE)
                modified = os.fstat(descriptor).st_mtime_ns
                writer.flush()
                os.utime(writer.fileno(), ns=(modified, modified))
                os.fsync(writer.fileno())
            os.rename(partial, target)
        except BaseException:
            # On a full disk a piece that is of no use would be in the way of everything.
            with suppress(OSError):
                os.unlink(partial)
            raise
