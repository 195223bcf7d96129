"""Hammer: evaluation sets in one format, and xLAM rows with masked names."""

import json
from typing import Any

import pytest

from poe.data.readers import hammer
from test_readers import kept, reason, shape

BAKE = {
    "name": "bake",
    "description": "Bake a loaf",
    "parameters": {"flour": {"type": "str", "description": "Which"}, "grams": {"type": "int", "description": ""}},
}
RYE = {"name": "bake", "arguments": {"flour": "rye"}}


def row(query: Any = "Bread, please.", answers: Any = (RYE,), tools: Any = (BAKE,)) -> dict[str, Any]:
    return {"query": query, "tools": list(tools), "answers": list(answers)}


def masked(answers: Any, **more: Any) -> dict[str, Any]:
    instruction = (
        "[BEGIN OF TASK INSTRUCTION]\nCall tools.\n[END OF TASK INSTRUCTION]\n\n[BEGIN OF AVAILABLE TOOLS]\n"
        f"{json.dumps([BAKE])}\n[END OF AVAILABLE TOOLS]\n\n[BEGIN OF QUERY]\nBread, please.\n[END OF QUERY]\n\n\n"
    )
    return {"instruction": instruction, "input": "", "output": f"```\n{json.dumps(answers)}\n```", **more}


def test_both_keys_of_answers() -> None:
    other = {"tool": "bake", "parameters": {"flour": "oat", "grams": "5"}}
    conversation, repairs = kept(hammer, row(answers=[RYE, other]))
    assert shape(conversation) == [
        ("user", "Bread, please.", []),
        ("assistant", None, [("bake", {"flour": "rye"}), ("bake", {"flour": "oat", "grams": 5})]),
    ]
    assert repairs == {"str coerced to integer": 1}


@pytest.mark.parametrize(
    ("beside", "inside", "required"),
    [(None, False, []), (["flour"], False, ["flour"]), (None, True, ["flour"]), ([], True, [])],
)
def test_required_parameters_are_those_of_the_row(beside: Any, inside: bool, required: list[str]) -> None:
    tool: dict[str, Any] = json.loads(json.dumps(BAKE))
    if beside is not None:
        tool["required"] = beside
    if inside:
        tool["parameters"]["flour"]["required"] = True
    parameters = kept(hammer, row(tools=[tool]))[0].tools[0]["function"]["parameters"]
    assert parameters["required"] == required
    assert parameters["properties"]["grams"] == {"type": "integer", "description": ""}


def test_messages_as_a_query() -> None:
    fenced = f"```{json.dumps([RYE])}```"
    query = [
        {"role": "user", "content": "Bread."},
        {"role": "agent", "content": "Which?"},
        {"role": "user", "content": "Rye."},
        {"role": "assistant", "content": fenced},
        {"role": "tool", "content": "success"},
        {"role": "agent", "content": "Baked."},
        {"role": "user", "content": "Again!\nGenerate API Request:"},
    ]
    assert shape(kept(hammer, row(query))[0]) == [
        ("user", "Bread.", []),
        ("assistant", "Which?", []),
        ("user", "Rye.", []),
        ("assistant", None, [("bake", {"flour": "rye"})]),
        ("tool", "success", []),
        ("assistant", "Baked.", []),
        ("user", "Again!", []),
        ("assistant", None, [("bake", {"flour": "rye"})]),
    ]
    query[6:] = [{"role": "user", "content": "Again!"}, {"role": "agent", "content": "Sure.\nGenerate API Request:"}]
    assert shape(kept(hammer, row(query))[0])[-1] == ("assistant", "Sure.", [("bake", {"flour": "rye"})])
    query[3] = {"role": "assistant", "content": fenced.replace("bake", "search")}
    assert reason(hammer, row(query)) == "call to a tool that is not offered"
    assert reason(hammer, row([{"role": "robot", "content": "a"}])) == "message of an unknown role ('robot')"
    assert reason(hammer, row([{"role": "user", "content": None}])) == "message is not text"


def test_documentation_among_the_tools_is_removed() -> None:
    documentation = {"name": "components", "description": "#Loaf: Object{crust}", "parameters": {}}
    conversation, repairs = kept(hammer, row(tools=[BAKE, documentation]))
    assert [tool["function"]["name"] for tool in conversation.tools] == ["bake"]
    assert repairs == {"documentation of results removed from the tools": 1}


def test_masked_rows_follow_the_rule_of_xlam() -> None:
    conversation, _ = kept(hammer, masked([{"name": "bake", "arguments": {"flour": "rye", "grams": 5}}]))
    assert shape(conversation)[0] == ("user", "Bread, please.", [])
    assert conversation.tools[0]["function"]["parameters"]["required"] == ["flour", "grams"]
    assert reason(hammer, masked([RYE])) == "required argument missing"
    assert reason(hammer, masked([])) == "answer without a call or a text"
    assert reason(hammer, masked([RYE], input="more")) == "row of an unknown format"
    assert reason(hammer, masked([RYE], instruction="Bread, please.")) == "row of an unknown format"


def test_rows_that_cannot_be_converted_are_dropped() -> None:
    assert reason(hammer, row(answers=[{**RYE, "name": "fry"}])) == "call to a tool that is not offered"
    assert reason(hammer, row(answers=[{"name": "bake"}])) == "call without a name or arguments"
    assert reason(hammer, row(answers=["bake"])) == "call is not an object"
    assert reason(hammer, {**row(), "answers": "bake"}) == "answers not JSON"
    assert reason(hammer, {**row(), "answers": {}}) == "answers are not a list"
    assert reason(hammer, {**row(), "tools": None}) == "row of an unknown format"
    assert reason(hammer, {**row(), "query": 5}) == "row of an unknown format"
