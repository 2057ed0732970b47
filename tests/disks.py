"""Disks that are soon full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["enlarge", "small_disk"]


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB at a path that is not there yet; skips where that cannot be."""
    if os.geteuid():
        pytest.skip("only root can mount a small file system")
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "postoffice-test", str(path)], check=True
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def enlarge(disk: Path) -> None:
    """Give a small disk room."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
