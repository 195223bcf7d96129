"""Hermes function calling v1: chats with calls in tags, and chats that are answered in JSON.

Hub: `NousResearch/hermes-function-calling-v1`, its five subsets one after another. License: Apache-2.0.

A row is `{"conversations": [{"from", "value"}], "tools"}`; speakers are system, human, gpt and tool, `tools` is JSON
text and not in every row. The system turn lists the tools again between `<tools>` and `</tools>`; a call is a
`<tool_call>` block with a JSON object, a result a `<tool_response>` block; one turn may hold several of either.

Traps, and what is done about each:

* Tools, calls and results in Python notation (single quotes, True): parsed as data, never run, and counted.
* A literal backslash-n around a call: taken off. `name` inside `arguments`, calls that are neither notation, calls that
  break off, text behind a call: dropped.
* `tools` that are empty or absent while the prompt lists some: those of the prompt, if they can be read, else dropped.
  Tools of the row that differ from those of the prompt: dropped.
* Names declared twice: dropped, unless word for word. `parameters` that are null become an object without properties.
* Results repeat the name of their call, `{"name", "content"}`: the content is the message.
* Rows without tools (the two JSON modes, some of Glaive's): plain chats. In JSON mode the system turn holds the schema
  of the answer; it stays as it is.
* `func_calling` continues nearly every row of `func_calling_singleturn`, so the longer one is read first: equal
  questions are dropped later, where rows are de-duplicated.

The system turn of a row with tools says what the tools are, how to call them and that values must not be made up. A
chat template says so itself, in its own words, so these sentences are taken out; what else it says stays.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.schema import Note, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.messages import read_tool
from poe.data.readers.turns import Turns, named_call, parse_notation, read_rows, sections
from poe.data.sources import Row
from poe.errors import RowError

NAME = "hermes"
HUB_ID = "NousResearch/hermes-function-calling-v1"
HUB_CONFIGS = (
    "func_calling",
    "func_calling_singleturn",
    "glaive_func_calling",
    "json_mode_agentic",
    "json_mode_singleturn",
)
LICENSE = "Apache-2.0"

_FIELDS = ("conversations", "tools")
_TOOLS = ("<tools>", "</tools>")
_CALL = ("<tool_call>", "</tool_call>")
_RESPONSE = ("<tool_response>", "</tool_response>")
_BOILERPLATE = re.compile(
    "|".join(
        [
            r"You are a function calling AI model\.",
            r"You are (?:also )?provided with (?:the json schema to output extracted information in the )?"
            r"function signatures within (?:XML tags )?<tools></tools>(?: XML tags)?\.",
            r"You may call one or more functions to assist with the user query\.",
            r"Don't make assumptions about what values to plug into (?:functions|json schema)\.",
            r"Here are the available tools: ?",
            r"Use the following pydantic model json schema for each tool call you will make:.{0,2000}?(?=For each |\Z)",
            r"For each (?:extraction )?function call return a json object .{0,200}?(?:schema|follows):\s*"
            r"<tool_call>.{0,200}?</tool_call>",
            r"<tools></tools>",
        ]
    ),
    re.DOTALL,
)


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows of any subset; what cannot be read faithfully is dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    spoken = row.get("conversations")
    if not isinstance(spoken, list) or not all(isinstance(turn, dict) for turn in spoken):
        raise RowError("row is of no known format")
    if not all(isinstance(turn.get("value"), str) for turn in spoken):
        raise RowError("turn is not text")
    system = next((turn["value"] for turn in spoken[:1] if turn.get("from") == "system"), "")
    said, listed = read_system(system)
    turns = Turns(_tools(row.get("tools"), listed, note), note)
    turns.system(said)
    for turn in spoken[1:] if system else spoken:
        _add(turns, turn.get("from"), turn["value"], note)
    return turns


def _add(turns: Turns, speaker: Any, value: str, note: Note) -> None:
    if speaker == "system":
        turns.system(value)
    elif speaker == "human":
        turns.user(value.strip())
    elif speaker == "gpt":
        said, calls = read_turn(value, note)
        if calls:
            turns.calls(calls, said)
        else:
            turns.assistant(said)
    elif speaker == "tool":
        turns.results(_responses(value, note))
    else:
        raise RowError(f"turn of an unknown speaker ({str(speaker)[:40]!r})")


def read_system(text: str) -> tuple[str, str]:
    """What a system turn says besides the format of tools and calls, and the text of its list of tools."""
    blocks, said = sections(text, *_TOOLS)
    if not blocks:
        return text.strip(), ""
    listed = [block.strip() for block in blocks if block.strip()]
    if len(listed) > 1:
        raise RowError("several lists of tools")
    said = _BOILERPLATE.sub("", said)
    return re.sub(r"\n{3,}", "\n\n", said).strip(), "".join(listed)


def _tools(own: Any, listed: str, note: Note) -> list[Tool]:
    """The tools of a row, from its field and from the list in its prompt, which must not contradict each other."""
    declared = parse_notation(own.strip() or "[]", "tools", note) if isinstance(own, str) else own or []
    if listed and not (isinstance(own, str) and own.strip() == listed and declared):
        try:
            shown = parse_notation(listed, "tools of the prompt", note)
        except RowError:
            if not declared:
                raise
            shown = declared
        if declared and shown != declared:
            raise RowError("tools of the row and of its prompt differ")
        declared = shown
    return unique_tools([read_tool(tool, note) for tool in _as_list(declared)], note)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def read_turn(text: str, note: Note) -> tuple[str, list[tuple[Any, Any, None]]]:
    """The text and the calls of an assistant turn."""
    said, *blocks = text.split(_CALL[0])
    if not blocks:
        return text.strip(), []
    calls = []
    for block in blocks:
        inside, end, behind = block.partition(_CALL[1])
        if not end:
            raise RowError("call breaks off")
        if _bare(behind, note):
            raise RowError("text after a call")
        for call in _as_list(parse_notation(_bare(inside, note), "call", note)):
            if isinstance(call, dict) and "name" not in call and _holds_name(call.get("arguments")):
                raise RowError("name inside the arguments")
            calls.append(named_call(call))
    return _bare(said, note), calls


def _holds_name(arguments: Any) -> bool:
    return isinstance(arguments, dict) and "name" in arguments


def _responses(text: str, note: Note) -> list[str]:
    """The results in a tool turn: one per block, or the whole turn where there is none."""
    blocks, rest = sections(text, *_RESPONSE)
    if not blocks:
        return [text.strip()]
    if _bare(rest.replace("".join(_RESPONSE), ""), note):
        raise RowError("text outside of a response")
    return [_bare(block, note) for block in blocks]


def _bare(text: str, note: Note) -> str:
    """The text without white space around it, real or written as a backslash and an n."""
    bare = text.strip()
    while bare.startswith("\\n") or bare.endswith("\\n"):
        bare = bare.removeprefix("\\n").removesuffix("\\n").strip()
    if bare != text.strip():
        note("literal backslash-n around a block taken off")
    return bare
