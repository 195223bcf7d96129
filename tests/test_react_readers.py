"""ToolBench and RoTBench: traces of thought, action and input."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.data.readers import rotbench, toolbench
from poe.data.readers.react import Step, read_question, read_step
from poe.errors import RowError
from test_readers import BAKE, junk, kept, reason, run, shape

FINISH = {
    "name": "Finish",
    "description": "End the task",
    "parameters": {
        "type": "object",
        "properties": {"return_type": {"type": "string"}, "final_answer": {"type": "string"}},
        "required": ["return_type"],
    },
}


def step(name: str, arguments: Any, thought: str = "") -> str:
    return f"\nThought: {thought}\nAction: {name}\nAction Input: {json.dumps(arguments, indent=2)}"


def trace(*turns: tuple[str, Any], tools: Any = (BAKE, FINISH)) -> dict[str, Any]:
    system = f"Think, then act.\nSpecifically, you have access to the following APIs: {list(tools)!r}"
    speeches = [("system", system), ("user", "\nBread, please.\nBegin!\n"), *turns]
    return {"id": "Step 3: Bread", "conversations": [{"from": who, "value": what} for who, what in speeches]}


def done(answer: str) -> tuple[str, str]:
    return "assistant", step("Finish", {"return_type": "give_answer", "final_answer": answer}, "It is done.")


def test_toolbench_trace() -> None:
    call = step("bake_bread", {"grams": 5, "flour": "rye"}, "The flour first.\nThen the rest.")
    conversation, repairs = kept(toolbench, trace(("assistant", call), ("function", '{"ok": 1}'), done("Here it is.")))
    assert shape(conversation) == [
        ("user", "Bread, please.", []),
        ("assistant", "The flour first.\nThen the rest.", [("bake_bread", {"flour": "rye", "grams": 5})]),
        ("tool", '{"ok": 1}', []),
        ("assistant", "Here it is.", []),
    ]
    assert [tool["function"]["name"] for tool in conversation.tools] == ["bake_bread"]
    assert repairs == {"thought before the final answer left out": 1}


def test_toolbench_trace_that_ends_on_a_call() -> None:
    optional = {**BAKE, "parameters": {**BAKE["parameters"], "optional": ["grams"]}}
    conversation, _ = kept(toolbench, trace(("assistant", step("bake_bread", {"flour": "rye"})), tools=(optional,)))
    assert shape(conversation)[-1] == ("assistant", None, [("bake_bread", {"flour": "rye"})])
    assert "optional" not in conversation.tools[0]["function"]["parameters"]


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ([("assistant", "I would rather not.")], "turn without an action"),
        ([("assistant", step("invented", {}))], "call to a tool that is not offered"),
        ([("assistant", step("bake_bread", {}))], "required argument missing"),
        ([("assistant", "Action: bake_bread\nAction Input: {flour: rye}")], "arguments not JSON"),
        ([("assistant", step("Finish", {"return_type": "give_up_and_restart"}))], "trace without a final answer"),
        ([("assistant", step("Finish", []))], "trace without a final answer"),
        ([done("Yes"), ("function", "{}")], "turn after the final answer"),
        ([("user", "Try again, otherwise.")], "second user turn"),
        ([("function", "{}")], "response without a call"),
        ([("robot", "Beep")], "turn of an unknown speaker ('robot')"),
        ([("assistant", None)], "turn is not text"),
        ([], "no assistant turn"),
    ],
)  # fmt: skip
def test_toolbench_rows_that_cannot_be_converted_are_dropped(turns: list[tuple[str, Any]], why: str) -> None:
    assert reason(toolbench, trace(*turns)) == why


def test_toolbench_queries_have_no_answer() -> None:
    assert reason(toolbench, {"api_list": [], "query": "Bread?", "query_id": 1}) == "query without an answer"
    assert reason(toolbench, {"id": 1}) == "row of an unknown format"


def rotten(answers: Any, tools: Any = (BAKE, FINISH)) -> dict[str, Any]:
    system = f"... you have access of the following tools:\n{json.dumps(tools)}\n\nLet's Begin!"
    turns = [("system", system), ("user", "Bread?\nBegin!\n"), ("assistant", answers)]
    return {"id": "Turn 1: Bread?", "scenario": "TG", "conversations": [{"from": w, "value": v} for w, v in turns]}


def test_rotbench_uses_the_first_correct_answer() -> None:
    answers = [f"Thought:\nAction: bake_bread\nAction Input: {json.dumps({'flour': f})}" for f in ("rye", "oat")]
    conversation, repairs = kept(rotbench, rotten(answers))
    assert shape(conversation) == [("user", "Bread?", []), ("assistant", None, [("bake_bread", {"flour": "rye"})])]
    assert repairs == {"other correct answers left out": 1}
    assert kept(rotbench, rotten(answers[:1]))[1] == {}


def test_rotbench_names_have_no_special_meaning() -> None:
    swapped = [{**BAKE, "name": "finish"}, {**FINISH, "name": "bake_bread"}]
    row = rotten(['Thought:\nAction: finish\nAction Input: {"flour": "None"}'], swapped)
    assert shape(kept(rotbench, row)[0])[1] == ("assistant", None, [("finish", {"flour": "None"})])


def test_rotbench_rows_that_cannot_be_converted_are_dropped() -> None:
    for answers in ([], "Action: bake_bread", [5], None):
        assert reason(rotbench, rotten(answers)) == "row of an unknown format"
    good = ['Action: bake_bread\nAction Input: {"flour": "rye"}']
    assert reason(rotbench, rotten(good, {"a": 1})) == "tools are not a list"
    row = rotten(good)
    row["conversations"][0]["value"] = "No tools here."
    assert reason(rotbench, row) == "no declaration of tools"
    row["conversations"][0]["value"] = "you have access of the following tools:\n[f(x)]\n\nLet's Begin!"
    assert reason(rotbench, row) == "tool declarations not JSON"


words = st.text("ab .:\n{}", max_size=20)


@given(words, st.text("ab_", min_size=1, max_size=5), st.dictionaries(words, words | st.integers(), max_size=3))
def test_a_step_is_read_back(thought: str, name: str, arguments: dict[str, Any]) -> None:
    assert read_step(step(name, arguments, thought)) == Step(thought.strip(), name, arguments)


def test_a_step_needs_an_action_on_a_separate_line() -> None:
    with pytest.raises(RowError):
        read_step('Thought: no Action: f\nAction Input: {"a": 1}')
    assert read_question("Begin! he said\nBegin!\n") == "Begin! he said"


@pytest.mark.parametrize("reader", [rotbench, toolbench])
@given(row=junk)
def test_random_rows_never_crash_a_reader_of_traces(reader: Any, row: Any) -> None:
    conversations, counts = run(reader, row)
    assert len(conversations) + sum(counts["dropped"].values()) == counts["read"] == 1
