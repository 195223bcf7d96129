"""Hammer's files: evaluation sets of others in one form, and xLAM rows with masked names.

Repository: MadeAgents/Hammer; give a file, `hammer=sealtool.json`. License: Apache-2.0.

Two formats are read.

* Evaluation, `{"query", "tools", "answers"}` (from API-Bank, Seal-Tools and ToolAlpaca): `query` is a question or a
  list of messages, tools are flat. All calls of the answer are one turn.
* Training, `{"instruction", "input", "output"}`: xLAM rows as one prompt, names of tools and parameters replaced by
  random ones, in sections marked `[BEGIN OF ...]`.

Traps, and what is done about each:

* Answers are `{"name", "arguments"}` or `{"tool", "parameters"}`.
* Roles are user, agent (text), assistant (calls in a code fence) and tool; the last message ends in "Generate API
  Request:", which is no part of the conversation.
* What is required stands in a list beside the parameters, or as `required: true` in a parameter and nowhere in the
  others. So a parameter that no evaluation row calls required is not; masked rows follow xLAM's rule.
* ToolAlpaca's rows offer a tool called `components` that is documentation of results: taken out.
* Answers that name a tool that is not offered, and calls of earlier turns to tools no longer offered (API-Bank's
  `ToolSearcher`): dropped.
* The answer `[]` of masked rows means that no tool fits. What to say instead is not told: dropped.
* The evaluation sets are questions of ToolAlpaca, Seal-Tools and API-Bank: never train on both a set and its copy here.

The prompt around the masked rows says only how to write a call: it is no system message.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.flat import read_tool
from poe.data.readers.turns import Turns, named_call, parse_field, read_rows, sections
from poe.data.sources import Row
from poe.errors import RowError

NAME = "hammer"
HUB_ID = None
LICENSE = "Apache-2.0"

_FIELDS = ("query", "tools", "answers", "instruction", "input", "output")
_REQUEST = "Generate API Request:"
_FENCE = "```"


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows in either format; what cannot be read faithfully is dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    if "instruction" in row:
        return _masked(row, note)
    declared = parse_field(row.get("tools"), "tools")
    query = row.get("query")
    if not isinstance(declared, list) or not isinstance(query, str | list):
        raise RowError("row is of no known format")
    named = [tool for tool in declared if not _is_documentation(tool)]
    if len(named) < len(declared):
        note("documentation of results taken out of the tools")
    turns = Turns(unique_tools([read_tool(_with_required(tool), note) for tool in named], note), note)
    if isinstance(query, str):
        turns.user(query.strip())
    else:
        _dialogue(query, turns)
    turns.calls(_calls(row.get("answers")))
    return turns


def _is_documentation(tool: Any) -> bool:
    return isinstance(tool, dict) and tool.get("name") == "components" and not tool.get("parameters")


def _with_required(tool: Any) -> Any:
    """The tool with a list of what is required, made of the marks inside its parameters if it has none."""
    if not isinstance(tool, dict) or isinstance(tool.get("required"), list):
        return tool
    flat = tool.get("parameters")
    marked = flat.items() if isinstance(flat, dict) else ()
    return {**tool, "required": [name for name, p in marked if isinstance(p, dict) and p.get("required") is True]}


def _calls(answers: Any) -> list[tuple[Any, Any, None]]:
    answers = parse_field(answers, "answers")
    if not isinstance(answers, list):
        raise RowError("answers are not a list")
    if not answers:
        raise RowError("answer without a call or a text")
    return [
        named_call(call, "tool", "parameters") if isinstance(call, dict) and "tool" in call else named_call(call)
        for call in answers
    ]


def _dialogue(messages: list[Any], turns: Turns) -> None:
    for index, message in enumerate(messages):
        role, text = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(text, str):
            raise RowError("message is not text")
        text = text.strip()
        if index + 1 == len(messages):
            text = text.removesuffix(_REQUEST).strip()
        if role == "user":
            turns.user(text)
        elif role == "agent":
            turns.assistant(text)
        elif role == "assistant":
            turns.calls(_calls(_unfenced(text)))
        elif role == "tool":
            turns.results([text])
        else:
            raise RowError(f"message of an unknown role ({str(role)[:40]!r})")


def _unfenced(text: str) -> str:
    return text.strip().removeprefix(_FENCE).removeprefix("json").removesuffix(_FENCE)


def _masked(row: dict[str, Any], note: Note) -> Turns:
    instruction, output = row.get("instruction"), row.get("output")
    if not isinstance(instruction, str) or not isinstance(output, str) or row.get("input"):
        raise RowError("row is of no known format")
    declared = parse_field(_section(instruction, "AVAILABLE TOOLS"), "tools")
    if not isinstance(declared, list):
        raise RowError("tools are not a list")
    turns = Turns(unique_tools([read_tool(tool, note) for tool in declared], note), note)
    turns.user(_section(instruction, "QUERY").strip())
    turns.calls(_calls(_unfenced(output)))
    return turns


def _section(instruction: str, name: str) -> str:
    found, _ = sections(instruction, f"[BEGIN OF {name}]", f"[END OF {name}]")
    if len(found) != 1:
        raise RowError("row is of no known format")
    return found[0]
