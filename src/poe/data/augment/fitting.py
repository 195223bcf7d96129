"""Which tools could do another's job: a row that must abstain may not be left with one, nor be given one.

No rule can know what a tool does, so the test errs on the side of calling a tool fitting. A tool fits another when

* their names are equal, case and separators aside (`getWeather`, `get_weather`),
* every word of one's name is in the other's (`get_weather`, `fetch_weather_forecast`), common synonyms taken as one,
* half of all the words of their descriptions are in both, or
* their parameters have the same names, and a third of the words of their names or of their descriptions are in both.

What is lost is a hard negative; what is avoided is a row that teaches to refuse what could have been done.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from poe.calls.conversation import Conversation, Tool
from poe.data.augment.rows import called_tools, questions_answered_in_words
from poe.data.augment.words import content_words

MUCH_ALIKE = 0.5
ALIKE = 0.33


class Traits(NamedTuple):
    """What a tool is compared by."""

    name: str
    named: frozenset[str]  # the words of its name
    told: frozenset[str]  # the words of its description
    parameters: frozenset[str]


def traits(tool: Tool) -> Traits:
    function = tool["function"]
    return Traits(
        _plain(function["name"]),
        content_words(function["name"]),
        content_words(function["description"]),
        frozenset(_plain(name) for name in function["parameters"].get("properties", {})),
    )


def fits(one: Traits, other: Traits) -> bool:
    """Whether either tool might do what the other does."""
    if one.name == other.name:
        return True
    fewer, more = sorted((one.named, other.named), key=len)
    if fewer - {"get"} and fewer <= more:
        return True
    told = _overlap(one.told, other.told)
    if told >= MUCH_ALIKE:
        return True
    same = bool(one.parameters) and one.parameters == other.parameters
    return same and max(told, _overlap(one.named, other.named)) >= ALIKE


def without_fitting(tools: list[Tool], called: list[Tool]) -> list[Tool]:
    """The tools that could do nothing of what the called ones do."""
    wanted = [traits(tool) for tool in called]
    return [tool for tool in tools if not any(map(partial(fits, traits(tool)), wanted))]


def harmless_to(*rows: Conversation) -> Callable[[Traits], bool]:
    """A test of tools that may be added to these rows without making an answer wrong.

    Not one whose name is there already, not one that fits a called tool, and where a question is answered without a
    call, not one that shares a word of its name, or two of its description, with the question.
    """
    names = {_plain(tool["function"]["name"]) for row in rows for tool in row.tools}
    called = [traits(tool) for row in rows for tool in called_tools(row)]
    asked = content_words(" ".join(text for row in rows for text in questions_answered_in_words(row)))

    def test(tool: Traits) -> bool:
        return (
            tool.name not in names
            and not tool.named & asked
            and len(tool.told & asked) < 2
            and not any(fits(tool, other) for other in called)
        )

    return test


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum()) or name


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other) if one and other else 0.0
