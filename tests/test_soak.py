"""A soak of all that there is, with a Postfix before it and applications behind it."""

from __future__ import annotations

from statistics import median

import pytest

from tests.soak import Soak


@pytest.mark.torture
def test_ten_minutes() -> None:
    """Nothing is lost or doubled, whatever is hit; memory and descriptors stay what they are."""
    said: list[str] = []
    summary = Soak(600.0, 10.0, said.append).run()
    said += summary.lines()
    assert (summary.lost, summary.doubled) == ([], []), said
    for role in ("serve", "storage", "lmtp", "lmtp receiver", "spool"):
        first, last = summary.thirds(role)
        memory = [median(one.memory for one in samples) for samples in (first, last)]
        assert memory[1] < 1.2 * memory[0] + 4_000_000, said
        descriptors = [median(one.descriptors for one in samples) for samples in (first, last)]
        assert descriptors[1] <= descriptors[0] + 1, said
