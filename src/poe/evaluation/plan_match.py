"""Compare plans as graphs, as TinyAgent does (arXiv 2409.00608), and also with their arguments.

The calls of a plan are the nodes of a directed acyclic graph, labeled with their tools. An edge goes from a call to
each call that uses its result. Two plans match if their graphs are isomorphic: their calls can be paired so that tools
and edges agree. Neither the order nor the numbers of the calls matter. With arguments, paired calls must have equal
arguments as well, where a reference equals one to the paired call.

TinyAgent's script sees the first reference of a text, and those inside of a list one level deep. Here all count.
"""

from collections.abc import Hashable, Iterable, Mapping
from graphlib import TopologicalSorter
from typing import Any

from poe.calls.validation import canonical_value
from poe.tools.plans import Plan, renumber_references


def match_plans(first: Plan, second: Plan, *, with_arguments: bool = False) -> bool:
    """Return whether two plans are the same graph of calls. The work is exponential only for very regular graphs."""
    size = len(first.calls)
    if size != len(second.calls):
        return False
    # Both plans are one graph: call i of the second plan has the number size + i.
    calls = [*first.calls, *second.calls]
    needs = [{n - 1 + start for n in needed} for plan, start in ((first, 0), (second, size)) for needed in plan.needs]
    users: list[set[int]] = [set() for _ in calls]
    for user, needed in enumerate(needs):
        for number in needed:
            users[number].add(user)
    colors = _refine([_label(call.name, call.arguments, with_arguments) for call in calls], needs, users)
    if sorted(colors[:size]) != sorted(colors[size:]):
        return False
    order = list(TopologicalSorter({number: needs[number] for number in range(size)}).static_order())
    arguments = [_canonical(call.arguments, {}) for call in second.calls] if with_arguments else []
    pairs: dict[int, int] = {}  # call of the first plan -> call of the second
    taken: set[int] = set()

    def agree(mine: int, other: int) -> bool:
        if colors[mine] != colors[other] or {pairs[number] for number in needs[mine]} != needs[other]:
            return False
        if not with_arguments:
            return True
        numbers = {number + 1: pairs[number] - size + 1 for number in needs[mine]}
        return _canonical(calls[mine].arguments, numbers) == arguments[other - size]

    def pair_rest(position: int) -> bool:
        if position == size:
            return True
        mine = order[position]
        for other in range(size, 2 * size):
            if other not in taken and agree(mine, other):
                pairs[mine] = other
                taken.add(other)
                if pair_rest(position + 1):
                    return True
                taken.remove(other)
        return False

    return pair_rest(0)


def _label(name: str, arguments: Any, with_arguments: bool) -> Hashable:
    """Return what is equal for calls that may be paired: the numbers of references do not count."""
    return (name, canonical_value(renumber_references(arguments, lambda _: 0))) if with_arguments else name


def _canonical(arguments: Any, numbers: Mapping[int, int]) -> Any:
    return canonical_value(renumber_references(arguments, lambda number: numbers.get(number, number)))


def _refine(labels: Iterable[Hashable], needs: list[set[int]], users: list[set[int]]) -> list[int]:
    """Return colors that are equal for calls that look alike from their labels, neighbors, neighbors of these, ..."""
    colors = _number(labels)
    while True:
        refined = _number(
            (color, tuple(sorted(colors[n] for n in needs[i])), tuple(sorted(colors[n] for n in users[i])))
            for i, color in enumerate(colors)
        )
        if len({*refined}) == len({*colors}):
            return refined
        colors = refined


def _number(keys: Iterable[Hashable]) -> list[int]:
    palette: dict[Hashable, int] = {}
    return [palette.setdefault(key, len(palette)) for key in keys]
