"""Read the format of ToolBench and RoTBench: tools in a system prompt; steps of thought, action and input."""

import re
from typing import Any, NamedTuple

from poe.calls.conversation import Tool
from poe.calls.json_text import parse_field, parse_json
from poe.calls.literals import parse_literal
from poe.calls.schema import Note
from poe.calls.tools import read_tools
from poe.calls.values import check_value
from poe.errors import RowError

_STEP = re.compile(
    r"\s*(?:Thought:(?P<thought>.*?))?^Action:(?P<name>[^\n]*)\n\s*Action Input:(?P<arguments>.*)\Z",
    re.DOTALL | re.MULTILINE,
)


class Step(NamedTuple):
    """One assistant turn."""

    thought: str
    name: str
    arguments: Any


def read_step(text: str) -> Step:
    """Parse `Thought: ... Action: ... Action Input: {...}`."""
    match = _STEP.match(text)
    if match is None:
        raise RowError("turn without an action")
    return Step((match["thought"] or "").strip(), match["name"].strip(), parse_field(match["arguments"], "arguments"))


def read_question(text: str) -> str:
    """Return the user's text without the final line `Begin!`."""
    return text.strip().removesuffix("Begin!").strip()


def read_prompt_tools(system: str, heading: str, note: Note) -> list[Tool]:
    """Return the tools that are listed after `heading`, as JSON or a Python literal.

    The rest of the prompt is not used. It explains an answer format that the conversation no longer has.
    """
    _, separator, tools_text = system.partition(heading)
    tools_text = tools_text.partition("\n\nLet's Begin!")[0].strip()
    if not separator:
        raise RowError("no declaration of tools")
    try:
        declarations = parse_json(tools_text)
    except ValueError:
        try:
            declarations = parse_literal(tools_text)
        except ValueError:
            raise RowError("tool declarations not JSON") from None
    if problem := check_value(declarations):
        raise RowError(problem)
    if not isinstance(declarations, list) or not all(isinstance(tool, dict) for tool in declarations):
        raise RowError("tools are not a list")
    return read_tools([_without_optional(tool) for tool in declarations], note)


def _without_optional(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the tool without its list of optional parameters, which is not a JSON Schema keyword."""
    parameters = tool.get("parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("optional"), list):
        return tool
    return {**tool, "parameters": {key: value for key, value in parameters.items() if key != "optional"}}


def read_turns(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the turns of `conversations` as (speaker, value)."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("row of an unknown format")
    return [(str(turn.get("from")), turn.get("value")) for turn in turns]
