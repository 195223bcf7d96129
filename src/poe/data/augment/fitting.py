"""Decide which tools could do the job of another tool. A row that must abstain may not offer such a tool.

No rule can determine what a tool does, so the test prefers to report a tool as fitting. A tool fits another one if

* their names are equal except for case and separators (`getWeather`, `get_weather`),
* every word of one name is in the other (`get_weather`, `fetch_weather_forecast`), with common synonyms as one word,
* half of all the words of their descriptions are in both, or
* their parameters have the same names, and a third of the words of their names or of their descriptions are in both.

This loses some hard negatives, and avoids rows that teach the model to refuse what it could have done.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from poe.calls.conversation import Conversation, Tool
from poe.data.augment.rows import called_tools, questions_without_calls
from poe.data.augment.words import content_words

HIGH_OVERLAP = 0.5
MEDIUM_OVERLAP = 0.33


class ToolTraits(NamedTuple):
    """The properties by which tools are compared."""

    name: str  # normalized
    name_words: frozenset[str]
    description_words: frozenset[str]
    parameters: frozenset[str]


def get_traits(tool: Tool) -> ToolTraits:
    """Return the traits of a tool."""
    function = tool["function"]
    return ToolTraits(
        _normalize_name(function["name"]),
        content_words(function["name"]),
        content_words(function["description"]),
        frozenset(_normalize_name(name) for name in function["parameters"].get("properties", {})),
    )


def fits(first: ToolTraits, second: ToolTraits) -> bool:
    """Return whether either tool could do the job of the other."""
    if first.name == second.name:
        return True
    fewer, more = sorted((first.name_words, second.name_words), key=len)
    if fewer - {"get"} and fewer <= more:
        return True
    overlap = _overlap(first.description_words, second.description_words)
    if overlap >= HIGH_OVERLAP:
        return True
    same_parameters = bool(first.parameters) and first.parameters == second.parameters
    return same_parameters and max(overlap, _overlap(first.name_words, second.name_words)) >= MEDIUM_OVERLAP


def without_fitting(tools: list[Tool], called: list[Tool]) -> list[Tool]:
    """Return the tools that fit none of the called ones."""
    called_traits = [get_traits(tool) for tool in called]
    return [tool for tool in tools if not any(map(partial(fits, get_traits(tool)), called_traits))]


def distractor_filter(*rows: Conversation) -> Callable[[ToolTraits], bool]:
    """Return a test for tools that can be added to these rows without making an answer wrong.

    It rejects a tool with the name of an offered tool and a tool that fits a called one. If a question is answered
    without a call, it also rejects a tool that shares one word of its name, or two words of its description, with it.
    """
    names = {_normalize_name(tool["function"]["name"]) for row in rows for tool in row.tools}
    called = [get_traits(tool) for row in rows for tool in called_tools(row)]
    question_words = content_words(" ".join(text for row in rows for text in questions_without_calls(row)))

    def is_harmless(tool: ToolTraits) -> bool:
        return (
            tool.name not in names
            and not tool.name_words & question_words
            and len(tool.description_words & question_words) < 2
            and not any(fits(tool, other) for other in called)
        )

    return is_harmless


def _normalize_name(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum()) or name


def _overlap(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second) if first and second else 0.0
