"""The cost of a match: for how long a text the steps of ``re`` are bounded, and few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from postoffice.expressions.parsing import Node

__all__ = [
    "AFFORDABLE_STEPS",
    "PREFERRED_MATCH_STEPS",
    "PREFERRED_SEARCH_STEPS",
    "effort",
    "longest",
]

# A step of re takes 5 ns at most, often a tenth of that.  RE2 wins most searches, but few matches.
PREFERRED_MATCH_STEPS: Final = 40_000
PREFERRED_SEARCH_STEPS: Final = 4_000
AFFORDABLE_STEPS: Final = 2_000_000

_CHARACTER_NODES: Final = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN"})


def longest(tree: Any, match_budget: int, search_budget: int) -> tuple[int, int]:
    """Return how long a text may be for ``re`` to match it, and to search it, within its budget.

    The budgets are steps.  -1 is the answer where even an empty text may need more.
    """
    matched = searched = -1
    if tree is None:
        return matched, searched
    # Each step that may be taken back saves the groups.
    weight = 1 + tree.state.groups / 8
    length = 0
    while length <= 1 << 22:
        try:
            steps = effort(tree, length)[1] * weight
        except RecursionError:
            break
        if steps > match_budget:
            break
        matched = length
        if steps * (length + 1) <= search_budget:
            searched = length
        length = length + 16 if length < 256 else length * 3 // 2
    return matched, searched


def effort(nodes: Iterable[Node], length: int) -> tuple[float, float]:
    """Return in how many ways *nodes* can match from one place, and the steps to try them all.

    Both are upper bounds for any text of *length* characters.
    """
    ways = steps = 1.0
    for operator, argument in nodes:
        node_ways, node_steps = _node_effort(operator.name, argument, length)
        steps += ways * node_steps
        ways *= node_ways
    return ways, steps


def _node_effort(operator: str, argument: Any, length: int) -> tuple[float, float]:
    match operator:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "AT":
            return 1.0, 1.0
        case "IN":
            return 1.0, 1.0 + len(argument)
        case "SUBPATTERN":
            ways, steps = effort(argument[3], length)
            return ways, steps + 2 * ways
        case "BRANCH":
            efforts = [effort(choice, length) for choice in argument[1]]
            return sum(ways for ways, _ in efforts), sum(steps + 1 for _, steps in efforts)
        case "MAX_REPEAT" | "MIN_REPEAT":
            return _repeat_effort(argument, length)
        case "POSSESSIVE_REPEAT":
            return 1.0, _repeat_effort(argument, length)[1]
        case "ATOMIC_GROUP":
            return 1.0, effort(argument, length)[1] + 1
        case "ASSERT" | "ASSERT_NOT":
            return 1.0, effort(argument[1], length)[1] + 1
        case "GROUPREF":
            return 1.0, length + 1.0
        case "GROUPREF_EXISTS":
            efforts = [effort(choice, length) for choice in argument[1:] if choice is not None]
            return sum(ways for ways, _ in efforts) + 1, sum(steps + 1 for _, steps in efforts)
    return float("inf"), float("inf")


def _repeat_effort(argument: Any, length: int) -> tuple[float, float]:
    least, most, nodes = argument
    width = nodes.getwidth()[0]
    rounds = min(int(most), length // width if width else int(least) + length + 1)
    ways, steps = effort(nodes, length)
    if len(nodes) == 1 and nodes[0][0].name in _CHARACTER_NODES:
        return max(1.0, rounds - least + 1.0), (rounds + 1) * steps
    steps += 4
    if ways == 1:
        return rounds + 1.0, (rounds + 1) * steps
    if ways > 1e9 or rounds > 30:
        return float("inf"), float("inf")
    total = sum(ways**count for count in range(rounds + 1))
    return total, total * steps
