"""A value behind a reference or in a union is converted, ordered and checked as if its schema were in its place."""

import time
from contextlib import suppress
from typing import Any

import jsonschema
import pytest

from poe.calls.arguments import check_call, fit_call
from poe.calls.schema import lint_schema
from poe.calls.tools import as_tool
from poe.data.readers import messages
from poe.errors import RowError
from test_readers import kept, reason

PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "zip": {"type": "integer"}},
    "required": ["city"],
}
INLINE = {"place": PLACE, "days": {"type": "integer"}}
TREE = {
    "type": "object",
    "properties": {"size": {"type": "integer"}, "parts": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
}


def parameters(properties: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)[:1], **others}


REFERENCE = {**INLINE, "place": {"$ref": "#/$defs/P"}}
DEFINED = {"$defs": {"P": PLACE, "Q": {"$ref": "#/$defs/P"}}}
ESCAPED = {**INLINE, "place": {"$ref": "#/components/schemas/a~1b%20c"}}
PARTS = {"allOf": [{"required": ["city"]}, {"properties": PLACE["properties"]}], "type": "object"}
SPELLINGS = {
    "inline": parameters(INLINE),
    "$defs": parameters(REFERENCE, **DEFINED),
    "definitions": parameters({**INLINE, "place": {"$ref": "#/definitions/P"}}, definitions={"P": PLACE}),
    "pointer": parameters(ESCAPED, components={"schemas": {"a/b c": PLACE}}),
    "anchor": parameters({**INLINE, "place": {"$ref": "#p"}}, **{"$defs": {"P": {"$anchor": "p", **PLACE}}}),
    "chain": parameters({**INLINE, "place": {"$ref": "#/$defs/Q"}}, **DEFINED),
    "with a description": parameters({**INLINE, "place": {**REFERENCE["place"], "description": "x"}}, **DEFINED),
    "Pydantic's optional": parameters(
        {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in REFERENCE.items()}, **DEFINED
    ),
    "type lists": parameters({"place": {**PLACE, "type": ["object", "null"]}, "days": {"type": ["integer", "null"]}}),
    "nullable": parameters({name: {**schema, "nullable": True} for name, schema in INLINE.items()}),
    "nullable reference": parameters({name: {**sub, "nullable": True} for name, sub in REFERENCE.items()}, **DEFINED),
    "oneOf": parameters({**INLINE, "place": {"oneOf": [{"type": "string"}, PLACE]}}),
    "allOf": parameters({**INLINE, "place": PARTS}),
    "a whole reference": {"$ref": "#/$defs/A", "$defs": {"A": parameters(REFERENCE), "P": PLACE}},
    "conditional": parameters(INLINE, **{"if": {"required": ["days"]}, "then": {"required": ["place"]}}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_schema_elsewhere_acts_as_one_in_its_place(spelling: str) -> None:
    tools = [as_tool("f", "", SPELLINGS[spelling])]
    notes: list[str] = []
    fitted = fit_call(tools, "f", {"days": "3", "place": {"zip": "5", "city": "Oslo"}}, notes.append)
    assert fitted == {"place": {"city": "Oslo", "zip": 5}, "days": 3}
    assert [list(fitted), list(fitted["place"])] == [["place", "days"], ["city", "zip"]]
    assert notes == ["str coerced to integer"] * 2
    for arguments, why in (
        ({"place": {"city": "Oslo", "color": "red"}}, "argument that the tool does not declare"),
        ({"place": {"city": "Oslo"}, "color": "red"}, "argument that the tool does not declare"),
        ({"place": {"city": 5.5}}, "argument of another type than declared"),
        ({"place": {"zip": 5}}, "required argument missing"),
        ({}, "required argument missing"),
    ):
        assert check_call(tools, "f", arguments) == why


def test_a_union_takes_the_member_that_fits() -> None:
    cat = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}}
    tricks = {"type": "array", "items": {"type": "integer"}}
    dog = {"type": "object", "properties": {"kind": {"const": "dog"}, "tricks": tricks}}
    tools = [as_tool("f", "", parameters({"pet": {"oneOf": [cat, dog]}, "n": {"type": ["boolean", "integer"]}}))]
    fitted = fit_call(tools, "f", {"n": "7", "pet": {"tricks": ["1", 2], "kind": "dog"}})
    assert fitted == {"pet": {"kind": "dog", "tricks": [1, 2]}, "n": 7}
    assert list(fitted["pet"]) == ["kind", "tricks"]
    assert check_call(tools, "f", {"pet": {"kind": "bird"}}) == "argument outside its enum"
    assert check_call(tools, "f", {"pet": {"kind": "cat", "wings": 2}}) == "argument that the tool does not declare"
    text_first = [as_tool("f", "", parameters({"x": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}))]
    assert fit_call(text_first, "f", {"x": "5"}) == {"x": "5"}  # it fits as it is
    both = {"anyOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}]}
    assert fit_call([as_tool("f", "", {"type": "object", **both})], "f", {"b": "2", "a": "1"}) == {"a": 1, "b": 2}


def test_a_schema_that_contains_itself_ends_with_the_value() -> None:
    tools = [as_tool("f", "", parameters({"tree": {"$ref": "#/$defs/tree"}}, **{"$defs": {"tree": TREE}}))]
    value: Any = {"size": "1"}
    for _ in range(20):
        value = {"parts": [value], "size": "1"}
    fitted = fit_call(tools, "f", {"tree": value})["tree"]
    for _ in range(20):
        assert list(fitted) == ["size", "parts"]
        fitted = fitted["parts"][0]
    assert fitted == {"size": 1}


def test_references_that_lead_nowhere_are_refused_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_: pytest.fail("a reference was fetched"))
    for reference, why in (
        ("https://example.com/x.json", "refers to another document"),
        ("other.json#/a", "refers to another document"),
        ("#/$defs/none", "refers to a schema that does not exist"),
        ("#none", "refers to a schema that does not exist"),
        ("#/$defs/a", "refers back to itself"),
    ):
        defs = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}} if reference == "#/$defs/a" else {}
        with pytest.raises(RowError, match=why):
            as_tool("f", "", parameters({"x": {"$ref": reference}}, **{"$defs": defs}))
        with pytest.raises(RowError, match=why):
            as_tool("f", "", {"$ref": reference, "$defs": defs})


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"^\p{L}+$", "Ås", "5"),  # not in Python's notation
        (r"^(?<year>\d{4})$", "2020", "20"),
        (r"^[[:alpha:]]+$", "abc", "a1"),
        (r"^(?=.*[A-Z]).+$", "aB", "ab"),
        (r"^[^]+$", "anything", None),  # in JavaScript's notation only: not checked
        ("(", "anything", None),
    ],
)
def test_patterns_of_other_languages_lose_no_row(pattern: str, right: str, wrong: str | None) -> None:
    for where in ({"x": {"type": "string", "pattern": pattern}}, {"x": {"propertyNames": {"pattern": pattern}}}):
        tools = [as_tool("f", "", parameters(where))]
        values = [right, wrong] if "pattern" in where["x"] else [{right: 1}, {wrong: 1}]
        assert check_call(tools, "f", {"x": values[0]}) is None
        if wrong is not None:
            assert check_call(tools, "f", {"x": values[1]}) == "arguments do not fit the tool's schema"
    keyed = as_tool("f", "", {**parameters({}), "patternProperties": {pattern: {"type": "integer"}}})
    assert check_call([keyed], "f", {right: 1}) is None


def test_hostile_schemas_take_a_bounded_time() -> None:
    nested: Any = 5
    for _ in range(30):
        nested = [nested]
    twice = {"oneOf": [{"type": "array", "items": {"$ref": "#/$defs/t"}}] * 2 + [{"type": "string"}]}
    cases = [
        (parameters({"x": {"type": "string", "pattern": "^(a|a|aa)*(b|a+)*$"}}), {"x": "a" * 200 + "!"}),
        (parameters({"x": {"$ref": "#/$defs/t"}}, **{"$defs": {"t": twice}}), {"x": nested}),
        (parameters({"x": {"items": {"enum": list(range(19_000))}}}), {"x": [-1] * 2_000}),
        (parameters({"x": {"uniqueItems": True}}), {"x": [{"a": i} for i in range(3_000)]}),
        (parameters({"x": {"anyOf": [{"anyOf": [{"type": "null"}] * 50}] * 50}}), {"x": 1}),
    ]
    start = time.process_time()
    for schema, arguments in cases:
        tools = [as_tool("f", "", schema)]
        assert len(str(check_call(tools, "f", arguments))) < 100
        with suppress(RowError):
            fit_call(tools, "f", arguments)
    assert time.process_time() - start < 15
    with pytest.raises(RowError, match="more than 20,000 values"):
        as_tool("f", "", parameters({"x": {"enum": list(range(30_000))}}))
    deep: Any = {}
    for _ in range(5_000):
        deep = {"not": deep}
    with pytest.raises(RowError, match="nested too deeply"):
        as_tool("f", "", parameters({"x": deep}))


def test_older_spellings_of_schemas_are_repaired() -> None:
    notes: list[str] = []
    properties = {
        "pair": {"type": "array", "items": [{"type": "int"}, {"type": "List[str]"}], "additionalItems": False},
        "age": {"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": "150"},
        "unit": {"type": "STRING", "enum": ["c", "f"], "nullable": True, "description": None, "default": None},
        "any": {"type": "TYPE_UNSPECIFIED", "nullable": False},
        "gone": None,
    }
    tool = as_tool("f", "", {"type": "OBJECT", "properties": properties, "required": ["pair", "gone"]}, notes.append)
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "pair": {
                "type": "array",
                "prefixItems": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}],
                "items": False,
            },
            "age": {"type": "integer", "exclusiveMinimum": 0, "maximum": 150},
            "unit": {"type": ["string", "null"], "enum": ["c", "f", None], "default": None},
            "any": {},
        },
        "required": ["pair"],
    }
    assert fit_call([tool], "f", {"age": "5", "pair": ["1", ["x"]]}) == {"pair": [1, ["x"]], "age": 5}
    assert {"nullable written as a type", "items of a tuple written as prefixItems"} <= set(notes)


@pytest.mark.parametrize(
    "keyword",
    [
        {"enum": "a"}, {"enum": []}, {"required": ["a", "a"]}, {"required": "a"}, {"minLength": -1}, {"minLength": 1.5},
        {"maxItems": True}, {"multipleOf": 0}, {"minimum": "low"}, {"pattern": 5}, {"anyOf": []}, {"allOf": [5]},
        {"items": [{}]}, {"items": 5}, {"properties": {"a": 1}}, {"$defs": {"a": None}}, {"title": 5}, {"not": []},
        {"type": []}, {"type": ["string", "string"]}, {"dependentRequired": {"a": ["b", "b"]}}, {"const": None},
        {"uniqueItems": 1}, {"additionalProperties": False}, {"unknown": 1}, {"minProperties": 2.0}, {"format": ""},
    ],
    ids=str,
)  # fmt: skip
def test_our_lint_agrees_with_jsonschema(keyword: dict[str, Any]) -> None:
    try:
        jsonschema.Draft202012Validator.check_schema(keyword)
        is_valid = True
    except jsonschema.SchemaError:
        is_valid = False
    assert (lint_schema(keyword) is None) == is_valid


def test_rows_with_referenced_schemas_are_converted_and_counted() -> None:
    call = {"name": "f", "arguments": '{"days": "3", "place": {"zip": "5", "city": "Oslo"}, "color": null}'}
    chat = [{"role": "user", "content": "Go"}, {"role": "assistant", "tool_calls": [call]}]
    row = {"messages": chat, "tools": [{"name": "f", "inputSchema": SPELLINGS["$defs"]}]}
    conversation, repairs = kept(messages, row)
    fitted = conversation.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert fitted == {"place": {"city": "Oslo", "zip": 5}, "days": 3}
    assert repairs == {"str coerced to integer": 2, "null for an argument that is not declared left out": 1}
    call["arguments"] = '{"place": {"city": "Oslo", "color": "red"}}'
    assert reason(messages, row) == "argument that the tool does not declare"
