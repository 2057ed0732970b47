"""What RE2 has compiled, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

# The public classes add 1.5 us a call, so the extension is used itself.
from re2 import _re2

__all__ = ["ANCHORED", "BLOCK_MEMORY", "PROGRAM_MEMORY", "UNANCHORED", "Program"]

# Where its DFA does not fit, RE2 takes up to 18 ns for each instruction and byte.
LINEAR_STEPS_PER_SECOND: Final = 40_000_000
PROGRAM_MEMORY: Final = 4 << 20
BLOCK_MEMORY: Final = 16 << 20

ANCHORED: Final = _re2.RE2.Anchor.ANCHOR_START
UNANCHORED: Final = _re2.RE2.Anchor.UNANCHORED


@dataclass(frozen=True, slots=True)
class Program:
    """What RE2 compiled, and the length in bytes of the longest text it answers in time here."""

    source: bytes
    run: Callable[[Any, bytes, int, int], list[tuple[int, int]]]
    longest: int

    @classmethod
    def compiled(cls, source: str, memory: int, limit: float) -> Program | None:
        """Compile *source*, or return ``None`` if RE2 refuses it, as too large for one."""
        options = _re2.RE2.Options()
        options.log_errors = False
        options.max_mem = memory
        encoded = source.encode("ascii")
        program = _re2.RE2(encoded, options)
        if not program.ok():
            return None
        longest = int(limit * LINEAR_STEPS_PER_SECOND / max(1, program.ProgramSize()))
        return cls(encoded, program.Match, longest)

    def found(self, anchor: Any, data: bytes) -> bool:
        """Say whether it matches *data*, from its start or anywhere."""
        return self.run(anchor, data, 0, len(data))[0][0] >= 0
