"""API-Bank: requests in Python notation, and tools that a search declares."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.data.readers import apibank
from test_readers import junk, kept, reason, run, shape

SEARCHER = {
    "apiCode": "ToolSearcher",
    "description": "Finds tools",
    "parameters": {"keywords": {"type": "str", "description": "What for"}},
    "response": {"found": {"type": "list", "description": ""}},
}
BAKER = {
    "name": "BakeBread",
    "description": "Bakes a loaf",
    "input_parameters": {
        "flour": {"type": "str", "description": "Which flour"},
        "ready": {"type": "datetime"},
        "grams": {"type": "int"},
    },
    "output_parameters": {"status": {"type": "str"}},
}
INSTRUCTION = "Write a request.\nThe current time is {{time}}.\nInput: \nUser: ...\n\nAPI descriptions:\n"
SEARCH = f"API-Request: [ToolSearcher(keywords='bread')]->{BAKER!r}"
BAKE = "BakeBread(flour='rye', ready='2030-01-01 08:00:00', grams=500)"


def step(output: str, *history: str, question: str = "Bread, please.", **other: Any) -> dict[str, Any]:
    lines = [json.dumps(SEARCHER), f"User: {question}", *history]
    ending = "Generate API Request: " if "API-Request" in output else "Generate AI Response: "
    return {"instruction": INSTRUCTION, "input": "\n".join([*lines, ending]), "output": output, **other}


def test_a_search_declares_the_tool_that_is_called_next() -> None:
    row = step(f"API-Request: [{BAKE}]", SEARCH, question="Bread, please.TIME: 2030-01-01 06:00:00")
    conversation, repairs = kept(apibank, row)
    arguments = {"flour": "rye", "ready": "2030-01-01 08:00:00", "grams": 500}
    assert shape(conversation) == [
        ("system", "The current time is 2030-01-01 06:00:00.", []),
        ("user", "Bread, please.", []),
        ("assistant", None, [("ToolSearcher", {"keywords": "bread"})]),
        ("tool", json.dumps(BAKER), []),
        ("assistant", None, [("BakeBread", arguments)]),
    ]
    assert [tool["function"]["name"] for tool in conversation.tools] == ["ToolSearcher", "BakeBread"]
    assert conversation.tools[1]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "flour": {"type": "string", "description": "Which flour"},
            "ready": {"type": "string"},
            "grams": {"type": "integer"},
        },
        "required": ["flour", "ready", "grams"],
    }
    assert repairs == {"time moved from the question into the system text": 1}


def test_a_step_with_a_text_answer() -> None:
    row = step("AI: It is in the oven.\n", SEARCH, f"API-Request: [{BAKE}]->success")
    assert shape(kept(apibank, row)[0])[3:] == [
        ("assistant", None, [("BakeBread", {"flour": "rye", "ready": "2030-01-01 08:00:00", "grams": 500})]),
        ("tool", "success", []),
        ("assistant", "It is in the oven.", []),
    ]


def test_tests_declare_their_tools_in_the_instruction() -> None:
    instruction = f"Answer.\nThe current year is 2030.\nAPI descriptions:\n{json.dumps(BAKER)}"
    history = "User: Bread.\nAI: Which flour?\nUser: Rye.\nAI: At once.\nGenerate API Request:\n"
    row = {
        "file": "x",
        "id": 0,
        "instruction": instruction,
        "input": history,
        "expected_output": f"API-Request: [{BAKE}]",
    }
    conversation, _ = kept(apibank, row)
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert conversation.messages[0]["content"] == "The current year is 2030."
    assert conversation.messages[-1]["content"] == "At once."
    assert [tool["function"]["name"] for tool in conversation.tools] == ["BakeBread"]
    again = {
        **row,
        "input": history.replace("AI: At once.", SEARCH),
        "instruction": instruction + "\n" + json.dumps(SEARCHER),
    }
    found_twice = {**BAKER, "description": "Bakes bread of any kind"}
    again["input"] = again["input"].replace(repr(BAKER), repr([found_twice]))
    assert kept(apibank, again)[0].tools[0]["function"]["description"] == "Bakes a loaf"


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("API-Request: [BakeBread(flour=rye bread, ready='x', grams=5)]", "call that is not Python notation"),
        ("API-Request: [BakeBread(flour=rye, ready='x', grams=5)]", "argument that is a bare word"),
        ("API-Request: [BakeBread(flour='miller's', ready='x', grams=5)]", "call that is not Python notation"),
        ("API-Request: [BakeBread(flour='rye', ready='x')]", "required argument missing"),
        ("API-Request: [BakeBread(flour='rye', ready='x', grams='half')]", "argument of another type than declared"),
        ("API-Request: [EatBread()]", "call to a tool that is not offered"),
        ("AI: Sure. [ToolSearcher(keywords='bread')] Found.", "request inside a text"),
        ("AI: ", "empty turn"),
    ],
)
def test_steps_that_cannot_be_converted_are_dropped(output: str, why: str) -> None:
    assert reason(apibank, step(output, SEARCH)) == why


@pytest.mark.parametrize(
    ("history", "why"),
    [
        ("API-Request: [ToolSearcher(keywords='a')]", "request without a result"),
        ("API-Request: [ToolSearcher(keywords=rye)]->{'name': 'x'}", "argument that is a bare word"),
        ("API-Request: [ToolSearcher(keywords='a')]->{'name': the user's}", "search result that declares no tool"),
        ("API-Request: [ToolSearcher(keywords='a'), ToolSearcher(keywords='b')]->[]", "one result for several calls"),
        ("API-Request: [ToolSearcher('a')]->{'name': 'f', 'parameters': {'none'}}", "tool parameter is not an object"),
        ("AI: Yes.\nAI: Yes.", "two assistant turns in a row"),
        ("Generate API Request:", "row of an unknown format"),
    ],
)  # fmt: skip
def test_histories_that_cannot_be_converted_are_dropped(history: str, why: str) -> None:
    assert reason(apibank, step("AI: Done.", history)) == why


def test_a_request_without_brackets_is_read() -> None:
    row = step("API-Request: ToolSearcher(keywords='bread')")
    assert shape(kept(apibank, row)[0])[-1] == ("assistant", None, [("ToolSearcher", {"keywords": "bread"})])
    assert reason(apibank, {**row, "input": "User: Bread"}) == "row of an unknown format"
    assert reason(apibank, {**row, "input": row["input"].replace("{", "<")}) == "tool declaration not JSON"


def api(name: str, arguments: Any, output: Any, exception: Any = None) -> dict[str, Any]:
    return {
        "role": "API",
        "api_name": name,
        "param_dict": arguments,
        "result": {"api_name": name, "input": arguments, "output": output, "exception": exception},
    }


def test_dialogues_declare_what_a_search_finds() -> None:
    arguments = {"flour": "rye", "ready": "2030-01-01", "grams": "500"}
    turns = [
        {"role": "User", "text": "Bread."},
        {"role": "AI", "text": "Let me look."},
        api("ToolSearcher", {"keywords": "bread"}, [BAKER]),
        api("BakeBread", arguments, None, "No oven."),
        {"role": "AI", "text": "There is no oven."},
    ]
    conversation, repairs = kept(apibank, {"file": "x", "turns": turns})
    assert shape(conversation) == [
        ("user", "Bread.", []),
        ("assistant", "Let me look.", [("ToolSearcher", {"keywords": "bread"})]),
        ("tool", json.dumps([BAKER]), []),
        ("assistant", None, [("BakeBread", {**arguments, "grams": 500})]),
        ("tool", "No oven.", []),
        ("assistant", "There is no oven.", []),
    ]
    assert repairs["str coerced to integer"] == 1
    assert reason(apibank, {"turns": [turns[0], turns[3]]}) == "called tool is not declared"
    assert reason(apibank, {"turns": [turns[0], {**turns[2], "result": "ok"}]}) == "request without a result"
    assert reason(apibank, {"turns": [{"role": "Robot", "text": "x"}]}) == "turn of an unknown speaker ('Robot')"
    assert reason(apibank, {"turns": ["x"]}) == "row of an unknown format"


def test_rows_of_level_three() -> None:
    arguments = {"flour": "rye", "ready": "2030-01-01", "grams": 500}
    calls = [api("ToolSearcher", {"keywords": "bread"}, BAKER), api("BakeBread", arguments, {"status": "ok"})]
    apis = [{"api_name": c["api_name"], "input": c["param_dict"], "output": c["result"]} for c in calls]
    row = {"requirement": " Bread. ", "response": "Done.", "apis": apis}
    conversation, _ = kept(apibank, row)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert conversation.messages[4]["content"] == '{"status": "ok"}'
    assert reason(apibank, {**row, "apis": 5}) == "row of an unknown format"
    assert reason(apibank, {**row, "response": None}) == "turn is not text"


values = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20)


@given(values, values, st.integers(-(10**9), 10**9))
def test_valid_requests_are_read_exactly(flour: str, ready: str, grams: int) -> None:
    request = f"BakeBread(flour={flour!r}, ready={ready!r}, grams={grams})"
    conversation, _ = kept(apibank, step(f"API-Request: [{request}]", SEARCH))
    assert shape(conversation)[-1][2] == [("BakeBread", {"flour": flour, "ready": ready, "grams": grams})]


@given(junk)
def test_random_rows_never_crash_apibank(row: Any) -> None:
    _, counts = run(apibank, row)
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["read"] == 1


@given(st.text("[](){}'=->AI: \nUserGenrat,x5", max_size=60), st.text("[](){}'=->API-Request: x", max_size=40))
def test_random_histories_never_crash_apibank(history: str, output: str) -> None:
    _, counts = run(
        apibank, step(output, history), step(output, f"API-Request: {history}"), step(f"API-Request: {output}")
    )
    assert counts["kept"] + sum(counts["dropped"].values()) == 3
