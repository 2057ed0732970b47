"""The channel between the process that receives mail and the one that commits it."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from postoffice.intake.receiving import Frames, frame

SMALL = [(number, "a" * number) for number in range(40)]
LARGE = [(1, b"x" * 300_000), (2, b""), (3, b"y" * 1_000_000), (4, b"z" * 262_144)]


def read(data: bytes, lengths: Sequence[int]) -> list[Any]:
    """Return what comes of data that are read in pieces of at most these lengths, in turn."""
    frames, values, at, turn = Frames(), [], 0, 0
    while at < len(data):
        room = frames.room()
        assert len(room) > 0
        piece = data[at : at + min(len(room), lengths[turn % len(lengths)])]
        room[: len(piece)] = piece
        values += frames.take(len(piece))
        at += len(piece)
        turn += 1
    return values


@pytest.mark.parametrize("seed", range(20))
def test_values_come_as_they_were_sent(seed: int) -> None:
    """However what is sent is divided, the values come in order, each once."""
    chosen = random.Random(seed)
    sent = SMALL + LARGE
    chosen.shuffle(sent)
    lengths = [chosen.choice((1, 7, 8, 9, 100, 70_000, 1 << 20)) for _ in range(50)]
    assert read(b"".join(map(frame, sent)), [*lengths, 1 << 20]) == sent


def test_byte_by_byte() -> None:
    """Values come whole also when each byte comes by itself."""
    assert read(b"".join(map(frame, SMALL)), [1]) == SMALL


def test_the_end_within_a_value() -> None:
    """A value that is cut off by the end of the channel does not come."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((frame("one") + frame("two" * 100))[:-1])
        theirs.shutdown(socket.SHUT_WR)
        frames, values = Frames(), []
        while length := ours.recv_into(frames.room()):
            values += frames.take(length)
        assert values == ["one"]
        assert frames.take(0) == []
