"""The arguments of a call reach a Python function as the types that it declares."""

import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypedDict

import pydantic
import pytest

from poe import Agent
from poe.calls.arguments import find_faults
from poe.calls.conversation import Call
from poe.calls.tools import read_tools
from poe.calls.typed_arguments import convert_arguments
from poe.chat import Answer


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Place:
    city: str
    since: datetime.date | None = None


class Stop(TypedDict):
    place: Place
    minutes: int


class Guest(pydantic.BaseModel):
    name: str
    color: Color = Color.RED


CASES: list[tuple[Any, Any, Any]] = [
    (Color, "blue", Color.BLUE),
    (Color | None, None, None),
    (Color | None, "red", Color.RED),
    (Literal[Color.RED, "any"], "red", Color.RED),
    (Literal[1, "any"], "any", "any"),
    (list[Color], ["red", "blue"], [Color.RED, Color.BLUE]),
    (set[int], [1, 2], {1, 2}),
    (frozenset, ["a"], frozenset({"a"})),
    (tuple[int, Color], [1, "red"], (1, Color.RED)),
    (tuple[Color, ...], ["red"], (Color.RED,)),
    (Sequence[datetime.date], ["2027-01-31"], [datetime.date(2027, 1, 31)]),
    (dict[str, Place], {"a": {"city": "Oslo"}}, {"a": Place("Oslo")}),
    (Place, {"city": "Oslo", "since": "2027-01-31"}, Place("Oslo", datetime.date(2027, 1, 31))),
    (Stop, {"place": {"city": "Oslo"}, "minutes": 3}, {"place": Place("Oslo"), "minutes": 3}),
    (Guest, {"name": "Zoe", "color": "blue"}, Guest(name="Zoe", color=Color.BLUE)),
    (datetime.datetime, "2027-01-31T10:00:00+00:00", datetime.datetime(2027, 1, 31, 10, tzinfo=datetime.UTC)),
    (uuid.UUID, str(uuid.UUID(int=5)), uuid.UUID(int=5)),
    (pathlib.Path, "a/b", pathlib.Path("a/b")),
    (decimal.Decimal, "1.50", decimal.Decimal("1.50")),
    (Annotated[Color, "of the boat"], "red", Color.RED),
    (datetime.date | str, "tomorrow", "tomorrow"),
    (int | Color, "red", Color.RED),
    (float, 3, 3),
    (Any, {"a": 1}, {"a": 1}),
    ("Unknown", [1], [1]),
]


@pytest.mark.parametrize(("hint", "value", "expected"), CASES, ids=lambda part: str(part)[:30])
def test_a_value_becomes_the_declared_type(hint: Any, value: Any, expected: Any) -> None:
    def function(argument):  # the annotation is set below
        return argument

    function.__annotations__ = {"argument": hint}
    for each in (function, functools.partial(function)):
        got = convert_arguments(each, {"argument": value})["argument"]
        assert got == expected
        assert type(got) is type(expected)
    if hint != "Unknown":
        tools = read_tools(function)
        assert find_faults(Call("function", {"argument": value}), tools) == []


def test_an_agent_gives_a_function_what_it_declares() -> None:
    seen = []

    def paint(color: Color, where: Place) -> str:
        """Paint a place."""
        seen.append((color, where))
        return "done"

    call = Call("paint", {"color": "red", "where": {"city": "Oslo", "since": "not a date"}})
    answers = iter(
        [
            Answer("", [call], [], "tool_calls", "", []),
            Answer("", [Call("paint", {"color": "red", "where": {"city": "Oslo"}})], [], "tool_calls", "", []),
            Answer("Painted.", [], [], "stop", "Painted.", []),
        ]
    )
    run = Agent(lambda messages, tools: next(answers), [paint]).run("Paint Oslo red!")
    assert seen == [(Color.RED, Place("Oslo"))]
    assert [outcome.status for outcome in run.outcomes] == ["failed", "done"]  # it is no date: the model reads why
