"""Hermes: tools, calls and results between tags, in JSON and in Python notation."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.calls.schema import no_note
from poe.data.drops import DropReport
from poe.data.readers import get_reader, hermes
from test_readers import BAKE, NAP, kept, plain, reason, shape, values

WRAPPED = [{"type": "function", "function": BAKE}, {"type": "function", "function": NAP}]
PROMPTS = {
    "function calling": (
        "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML "
        "tags. You may call one or more functions to assist with the user query. Don't make assumptions about what "
        "values to plug into functions.\n<tools>\n{}\n</tools>\nFor each function call return a json object with "
        "function name and arguments within <tool_call> </tool_call> tags with the following schema:\n<tool_call>\n"
        "{{'arguments': <args-dict>, 'name': <function-name>}}\n</tool_call>\n"
    ),
    "glaive": (
        "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML "
        "tags.You may call one or more functions to assist with the user query. Don't make assumptions about what "
        "values to plug into functions.Here are the available tools:<tools>\n{}\n</tools>Use the following pydantic "
        "model json schema for each tool call you will make: {{'title': 'FunctionCall', 'required': ['name']}}For each "
        "function call return a json object with function name and arguments within <tool_call></tool_call> XML tags "
        "as follows:\n<tool_call>\n{{tool_call}}\n</tool_call>"
    ),
}
RYE = '{"name": "bake_bread", "arguments": {"flour": "rye"}}'


def row(*turns: str, tools: Any = WRAPPED, listed: str | None = None, prompt: str = "glaive") -> dict[str, Any]:
    """Return a row from `H:`, `G:` and `T:` texts. `tools` None: no field. `listed`: the tools in the prompt."""
    field = None if tools is None else json.dumps(tools)
    shown = field if listed is None else listed
    heads = {"H": "human", "G": "gpt", "T": "tool"}
    spoken = [{"from": "system", "value": PROMPTS[prompt].format(shown)}]
    spoken += [{"from": heads[turn[0]], "value": turn[2:]} for turn in turns]
    return {"id": "a", "conversations": spoken, "category": "Baking", **({} if field is None else {"tools": field})}


def tagged(text: str, tag: str = "tool_call") -> str:
    return f"<{tag}>\n{text}\n</{tag}>\n"


def test_several_calls_and_their_results() -> None:
    conversation, repairs = kept(
        hermes,
        row(
            "H:Bread and a rest.",
            "G:" + tagged(RYE) + tagged('{"arguments": {}, "name": "take_nap"}'),
            "T:"
            + tagged('{"name": "bake_bread", "content": {"crust": "dark", "é": null}}', "tool_response")
            + tagged("rested", "tool_response"),
            "G:Both are done.",
        ),
    )
    assert shape(conversation) == [
        ("user", "Bread and a rest.", []),
        ("assistant", None, [("bake_bread", {"flour": "rye"}), ("take_nap", {})]),
        ("tool", '{"crust": "dark", "é": null}', []),
        ("tool", "rested", []),
        ("assistant", "Both are done.", []),
    ]
    assert [m["name"] for m in conversation.messages if m["role"] == "tool"] == ["bake_bread", "take_nap"]
    assert [t["function"]["name"] for t in conversation.tools] == ["bake_bread", "take_nap"]
    assert repairs == {"empty parameters written as an object schema": 1}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_explanations_of_tools_are_removed_from_the_system_message(prompt: str) -> None:
    assert shape(kept(hermes, row("H:Hi", "G:Hello", prompt=prompt))[0])[0][0] == "user"
    more = row("H:Hi", "G:Hello", prompt=prompt)
    more["conversations"][0]["value"] += "\nAnswer in French."
    assert kept(hermes, more)[0].messages[0] == {"role": "system", "content": "Answer in French."}


def test_the_role_of_an_extraction_prompt_stays() -> None:
    prompt = (
        "You are an expert extractor of recipes. You are also provided with the json schema to output extracted "
        "information in the function signatures within XML tags <tools></tools>. Don't make assumptions about what "
        "values to plug into json schema. \n<tools>\n[]\n</tools>\nFor each extraction function call return a json "
        "object with function name and arguments followed by a <tool_call> tag with the following schema:\n"
        "<tool_call>\n{}\n</tool_call>"
    )
    assert hermes.read_system(prompt) == ("You are an expert extractor of recipes.", "[]")


def test_python_notation_is_read_as_data() -> None:
    python = str([{"type": "function", "function": {**BAKE, "strict": True}}])
    call = "{'arguments': {'flour': 'miller\\'s', 'oven': {'fan': True}}, 'name': 'bake_bread'}"
    result = "{'name': 'bake_bread', 'content': {'ok': True, 'left': None}}"
    turns = ("H:Go", "G:" + tagged(call), "T:" + tagged(result, "tool_response"), "G:Done")
    conversation, repairs = kept(hermes, row(*turns, tools=None, listed=python))
    assert shape(conversation)[1] == ("assistant", None, [("bake_bread", {"flour": "miller's", "oven": {"fan": True}})])
    assert shape(conversation)[2] == ("tool", '{"ok": true, "left": null}', [])
    assert repairs == {"tools of the prompt read in Python notation": 1, "call read in Python notation": 1}


def test_a_literal_backslash_n_around_a_call() -> None:
    conversation, repairs = kept(hermes, row("H:Go", f"G:<tool_call>\\n{RYE}\\n</tool_call>\\n", tools=[BAKE]))
    assert shape(conversation)[1][2] == [("bake_bread", {"flour": "rye"})]
    assert repairs == {"literal backslash-n around a block removed": 2}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (tagged('{"arguments": {"flour": "rye", "name": "bake_bread"}}'), "name inside the arguments"),
        (tagged("{'name': 'bake_bread', 'arguments': {'flour': flour}}"), "call not JSON"),
        (tagged("{'name': 'bake_bread', 'arguments': {'fan': true}}"), "call not JSON"),
        (tagged('{"name": "bake_bread"}'), "call without a name or arguments"),
        (tagged('"bake_bread"'), "call is not an object"),
        (tagged(RYE) + "There.", "text after a call"),
        (f"<tool_call>\n{RYE}", "call cut off"),
        (tagged(RYE.replace("bake_bread", "bake")), "call to a tool that is not offered"),
        (tagged(RYE.replace('"rye"', "[]")), "argument of another type than declared"),
        ("", "empty turn"),
    ],
)
def test_turns_that_cannot_be_converted_are_dropped(text: str, why: str) -> None:
    assert reason(hermes, row("H:Go", "G:" + text)) == why


def test_responses() -> None:
    one, two = "G:" + tagged(RYE), "G:" + tagged(RYE) + tagged(RYE)
    done = "G:Done"
    assert shape(kept(hermes, row("H:Go", one, "T:plain text", done))[0])[2] == ("tool", "plain text", [])
    other = '{"name": "another", "content": 1}'
    assert shape(kept(hermes, row("H:Go", one, "T:" + tagged(other, "tool_response"), done))[0])[2][1] == other
    assert reason(hermes, row("H:Go", two, "T:" + tagged("1", "tool_response"), done)) == "call without a response"
    three = "T:" + tagged("1", "tool_response") * 3
    assert reason(hermes, row("H:Go", two, three, done)) == "response without a call"
    assert (
        reason(hermes, row("H:Go", one, "T:so: " + tagged("1", "tool_response"), done)) == "text outside of a response"
    )


def test_the_tools_of_the_row_and_of_the_prompt() -> None:
    turns = ("H:Hi", "G:Hello")
    assert reason(hermes, row(*turns, tools=[], listed='[{"name": "bake"')) == "tools of the prompt not JSON"
    assert reason(hermes, row(*turns, listed=json.dumps([BAKE]))) == "tools of the row and of its prompt differ"
    assert len(kept(hermes, row(*turns, tools=[], listed=json.dumps([BAKE])))[0].tools) == 1
    assert len(kept(hermes, row(*turns, listed="(the list is broken"))[0].tools) == 2
    assert kept(hermes, row(*turns, tools=[]))[0].tools == []
    assert reason(hermes, row(*turns, tools=[BAKE, {**BAKE, "description": "x"}])) == "one tool name, two definitions"
    null = kept(hermes, row(*turns, tools=[{**NAP, "parameters": None}]))[0].tools[0]["function"]["parameters"]
    assert null == {"type": "object", "properties": {}}
    twice = row(*turns)
    twice["conversations"][0]["value"] += "<tools>[1]</tools>"
    assert reason(hermes, twice) == "several lists of tools"


def test_json_mode_keeps_its_schema_and_its_answer() -> None:
    system = "Answer in JSON after this schema:\n<schema>\n{'type': 'object'}\n</schema>"
    spoken = [{"from": "system", "value": system}, {"from": "human", "value": "A loaf"}]
    answer = '{"loaf": {"flour": "rye"}}'
    conversation, repairs = kept(hermes, {"conversations": [*spoken, {"from": "gpt", "value": answer}], "schema": "{}"})
    assert [m["content"] for m in conversation.messages] == [system, "A loaf", answer]
    assert (conversation.tools, repairs) == ([], {})


def test_rows_of_another_format_are_dropped() -> None:
    assert reason(hermes, {"conversations": "a"}) == "row of an unknown format"
    assert reason(hermes, {"conversations": [{"from": "gpt", "value": 1}]}) == "turn is not text"
    robot = {"conversations": [{"from": "robot", "value": "a"}]}
    assert reason(hermes, robot) == "turn of an unknown speaker ('robot')"


@given(st.lists(st.dictionaries(plain, values, max_size=3), min_size=1, max_size=3), st.booleans())
def test_calls_round_trip(calls: list[dict[str, Any]], python: bool) -> None:
    """Calls between tags are read back, in either notation."""
    written = [{"name": "f", "arguments": arguments} for arguments in calls]
    texts = [repr(call) if python else json.dumps(call) for call in written]
    if any("tool_call>" in text for text in texts):
        return
    text, read = hermes.read_turn("".join(tagged(text) for text in texts), no_note)
    assert (text, [(name, arguments) for name, arguments, _ in read]) == ("", [("f", c) for c in calls])


def test_the_hub_s_five_configurations_are_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub_rows(dataset_id: str, name: str, config: str) -> Any:
        yield f"{config}[0]", row("H:Hi", f"G:Hello from {config}")

    monkeypatch.setattr("poe.data.readers.hub_rows", hub_rows)
    found = list(get_reader("hermes").read(None, DropReport()))
    assert [c.id for c in found] == [f"{config}[0]" for config in hermes.HUB_CONFIGS]
    assert found[0].messages[-1]["content"] == "Hello from func_calling"
