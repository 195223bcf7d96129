"""The glaive and xlam readers, on rows in the public formats: one test per quirk of the real data."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.calls.conversation import Conversation
from poe.calls.python_types import python_type
from poe.calls.schema import no_note
from poe.data.drops import DropReport
from poe.data.readers import glaive, messages, xlam

WITH = "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
WITHOUT = "SYSTEM: You are a helpful assistant, with no access to external functions.\n\n"
BAKE = {
    "name": "bake_bread",
    "description": "Bake a loaf",
    "parameters": {
        "type": "object",
        "properties": {
            "flour": {"type": "string", "description": "Which flour"},
            "grams": {"type": "integer"},
            "oven": {"type": "object", "properties": {"heat": {"type": "number"}, "fan": {"type": "boolean"}}},
        },
        "required": ["flour"],
    },
}
NAP = {"name": "take_nap", "description": "Sleep a little", "parameters": {}}


def run(reader: Any, *rows: Any) -> tuple[list[Conversation], dict[str, Any]]:
    report = DropReport()
    conversations = list(reader.read(((f"row {i}", row) for i, row in enumerate(rows)), report))
    return conversations, report.as_dict().get(reader.NAME, {})


def kept(reader: Any, row: Any) -> tuple[Conversation, dict[str, int]]:
    conversations, counts = run(reader, row)
    assert counts["dropped"] == {}
    return conversations[0], counts.get("repaired", {})


def reason(reader: Any, row: Any) -> str:
    conversations, counts = run(reader, row)
    assert conversations == []
    assert counts["read"] == 1
    assert counts["kept"] == 0
    return next(iter(counts["dropped"]))


def shape(conversation: Conversation) -> list[Any]:
    """Return (role, content, calls as (name, arguments)) of each message."""
    return [
        (
            m["role"],
            m["content"],
            [(c["function"]["name"], c["function"]["arguments"]) for c in m.get("tool_calls", [])],
        )
        for m in conversation.messages
    ]


def glaive_row(*turns: str, tools: Any = (BAKE,), system: str | None = None) -> dict[str, str]:
    """Return a row in the original format from `U:`, `A:` and `F:` texts, with end marks."""
    heads = {"U": "USER: ", "A": "ASSISTANT: ", "F": "FUNCTION RESPONSE: "}
    chat = "".join(heads[t[0]] + t[2:] + (" <|endoftext|>" if t[0] == "A" else "") + "\n\n\n" for t in turns)
    return {"system": system or WITH + "\n\n".join(json.dumps(t, indent=4) for t in tools) + "\n", "chat": chat}


def call(arguments: str, name: str = "bake_bread") -> str:
    return f'A:<functioncall> {{"name": "{name}", "arguments": {arguments}}}'


def test_glaive_conversation() -> None:
    conversation, repairs = kept(
        glaive,
        glaive_row(
            "U:Bread, please.",
            "A:Let me see to that.",
            call("""'{"grams": 500, "oven": {"fan": true, "heat": 220.5}, "flour": "rye"}'"""),
            'F:{"status": "rising"}',
            "A:It rises.",
            "U:Thanks!",
            tools=(BAKE, NAP),
        ),
    )
    assert shape(conversation) == [
        ("user", "Bread, please.", []),
        (
            "assistant",
            "Let me see to that.",
            [("bake_bread", {"flour": "rye", "grams": 500, "oven": {"heat": 220.5, "fan": True}})],
        ),
        ("tool", '{"status": "rising"}', []),
        ("assistant", "It rises.", []),
    ]
    made = conversation.messages[1]["tool_calls"][0]
    assert list(made["function"]["arguments"]) == ["flour", "grams", "oven"]  # schema order
    assert list(made["function"]["arguments"]["oven"]) == ["heat", "fan"]
    assert conversation.messages[2] == {
        "role": "tool",
        "tool_call_id": made["id"],
        "name": "bake_bread",
        "content": '{"status": "rising"}',
    }
    assert [t["function"]["name"] for t in conversation.tools] == ["bake_bread", "take_nap"]
    assert conversation.tools[1]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert (conversation.source, conversation.license, conversation.id) == ("glaive", "Apache-2.0", "row 0")
    assert repairs == {
        "empty parameters written as an object schema": 1,
        "text turn joined with the call that follows it": 1,
        "turns after the last assistant turn trimmed": 1,
    }


def test_glaive_rows_without_functions() -> None:
    turns = ("USER: Name a fruit\nthat is red.", "ASSISTANT: Cherry\n\nor apple <|endoftext|>")
    chat = "\n\n".join([*turns, "USER: More?", "ASSISTANT: Plum <|endoftext|>"])
    conversation, repairs = kept(glaive, {"system": WITHOUT, "chat": chat})
    assert [m["content"] for m in conversation.messages] == [
        "Name a fruit\nthat is red.",
        "Cherry\n\nor apple",
        "More?",
        "Plum",
    ]
    assert (conversation.tools, repairs) == ([], {})


def test_glaive_other_system_texts_are_kept() -> None:
    conversation, _ = kept(
        glaive, {"system": "SYSTEM: You are a baker.", "chat": "USER: a\n\nASSISTANT: b <|endoftext|>"}
    )
    assert conversation.messages[0] == {"role": "system", "content": "You are a baker."}


@pytest.mark.parametrize(
    ("text", "arguments", "repair"),
    [
        ("""'{"flour": "rye"}'""", {"flour": "rye"}, None),
        ("""'{\n  "flour": "rye"\n}'""", {"flour": "rye"}, None),
        ("""'{"flour": "miller's"}'""", {"flour": "miller's"}, None),
        ("""'{"flour": "it's 'fine' \\"stuff\\""}'""", {"flour": "it's 'fine' \"stuff\""}, None),
        ("""{"flour": "rye"}""", {"flour": "rye"}, None),
        (json.dumps('{"flour": "rye"}'), {"flour": "rye"}, None),
        ("""'{"flour": "miller\\'s"}'""", {"flour": "miller's"}, "escaped apostrophe read as an apostrophe"),
        ("""'{"flour": "C:\\\\\\\\ \\'x"}'""", {"flour": "C:\\\\ 'x"}, "escaped apostrophe read as an apostrophe"),
        ("""'{"flour": "two\nlines"}'""", {"flour": "two\nlines"}, "raw line feed inside a string"),
        ("""'{"flour": "rye"}'}""", {"flour": "rye"}, "extra closing brace removed"),
        ("""'{"flour": "rye", "grams": "5"}'""", {"flour": "rye", "grams": 5}, "str coerced to integer"),
        ("""'{"flour": "rye", "grams": 5.0}'""", {"flour": "rye", "grams": 5}, "whole number written as an integer"),
        ("""'{"flour": 550}'""", {"flour": "550"}, "int coerced to string"),
        (
            """'{"flour": "rye", "oven": {"fan": "True"}}'""",
            {"flour": "rye", "oven": {"fan": True}},
            "str coerced to boolean",
        ),
        ("""'{"flour": "rye", "grams": null}'""", {"flour": "rye"}, "null for an optional argument left out"),
    ],
)
def test_glaive_arguments(text: str, arguments: dict[str, Any], repair: str | None) -> None:
    conversation, repairs = kept(glaive, glaive_row("U:Go", call(text)))
    assert shape(conversation)[1] == ("assistant", None, [("bake_bread", arguments)])
    assert repairs == ({repair: 1} if repair else {})


def test_glaive_null_arguments_and_parameters_for_arguments() -> None:
    for text, repair in (
        (call("null", "take_nap"), "null arguments read as no arguments"),
        (call("'null'", "take_nap"), "null arguments read as no arguments"),
        ('A:<functioncall> {"name": "take_nap", "parameters": {}}', "parameters read as arguments"),
        ('A:<functioncall> {"name": "take_nap", "parameters": \'{}\'}', "parameters read as arguments"),
    ):
        conversation, repairs = kept(glaive, glaive_row("U:Go", text, tools=(NAP,)))
        assert shape(conversation)[1] == ("assistant", None, [("take_nap", {})])
        assert repairs[repair] == 1


def test_glaive_text_before_a_call() -> None:
    conversation, _ = kept(glaive, glaive_row("U:Go", "A:Sure." + call("""'{"flour": "rye"}'""")[2:]))
    assert shape(conversation)[1] == ("assistant", "Sure.", [("bake_bread", {"flour": "rye"})])


RYE = """'{"flour": "rye"}'"""


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        (["U:Go", call("""'{"flour": [your flour]}'""")], "arguments not JSON"),
        (["U:Go", call("""'{"flour": "rye", "grams": Infinity}'""")], "arguments not JSON"),
        (["U:Go", call("""'["rye"]'""")], "arguments are not an object"),
        (["U:Go", """A:<functioncall> {"name": "bake_bread", "arguments": '{"flour": "r"""], "call cut off"),
        (["U:Go", """A:<functioncall> {"arguments": {}}"""], "call without a name or arguments"),
        (["U:Go", """A:<functioncall> {bake_bread: rye}"""], "call not JSON"),
        (["U:Go", "A:<functioncall> [1]"], "call is not an object"),
        (["U:Go", call(RYE) + call(RYE)[2:]], "two calls in one turn"),
        (["U:Go", call(RYE, "bake-bread")], "call to a tool that is not offered"),
        (["U:Go", call("""'{"grams": 5}'""")], "required argument missing"),
        (["U:Go", call("""'{"flour": "rye", "salt": 1}'""")], "argument that the tool does not declare"),
        (["U:Go", call("""'{"flour": "rye", "grams": "half"}'""")], "argument of another type than declared"),
        (["U:Go", call("""'{"flour": "rye", "oven": {"gas": 1}}'""")], "argument that the tool does not declare"),
        (["U:Go", call("""'{"flour": "\\ud800"}'""")], "text with a lone surrogate"),
        (["U:Go", call("'" + '{"flour": ' + "[" * 100 + "]" * 100 + "}'")], "nested too deeply"),
        (["U:Go", call("'" + '{"flour": ' + "[" * 10_000 + "]" * 10_000 + "}'")], "arguments not JSON"),
        (["U:Go", call(RYE), "U:Well?", "A:Yes"], "call without a response"),
        (["U:Go", "A:AI to= bake_bread: {}", "F:{}", "A:Done"], "response without a call"),
        (["U:Go", call(RYE), "F:a", "F:b", "A:Done"], "response without a call"),
        (["U:Go", call(RYE), "F:", "A:Done"], "empty turn"),
        (["U:Go", "A:"], "empty turn"),
        (["U:", "A:Done"], "empty turn"),
        (["U:Go", "A:News of ", "A:1. a list"], "two assistant turns in a row"),
        (["U:Go", "U:Go on", "A:Yes"], "two user turns in a row"),
        (["A:Hello"], "conversation that begins with the assistant"),
        (["U:Go"], "no assistant turn"),
        (["U:A book, \"\nASSISTANT: A tale\"", "A:Yes"], "turn heading inside a turn"),
        (["U:A book <|endoftext|>", "A:Yes"], "end mark inside a turn"),
        (["U:Go", "A:One <|endoftext|> two"], "end mark inside a turn"),
    ],
)  # fmt: skip
def test_glaive_rows_that_cannot_be_converted_are_dropped(turns: list[str], why: str) -> None:
    assert reason(glaive, glaive_row(*turns, tools=(BAKE, NAP))) == why


def test_glaive_rows_with_invalid_tools_are_dropped() -> None:
    turns = ("U:Hello", "A:Hello")
    other = {**BAKE, "description": "Another bakery"}
    assert reason(glaive, glaive_row(*turns, tools=(BAKE, other))) == "one tool name, two definitions"
    assert kept(glaive, glaive_row(*turns, tools=(BAKE, BAKE)))[1] == {"repeated tool removed": 1}
    listed = {"name": "mean", "description": "", "parameters": {"type": "array", "items": {"type": "number"}}}
    assert reason(glaive, glaive_row(*turns, tools=(listed,))) == "tool parameters are not an object schema"
    assert reason(glaive, glaive_row(*turns, system=WITH + '{"name": ')) == "tool declarations not JSON"
    assert reason(glaive, glaive_row(*turns, system=WITH + '{"a": ' * 10_000)) == "tool declarations not JSON"
    assert reason(glaive, glaive_row(*turns, tools=({"parameters": {}},))) == "tool without a usable name"
    beside = {
        "name": "f",
        "description": "",
        "parameters": {"properties": {"a": {"type": "str"}}},
        "required": ["a", "b"],
    }
    conversation, repairs = kept(glaive, glaive_row(*turns, tools=(beside,)))
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    assert conversation.tools[0]["function"]["parameters"] == parameters
    assert len(repairs) == 4
    kept(glaive, glaive_row(*turns, tools=({"name": "f", "description": "", "parameters": {}, "required": []},)))


def test_glaive_in_the_sharegpt_format() -> None:
    calls = [{"name": "bake_bread", "arguments": {"flour": "rye"}}, {"name": "take_nap", "arguments": "{}"}]
    row = {
        "conversations": [
            {"from": "human", "value": "Two loaves"},
            {"from": "gpt", "value": "At once."},
            {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "{}"},
            {"from": "observation", "value": "rested"},
            {"from": "gpt", "value": "Done."},
        ],
        "tools": json.dumps([BAKE, NAP]),
    }
    conversation, _ = kept(glaive, row)
    assert shape(conversation)[1] == ("assistant", "At once.", [("bake_bread", {"flour": "rye"}), ("take_nap", {})])
    assert [m.get("name") for m in conversation.messages if m["role"] == "tool"] == ["bake_bread", "take_nap"]
    assert (
        kept(
            glaive, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"}
        )[0].tools
        == []
    )
    del row["conversations"][4]
    assert reason(glaive, row) == "call without a response"
    assert (
        reason(glaive, {"conversations": [{"from": "robot", "value": "a"}]}) == "turn of an unknown speaker ('robot')"
    )
    assert reason(glaive, {"conversations": [{"from": "human", "value": 3}]}) == "turn is not text"
    assert reason(glaive, {**row, "tools": "{not"}) == "tools not JSON"


def test_glaive_cut_into_turns() -> None:
    whole = glaive_row("U:Two loaves", call("""'{"flour": "rye"}'"""), "F:{}", "A:Done.")
    bake = {"role": "assistant", "content": call("""'{"flour": "rye"}'""")[2:]}
    said = [("system", whole["system"]), ("user", "Two loaves"), ("assistant", bake["content"]), ("tool", "{}")]
    messages = [{"role": role, "content": text} for role, text in said]
    row = {"system": whole["system"], "input_messages": messages, "ground_truth": "Done.<|endoftext|>"}
    assert kept(glaive, row)[0].messages == kept(glaive, whole)[0].messages
    first = {**row, "input_messages": messages[:2], "ground_truth": bake["content"]}
    assert shape(kept(glaive, first)[0])[-1] == ("assistant", None, [("bake_bread", {"flour": "rye"})])
    assert reason(glaive, {**row, "ground_truth": None}) == "turn is not text"
    assert reason(glaive, {**row, "input_messages": "Two loaves"}) == "row of an unknown format"
    assert reason(glaive, {**row, "input_messages": [3]}) == "turn is not text"
    for message, why in (
        ({"role": "robot", "content": "a"}, "turn of an unknown speaker ('robot')"),
        ({"role": "user", "content": "a<|endoftext|>b"}, "end mark inside a turn"),
    ):
        assert reason(glaive, {**row, "input_messages": [message]}) == why


plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
values = st.recursive(
    plain | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=8,
)
FREE = {
    "name": "free",
    "description": "",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": True},
}


@given(st.dictionaries(plain, values, max_size=4), st.booleans(), st.sampled_from([None, 2]))
def test_glaive_calls_round_trip(arguments: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    assert glaive.read_call(f'{{"name": "free", "arguments": \'{text}\'}}', no_note) == ("free", arguments)
    assert glaive.read_call(f'{{"name": "free", "arguments": {text}}}', no_note) == ("free", arguments)
    if "<|endoftext|>" in text or "<functioncall>" in text:
        return
    conversation, _ = kept(glaive, glaive_row("U:Go", call(f"'{text}'", "free"), tools=(FREE,)))
    assert shape(conversation)[1][2] == [("free", arguments)]


quotes = st.text(st.sampled_from("'\"\\\n\t {}[],:é\u2028😀ab"), max_size=20)


@given(quotes)
def test_glaive_calls_with_awkward_strings(text: str) -> None:
    conversation, _ = kept(
        glaive, glaive_row("U:Go", call("'" + json.dumps({"flour": text}, ensure_ascii=False) + "'"))
    )
    assert shape(conversation)[1][2] == [("bake_bread", {"flour": text})]


@given(st.text(max_size=80), st.text(max_size=80))
def test_glaive_never_crashes(system: str, chat: str) -> None:
    cut = f"USER: {chat}\n\n\nASSISTANT: <functioncall>{chat}<|endoftext|>"
    rows = ({"system": system, "chat": chat}, {"system": WITH + system, "chat": cut})
    conversations, counts = run(glaive, *rows)
    assert len(conversations) + sum(counts["dropped"].values()) == 2


KEYS = ["messages", "tools", "role", "content", "query", "answers", "name", "parameters", "function", "type"]
KEYS += ["tool_calls", "tool_call_id", "conversations", "from", "value", "chat", "system", "arguments", "properties"]
KEYS += ["required", "items", "enum", "default"]
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.floats() | st.sampled_from(["user", "object"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=15,
)


@pytest.mark.parametrize("reader", [glaive, xlam, messages])
@given(row=junk)
def test_random_rows_never_crash_a_reader(reader: Any, row: Any) -> None:
    conversations, counts = run(reader, row)
    assert len(conversations) + sum(counts["dropped"].values()) == counts["read"] == 1


def xlam_row(answers: Any, parameters: dict[str, Any], query: str = "Go") -> dict[str, Any]:
    tools = [{"name": "bake", "description": "Bake", "parameters": parameters}]
    return {"id": 7, "query": query, "answers": json.dumps(answers), "tools": json.dumps(tools)}


def test_xlam_parallel_calls() -> None:
    parameters = {
        "shelf": {"description": "Where", "type": "int, optional", "default": "3"},
        "flour": {"description": "Which", "type": "str"},
        "salt": {"description": "How much", "type": "float", "default": ""},
    }
    answers = [
        {"name": "bake", "arguments": {"flour": "rye", "shelf": "2"}},
        {"name": "bake", "arguments": {"flour": "oat"}},
    ]
    conversation, repairs = kept(xlam, xlam_row(answers, parameters))
    calls = [("bake", {"shelf": 2, "flour": "rye"}), ("bake", {"flour": "oat"})]
    assert shape(conversation) == [("user", "Go", []), ("assistant", None, calls)]
    assert [c["id"] for c in conversation.messages[1]["tool_calls"]] == ["call_1", "call_2"]
    assert list(conversation.messages[1]["tool_calls"][0]["function"]["arguments"]) == ["shelf", "flour"]
    assert conversation.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "shelf": {"type": "integer", "description": "Where", "default": 3},
            "flour": {"type": "string", "description": "Which"},
            "salt": {"type": "number", "description": "How much"},
        },
        "required": ["flour"],
    }
    assert repairs == {"str coerced to integer": 1}
    assert (conversation.source, conversation.license) == ("xlam", "CC-BY-4.0")


def test_xlam_in_the_ms_swift_format() -> None:
    tool = {"name": "bake", "description": "", "parameters": {"type": {"type": "str", "description": "Which"}}}
    wrapped = json.dumps([{"type": "function", "function": tool}])
    calls = [
        {"role": "tool_call", "content": json.dumps({"name": "bake", "arguments": {"type": t}})} for t in ("a", "b")
    ]
    row = {"tools": wrapped, "messages": [{"role": "user", "content": "Go"}, *calls]}
    first, _ = kept(xlam, row)
    assert shape(first)[1][2] == [("bake", {"type": "a"}), ("bake", {"type": "b"})]
    original = {
        "query": "Go",
        "tools": json.dumps([tool]),
        "answers": json.dumps([json.loads(c["content"]) for c in calls]),
    }
    assert kept(xlam, original)[0].key() == first.key()  # both formats of a row give the same row
    answers = [{"role": "tool_response", "content": t} for t in ("1", "2")]
    longer, _ = kept(xlam, {**row, "messages": [*row["messages"], *answers, {"role": "assistant", "content": "Done"}]})
    assert [m["role"] for m in longer.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert (
        reason(xlam, {**row, "messages": [{"role": "robot", "content": ""}]}) == "message of an unknown role ('robot')"
    )


@pytest.mark.parametrize(
    ("text", "schema", "optional", "default"),
    [
        ("str", {"type": "string"}, False, None),
        ("str, optional", {"type": "string"}, True, None),
        ("str, optional, default='20'", {"type": "string"}, True, "20"),
        ("str, default='a, b'", {"type": "string"}, True, "a, b"),
        ("str, optional, default 'London'", {"type": "string"}, True, "London"),
        ("List[int], default=[1, 2]", {"type": "array", "items": {"type": "integer"}}, True, [1, 2]),
        ("list", {"type": "array"}, False, None),
        ("List[List[float]]", {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}, False, None),
        ("List[Union[int, float]]", {"type": "array", "items": {"type": "number"}}, False, None),
        (
            "Tuple[float, float]",
            {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            False,
            None,
        ),
        ("Tuple[str, ...]", {"type": "array", "items": {"type": "string"}}, False, None),
        ("tuple", {"type": "array"}, False, None),
        ("Dict[str, int]", {"type": "object", "additionalProperties": {"type": "integer"}}, False, None),
        ("Dict[str, Any]", {"type": "object"}, False, None),
        ("set", {"type": "array"}, False, None),
        ("Optional[str]", {"type": "string"}, True, None),
        ("int | None", {"type": "integer"}, True, None),
        ("Union[str, int, None]", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, True, None),
        ("Any", {}, False, None),
        ("Literal['a', 'b']", {"type": "string", "enum": ["a", "b"]}, False, None),
    ],
)
def test_xlam_types(text: str, schema: dict[str, Any], optional: bool, default: Any) -> None:
    assert python_type(text) == (schema, optional, default)


@pytest.mark.parametrize(
    "text",
    [
        *("Callable[[float], float]", "np.ndarray", "", "List[int", "List[]x", "int]", "str, maybe", "a(b)"),
        *("Tuple[..., int]", "List[" * 90 + "int"),
    ],
)
def test_xlam_types_that_json_cannot_write(text: str) -> None:
    assert (
        reason(xlam, xlam_row([{"name": "bake", "arguments": {}}], {"f": {"type": text}}))
        == "type without a JSON equivalent"
    )


@given(st.text("abcdefIntListUnionTupleDict[],| .'\"", max_size=40))
def test_xlam_types_never_crash(text: str) -> None:
    run(xlam, xlam_row([{"name": "bake", "arguments": {}}], {"f": {"type": text}}))


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("int", "movie", "argument of another type than declared"),
        ("int", 139.69, "argument of another type than declared"),
        ("int", "05", "argument of another type than declared"),
        ("int", True, "argument of another type than declared"),
        ("str", None, "argument of another type than declared"),
        ("List[int]", 5, "argument of another type than declared"),
        ("List[int]", [1, "x"], "argument of another type than declared"),
        ("Tuple[int, int]", [1], "arguments do not fit the tool's schema"),
    ],
)
def test_xlam_arguments_that_do_not_fit(kind: str, value: Any, why: str) -> None:
    assert reason(xlam, xlam_row([{"name": "bake", "arguments": {"f": value}}], {"f": {"type": kind}})) == why


def test_xlam_rows_that_cannot_be_converted_are_dropped() -> None:
    good = xlam_row([{"name": "bake", "arguments": {}}], {})
    assert reason(xlam, {**good, "answers": "[]"}) == "empty list of calls"
    assert reason(xlam, {**good, "answers": "[NaN]"}) == "answers not JSON"
    assert reason(xlam, {**good, "answers": "[" * 10_000}) == "answers not JSON"
    assert reason(xlam, {**good, "tools": "{}"}) == "tools are not a list"
    assert reason(xlam, {**good, "query": " "}) == "empty turn"
    assert reason(xlam, {**good, "query": None}) == "row of an unknown format"
    assert (
        reason(xlam, xlam_row([{"name": "bake", "arguments": {}}], {"f": {"type": "str"}}))
        == "required argument missing"
    )
    two = json.dumps([{"name": "bake", "description": d, "parameters": {}} for d in "ab"])
    assert reason(xlam, {**good, "tools": two}) == "one tool name, two definitions"
