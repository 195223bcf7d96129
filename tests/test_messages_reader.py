"""The reader of OpenAI and TRL rows, and the lint and checks of tools and calls that all readers use."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.calls.arguments import check_call, fit_value
from poe.calls.schema import lint_schema
from poe.calls.tools import as_tool
from poe.calls.values import fits_type
from poe.data.drops import DropReport
from poe.data.readers import messages, read_source
from poe.data.spec import DataSource
from poe.errors import RowError
from test_readers import BAKE, NAP, kept, reason, run, shape

USER = {"role": "user", "content": "Go"}


def tool_call(arguments: Any, call_id: str | None = None, name: str = "bake_bread") -> dict[str, Any]:
    return {
        **({"id": call_id} if call_id else {}),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def assistant(*calls: dict[str, Any], content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def test_messages_conversation() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Go "}, {"type": "text", "text": "on"}],
                "name": "Ann",
            },
            assistant(tool_call('{"grams": 5, "flour": "rye"}', "x"), tool_call({}, "y", "take_nap"), content="Sure."),
            {"role": "tool", "tool_call_id": "y", "content": "rested"},
            {"role": "tool", "tool_call_id": "x", "content": {"status": "ok"}},
            {"role": "assistant", "content": "Done."},
        ],
        "tools": [{"type": "function", "function": BAKE}, NAP],
        "created": object(),  # other columns are ignored
    }
    conversation, _ = kept(messages, row)
    assert shape(conversation)[:3] == [
        ("system", "Be brief.", []),
        ("user", "Go on", []),
        ("assistant", "Sure.", [("bake_bread", {"flour": "rye", "grams": 5}), ("take_nap", {})]),
    ]
    assert conversation.messages[3] == {
        "role": "tool",
        "tool_call_id": "call_2",
        "name": "take_nap",
        "content": "rested",
    }
    assert conversation.messages[4]["content"] == '{"status": "ok"}'
    as_text = {**row, "tools": json.dumps(row["tools"]), "messages": json.dumps(row["messages"])}
    assert kept(messages, as_text)[0].key() == conversation.key()


def test_messages_legacy_function_calls() -> None:
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "take_nap", "arguments": ""}}
    answer = {"role": "function", "name": "take_nap", "content": "ok"}
    row = {"messages": [USER, legacy, answer, {"role": "assistant", "content": "b"}], "tools": [NAP]}
    assert [m["role"] for m in kept(messages, row)[0].messages] == ["user", "assistant", "tool", "assistant"]


def test_messages_without_tools() -> None:
    for tools in ({}, {"tools": None}, {"tools": []}, {"tools": "[]"}, {"tools": ""}):
        assert kept(messages, {"messages": [USER, {"role": "assistant", "content": "b"}], **tools})[0].tools == []


def test_messages_from_parquet_lose_their_null_members(tmp_path: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    tools = [
        {"name": "a", "description": "", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        {"name": "b", "description": "", "parameters": {"type": "object", "properties": {"y": {"type": "string"}}}},
    ]
    rows = [
        {"messages": [USER, assistant(tool_call({name: value}, None, tool["name"]))], "tools": [tool]}
        for tool, name, value in zip(tools, "xy", (1, "t"), strict=True)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    got = list(read_source(DataSource("messages", f"{tmp_path}/x.parquet"), DropReport()))
    assert [shape(c)[1][2] for c in got] == [[("a", {"x": 1})], [("b", {"y": "t"})]]
    assert [c.tools[0]["function"] for c in got] == tools


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "row without a list of messages"),
        ({"messages": []}, "row without a list of messages"),
        ({"messages": "[" * 10_000}, "messages not JSON"),
        ({"messages": ["Go"]}, "message is not an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message of an unknown role ('robot')"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "system turn that is not the first"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image in the content"),
        ({"messages": [USER, assistant(content="")]}, "empty turn"),
        ({"messages": [USER, assistant(tool_call({}))]}, "call to a tool that is not offered"),
        ({"messages": [USER, assistant(tool_call("{"))], "tools": [BAKE]}, "arguments not JSON"),
        ({"messages": [USER, assistant(tool_call("[]"))], "tools": [BAKE]}, "arguments are not an object"),
        ({"messages": [USER, assistant(tool_call({}, None, ""))], "tools": [BAKE]}, "call without a name"),
        ({"messages": [USER, assistant({"type": "custom"})]}, "call that is not a function call"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": 5}]}, "tool_calls are not a list"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "response without a call"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools are not a list"),
        ({"messages": [USER], "tools": ["x"]}, "tool not JSON"),
        ({"messages": [USER], "tools": [{"type": "web_search"}]}, "tool that is not a function"),
        ({"messages": [USER, {"role": "assistant", "content": float("nan")}]}, "NaN or Infinity"),
        ({"messages": [USER, {"role": "assistant", "content": "\udc00"}]}, "text with a lone surrogate"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_converted_are_dropped(row: dict[str, Any], why: str) -> None:
    assert reason(messages, row) == why


def test_messages_with_responses_to_no_call_are_dropped() -> None:
    call = assistant(tool_call({"flour": "rye"}, "x"))
    row = {"messages": [USER, call, {"role": "tool", "tool_call_id": "z", "content": "ok"}], "tools": [BAKE]}
    assert reason(messages, row) == "response to another call"
    row["messages"][2] = {"role": "tool", "name": "take_nap", "content": "ok"}
    assert reason(messages, row) == "response to another call"


def test_deep_nesting_inside_a_row_drops_the_row() -> None:
    deep: Any = "x"
    for _ in range(10_000):
        deep = [deep]
    assert reason(messages, {"messages": [{"role": "user", "content": deep}]}) == "nested too deeply"


def test_the_demo_reader_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    made, _ = run(messages, {"messages": [USER, {"role": "assistant", "content": "b"}]})
    fake = ModuleType("poe.data.readers.demo")
    fake.read = lambda path, report: iter(made if path is None else [])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "poe.data.readers.demo", fake)
    assert list(read_source(DataSource("demo"), DropReport())) == made


OFFERED = [as_tool(BAKE["name"], "", BAKE["parameters"])]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"flour": "rye", "oven": {"heat": 1, "fan": False}}, None),
        ({"flour": "rye", "grams": 5.0}, None),
        ({}, "required argument missing"),
        ({"flour": 5}, "argument of another type than declared"),
        ({"flour": "rye", "grams": True}, "argument of another type than declared"),
        ({"flour": "rye", "salt": 1}, "argument that the tool does not declare"),
        ([], "arguments are not an object"),
        (None, "arguments are not an object"),
    ],
)
def test_check_call(arguments: Any, why: str | None) -> None:
    assert check_call(OFFERED, "bake_bread", arguments) == why
    assert check_call(OFFERED, "bake_cake", arguments) == "call to a tool that is not offered"


def test_schemas_that_cannot_be_applied() -> None:
    for parameters, why in (
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, "tool schema cannot be applied"),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, None),
        ({"type": "object", "properties": {"a": {"enum": ["x"]}}}, "argument outside its enum"),
        ({"type": "object", "properties": {"a": {"maxLength": 1}}}, "arguments do not fit the tool's schema"),
        ({"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}, "tool schema cannot be applied"),
    ):
        tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": parameters}}
        assert check_call([tool], "f", {"a": "text"}) == why


def test_as_tool_repairs_or_rejects_tools() -> None:
    notes: list[str] = []
    properties = {"a": {"type": "any", "required": True}, "b": {"type": "String"}}
    tool = as_tool(" f ", None, {"type": "dict", "properties": properties}, notes.append)
    assert tool["function"] == {
        "name": "f",
        "description": "",
        "parameters": {"type": "object", "properties": {"a": {}, "b": {"type": "string"}}, "required": ["a"]},
    }
    assert set(notes) == {"type name written as JSON Schema's", "required moved out of a property"}
    for name, description, parameters in (
        ("", "", {}),
        (None, "", {}),
        ("f\n", "", []),
        ("f", 5, {}),
        ("f", "", []),
        ("f", "", {"type": "string"}),
        ("f", "", {"type": "object", "properties": []}),
        ("f", "", {"type": "object", "properties": {"a": {"type": "matrix"}}}),
        ("f", "", {"type": "object", "properties": {"a": {"type": 5}}}),
        ("f", "", {"type": "object", "properties": {"a": "text"}}),
        ("f", "", {"type": "object", "required": "a"}),
        ("f", "", {"type": "object", "properties": {"a": {"$ref": "https://example.com/schema"}}}),
        ("f", "", {"type": "object", "properties": {"a": {"default": float("inf")}}}),
    ):
        with pytest.raises(RowError):
            as_tool(name, description, parameters)


def test_lint_accepts_valid_schemas() -> None:
    assert lint_schema({"type": "object", "properties": {"a": {"type": ["string", "null"]}, "b": True}}) is None
    assert (
        lint_schema({"type": "object", "properties": {"type": {"type": "string"}, "required": {"type": "boolean"}}})
        is None
    )


numbers = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | st.text(max_size=5)


@given(st.dictionaries(st.sampled_from("abcxyz"), numbers), st.permutations("abc"))
def test_ordering_changes_only_the_order(arguments: dict[str, Any], names: list[str]) -> None:
    ordered = fit_value({"properties": {n: {} for n in names}, "additionalProperties": True}, arguments)
    assert ordered == arguments
    declared = [n for n in ordered if n in names]
    assert list(ordered)[: len(declared)] == declared == [n for n in names if n in arguments]


@given(st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False))
def test_coercion_is_exact(whole: int, real: float) -> None:
    assert fit_value({"type": "integer"}, str(whole)) == whole
    assert fit_value({"type": "string"}, whole) == str(whole)
    assert fit_value({"type": "number"}, repr(real)) == real
    assert fit_value({"type": "integer"}, repr(real)) == repr(real)


@given(st.sampled_from(["string", "integer", "number", "boolean", "array", "object", "null"]), numbers)
def test_coercion_never_changes_a_fitting_value(kind: str, value: Any) -> None:
    result = fit_value({"type": kind}, value)
    if fits_type(kind, value):
        assert result == value
    else:
        assert result is value or fits_type(kind, result)


def test_typed_content() -> None:
    """LLaMA-Factory's parts: reasoning is removed, and one tool message answers all calls."""
    declared = {
        "name": "bake",
        "description": "",
        "parameters": {"type": "dict", "properties": {"flour": {"type": "str, optional"}, "grams": {"type": "int"}}},
        "required": ["grams"],
    }
    flat = {"name": "nap", "description": "", "parameters": {"minutes": {"type": "int", "default": ""}}}
    calls = ['{"name": "bake", "arguments": {"grams": "5"}}', '{"name": "nap", "arguments": {}}']
    results = [{"tool_call_id": "x", "name": "bake", "content": {"ok": 1}}, {"name": "nap", "content": "rested"}]

    def typed_message(role: str, *parts: tuple[str, str]) -> dict[str, Any]:
        return {"role": role, "content": [{"type": kind, "value": value} for kind, value in parts]}

    row = {
        "tools": json.dumps([{"type": "function", "function": tool} for tool in (declared, flat)]),
        "messages": [
            typed_message("system", ("text", "Be brief.")),
            typed_message("user", ("text", "Go")),
            typed_message("assistant", ("reasoning", "Both."), *(("tool_call", call) for call in calls)),
            typed_message("tool", ("text", json.dumps(results))),
            typed_message("assistant", ("reasoning", "Say so."), ("text", "Done.")),
        ],
    }
    conversation, repairs = kept(messages, row)
    assert shape(conversation) == [
        ("system", "Be brief.", []),
        ("user", "Go", []),
        ("assistant", None, [("bake", {"grams": 5}), ("nap", {})]),
        ("tool", '{"ok": 1}', []),
        ("tool", "rested", []),
        ("assistant", "Done.", []),
    ]
    bake, nap = (tool["function"]["parameters"] for tool in conversation.tools)
    assert bake == {
        "type": "object",
        "properties": {"flour": {"type": "string"}, "grams": {"type": "integer"}},
        "required": ["grams"],
    }
    assert nap == {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": []}
    assert repairs["flat parameters written as an object schema"] == 1
    for parts, why in (
        ([("tool_call", calls[0]), ("text", "after")], "text after a call"),
        ([("image", "a")], "part of an unknown kind ('image')"),
        ([("tool_call", "bake()")], "call not JSON"),
        ([("text", "a"), ("text", None)], "content that is not text"),
    ):
        assert reason(messages, {**row, "messages": [row["messages"][1], typed_message("assistant", *parts)]}) == why
    invalid = typed_message("user", ("tool_call", calls[0]))
    assert reason(messages, {**row, "messages": [invalid]}) == "part of an unknown kind ('tool_call')"
