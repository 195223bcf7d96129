"""Hammer's files: evaluation sets of other projects in one format, and xLAM rows with masked names.

Repository: MadeAgents/Hammer; give a file, `hammer=sealtool.json`. License: Apache-2.0.

Two formats are read.

* Evaluation, `{"query", "tools", "answers"}` (from API-Bank, Seal-Tools and ToolAlpaca): `query` is a question or a
  list of messages, and tools have flat parameters. All calls of the answer are one turn.
* Training, `{"instruction", "input", "output"}`: xLAM rows as one prompt with sections marked `[BEGIN OF ...]`. The
  names of tools and parameters are replaced by random ones.

Traps and how the reader handles them:

* Answers are `{"name", "arguments"}` or `{"tool", "parameters"}`.
* Roles are user, agent (text), assistant (calls in a code fence) and tool. The last message ends in "Generate API
  Request:", which is not part of the conversation.
* Required parameters are in a list beside the parameters, or have `required: true`, and other parameters have no mark.
  A parameter of an evaluation row that is not called required is therefore optional. Masked rows follow xLAM's rule.
* ToolAlpaca's rows offer a tool `components` that is documentation of results: removed.
* Answers that name a tool that is not offered, and calls of earlier turns to tools that are no longer offered
  (API-Bank's `ToolSearcher`): dropped.
* The answer `[]` of masked rows means that no tool fits. The text of such an answer is unknown: dropped.
* The evaluation sets contain questions of ToolAlpaca, Seal-Tools and API-Bank: do not train on a set and its copy here.

The prompt of the masked rows only explains how to write a call, so it does not become a system message.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.json_text import parse_field
from poe.calls.schema import Note
from poe.calls.tools import read_tools
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, parse_call_object, read_rows, split_sections
from poe.data.sources import Row
from poe.errors import RowError

NAME = "hammer"
HUB_ID = None
LICENSE = "Apache-2.0"

_FIELDS = ("query", "tools", "answers", "instruction", "input", "output")
_REQUEST = "Generate API Request:"
_FENCE = "```"


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of rows in either format; rows that lose content are dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    if "instruction" in row:
        return _convert_masked(row, note)
    declared = parse_field(row.get("tools"), "tools")
    query = row.get("query")
    if not isinstance(declared, list) or not isinstance(query, str | list):
        raise RowError("row of an unknown format")
    tools = [tool for tool in declared if not _is_documentation(tool)]
    if len(tools) < len(declared):
        note("documentation of results removed from the tools")
    turns = Turns(read_tools([_add_required(tool) for tool in tools], note, flat=True), note)
    if isinstance(query, str):
        turns.add_user(query.strip())
    else:
        _add_dialogue(query, turns)
    turns.add_calls(_read_calls(row.get("answers")))
    return turns


def _is_documentation(tool: Any) -> bool:
    return isinstance(tool, dict) and tool.get("name") == "components" and not tool.get("parameters")


def _add_required(tool: Any) -> Any:
    """Return the tool with a list of required parameters, made from their marks if it has no list."""
    if not isinstance(tool, dict) or isinstance(tool.get("required"), list):
        return tool
    flat = tool.get("parameters")
    marked = flat.items() if isinstance(flat, dict) else ()
    return {**tool, "required": [name for name, p in marked if isinstance(p, dict) and p.get("required") is True]}


def _read_calls(answers: Any) -> list[tuple[Any, Any, None]]:
    answers = parse_field(answers, "answers")
    if not isinstance(answers, list):
        raise RowError("answers are not a list")
    if not answers:
        raise RowError("answer without a call or a text")
    return [
        parse_call_object(call, "tool", "parameters")
        if isinstance(call, dict) and "tool" in call
        else parse_call_object(call)
        for call in answers
    ]


def _add_dialogue(messages: list[Any], turns: Turns) -> None:
    for index, message in enumerate(messages):
        role, text = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(text, str):
            raise RowError("message is not text")
        text = text.strip()
        if index + 1 == len(messages):
            text = text.removesuffix(_REQUEST).strip()
        if role == "user":
            turns.add_user(text)
        elif role == "agent":
            turns.add_assistant(text)
        elif role == "assistant":
            turns.add_calls(_read_calls(_remove_fence(text)))
        elif role == "tool":
            turns.add_results([text])
        else:
            raise RowError(f"message of an unknown role ({str(role)[:40]!r})")


def _remove_fence(text: str) -> str:
    return text.strip().removeprefix(_FENCE).removeprefix("json").removesuffix(_FENCE)


def _convert_masked(row: dict[str, Any], note: Note) -> Turns:
    instruction, output = row.get("instruction"), row.get("output")
    if not isinstance(instruction, str) or not isinstance(output, str) or row.get("input"):
        raise RowError("row of an unknown format")
    declared = parse_field(_section(instruction, "AVAILABLE TOOLS"), "tools")
    if not isinstance(declared, list):
        raise RowError("tools are not a list")
    turns = Turns(read_tools(declared, note, flat=True), note)
    turns.add_user(_section(instruction, "QUERY").strip())
    turns.add_calls(_read_calls(_remove_fence(output)))
    return turns


def _section(instruction: str, name: str) -> str:
    texts, _ = split_sections(instruction, f"[BEGIN OF {name}]", f"[END OF {name}]")
    if len(texts) != 1:
        raise RowError("row of an unknown format")
    return texts[0]
