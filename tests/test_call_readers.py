"""NexusRaven, DroidCall and GPTeacher Toolformer: calls in other formats."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.calls.literals import parse_definition
from poe.calls.schema import no_note
from poe.data.readers import droidcall, gpteacher_toolformer, nexusraven
from poe.data.readers.signatures import read_calls, read_definition
from poe.errors import RowError
from test_readers import junk, kept, reason, run, shape

BAKE = '''def bake(flour: str, grams: int=500, *, seeds: List[str]=None, heat: float=220, oven: ENUM=None, by: date="2030-01-01"):
    """Bake a loaf."""
    raise SystemExit
'''  # noqa: E501
NAP = "def nap():\n    ''"


def test_a_signature_becomes_a_tool() -> None:
    notes: list[str] = []
    function = read_definition(BAKE, notes.append, parameter_descriptions={"flour": "Which flour"})["function"]
    assert (function["name"], function["description"]) == ("bake", "Bake a loaf.")
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "flour": {"type": "string", "description": "Which flour"},
            "grams": {"type": "integer", "default": 500},
            "seeds": {"type": "array", "items": {"type": "string"}},
            "heat": {"type": "number", "default": 220},
            "oven": {},
            "by": {"type": "string", "default": "2030-01-01"},
        },
        "required": ["flour"],
    }
    assert notes == ["type without a JSON equivalent left out"]
    schema = read_definition("def f(a: int=2.5, b=len('x')): ...", notes.append)["function"]["parameters"]
    assert schema["properties"] == {"a": {"type": "integer"}, "b": {}}
    assert notes[1:] == ["default of another type left out", "default that is not a literal left out"]


@pytest.mark.parametrize("source", ["def f(*a): ...", "def f(**a): ...", "def f(a, /): ...", "f = 1", "def f(:", ""])
def test_signatures_that_declare_no_tool(source: str) -> None:
    with pytest.raises(RowError):
        read_definition(source, no_note)


def test_a_definition_is_parsed_and_not_executed() -> None:
    assert parse_definition("def f(a=exit()): exit()").name == "f"
    with pytest.raises(ValueError):
        parse_definition("def f(): ...\ndef g(): ...")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("bake('rye', 5)", {"flour": "rye", "grams": 5}),
        ("bake('rye', heat=1)", {"flour": "rye", "heat": 1}),
        ("loaf = bake(flour='rye')", {"flour": "rye"}),
    ],
)
def test_positional_arguments_get_their_names(text: str, arguments: dict[str, Any]) -> None:
    assert read_calls(text, [read_definition(BAKE, no_note)]) == [("bake", arguments, None)]


def raven(answer: str, *context: str) -> dict[str, Any]:
    return {"Input": "Bread?", "Output": answer, "context": list(context or (BAKE, NAP)), "ToolName": "bakery"}


def test_nexusraven_with_python_context() -> None:
    conversation, _ = kept(nexusraven, raven('bake(grams= 5,  flour= "rye")'))
    assert shape(conversation) == [
        ("user", "Bread?", []),
        ("assistant", None, [("bake", {"flour": "rye", "grams": 5})]),
    ]
    assert [tool["function"]["name"] for tool in conversation.tools] == ["bake", "nap"]
    assert conversation.license == "CC-BY-NC-4.0"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("bake(rye)", "argument that is a bare word"),
        ("bake(flour=nap())", "argument that is a call"),
        ("bake(flour=['a', rye])", "argument that is a bare word"),
        ("bake('rye', flour='oat')", "one argument twice"),
        ("nap('long')", "more arguments than parameters"),
        ("toast()", "call to a tool that is not offered"),
        ("bake(flour=rye bread)", "call that is not Python notation"),
        ("bake('rye', 'half')", "argument of another type than declared"),
        ("bake()", "required argument missing"),
    ],
)
def test_nexusraven_calls_that_cannot_be_converted_are_dropped(answer: str, why: str) -> None:
    assert reason(nexusraven, raven(answer)) == why


def test_nexusraven_files_without_declarations() -> None:
    assert reason(nexusraven, {"query": "Bread?", "reference": "bake('rye')"}) == "no declaration of tools"
    assert reason(nexusraven, {"question": "Bread?"}) == "row of an unknown format"
    assert reason(nexusraven, raven("nap()", NAP, "def nap(a): ...")) == "one tool name, two definitions"
    assert reason(nexusraven, raven("nap()", "class Nap: ...")) == "tool declaration is not a Python function"


def option(signature: str, about: str) -> str:
    return f'OPTION:\n<func_start>{signature}<func_end>\n<docstring_start>\n"""\n{about}\n"""\n<docstring_end>\n'


PROMPT = option(
    "def bake(flour: str, shape: str)",
    "Bake a loaf.\n\nParameters:\n    flour (str) required: Required. string. Which.\n    shape (str) required: text.",
) + option("def nap()", "Sleep.")


def test_nexusraven_slots() -> None:
    empty = dict.fromkeys(("backup", "docstring", "golden_answer", "instruction"))
    calls = ['bake(flour="rye", shape=None)', 'bake(flour="oat", shape="round")']
    slot = {**empty, "docstring": PROMPT, "golden_answer": json.dumps(calls), "instruction": "Two loaves"}
    conversations, counts = run(nexusraven, {"turns_1": empty, "turns_2": slot, "turns_3": slot})
    assert [c.id for c in conversations] == ["row 0.turns_2", "row 0.turns_3"]
    assert counts["read"] == 2
    expected = [("bake", {"flour": "rye"}), ("bake", {"flour": "oat", "shape": "round"})]
    assert shape(conversations[0])[1] == ("assistant", None, expected)
    bake = conversations[0].tools[0]["function"]
    assert (bake["description"], bake["parameters"]["required"]) == ("Bake a loaf.", ["flour"])
    assert bake["parameters"]["properties"]["flour"]["description"] == "Required. string. Which."
    assert reason(nexusraven, {"turns_1": empty}) == "row of an unknown format"
    assert reason(nexusraven, {**slot, "docstring": "<func_start>def f()"}) == "tool declaration is not a signature"


def droid(intent: str, extras: Any = None, uri: Any = None, mime: Any = None) -> dict[str, Any]:
    return {"query": "Do it", "intent": intent, "uri": uri, "mime": mime, "extras": extras or {}, "id": 1}


@pytest.mark.parametrize("absent", [None, "", "None", {}])
def test_droidcall_absent_values_are_left_out(absent: Any) -> None:
    extras = {"EXTRA_MESSAGE": "Tea", "EXTRA_HOUR": 7, "EXTRA_RINGTONE": absent}
    conversation, _ = kept(droidcall, droid("ACTION_SET_ALARM", extras, absent, absent))
    made = conversation.messages[1]["tool_calls"][0]["function"]
    assert (made["name"], made["arguments"]) == ("ACTION_SET_ALARM", {"EXTRA_HOUR": 7, "EXTRA_MESSAGE": "Tea"})
    assert list(made["arguments"]) == ["EXTRA_HOUR", "EXTRA_MESSAGE"]  # the order of the schema
    names = [tool["function"]["name"] for tool in conversation.tools]
    assert names == ["ACTION_SET_ALARM", "ACTION_SET_TIMER", "ACTION_SHOW_ALARMS"]


@pytest.mark.parametrize(
    ("mime", "rule"),
    [("image/*", None), ({"image/*": ""}, "mime written as an object"), ('"image/*"', "mime quoted twice")],
)
def test_droidcall_mime(mime: Any, rule: str | None) -> None:
    conversation, repairs = kept(droidcall, droid("ACTION_GET_CONTENT", mime=mime))
    assert shape(conversation)[1][2] == [("ACTION_GET_CONTENT", {"mime": "image/*"})]
    assert repairs == ({rule: 1} if rule else {})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (droid("ACTION_DANCE"), "unknown intent"),
        (droid("ACTION_GET_CONTENT", mime={"image/*": "", "video/*": ""}), "mime that is not one type"),
        (droid("ACTION_GET_CONTENT", mime={"image/*": "png"}), "mime that is not one type"),
        (droid("ACTION_SET_TIMER", {"EXTRA_LENGTH": "soon"}), "argument of another type than declared"),
        (droid("ACTION_SET_TIMER", {"EXTRA_COLOUR": "red"}), "argument that the tool does not declare"),
        (droid("ACTION_WIFI_SETTINGS", uri="content://x"), "argument that the tool does not declare"),
        ({"query": "Do it"}, "row of an unknown format"),
        (droid("ACTION_SEND", [1]), "row of an unknown format"),
    ],
)
def test_droidcall_rows_that_cannot_be_converted_are_dropped(row: dict[str, Any], why: str) -> None:
    assert reason(droidcall, row) == why


@pytest.mark.parametrize("intent", [name for group in droidcall.GROUPS.values() for name in group])
def test_droidcall_intents_can_be_called_without_arguments(intent: str) -> None:
    conversation, _ = kept(droidcall, droid(intent))
    assert shape(conversation)[1][2] == [(intent, {})]


def test_droidcall_contact_fields_are_open_and_rows_share_no_objects() -> None:
    row = droid("ACTION_EDIT", {"nickname": "Bo"}, "content://contacts/people/3")
    first, second = kept(droidcall, row)[0], kept(droidcall, row)[0]
    assert shape(first)[1][2] == [("ACTION_EDIT", {"uri": "content://contacts/people/3", "nickname": "Bo"})]
    first.tools[0]["function"]["name"] = "changed"
    assert second.tools[0]["function"]["name"] == "ACTION_PICK"


def former(response: str, request: str = "Tell me.", tools: tuple[str, ...] = ("oracle",)) -> dict[str, str]:
    declared = "".join(f"The {name}. Ask it.\n{name}(query)\n" for name in tools)
    return {
        "instruction": f"toolformer: enabled\ntoolformer access: {', '.join(tools)}\n{declared}{request}",
        "input": "",
        "response": response,
    }


def test_toolformer_conversations_have_only_calls() -> None:
    row = former("It is oracle('bread (rye)') and then atlas(\"Oslo's map\").", "Tell\nme.", ("oracle", "atlas"))
    conversation, repairs = kept(gpteacher_toolformer, {**row, "input": "Oslo"})
    calls = [("oracle", {"query": "bread (rye)"}), ("atlas", {"query": "Oslo's map"})]
    assert shape(conversation) == [("user", "Tell\nme.\n\nOslo", []), ("assistant", None, calls)]
    assert conversation.tools[0]["function"] == {
        "name": "oracle",
        "description": "The oracle. Ask it.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    }
    assert repairs == {"prose around a call left out": 1}
    assert kept(gpteacher_toolformer, former("oracle('x').")) == (
        kept(gpteacher_toolformer, former("oracle('x')"))[0],
        {},
    )


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("It is 7.", "response without a call"),
        ("It is theoracle('x').", "response without a call"),
        ("It is oracle('what's new').", "call that is not Python notation"),
        ("It is oracle('x'[::-1]).", "call that is not Python notation"),
        ("It is oracle('x", "call that is not Python notation"),
        ("It is oracle(bread).", "argument that is a bare word"),
        ("It is oracle(oracle('x')).", "argument that is a call"),
        ("It is oracle('{input} bread').", "argument that is a template"),
        ("It is oracle('<result placeholder> in grams').", "argument that is a template"),
        ("It is oracle('x', 5).", "more arguments than parameters"),
        ("It is oracle('x', top=5).", "argument that the tool does not declare"),
        ("It is oracle().", "required argument missing"),
    ],
)
def test_toolformer_rows_that_cannot_be_converted_are_dropped(response: str, why: str) -> None:
    assert reason(gpteacher_toolformer, former(response)) == why


def test_toolformer_headers() -> None:
    row = former("oracle('x')")
    for text in ("Tell me.", row["instruction"].replace("oracle(query)", "oracle: a query"), "toolformer: enabled\n"):
        assert reason(gpteacher_toolformer, {**row, "instruction": text}) in (
            "row of an unknown format",
            "tool declaration is not a signature",
        )


@given(st.lists(st.text(max_size=20), min_size=1, max_size=3), st.text("ab .,:'\n", max_size=9))
def test_toolformer_finds_all_correctly_quoted_calls(queries: list[str], prose: str) -> None:
    if any(gpteacher_toolformer._TEMPLATE.search(query) or not query.isprintable() for query in queries):
        return
    text = prose + prose.join(f" oracle({query!r}) " for query in queries) + prose
    conversation, _ = kept(gpteacher_toolformer, former(text))
    assert [call[1]["query"] for call in shape(conversation)[1][2]] == queries


@pytest.mark.parametrize("reader", [droidcall, gpteacher_toolformer, nexusraven])
@given(row=junk)
def test_random_rows_never_crash_a_reader_of_calls(reader: Any, row: Any) -> None:
    conversations, counts = run(reader, row)
    assert len(conversations) + sum(counts["dropped"].values()) == counts["read"] == 1


@given(st.text("def f(a: int=1, *'\")[]\n.", max_size=60), st.text("f(a=1, 'b')[]{x}\n", max_size=40))
def test_random_sources_never_crash_nexusraven(source: str, answer: str) -> None:
    run(nexusraven, raven(answer, BAKE, source))
    run(nexusraven, raven(answer, "def f(a: int = 1, b: str = ''): ..."))
