"""Plans: calls that use results of others run in order, independent ones at once; bad plans are refused."""

import json
import threading
from typing import Any

import pytest

from poe.calls.conversation import Call
from poe.errors import DataError, ToolError
from poe.tools.plans import parse_plan, run_plan


def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: first
        b: second
    """
    return a + b


def find_user(name: str) -> dict:
    """Find a user.

    Args:
        name: who
    """
    return {"name": name, "orders": [{"number": 7}, {"number": 9}]}


def write(text: str) -> str:
    """Write.

    Args:
        text: what
    """
    return text


def step(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def test_results_take_the_place_of_references() -> None:
    plan = parse_plan(
        json.dumps(
            [
                step("write", text="Total of $2.name: $$$3, first $2.orders.0.number, $2.orders"),
                step("find_user", name="Marla"),
                step("add", a="$2.orders[1].number", b=1),
            ]
        )
    )
    assert plan.needs == [{2, 3}, set(), {2}]
    outcomes = run_plan(plan, [add, find_user, write])
    assert outcomes[2].call == Call("add", {"a": 9, "b": 1})  # the value, not its text
    assert outcomes[0].value == 'Total of Marla: $10, first 7, [{"number": 7}, {"number": 9}]'


def test_independent_calls_run_at_once() -> None:
    meeting = threading.Barrier(3, timeout=5)

    def meet(number: int) -> int:
        """Wait for the others.

        Args:
            number: which
        """
        meeting.wait()
        return number

    calls = [*(step("meet", number=n) for n in range(3)), step("add", a="$1", b="$3")]
    assert run_plan(parse_plan(calls), [meet, add])[3].value == 2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("{", "not JSON"),
        ('{"name": "add"}', "no list"),
        ([{"arguments": {}}], "no call of a plan"),
        ([{"name": "add", "arguments": "a"}], "no object"),
        ([step("write", text="$2")], r"uses \$2, but the plan has 1 calls. Write \$\$"),
        ([step("write", text="$0")], r"uses \$0"),
        ([step("write", text="$1")], r"wait for each other: \$1 -> \$1"),
        ([step("write", text="$2"), step("write", text=["$1"])], r"wait for each other: \$\d -> \$\d -> \$\d"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(plan: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_plan(plan)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([step("write", text="a"), step("steal")], r"Call 2 of the plan \(steal\) cannot be run: call to a tool"),
        ([step("write", text="a"), step("write", text=3)], r"Call 2 of the plan \(write\) cannot be run"),
        ([step("find_user", name="a"), step("write", text="$1")], r"Call 2 of the plan \(write\) was not run"),
        ([step("find_user", name="a"), step("write", text="$1.age")], r"has no 'age'. It has the names name, orders"),
        ([step("find_user", name="a"), step("write", text="$1.orders[5]")], r"has no '5'. It has list"),
        ([step("write", text="a"), step("write", text="$1.b")], r"has no 'b'. It has str"),
        ([step("add", a=1, b=2), step("fail", a="$1")], r"Call 2 of the plan \(fail\): Error: OSError: on fire"),
    ],
)
def test_a_call_that_cannot_be_run_ends_the_plan(calls: Any, message: str) -> None:
    def fail(a: int) -> int:
        """Fail.

        Args:
            a: x
        """
        raise OSError("on fire")

    ran: list[str] = []
    with pytest.raises(ToolError, match=message):
        run_plan(parse_plan(calls), [add, find_user, write, fail], approve=lambda call: not ran.append(call.name))
    if "cannot be run" in message:
        assert ran == []  # found before the plan starts


def test_a_refused_call_ends_the_plan() -> None:
    with pytest.raises(ToolError, match="was not run: it was refused"):
        run_plan(parse_plan([step("add", a=1, b=2)]), [add], approve=lambda call: False)


def test_a_call_that_takes_too_long_ends_the_plan() -> None:
    release = threading.Event()

    def hang() -> str:
        """Hang."""
        release.wait(20)
        return "late"

    with pytest.raises(ToolError, match=r"Call 1 of the plan \(hang\): Error: no result within 0.1 seconds"):
        run_plan(parse_plan([step("hang"), step("add", a=1, b=2)]), [hang, add], call_seconds=0.1)
    release.set()


def test_an_empty_plan_has_no_outcomes() -> None:
    assert run_plan(parse_plan("[]"), [add]) == []
