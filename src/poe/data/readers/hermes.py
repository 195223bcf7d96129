"""Hermes function calling v1: chats with calls in tags, and chats that are answered in JSON.

Hub: `NousResearch/hermes-function-calling-v1`, its five subsets one after another. License: Apache-2.0.

A row is `{"conversations": [{"from", "value"}], "tools"}`. The speakers are system, human, gpt and tool. `tools` is
JSON text and is not in every row. The system turn lists the tools again between `<tools>` and `</tools>`. A call is a
`<tool_call>` block with a JSON object, a result a `<tool_response>` block. One turn may have several of either.

Traps and how the reader handles them:

* Tools, calls and results in Python notation (single quotes, True): parsed as data, never executed, and counted.
* A literal backslash-n around a call: removed. `name` inside `arguments`, calls in neither notation, calls that are cut
  off, and text after a call: dropped.
* `tools` that are empty or absent although the prompt lists tools: those of the prompt are used if they can be read;
  otherwise the row is dropped. Tools of the row that differ from those of the prompt: dropped.
* Names that are declared twice: dropped, except exact repetitions. Null `parameters` become an object without
  properties.
* Results repeat the name of their call, `{"name", "content"}`: the content becomes the message.
* Rows without tools (the two JSON modes, some rows of Glaive) are plain chats. In JSON mode the system turn contains
  the schema of the answer and stays unchanged.
* `func_calling` continues nearly every row of `func_calling_singleturn`, so it is read first. De-duplication later
  drops rows with equal questions.

The system turn of a row with tools explains the tools, how to call them, and that values must not be invented. A chat
template explains this in its own words, so these sentences are removed. The rest of the system turn stays.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.schema import Note
from poe.calls.tools import read_tools
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, is_trained, parse_call_object, parse_notation, read_rows, split_sections
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
    """Yield the conversations of rows of any subset; rows that lose content are dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    raw_turns = row.get("conversations")
    if not isinstance(raw_turns, list) or not all(isinstance(turn, dict) for turn in raw_turns):
        raise RowError("row of an unknown format")
    if not all(isinstance(turn.get("value"), str) for turn in raw_turns):
        raise RowError("turn is not text")
    system = next((turn["value"] for turn in raw_turns[:1] if turn.get("from") == "system"), "")
    text, tools_text = read_system(system)
    turns = Turns(_read_tools(row.get("tools"), tools_text, note), note)
    turns.add_system(text)
    for turn in raw_turns[1:] if system else raw_turns:
        _add(turns, turn, note)
    return turns


def _add(turns: Turns, turn: dict[str, Any], note: Note) -> None:
    speaker, value = turn.get("from"), turn["value"]
    if speaker == "system":
        turns.add_system(value)
    elif speaker == "human":
        turns.add_user(value.strip())
    elif speaker == "gpt":
        text, calls = read_turn(value, note)
        if calls:
            turns.add_calls(calls, text, trained=is_trained(turn))
        else:
            turns.add_assistant(text, trained=is_trained(turn))
    elif speaker == "tool":
        turns.add_results(_responses(value, note))
    else:
        raise RowError(f"turn of an unknown speaker ({str(speaker)[:40]!r})")


def read_system(text: str) -> tuple[str, str]:
    """Return a system turn without the explanation of tools and calls, and the text of its list of tools."""
    blocks, rest = split_sections(text, *_TOOLS)
    if not blocks:
        return text.strip(), ""
    lists = [block.strip() for block in blocks if block.strip()]
    if len(lists) > 1:
        raise RowError("several lists of tools")
    rest = _BOILERPLATE.sub("", rest)
    return re.sub(r"\n{3,}", "\n\n", rest).strip(), "".join(lists)


def _read_tools(field: Any, tools_text: str, note: Note) -> list[Tool]:
    """Return the tools of a row from its field and the list in its prompt. Both must agree."""
    tools = parse_notation(field.strip() or "[]", "tools", note) if isinstance(field, str) else field or []
    if tools_text and not (isinstance(field, str) and field.strip() == tools_text and tools):
        try:
            prompt_tools = parse_notation(tools_text, "tools of the prompt", note)
        except RowError:
            if not tools:
                raise
            prompt_tools = tools
        if tools and prompt_tools != tools:
            raise RowError("tools of the row and of its prompt differ")
        tools = prompt_tools
    return read_tools(tools, note)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def read_turn(text: str, note: Note) -> tuple[str, list[tuple[Any, Any, None]]]:
    """Return the text and the calls of an assistant turn."""
    text_before, *blocks = text.split(_CALL[0])
    if not blocks:
        return text.strip(), []
    calls = []
    for block in blocks:
        inside, end, after = block.partition(_CALL[1])
        if not end:
            raise RowError("call cut off")
        if _strip(after, note):
            raise RowError("text after a call")
        for call in _as_list(parse_notation(_strip(inside, note), "call", note)):
            if isinstance(call, dict) and "name" not in call and _has_name(call.get("arguments")):
                raise RowError("name inside the arguments")
            calls.append(parse_call_object(call))
    return _strip(text_before, note), calls


def _has_name(arguments: Any) -> bool:
    return isinstance(arguments, dict) and "name" in arguments


def _responses(text: str, note: Note) -> list[str]:
    """Return the results in a tool turn: one per block, or the whole turn if it has no block."""
    blocks, rest = split_sections(text, *_RESPONSE)
    if not blocks:
        return [text.strip()]
    if _strip(rest.replace("".join(_RESPONSE), ""), note):
        raise RowError("text outside of a response")
    return [_strip(block, note) for block in blocks]


def _strip(text: str, note: Note) -> str:
    """Return the text without white space around it, including line feeds written as a backslash and an n."""
    stripped = text.strip()
    while stripped.startswith("\\n") or stripped.endswith("\\n"):
        stripped = stripped.removeprefix("\\n").removesuffix("\\n").strip()
    if stripped != text.strip():
        note("literal backslash-n around a block removed")
    return stripped
