"""Function masking is a bijection that can be undone; calls still fit, and old names do not occur."""

import json
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from augmentation_rows import BOOK, TIDE, arguments, demo_rows, misfit, row, rows, text, tool
from poe.calls.conversation import Conversation
from poe.calls.renaming import ToolRenamer, is_identifier, rename_tools
from poe.calls.schema import lint_schema
from poe.data.augment import mask
from poe.data.augment.rows import iter_calls, iter_strings

any_row = rows() | demo_rows
slow = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def names(schema: Any) -> set[str]:
    """Return the names that a schema declares or requires, at every depth."""
    found: set[str] = set()
    if isinstance(schema, dict):
        found |= {*schema.get("properties", {}), *schema.get("required", [])}
        inner = [*schema.get("properties", {}).values(), schema.get("items"), *schema.get("anyOf", [])]
        found = found.union(*map(names, inner))
    return found


@slow
@given(any_row, st.integers(0, 9))
def test_masking_is_a_bijection_that_can_be_undone(conversation: Conversation, seed: int) -> None:
    masked, mapping = mask(conversation, Random(seed))
    assert len(set(mapping.values())) == len(mapping) > 0
    assert not set(mapping.values()) & set(mapping)
    old = {new: name for name, new in mapping.items()}
    mentions = {new: name for new, name in old.items() if is_identifier(name)}
    back = ToolRenamer(old, mentions).rename(masked)
    assert back == conversation
    assert json.dumps(back.messages) == json.dumps(conversation.messages)  # including the order of keys
    assert json.dumps(back.tools) == json.dumps(conversation.tools)


@slow
@given(any_row, st.integers(0, 9))
def test_a_masked_row_has_the_same_content_with_other_names(conversation: Conversation, seed: int) -> None:
    masked, mapping = mask(conversation, Random(seed))
    assert misfit(conversation) == misfit(masked) == []
    shown: set[str] = set()
    for one in masked.tools:
        assert lint_schema(one["function"]["parameters"]) is None
        shown |= {one["function"]["name"]} | names(one["function"]["parameters"])
    shown |= {call["name"] for call in iter_calls(masked)}
    shown |= {key for given in arguments(masked) for key in given}
    shown |= {message["name"] for message in masked.messages if "name" in message}
    assert shown == set(mapping.values())
    texts = " ".join(iter_strings([masked.messages, masked.tools])).split()
    assert not [name for name in mapping if is_identifier(name) and name in texts]


def test_a_mask_depends_on_the_row_and_its_randomness_alone() -> None:
    conversation = row("A table in Oslo", ("book_table", {"city": "Oslo"}))
    assert mask(conversation, Random(1)) == mask(conversation, Random(1))
    assert mask(conversation, Random(1)) != mask(conversation, Random(2))


def test_words_stay_and_identifiers_are_replaced() -> None:
    """Names change in user texts, arguments and keys of a default. An enum text is a value and stays."""
    pick = tool(
        "pick_tool",
        "Picks book_table, or another tool for a city",
        tool_name=text("for example book_table"),
        order=text("by what", enum=["city", "tool_name"]),
        options={
            "type": "object",
            "description": "city and more",
            "properties": {"city": text("the city")},
            "default": {"city": "Oslo"},
        },
    )
    answer = ("pick_tool", {"tool_name": "book_table", "order": "city", "options": {"city": "Bergen"}})
    masked, mapping = mask(
        row("Use pick_tool to get book_table for the city of Bergen", answer, tools=(pick, BOOK)), Random(3)
    )
    new = mapping
    function = masked.tools[0]["function"]
    assert masked.messages[0]["content"] == f"Use {new['pick_tool']} to get {new['book_table']} for the city of Bergen"
    assert function["description"] == f"Picks {new['book_table']}, or another tool for a city"
    properties = function["parameters"]["properties"]
    assert properties[new["order"]]["enum"] == ["city", new["tool_name"]]
    assert properties[new["options"]]["default"] == {new["city"]: "Oslo"}
    assert arguments(masked) == [
        {new["tool_name"]: new["book_table"], new["order"]: "city", new["options"]: {new["city"]: "Bergen"}}
    ]


@pytest.mark.parametrize(
    "parameter",
    [
        {"type": "string"},
        {"description": "by pattern", "type": "object", "patternProperties": {"^x": {}}},
        {"description": "by reference", "$ref": "#/properties/harbour"},
    ],
    ids=["undescribed", "pattern", "reference"],
)
def test_rows_without_descriptions_or_with_references_are_not_masked(parameter: dict[str, Any]) -> None:
    odd = tool("odd_tool", "Does odd things", harbour=text("the harbour"), other=parameter)
    conversation = row("Go", ("tideTimes", {"harbour": "Kiel"}), tools=(odd, TIDE))
    assert mask(conversation, Random(0)) == (conversation, {})
    assert rename_tools(conversation, {}) is conversation


def test_a_row_without_tools_is_not_masked() -> None:
    conversation = row("Hello", tools=())
    assert mask(conversation, Random(0)) == (conversation, {})
