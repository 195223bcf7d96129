"""Plans as graphs: the same calls in another order are the same plan, another dependency or argument is not."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from poe import Cascade
from poe.calls.conversation import Call
from poe.data.drops import DropReport
from poe.data.render import Renderer
from poe.data.templates import complete_template
from poe.errors import DataError
from poe.evaluation.kinds import make_suite, read_sources
from poe.evaluation.plan_match import match_plans
from poe.evaluation.plan_rows import INSTRUCTION, read_plans
from poe.evaluation.suites import Settings
from poe.tools.plans import Plan, parse_plan, renumber_references
from test_sealtools_reader import BAKE, FIND, POOL, TIMER, row


def plan(*calls: str) -> Plan:
    """Return the plan of calls such as `mail to=$1 text=Hi`."""
    parts = [call.split(" ") for call in calls]
    return parse_plan([Call(name, dict(pair.split("=") for pair in pairs)) for name, *pairs in parts])


def both(first: Plan, second: Plan) -> tuple[bool, bool]:
    return match_plans(first, second), match_plans(first, second, with_arguments=True)


MAIL = plan("email who=Ann", "file name=plan", "mail to=$1 with=$2")


@pytest.mark.parametrize(
    ("other", "graph", "arguments"),
    [
        (plan("email who=Ann", "file name=plan", "mail to=$1 with=$2"), True, True),
        (plan("file name=plan", "email who=Ann", "mail to=$2 with=$1"), True, True),  # in another order
        (plan("mail to=$3 with=$2", "file name=plan", "email who=Ann"), True, True),  # before what it needs
        (plan("email who=Bob", "file name=plan", "mail to=$1 with=$2"), True, False),  # another argument
        (plan("email who=Ann", "file name=plan", "mail to=$2 with=$1"), True, False),  # the references exchanged
        (plan("email who=Ann", "file name=plan", "mail to=$1.work with=$2"), True, False),  # a part of the result
        (plan("email who=Ann", "file name=plan", "mail to=$1 with=plan"), False, False),  # a dependency less
        (plan("email who=Ann", "file name=$1", "mail to=$1 with=$2"), False, False),  # one more
        (plan("email who=Ann", "note name=plan", "mail to=$1 with=$2"), False, False),  # another tool
        (plan("email who=Ann", "mail to=$1 with=$1"), False, False),  # a call less
        (plan(), False, False),
    ],
)
def test_plans_are_compared_as_graphs(other: Plan, graph: bool, arguments: bool) -> None:
    assert both(MAIL, other) == both(other, MAIL) == (graph, arguments)


def test_equal_calls_are_told_apart_by_who_uses_them() -> None:
    """Both have two equal calls, but in one of them each is used, and in the other one call twice."""
    each, twice = plan("f", "f", "g x=$1", "h x=$2"), plan("f", "f", "g x=$1", "h x=$1")
    assert both(each, twice) == (False, False)
    assert both(each, plan("f", "f", "g x=$2", "h x=$1")) == (True, True)
    many = [*["f x=1"] * 20, *(f"g x=${i}" for i in range(1, 21))]
    assert both(plan(*many), plan(*reversed(many[:20]), *many[:19:-1])) == (True, True)
    assert both(plan(*many), plan(*many[:-1], "g x=$1")) == (False, False)


@st.composite
def plans(draw: st.DrawFn, most: int = 7) -> Plan:
    """A plan of up to `most` calls of three tools, each with some references to earlier calls and a value."""
    calls = []
    for number in range(draw(st.integers(1, most))):
        used = draw(st.lists(st.integers(1, number), max_size=3)) if number else []
        arguments = {"used": [f"${n}" for n in used], "value": draw(st.sampled_from("xy"))}
        calls.append(Call(draw(st.sampled_from("fgh")), arguments))
    return parse_plan(calls)


def reorder(plan: Plan, order: list[int]) -> Plan:
    """Return the plan with call `order[i]` in place i, and the numbers of references changed accordingly."""
    places = {old + 1: new + 1 for new, old in enumerate(order)}
    calls = [plan.calls[old] for old in order]
    return parse_plan([Call(c.name, renumber_references(c.arguments, places.__getitem__)) for c in calls])


@settings(max_examples=40, deadline=None)
@given(plans(), st.data())
def test_a_reordered_plan_is_the_same_and_a_changed_one_is_not(drawn: Plan, data: st.DataObject) -> None:
    moved = reorder(drawn, data.draw(st.permutations(range(len(drawn.calls)))))
    assert both(drawn, moved) == (True, True)
    place = data.draw(st.integers(0, len(moved.calls) - 1))
    call = moved.calls[place]

    def change(**arguments: Any) -> Plan:
        changed = Call(call.name, {**call.arguments, **arguments})
        return parse_plan([*moved.calls[:place], changed, *moved.calls[place + 1 :]])

    assert both(drawn, change(value="z")) == (True, False)
    needed = moved.needs[place]
    if needed:
        assert both(drawn, change(used=[f"${n}" for n in needed - {min(needed)}])) == (False, False)
    try:
        more = change(used=[f"${n}" for n in {*needed, data.draw(st.integers(1, len(moved.calls)))}])
    except DataError:  # a circle
        return
    assume(more.needs[place] != needed)
    assert both(drawn, more) == (False, False)


@settings(max_examples=40, deadline=None)
@given(plans(4), plans(4), st.booleans())
def test_the_comparison_is_that_of_all_pairings(first: Plan, second: Plan, with_arguments: bool) -> None:
    def equal(other: Plan) -> bool:
        names = [call.name for call in first.calls] == [call.name for call in other.calls]
        arguments = [c.arguments for c in first.calls] == [c.arguments for c in other.calls]
        return names and first.needs == other.needs and (arguments or not with_arguments)

    orders = itertools.permutations(range(len(second.calls)))
    found = any(equal(reorder(second, list(order))) for order in orders)
    assert match_plans(first, second, with_arguments=with_arguments) is found


TOOLS = [
    {"name": "find_user", "parameters": {"name": {"type": "string"}}},
    {"name": "pay", "parameters": {"user": {"type": "integer"}, "cents": {"type": "integer", "default": 5}}},
]
PAY = [{"name": "find_user", "arguments": {"name": "Ann"}}, {"name": "pay", "arguments": {"user": "$1.id"}}]


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    rows = [
        {"question": "Pay Ann.", "tools": TOOLS, "plan": PAY},
        {"question": "Pay Ann.", "tools": TOOLS, "plan": PAY[1:]},  # uses a call that it does not have
        {"question": "Pay Ann.", "tools": TOOLS, "plan": []},
        {"question": "Pay Bob.", "tools": TOOLS, "plan": [{"name": "pay", "arguments": {"user": True}}]},
    ]
    (tmp_path / "plans.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "plans.jsonl"


def test_rows_with_plans_are_read(plan_file: Path) -> None:
    (rows,) = read_sources(f"plans={plan_file}")
    assert (rows.read, len(rows.rows), rows.dropped.total()) == (4, 1, 3)
    assert "plan with a reference to no other call, or with a circle" in rows.dropped
    conversation = rows.rows[0][-1]
    assert [message["content"] for message in conversation.messages] == [INSTRUCTION, "Pay Ann.", None]
    with pytest.raises(DataError, match="no public data set; give a file"):
        read_sources("plans")


def test_rows_of_seal_tools_become_plans(tmp_path: Path) -> None:
    (tmp_path / "tool.jsonl").write_text("\n".join(map(json.dumps, POOL.values())))
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, [row(FIND, TIMER, BAKE), row(FIND, id="dev-2")])))
    report = DropReport()
    (conversation,) = read_plans(str(tmp_path / "dev.jsonl"), report)
    calls = [call["function"] for call in conversation.messages[-1]["tool_calls"]]
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("findFlour", {"kind": "rye"}),
        ("setTimer", {"minutes": 5}),
        ("bakeLoaf", {"flour": "$1"}),
    ]
    assert report.dropped["sealtools"] == {"no call that uses the result of another": 1}


def test_a_reply_is_compared_as_a_plan(plan_file: Path, demo_base: Path) -> None:
    cascade = Cascade.from_pretrained(demo_base, dtype=torch.float32)
    complete_template(cascade.tokenizer)
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    (rows,) = read_sources(f"plans={plan_file}")
    suite = make_suite(rows, cascade, renderer, Settings(max_new_tokens=3))

    def score(*calls: dict[str, Any], rest: str = "") -> list[float]:
        reply = "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>\n" for call in calls) + rest
        (counts,) = suite.count(suite.items, [{"reply": reply, "finish_reason": "stop"}])
        return [counts[name][0] for name in ("plan", "plan_with_arguments", "readable_plan")]

    find, pay = PAY
    assert score(find, pay) == [1, 1, 1]
    assert score({"name": "pay", "arguments": {"user": "$2.id", "cents": 5}}, find) == [1, 1, 1]  # the default
    assert score(find, {"name": "pay", "arguments": {"user": "$1"}}) == [1, 0, 1]
    assert score(find, {"name": "pay", "arguments": {"user": 1}}) == [0, 0, 1]
    assert score(pay, find) == [0, 0, 0]  # a circle
    assert score(find, pay, rest="<tool_call>{") == [0, 0, 0]
    assert score(rest="Sure.") == [0, 0, 0]
    (counts,) = suite.count(suite.items, [{"reply": "", "finish_reason": "stop"}])
    assert "exact" not in counts  # the order of the calls decides what a reference means
