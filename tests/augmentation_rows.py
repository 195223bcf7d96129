"""Rows for the tests of augmentation: rows written by hand, and a hypothesis strategy for rows of any shape."""

import json
from typing import Any

from hypothesis import strategies as st

from poe.calls.arguments import check_call
from poe.calls.conversation import Conversation, Tool
from poe.calls.tools import as_tool
from poe.data.augment.rows import iter_calls
from poe.demo.conversations import make_conversation


def tool(name: str, description: str, **properties: Any) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return as_tool(name, description, parameters)


def text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


BOOK = tool(
    "book_table",
    "Reserve a table in a restaurant",
    city=text("the city"),
    guests={"type": "integer", "description": "how many"},
)
TIDE = tool("tideTimes", "When the sea is high", harbour=text("the harbour"), unit=text("m or ft", enum=["m", "ft"]))
POEM = tool("write_poem", "Compose some verses", topic=text("what it is about"))


def row(
    question: str, *answer: tuple[str, dict[str, Any]], tools: tuple[Tool, ...] = (BOOK, TIDE), said: str = "No."
) -> Conversation:
    """Return a row with one question, answered by calls, or by `said` if there are none."""
    made = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(answer, 1)
    ]
    last: dict[str, Any] = (
        {"role": "assistant", "content": None, "tool_calls": made} if made else {"role": "assistant", "content": said}
    )
    return Conversation([{"role": "user", "content": question}, last], list(tools), "test", "Apache-2.0", "1")


def arguments(conversation: Conversation) -> list[dict[str, Any]]:
    return [call["arguments"] for call in iter_calls(conversation)]


def misfit(conversation: Conversation) -> list[str]:
    """Return the reasons why calls of the row do not fit its tools."""
    reasons = (check_call(conversation.tools, call["name"], call["arguments"]) for call in iter_calls(conversation))
    return [reason for reason in reasons if reason]


DEMO = [make_conversation(i) for i in range(400)]
demo_rows = st.integers(0, 5000).map(make_conversation)

# Plain words, identifiers, and keywords of JSON Schema.
NAMES = (
    "city query day get_weather maxPrice maps.search user_id q properties items required default x-y straße A".split()
)
names = st.sampled_from([*NAMES, "get weather", "städte_2", "get_weather_2"])
words = st.sampled_from("Oslo rain user_id get_weather city in the maxPrice 5 maps.search".split())
sentences = st.lists(words, min_size=1, max_size=6).map(" ".join)


@st.composite
def schemas(draw: st.DrawFn, depth: int = 2) -> tuple[dict[str, Any], st.SearchStrategy[Any]]:
    """Draw a schema with a description, and a strategy for values that fit it."""
    kind = draw(st.sampled_from(("text", "enum", "number", "array", "object", "any", "free")[: 7 if depth else 3]))
    described = {"description": draw(sentences)}
    if kind == "text":
        return {"type": "string", **described}, sentences
    if kind == "enum":
        values = draw(st.lists(sentences, min_size=1, max_size=3, unique=True))
        return {"type": "string", "enum": values, **described}, st.sampled_from(values)
    if kind == "number":
        return {"type": "integer", "minimum": 0, **described}, st.integers(0, 9)
    if kind == "array":
        inner, values = draw(schemas(depth - 1))
        return {"type": "array", "items": inner, **described}, st.lists(values, max_size=2)
    if kind == "free":
        return {"type": "object", **described}, st.dictionaries(names, sentences, max_size=2)
    one, objects = draw(objects_of(depth - 1))
    if kind == "any":
        other, more = draw(objects_of(depth - 1))
        return {"anyOf": [one, other], **described}, objects | more
    default = {"default": draw(objects)} if draw(st.booleans()) else {}
    return {**one, **described, **default}, objects


@st.composite
def objects_of(draw: st.DrawFn, depth: int) -> tuple[dict[str, Any], st.SearchStrategy[dict[str, Any]]]:
    properties, required, optional = {}, {}, {}
    for name in draw(st.lists(names, max_size=3, unique=True)):
        properties[name], values = draw(schemas(depth))
        (required if draw(st.booleans()) else optional)[name] = values
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return schema, st.fixed_dictionaries(required, optional=optional)


@st.composite
def rows(draw: st.DrawFn) -> Conversation:
    tools, values = [], {}
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        schema, values[name] = draw(objects_of(2))
        tools.append(as_tool(name, draw(sentences), schema))
    messages: list[dict[str, Any]] = []
    for turn in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(list(values)))
        given = draw(values[name])
        said = " ".join([draw(sentences), *(v for v in given.values() if isinstance(v, str))])
        function = {"name": name, "arguments": given}
        calling = {"id": f"call_{turn}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": said},
            {"role": "assistant", "content": None, "tool_calls": [calling]},
            {"role": "tool", "tool_call_id": f"call_{turn}", "name": name, "content": json.dumps(given)},
            {"role": "assistant", "content": draw(sentences)},
        ]
    return Conversation(messages, tools, "test", "Apache-2.0", "1")
