"""ToolRL: one prompt with tools and history, and an answer that begins with thinking."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.data.readers import toolrl
from test_readers import kept, plain, reason, shape

BAKE = ("Bake Bread", {"flour": {"description": "Which", "type": "str", "default": ""}})
NAP = ("nap.v2", {"minutes": {"description": "How long", "type": "int, optional", "default": 20}})


def row(answer: str, *history: str, tools: Any = (BAKE, NAP)) -> dict[str, Any]:
    """Return a row with the blocks of `history` as the dialogue so far."""
    listed = "\n".join(
        f"{number}. Name: {name}\nDescription: {name} does it\nParameters: {json.dumps(parameters)}"
        for number, (name, parameters) in enumerate(tools, 1)
    )
    instruction = f"Use tools.\n\n**Available Tools**\nYours:\n{listed}\n\n**Steps for Each Turn**\n1. **Think**"
    dialogue = "\n\n".join(history or ("<user> Bread, please. </user>",))
    return {"instruction": instruction, "input": "**Dialogue Records History**\n" + dialogue, "output": answer}


def calls(*made: tuple[str, Any]) -> str:
    lines = "\n".join(json.dumps({"name": name, "parameters": parameters}) for name, parameters in made)
    return f"<tool_call>\n{lines}\n</tool_call>"


RYE = ("Bake Bread", {"flour": "rye"})


def test_thinking_is_removed_first() -> None:
    thinking = "<think> I could write <tool_call> or a <response>. Not {now}. </think>\n"
    conversation, repairs = kept(toolrl, row(thinking + calls(RYE, ("nap.v2", {"minutes": "5"}))))
    assert shape(conversation) == [
        ("user", "Bread, please.", []),
        ("assistant", None, [("Bake Bread", {"flour": "rye"}), ("nap.v2", {"minutes": 5})]),
    ]
    assert repairs == {"str coerced to integer": 1}
    assert conversation.tools[0]["function"] == {
        "name": "Bake Bread",
        "description": "Bake Bread does it",
        "parameters": {
            "type": "object",
            "properties": {"flour": {"type": "string", "description": "Which", "default": ""}},
            "required": [],
        },
    }


def test_history_becomes_turns() -> None:
    results = [{"name": "Bake Bread", "results": {"ok": 1}}, {"name": "nap.v2", "results": "rested"}]
    history = (
        "<user> Bread and a nap. </user>",
        "<think> Both. </think>\n" + calls(RYE, ("nap.v2", {})) + f"\n<obs> {json.dumps(results)} </obs>",
        "<think> Say so. </think>\n<response> Both are done. </response>",
        "<user> Thanks, is <b>it</b> rye? </user>",
    )
    conversation, _ = kept(toolrl, row("<think> Yes. </think>\n<response> It is. </response>", *history))
    assert shape(conversation)[2:] == [
        ("tool", '{"ok": 1}', []),
        ("tool", "rested", []),
        ("assistant", "Both are done.", []),
        ("user", "Thanks, is <b>it</b> rye?", []),
        ("assistant", "It is.", []),
    ]


def test_one_result_may_be_any_text() -> None:
    history = ("<user> Go </user>", calls(RYE) + "\n<obs> [1, 2] </obs>")
    assert shape(kept(toolrl, row("<response> Done </response>", *history))[0])[2] == ("tool", "[1, 2]", [])
    history = ("<user> Go </user>", calls(RYE, RYE) + "\n<obs> [1, 2] </obs>")
    assert reason(toolrl, row("<response> Done </response>", *history)) == "call without a response"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("<think> Hm. </think>", "no assistant turn"),
        ("Hello", "text outside of a block"),
        ("<response> Hello", "text outside of a block"),
        (calls(RYE) + "\n<response> Done </response>", "call without a response"),
        ("<user> Hello </user>", "answer with more than one turn"),
        ("<tool_call>\nBake Bread(rye)\n</tool_call>", "call not JSON"),
        ("<tool_call>\n\n</tool_call>", "empty list of calls"),
        (calls(("Bake", {})), "call to a tool that is not offered"),
        (calls(("Bake Bread", {"flour": '[{"kind": "rye"'})), "argument cut off"),
        (calls(("Bake Bread", {"flour": "rye", '"grams"]': 1})), "argument cut off"),
        ('<tool_call>\n{"name": "nap.v2", "arguments": {}}\n</tool_call>', "call without a name or arguments"),
    ],
)
def test_answers_that_cannot_be_converted_are_dropped(answer: str, why: str) -> None:
    assert reason(toolrl, row(answer)) == why


def test_tools_that_cannot_be_converted_are_dropped() -> None:
    answer = "<response> Hello </response>"
    assert reason(toolrl, {**row(answer), "instruction": "Use tools."}) == "row of an unknown format"
    broken = row(answer)
    broken["instruction"] = broken["instruction"].replace("2. Name", "3. Name")
    assert reason(toolrl, broken) == "tools are not numbered one by one"
    broken["instruction"] = broken["instruction"].replace("3. Name: nap.v2\nDescription: nap.v2 does it\n", "2. Name: ")
    assert reason(toolrl, broken) == "tool without a description or parameters"
    assert kept(toolrl, row(answer, tools=()))[0].tools == []
    either = {"type": ["string", "null"], "description": "a", "default": ""}
    schema = kept(toolrl, row(answer, tools=[("f", {"a": either})]))[0].tools[0]["function"]["parameters"]
    assert schema["properties"]["a"]["type"] == "string"
    either["type"] = ["string", "integer"]
    schema = kept(toolrl, row(answer, tools=[("f", {"a": either})]))[0].tools[0]["function"]["parameters"]
    assert schema["properties"]["a"]["anyOf"] == [{"type": "string"}, {"type": "integer"}]
    either["type"] = ["matrix"]
    assert reason(toolrl, row(answer, tools=[("f", {"a": either})])) == "type without a JSON equivalent"


spoken = plain.map(str.strip).filter(lambda text: text and "<" not in text)


@given(st.lists(st.tuples(st.sampled_from(["user", "think", "response", "obs"]), spoken), min_size=1, max_size=6))
def test_blocks_are_read_back(written: list[tuple[str, str]]) -> None:
    assert toolrl.split_blocks("\n".join(f"<{tag}> {text} </{tag}>" for tag, text in written)) == written
