"""GPTeacher Toolformer: one request, answered in prose with calls standing where their results would.

Hub: none of its own; the file of the repository (`Toolformer/toolformer-dedupe-only-dataset.json`) is given.
License: MIT; the texts come from an OpenAI model.

A row is `{"instruction", "input", "response"}`. The instruction starts with a header: `toolformer: enabled`,
`toolformer access: wikipedia, news`, then for each tool a line of description and a signature (`wikipedia(query)`);
the request follows. A response reads "The capital is wolfram('capital of Peru')." Traps, and what is done about each:

* The results are not in the row, and the prose is written to be filled with them: without them it is half a sentence.
  So the conversation is the request and then the calls alone, which is what the row can teach: which tool, with which
  words. Several calls are one turn, since none of them was written with a result in sight.
* A call nested in another needs that result: dropped. So is one whose argument is a template (`{input}`,
  `<site URL>`), and a response with no call at all, which can only make its answer up.
* The end of a call is where it first reads as Python notation; one that never does (`search('what's new')`) is not
  guessed: dropped.
* Signatures name no types; every parameter is text here, as every argument is. Numbers become their digits.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.literals import parse_calls
from poe.calls.schema import Note, as_tool, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.alpaca import instruction
from poe.data.readers.signatures import Call, bind
from poe.data.readers.turns import Turns, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "gpteacher_toolformer"
HUB_ID = None
LICENSE = "MIT"

MAX_CALL = 4_000
"""How many characters after its name a call may take."""

_HEADER = re.compile(r"toolformer: enabled\ntoolformer access: ([\w, ]+)\n")
_SIGNATURE = re.compile(r"(\w+)\(([\w, ]*)\)")
_TEMPLATE = re.compile(r"""\{input\}|["'] ?\+ ?input\b|<[^<>=]*(?:placeholder|url)[^<>=]*>""", re.IGNORECASE)


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of a request and the calls that answer it."""
    return read_rows(NAME, LICENSE, ("instruction", "input", "response"), rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    text, response = row.get("instruction"), row.get("response")
    if not isinstance(text, str) or not isinstance(response, str):
        raise RowError("row is of no known format")
    tools, request = read_header(text, note)
    turns = Turns(tools, note)
    turns.user(instruction({**row, "instruction": request}))
    calls, rest = find_calls(response, tools)
    if re.search(r"\w", rest):
        note("prose around a call left out")
    turns.calls(calls)
    return turns


def read_header(text: str, note: Note) -> tuple[list[Tool], str]:
    """The tools of an instruction's header, and the request after it."""
    header = _HEADER.match(text)
    if header is None:
        raise RowError("row is of no known format")
    names = [name.strip() for name in header[1].split(",")]
    lines = text[header.end() :].split("\n")
    tools = []
    for name, about, signature in zip(names, lines[::2], lines[1::2], strict=False):
        found = _SIGNATURE.fullmatch(signature.strip())
        if found is None or found[1] != name:
            break
        parameters = [parameter.strip() for parameter in found[2].split(",") if parameter.strip()]
        properties = {parameter: {"type": "string"} for parameter in parameters}
        schema = {"type": "object", "properties": properties, "required": parameters}
        tools.append(as_tool(name, about.strip(), schema, note))
    if len(tools) != len(names):
        raise RowError("tool declaration is not a signature")
    return unique_tools(tools, note), "\n".join(lines[2 * len(names) :])


def find_calls(text: str, tools: list[Tool]) -> tuple[list[Call], str]:
    """The calls inside a text, and the text without them."""
    opening = re.compile(r"\b(?:" + "|".join(tool["function"]["name"] for tool in tools) + r")\(")
    calls, rest, at = [], "", 0
    while found := opening.search(text, at):
        call, end = _call_at(text, found.start(), tools)
        if any(isinstance(value, str) and _TEMPLATE.search(value) for value in call[1].values()):
            raise RowError("argument that is a template")
        calls.append(call)
        rest += text[at : found.start()]
        at = end
    if not calls:
        raise RowError("response without a call")
    return calls, rest + text[at:]


def _call_at(text: str, start: int, tools: list[Tool]) -> tuple[Call, int]:
    for closing in re.finditer(r"\)", text[start : start + MAX_CALL]):
        end = start + closing.end()
        try:
            parsed = parse_calls(text[start:end])
        except ValueError:
            continue
        return bind(parsed[0], tools), end
    raise RowError("call that is not Python notation")
