"""ToolAlpaca: OpenAPI documents become tools, golden answers calls."""

import json
from typing import Any

import pytest

from poe.data.readers import toolalpaca
from test_readers import kept, reason, run, shape

LOAF = {"type": "object", "properties": {"flour": {"type": "string"}}, "required": ["flour"]}
DOCUMENT: dict[str, Any] = {
    "openapi": "3.0.0",
    "paths": {
        "/ovens/{oven}": {
            "get": {
                "summary": "Look into an oven",
                "description": "At length.",
                "parameters": [
                    {"name": "oven", "in": "path", "required": True, "schema": {"type": "integer"}},
                    {"$ref": "#/components/parameters/Side"},
                    {"name": "page", "in": "query", "description": "Which page", "schema": {"type": "integer"}},
                ],
            }
        },
        "/loaves": {
            "post": {
                "description": "Bake a loaf",
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Loaf"}}},
                },
            }
        },
    },
    "components": {
        "schemas": {"Loaf": LOAF},
        "parameters": {
            "Side": {"name": "side", "in": "query", "schema": {"enum": ["top", "bottom"], "type": "string"}}
        },
    },
}
PROJECTION = {"lookIntoOven": ["/ovens/{oven}", "get"], "bakeLoaf": ["/loaves", "post"]}


def api(*answers: Any, document: Any = DOCUMENT, projection: Any = PROJECTION) -> dict[str, Any]:
    """Return an API with one question per answer, a list of (function, arguments as text or object)."""
    return {
        "Name": "Bakery",
        "Documentation": json.dumps(document),
        "Function_Projection": projection,
        "Instructions": [f"Question {index}?" for index, _ in enumerate(answers)],
        "Golden_Answers": [
            [
                {"Action": name, "Action_Input": given if isinstance(given, str) else json.dumps(given)}
                for name, given in a
            ]
            for a in answers
        ],
    }


LOOK = [("lookIntoOven", {"oven": 3})]


def test_every_question_is_a_row() -> None:
    conversations, counts = run(toolalpaca, api(LOOK, [("fly", {})], [*LOOK, ("bakeLoaf", {"flour": "rye"})]))
    assert [c.id for c in conversations] == ["row 0.0", "row 0.2"]
    assert (counts["read"], counts["dropped"]) == (3, {"call to a tool that is not offered": 1})
    assert shape(conversations[1]) == [
        ("user", "Question 2?", []),
        ("assistant", None, [("lookIntoOven", {"oven": 3}), ("bakeLoaf", {"flour": "rye"})]),
    ]


def test_operations_become_tools() -> None:
    look, bake = (tool["function"] for tool in kept(toolalpaca, api(LOOK))[0].tools)
    assert look == {
        "name": "lookIntoOven",
        "description": "Look into an oven",
        "parameters": {
            "type": "object",
            "properties": {
                "oven": {"type": "integer"},
                "side": {"enum": ["top", "bottom"], "type": "string"},
                "page": {"type": "integer", "description": "Which page"},
            },
            "required": ["oven"],
        },
    }
    assert bake == {"name": "bakeLoaf", "description": "Bake a loaf", "parameters": LOAF}


def test_empty_text_for_optional_arguments_is_left_out() -> None:
    conversation, repairs = kept(toolalpaca, api([("lookIntoOven", {"oven": 3, "side": "", "page": ""})]))
    assert shape(conversation)[1][2] == [("lookIntoOven", {"oven": 3})]
    assert repairs == {"empty text for an optional argument left out": 1}
    blank = [("bakeLoaf", {"flour": ""})]  # required text: the empty text stays
    assert shape(kept(toolalpaca, api(blank))[0])[1][2] == blank
    assert reason(toolalpaca, api([("lookIntoOven", {"oven": ""})])) == "argument of another type than declared"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ([("lookIntoOven", '{"oven": ${id from listOvens}}')], "placeholder for the result of an earlier call"),
        ([("bakeLoaf", {"flour": "${name from listFlours}"})], "placeholder for the result of an earlier call"),
        ([("lookIntoOven", '{"oven": "oven": 3}')], "arguments not JSON"),
        ([("lookIntoOven", "[3]")], "arguments are not an object"),
        ([], "empty list of calls"),
    ],
)
def test_answers_that_cannot_be_converted_are_dropped(answer: Any, why: str) -> None:
    assert reason(toolalpaca, api(answer)) == why


def changed(**places: Any) -> dict[str, Any]:
    """Return the document with other schemas for the named components."""
    document = json.loads(json.dumps(DOCUMENT))
    document["components"]["schemas"] = places
    return document


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (changed(Loaf={"properties": {"a": {"$ref": "#/components/schemas/Loaf"}}}), "schema that contains itself"),
        (changed(Loaf={"$ref": "loaf.json"}), "tool schema that refers to another document"),
        (changed(), "unresolvable reference"),
        (changed(Loaf={"type": "string"}), "request body that is not an object"),
        ({**DOCUMENT, "paths": {}}, "function that the documentation does not describe"),
        ([], "row of an unknown format"),
    ],
)
def test_documents_that_cannot_be_converted_are_dropped(document: Any, why: str) -> None:
    assert reason(toolalpaca, api(LOOK, document=document)) == why


def test_references_that_grow_exponentially_are_rejected() -> None:
    nexts = [{"$ref": f"#/components/schemas/S{i + 1}"} for i in range(8)]
    steps = {f"S{i}": {"properties": dict.fromkeys("abcdef", after)} for i, after in enumerate(nexts)}
    document = changed(Loaf={"$ref": "#/components/schemas/S0"}, **steps, S8={"type": "object", "properties": {}})
    assert reason(toolalpaca, api(LOOK, document=document)) == "schema that contains itself"


def test_rows_of_another_format_are_dropped() -> None:
    row = api(LOOK)
    assert reason(toolalpaca, {**row, "Golden_Answers": []}) == "question without a golden answer"
    assert reason(toolalpaca, {**row, "Function_Projection": {"f": "x"}}) == "function without a path and a method"
    assert reason(toolalpaca, {"Instances": []}) == "row of an unknown format"
    clash = json.loads(json.dumps(DOCUMENT))
    clash["paths"]["/loaves"]["post"]["parameters"] = [{"name": "flour", "in": "query"}]
    assert reason(toolalpaca, api(LOOK, document=clash)) == "one parameter name, two places"
