"""The watch: wakes its caller when a folder has something new, by inotify or by looking."""

from __future__ import annotations

import ctypes
import logging
import os
import select
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

__all__ = ["Watch", "pause"]

log = logging.getLogger("postoffice")

_TICK_SECONDS = 1.0

# inotify(7)
_IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_CREATE, _IN_ONLYDIR = 0x8, 0x80, 0x100, 0x1000000
_NEW = _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE | _IN_ONLYDIR
_IN_IGNORED = 0x8000
_EVENT = struct.Struct("iIII")
_EVENTS = 64 * 1024

_Identity = tuple[int, int]


class Watch:
    """Watches folders for new files; belongs to one thread.

    Where a folder has gone, and is there again, it is watched again within a second, whether it was
    moved, mounted or made anew.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        """Watch some folders, whether they are there or not."""
        self._folders = tuple(folders)
        self._seen: dict[str, frozenset[str]] = {}
        self._watched: dict[str, tuple[_Identity, int]] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = -1
        self._open()
        self.look()

    def _open(self) -> None:
        try:
            self._inotify = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        except AttributeError:
            return
        if self._inotify < 0:
            reason = os.strerror(ctypes.get_errno())
            log.warning("inotify cannot be used (%s); the Maildir is looked at each second", reason)

    def close(self) -> None:
        """Watch no more."""
        if self._inotify >= 0:
            os.close(self._inotify)
            self._inotify = -1

    def look(self) -> None:
        """Take what is there for known: only what comes from now on is new."""
        self._drain()
        self._follow()
        self._seen = {folder: self._names(folder) for folder in self._folders}

    def wait(self, seconds: float, stop: int, tick: Callable[[], None]) -> bool:
        """Wait for something new; return whether there may be.

        :param seconds: how long at most.
        :param stop: a descriptor that ends the waiting when it can be read.
        :param tick: is called about each second.
        """
        until = time.monotonic() + seconds
        poller = select.poll()
        poller.register(stop, select.POLLIN)
        if self._inotify >= 0:
            poller.register(self._inotify, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            tick()
            ready = {one for one, _ in poller.poll(1000 * min(left, _TICK_SECONDS))}
            if stop in ready:
                return False
            if ready or self._follow() or self._has_more():
                return True
        return False

    def _drain(self) -> None:
        """Take the events that there are; forget the watches that the kernel has ended."""
        ended = set()
        with suppress(BlockingIOError):
            while self._inotify >= 0:
                data = os.read(self._inotify, _EVENTS)
                while data:
                    number, mask, _, length = _EVENT.unpack_from(data)
                    data = data[_EVENT.size + length :]
                    if mask & _IN_IGNORED:
                        ended.add(number)
        # A folder that is made anew may have the number of the one that was removed.
        for folder, (_, number) in list(self._watched.items()):
            if number in ended:
                del self._watched[folder]

    def _follow(self) -> bool:
        """Watch the folders that are there now; return whether any is another one than before."""
        changed = False
        for folder in self._folders:
            there = _identity(folder)
            known = self._watched.get(folder)
            if known is not None and known[0] == there:
                continue
            changed = changed or there is not None
            if known is not None:
                del self._watched[folder]
                if self._inotify >= 0:
                    self._libc.inotify_rm_watch(self._inotify, known[1])
            if there is not None:
                number = self._add(folder)
                self._watched[folder] = there, number
        return changed

    def _add(self, folder: str) -> int:
        if self._inotify < 0:
            return -1
        number: int = self._libc.inotify_add_watch(self._inotify, os.fsencode(folder), _NEW)
        if number < 0:
            reason = os.strerror(ctypes.get_errno())
            log.warning(
                "the folder %s cannot be watched (%s); it is looked at each second", folder, reason
            )
            self.close()
        return number

    def _has_more(self) -> bool:
        """Say, without inotify, whether a folder holds what it did not hold before."""
        if self._inotify >= 0:
            return False
        return any(self._names(folder) - self._seen[folder] for folder in self._folders)

    def _names(self, folder: str) -> frozenset[str]:
        if self._inotify >= 0:
            return frozenset()
        try:
            return frozenset(os.listdir(folder))
        except OSError:
            return frozenset()


def pause(seconds: float, stop: int, tick: Callable[[], None]) -> None:
    """Wait so many seconds, or until the descriptor `stop` can be read; see :meth:`Watch.wait`."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        tick()
        if select.select([stop], [], [], min(left, _TICK_SECONDS))[0]:
            return


def _identity(folder: str) -> _Identity | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino
