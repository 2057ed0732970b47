"""The intake journal: which spool files a transaction took in, until they have left the spool."""

from __future__ import annotations

from persistent import Persistent

__all__ = ["Journal"]


class Journal(Persistent):
    """The names of the files of one spool that are in the depot and may still be in the spool.

    Written in the transaction that stores the messages; whoever finds a file that is named here
    takes it out of the spool without importing it again.  Only the holder of the spool's lock may
    write it.

    :ivar names: where in the archive each file goes, or ``""``, by what it is known by: the unique
        part of its name, its modification time in nanoseconds and its size, as
        ``UNIQUE/TIME/SIZE``.
    """

    def __init__(self) -> None:
        """Make an empty journal."""
        self.names: dict[str, str] = {}
