"""ToolRL's rows for supervised training: a prompt with tools and history, and one answer that begins with thinking.

Repository: qiancheng0/ToolRL, `dataset/rlla_4k_raw/rlla_sft.json`; give the file, `toolrl=rlla_sft.json`. License:
Apache-2.0. The rows are taken from ToolACE, Hammer's masked xLAM and xLAM itself.

A row is `{"instruction", "input", "output"}`. `instruction` is a fixed text around numbered tools (name, description,
flat parameters as JSON). `input` is the dialogue so far in `<user>`, `<think>`, `<tool_call>`, `<obs>` and `<response>`
blocks. `output` is the next turn. A call is one JSON object per line with `name` and `parameters`.

Traps and how the reader handles them:

* The thinking mentions tags, calls and responses: a block ends where another one begins or the text ends. All thinking
  is left out, in the history and in the answer, because a conversation here has no place for it.
* Lists and objects in arguments were cut at commas when the set was made (`[{"name": "Ada"`; the rest is lost or turned
  into argument names): a row with an argument that has unbalanced brackets is dropped.
* Names of tools contain spaces and dots: they stay.
* Every parameter has a default, mostly an empty one, so none is required. Types are Python's or JSON Schema's.
* One `<obs>` block answers all previous calls: a list of `{"name", "results"}`.
* A call and a response in one turn, without the result between them: dropped.

The fixed text explains the tags of this set. A chat template explains its own format, so the text does not become a
system message.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.json_text import parse_field
from poe.calls.schema import Note
from poe.calls.tools import read_tool, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, parse_call_object, parse_values, read_rows, split_sections
from poe.data.sources import Row
from poe.errors import RowError

NAME = "toolrl"
HUB_ID = None
LICENSE = "Apache-2.0"

_FIELDS = ("instruction", "input", "output")
_TOOLS = ("**Available Tools**\n", "\n**Steps for Each Turn**")
_NUMBER = re.compile(r"^(\d{1,4})\. Name: ", re.MULTILINE)
_ENTRY = re.compile(r"(.*?)\nDescription: (.*)\nParameters: (.*)", re.DOTALL)
_HISTORY = "**Dialogue Records History**"
_TAGS = "user|think|tool_call|obs|response"
_BLOCK = re.compile(rf"\s*<({_TAGS})>(.*?)</\1>\s*(?=<(?:{_TAGS})>|\Z)", re.DOTALL)


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of rows; rows that lose content are dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    instruction, history, output = (row.get(field) for field in _FIELDS)
    if not isinstance(instruction, str) or not isinstance(history, str) or not isinstance(output, str):
        raise RowError("row of an unknown format")
    turns = Turns(read_tools(instruction, note), note)
    history_blocks, answer = split_blocks(history.strip().removeprefix(_HISTORY)), split_blocks(output)
    if any(tag in ("user", "obs") for tag, _ in answer):
        raise RowError("answer with more than one turn")
    for tag, body in [*history_blocks, *answer]:
        if tag == "user":
            turns.add_user(body)
        elif tag == "tool_call":
            turns.add_calls([_read_call(value) for value in parse_values(body, "call")])
        elif tag == "obs":
            turns.add_results([body])
        elif tag == "response":
            turns.add_assistant(body)
    if not any(tag in ("tool_call", "response") for tag, _ in answer):
        raise RowError("no assistant turn")
    return turns


def _read_call(value: Any) -> tuple[Any, Any, None]:
    call = parse_call_object(value, arguments="parameters")
    if any(
        text.count(left) != text.count(right) for text in _iter_texts(call[1]) for left, right in ("[]", "{}", "()")
    ):
        raise RowError("argument cut off")
    return call


def _iter_texts(value: Any) -> Iterator[str]:
    """Yield every text in a value, including names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for member in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _iter_texts(member)


def read_tools(instruction: str, note: Note) -> list[Tool]:
    """Return the numbered tools of an `instruction`."""
    texts, _ = split_sections(instruction, *_TOOLS)
    if len(texts) != 1:
        raise RowError("row of an unknown format")
    _, *parts = _NUMBER.split(texts[0])
    if [int(number) for number in parts[::2]] != list(range(1, len(parts) // 2 + 1)):
        raise RowError("tools are not numbered one by one")
    tools = []
    for text in parts[1::2]:
        entry = _ENTRY.fullmatch(text.strip())
        if entry is None:
            raise RowError("tool without a description or parameters")
        parameters = parse_field(entry[3], "parameters")
        tools.append(read_tool({"name": entry[1], "description": entry[2], "parameters": parameters}, note, flat=True))
    return unique_tools(tools, note)


def split_blocks(text: str) -> list[tuple[str, str]]:
    """Return the (tag, text) blocks of a text."""
    blocks, position = [], 0
    while position < len(text.rstrip()):
        block = _BLOCK.match(text, position)
        if block is None:
            raise RowError("text outside of a block")
        blocks.append((block[1], block[2].strip()))
        position = block.end()
    return blocks
