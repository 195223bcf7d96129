"""Plans: calls that use the results of others, as in LLMCompiler (arXiv 2312.04511).

A plan is a list of calls, numbered from 1. In a text of their arguments, `$2` stands for the result of call 2, and
`$2.user.orders[0]` for a part of it. A text that is only a reference becomes the value itself; in longer text it is
written out. `$$` is a dollar sign.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from time import monotonic
from typing import Any

from poe.calls.arguments import check_call, find_tool
from poe.calls.conversation import Call
from poe.calls.json_text import as_text, parse_json
from poe.errors import DataError, ToolError
from poe.tools.execution import (
    BoundTool,
    Outcome,
    ToolResult,
    bind_tools,
    declarations,
    late_outcome,
    read_outcome,
    start_call,
)

_REFERENCE = re.compile(r"\$\$|\$(\d+)((?:\.\w+|\[\d+\])*)")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_EXPECTED = 'expected a list of calls such as {"name": "get_user", "arguments": {"id": "$1.user_id"}}'


@dataclass(frozen=True)
class Plan:
    """Calls, and for each the numbers (from 1) of the calls that its arguments use."""

    calls: list[Call]
    needs: list[set[int]]


def parse_plan(plan: str | Sequence[Call | Mapping[str, Any]]) -> Plan:
    """Return the plan of calls, or of their JSON text.

    Raises `DataError` for what is no list of calls, a reference to a call that the plan does not have, and a circle.
    """
    try:
        given = parse_json(plan) if isinstance(plan, str) else plan
    except ValueError as error:
        raise DataError(f"The plan is not JSON ({error}): {_EXPECTED}.") from None
    if not isinstance(given, list | tuple):
        raise DataError(f"The plan is no list: {_EXPECTED}.")
    calls = [call if isinstance(call, Call) else _read_call(call) for call in given]
    needs = [set(_find_references(call.arguments)) for call in calls]
    for number, needed in enumerate(needs, 1):
        if unknown := sorted(needed - set(range(1, len(calls) + 1))):
            raise DataError(
                f"Call {number} of the plan uses ${unknown[0]}, but the plan has {len(calls)} calls. "
                "Write $$ for a dollar sign."
            )
    try:
        TopologicalSorter(dict(enumerate(needs, 1))).prepare()
    except CycleError as error:
        circle = " -> ".join(f"${number}" for number in error.args[1])
        raise DataError(f"The calls of the plan wait for each other: {circle}.") from None
    return Plan(calls, needs)


def run_plan(
    plan: Plan,
    tools: Any,
    *,
    approve: Callable[[Call], bool] | None = None,
    call_seconds: float = 60.0,
) -> list[Outcome]:
    """Run the calls of a plan, each as soon as the results that it uses are there; return their outcomes in order.

    `tools` and `approve` are those of `Agent`. A call is checked against its tool before the plan starts, and again
    with the results in its place. Raises `ToolError` if a call does not fit its tool, is refused, fails, or takes
    longer than `call_seconds`; calls that run then are given up, and no other is started.
    """
    bound = {member.name: member for member in bind_tools(tools)}
    for number, (call, needed) in enumerate(zip(plan.calls, plan.needs, strict=True), 1):
        offered = declarations(bound.values())
        problem = None if needed and find_tool(offered, call.name) else check_call(offered, call.name, call.arguments)
        if problem:
            raise ToolError(f"Call {number} of the plan ({call.name[:80]}) cannot be run: {problem}.")
    outcomes: dict[int, Outcome] = {}
    order = TopologicalSorter(dict(enumerate(plan.needs, 1)))
    order.prepare()
    running: dict[Future[ToolResult], tuple[int, Call, float]] = {}  # with the time at which it is too late
    try:
        while order.is_active():
            for number in order.get_ready():
                call = Call(plan.calls[number - 1].name, _substitute(plan.calls[number - 1].arguments, outcomes))
                _check_step(number, call, bound[call.name], approve)
                running[start_call(bound[call.name], call)] = (number, call, monotonic() + call_seconds)
            wait(running, max(0.0, min(late for _, _, late in running.values()) - monotonic()), FIRST_COMPLETED)
            for future, (number, call, late) in list(running.items()):
                if future.done() or monotonic() >= late:
                    del running[future]
                    outcome = read_outcome(call, future) if future.done() else late_outcome(call, call_seconds)
                    if outcome.status != "done":
                        raise ToolError(f"Call {number} of the plan ({call.name[:80]}): {outcome.text[:500]}")
                    outcomes[number] = outcome
                    order.done(number)
    finally:
        for future in running:
            future.cancel()
    return [outcomes[number] for number in sorted(outcomes)]


def renumber_references(value: Any, number: Callable[[int], int]) -> Any:
    """Return a value in which each reference to a call `$n` is one to `$number(n)`."""
    if isinstance(value, dict):
        return {name: renumber_references(member, number) for name, member in value.items()}
    if isinstance(value, list):
        return [renumber_references(member, number) for member in value]
    if not isinstance(value, str):
        return value
    return _REFERENCE.sub(lambda m: f"${number(int(m[1]))}{m[2]}" if m[1] else m[0], value)


def _check_step(number: int, call: Call, bound: BoundTool, approve: Callable[[Call], bool] | None) -> None:
    """Raise `ToolError` for a call that does not fit its tool or is refused."""
    problem = check_call([bound.tool], call.name, call.arguments)
    if not problem and approve is not None and not bound.is_read_only and not approve(call):
        problem = "it was refused"
    if problem:
        raise ToolError(f"Call {number} of the plan ({call.name[:80]}) was not run: {problem}.")


def _read_call(call: Any) -> Call:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise DataError(f"{str(call)[:80]!r} is no call of a plan: {_EXPECTED}.")
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise DataError(f"The arguments {str(arguments)[:80]!r} of a plan's call are no object: {_EXPECTED}.")
    return Call(call["name"], arguments)


def _find_references(value: Any) -> Iterator[int]:
    if isinstance(value, str):
        yield from (int(match[1]) for match in _REFERENCE.finditer(value) if match[1])
    elif isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _find_references(member)


def _substitute(value: Any, outcomes: Mapping[int, Outcome]) -> Any:
    """Return a value with results in the place of references."""
    if isinstance(value, dict):
        return {name: _substitute(member, outcomes) for name, member in value.items()}
    if isinstance(value, list):
        return [_substitute(member, outcomes) for member in value]
    if not isinstance(value, str):
        return value
    match = _REFERENCE.fullmatch(value)
    if match and match[1]:
        return _follow(match, outcomes)
    return _REFERENCE.sub(lambda found: as_text(_follow(found, outcomes)) if found[1] else "$", value)


def _follow(reference: re.Match[str], outcomes: Mapping[int, Outcome]) -> Any:
    """Return the part of a result that a reference names."""
    value = outcomes[int(reference[1])].value
    for name, index in _STEP.findall(reference[2]):
        try:
            value = value[int(index or name)] if isinstance(value, list) else value[name]
        except (KeyError, IndexError, TypeError, ValueError):
            known = f"the names {', '.join(map(str, value))[:200]}" if isinstance(value, dict) else type(value).__name__
            raise ToolError(
                f"The plan uses {reference[0]!r}, but the result of call {reference[1]} has no {name or index!r}. "
                f"It has {known}."
            ) from None
    return value
