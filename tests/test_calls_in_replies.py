"""Parse the calls of replies and check them against the tools."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poe.calls.arguments import check_call, find_faults
from poe.calls.conversation import Call, Conversation
from poe.calls.forms.call_forms import parse_reply
from poe.calls.tools import as_tool, check_calls, fit_calls
from poe.evaluation.calls import score_replies

TOOL = as_tool(
    "book_flight",
    "Book a flight",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "seats": {"type": "integer"}},
        "required": ["city"],
    },
)
arguments = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()))


@given(st.lists(st.tuples(st.text(), arguments), max_size=3), st.text())
def test_written_calls_are_read_back(calls, prose) -> None:
    if "<tool_call>" in prose or any("tool_call>" in json.dumps(c, ensure_ascii=False) for c in calls):
        return  # the marks are special tokens, which a text cannot contain
    text = prose + "".join(
        f"<tool_call>{json.dumps({'name': n, 'arguments': a}, ensure_ascii=False)}</tool_call>" for n, a in calls
    )
    reply = parse_reply(text)
    assert reply.calls == [Call(n, a) for n, a in calls]
    assert reply.content == prose.strip()
    assert not reply.malformed


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {}}',  # cut off
        "<tool_call>{name: f}</tool_call>",
        '<tool_call>["f"]</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_unreadable_calls_are_kept_as_malformed(text: str) -> None:
    reply = parse_reply(text)
    assert not reply.calls
    assert len(reply.malformed) == 1


@given(st.text())
def test_the_parser_never_raises(text: str) -> None:
    parse_reply("<tool_call>" + text)


def test_problems_give_the_call_and_the_reason() -> None:
    assert check_calls([Call("book_flight", {"city": "Oslo", "seats": 2})], [TOOL]) == []
    for bad in (
        Call("book_hotel", {}),
        Call("book_flight", {"seats": 2}),
        Call("book_flight", {"city": "Oslo", "seats": "two"}),
        Call("book_flight", {"city": "Oslo", "wings": 2}),
        Call("book_flight", "Oslo"),
    ):
        (problem,) = check_calls([bad], [TOOL])
        assert problem.startswith(bad.name)


ORDER = as_tool(
    "order",
    "Order",
    {
        "type": "object",
        "properties": {
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "sku": {"type": "string", "pattern": "^[A-Z]+$"},
                        "count": {"type": "integer", "minimum": 1},
                    },
                    "required": ["sku"],
                },
            },
            "size": {"enum": ["S", "M"]},
            "to": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/address"}]},
            "note": {"type": "string", "maxLength": 5},
        },
        "required": ["items", "size"],
        "$defs": {
            "address": {"type": "object", "properties": {"street": {"type": "string"}}, "required": ["street"]},
        },
    },
)


def test_every_error_of_a_call_is_named_with_its_place() -> None:
    arguments = {
        "items": [{"sku": "A", "count": 0}, {"count": "2"}, {"sku": "b", "two words": 1}],
        "to": {"street": 5},
        "note": "much too long",
        "gift": True,
    }
    assert check_calls([Call("order", arguments)], [ORDER]) == [
        "order: arguments.size: required argument missing",
        "order: arguments.gift: argument that the tool does not declare",
        "order: arguments.items[1].sku: required argument missing",
        'order: arguments.items[1].count: expected integer, found "2"',
        'order: arguments.items[2]["two words"]: argument that the tool does not declare',
        "order: arguments.to.street: expected string, found 5",
        "order: arguments.items[0].count: 0 is less than the minimum of 1",
        "order: arguments.items[2].sku: the text does not match the pattern",
        "order: arguments.note: 'much too long' is too long",
    ]
    fitting = {"items": [], "size": "M", "to": 3}
    assert check_calls([Call("order", fitting)], [ORDER]) == []
    assert check_calls([Call("order", {**fitting, "to": "x", "size": 1})], [ORDER]) == [
        'order: arguments.size: expected one of "S", "M", found 1',
        'order: arguments.to: expected integer or object, found "x"',
    ]


def test_a_call_has_faults_exactly_if_it_is_refused() -> None:
    rng = random.Random(2)
    parts: list[Any] = [
        {"type": "string", "maxLength": 2}, {"type": ["integer", "null"]}, {"enum": [1, "a"]}, True, False,
        {"type": "array", "items": {"$ref": "#/$defs/p"}}, {"$ref": "#/$defs/p"}, {"not": {"type": "string"}},
        {"anyOf": [{"$ref": "#/$defs/p"}, {"type": "integer"}]}, {"const": 5},
        {"oneOf": [{"minimum": 2}, {"type": "integer"}]},
    ]  # fmt: skip
    values: list[Any] = [None, True, 1, 2.5, 5, "a", "long", [], ["a", 1], {}, {"b": 1}, {"b": "x", "c": 1}]
    refused = 0
    for _ in range(300):
        definition = {"type": "object", "properties": {"b": rng.choice(parts)}, "required": ["b"]}
        tool = as_tool(
            "f", "", {"properties": dict(zip("ab", rng.sample(parts, 2), strict=True)), "$defs": {"p": definition}}
        )
        call = Call("f", {name: rng.choice(values) for name in rng.sample("abc", rng.randrange(4))})
        faults = find_faults(call, [tool])
        assert bool(faults) == (check_call([tool], call.name, call.arguments) is not None)
        assert len({fault.path for fault in faults}) == len(faults)
        refused += bool(faults)
    assert 50 < refused < 280


def test_conversions_are_exact_and_named() -> None:
    calls = [
        Call("order", {"to": "3", "items": [{"count": "2", "sku": "A"}], "size": "XL"}),
        Call("book_flight", '{"seats": "2", "city": "Oslo"}'),
        Call("book_flight", {"city": "Oslo", "seats": None}),
        Call("fly", {"seats": "2"}),
        Call("book_flight", "{"),
    ]
    fitted, notes = fit_calls(calls, [ORDER, TOOL])
    assert fitted == [
        Call("order", {"items": [{"sku": "A", "count": 2}], "size": "XL", "to": 3}),
        Call("book_flight", {"city": "Oslo", "seats": 2}),
        Call("book_flight", {"city": "Oslo"}),
        *calls[3:],
    ]
    assert notes == [
        'order: arguments.to: "3" became 3',
        'order: arguments.items[0].count: "2" became 2',
        'book_flight: arguments: "{\\"seats\\": \\"2\\", \\"city\\": \\"Oslo\\"}" became {"city": "Oslo", "seats": 2}',
        "book_flight: arguments.seats: null left out",
    ]
    assert len(check_calls(fitted, [ORDER, TOOL])) == 3


def test_scores_count_exact_calls_and_right_abstentions() -> None:
    def row(*calls: tuple[str, dict]) -> Conversation:
        made = [{"id": "1", "type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
        answer = {"role": "assistant", "content": None if calls else "no tool for that", "tool_calls": made}
        return Conversation([{"role": "user", "content": "x"}, answer], [TOOL])

    expected = row(("book_flight", {"city": "Oslo"}))
    right = '<tool_call>{"name": "book_flight", "arguments": {"city": "Oslo"}}</tool_call>'
    scores = score_replies(
        [expected, expected, expected, row(), row()],
        [right, right.replace("Oslo", "Bergen"), "I booked it", "sorry", right],
    )
    assert (scores.exact, scores.names, scores.valid) == (0.3333, 0.6667, 0.6667)
    assert scores.abstained == 0.5
