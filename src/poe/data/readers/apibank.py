"""API-Bank: dialogues with API requests, some of which first search for the API.

Hub: `liminghao1630/API-Bank`. Its files have different columns, so they do not load as one table: download them and
give a file. `lvN-train.json` is the union of `lvN-api-train.json` and `lvN-response-train.json`: read one or the other.
License: Apache-2.0 (the repository; the Hub says MIT).

Three formats are read.

* Steps, `{"instruction", "input", "output"}` (`expected_output` in the tests of levels 1 and 2): the dialogue so far as
  lines with the headings `User:`, `AI:` and `API-Request: [Api(key='value')]->result`, and the next step. The same
  dialogue is in several rows, each one step longer.
* Dialogues, `{"file", "turns"}` with the roles User, AI and API: the sample files of levels 1 and 2, one per row.
* Tests of level 3, `{"requirement", "apis", "response"}`.

Traps and how the reader handles them:

* Calls are similar to Python. Unquoted words (`location=New York`, `id=ABC123`), quotes inside quotes and any other
  text that is not Python notation: dropped. Missing brackets are accepted.
* A result of `ToolSearcher` declares an API. The API is offered from the first turn on, because a conversation has one
  list of tools. A tool that is found again is offered once, as first declared.
* Rows of the second and third format do not declare `ToolSearcher`, which always takes `keywords`: it is declared here.
  Rows with calls to other undeclared tools (all dialogues of level 1): dropped.
* The instruction describes an answer format that the conversation no longer has. Only the sentence on the current time
  or year becomes the system message. In training rows it is an unfilled template (`{{time}}`). The time is then
  appended to the question (`...check-up.TIME: 2034-04-15 10:00:00`) and moves into that sentence, or it is missing.
* No parameter is marked optional, so all are required. Dates and times are text. A type without a JSON equivalent is
  left out of the schema. Arguments of another type than declared: dropped, unless they can be coerced exactly.
* Python literals in results become JSON; other results stay unchanged.
* Some `AI:` texts contain a request inside a sentence: dropped, because calls must not be learned as prose.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.arguments import find_tool
from poe.calls.conversation import Conversation, Tool
from poe.calls.json_text import as_text, parse_field
from poe.calls.literals import parse_literal
from poe.calls.schema import Note
from poe.calls.tools import as_tool, unique_tools
from poe.calls.values import check_value
from poe.data.drops import DropReport
from poe.data.readers.signatures import Call, read_calls, type_schema
from poe.data.readers.turns import Turns, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "apibank"
HUB_ID = None
LICENSE = "Apache-2.0"

_FIELDS = (
    *("instruction", "input", "output", "expected_output"),
    *("requirement", "apis", "response"),
    "turns",
)
_SEARCHER = {
    "name": "ToolSearcher",
    "description": "Finds the APIs that fit some keywords.",
    "input_parameters": {"keywords": {"type": "str"}},
}
_HEADING = re.compile(r"^(User|AI|API-Request|Generate API Request|Generate AI Response):", re.MULTILINE)
_REQUEST = re.compile(r"\s*(\[?.*?\)\]?)->(.*)", re.DOTALL)
_NOW = re.compile(r"^The current (?:time|year) is [^{}\n]+\.[ \t]*$", re.MULTILINE)
_TIME = re.compile(r"TIME: (\d[\d :-]*)\Z")
_REQUEST_IN_TEXT = re.compile(r"\[\w+\([^\]]*\)\]")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of rows in any of the three forms; rows that lose content are dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    if "turns" in row:
        return _convert_dialogue(row["turns"], note)
    if "apis" in row:
        if not isinstance(row["apis"], list) or not all(isinstance(api, dict) for api in row["apis"]):
            raise RowError("row of an unknown format")
        calls = [
            {
                "role": "API",
                "api_name": api.get("api_name"),
                "param_dict": api.get("input"),
                "result": api.get("output"),
            }
            for api in row["apis"]
        ]
        question, answer = row.get("requirement"), row.get("response")
        return _convert_dialogue([{"role": "User", "text": question}, *calls, {"role": "AI", "text": answer}], note)
    return _convert_step(row, note)


def _convert_step(row: dict[str, Any], note: Note) -> Turns:
    match row.get("instruction"), row.get("input"), row.get("output", row.get("expected_output")):
        case str() as instruction, str() as history, str() as answer:
            pass
        case _:
            raise RowError("row of an unknown format")
    before, *parts = _HEADING.split(history)
    raw_turns = [(head, body.strip()) for head, body in zip(parts[::2], parts[1::2], strict=True)]
    if not raw_turns or not raw_turns[-1][0].startswith("Generate"):
        raise RowError("row of an unknown format")
    requests = [_parse_request(body) if head == "API-Request" else None for head, body in raw_turns]
    declared = [*_parse_lines(instruction.partition("API descriptions:")[2]), *_parse_lines(before)]
    tools = _find_tools(
        declared, [result for request, result in filter(None, requests) if "ToolSearcher" in request], note
    )

    turns = Turns(tools, note)
    turns.add_system(_find_time(instruction, raw_turns, note))
    for (head, body), request in zip(raw_turns[:-1], requests[:-1], strict=True):
        if request:
            _add_answered_call(turns, read_calls(request[0], tools), request[1])
        elif head == "User":
            turns.add_user(body)
        elif head == "AI":
            _add_text(turns, body)
        else:
            raise RowError("row of an unknown format")
    if answer.strip().startswith("API-Request:"):
        turns.add_calls(read_calls(answer.strip().removeprefix("API-Request:").strip(), tools))
    else:
        _add_text(turns, answer.strip().removeprefix("AI:").strip())
    return turns


def _find_time(instruction: str, raw_turns: list[tuple[str, str]], note: Note) -> str:
    """Return the sentence on the current time. A time at the end of the first question is removed there."""
    for i, (head, body) in enumerate(raw_turns):
        if head == "User" and (match := _TIME.search(body)):
            note("time moved from the question into the system text")
            raw_turns[i] = head, body[: match.start()].strip()
            return f"The current time is {match[1].strip()}."
    sentence = _NOW.search(instruction)
    return sentence[0].strip() if sentence else ""


def _parse_lines(text: str) -> list[Any]:
    return [parse_field(line, "tool declaration") for line in text.splitlines() if line.strip()]


def _parse_request(body: str) -> tuple[str, Any]:
    """Split `[Api(key='value')]->result` into the text of the call and the result; parse a Python literal."""
    match = _REQUEST.fullmatch(body)
    if match is None:
        raise RowError("request without a result")
    result = match[2].strip()
    try:
        return match[1], parse_literal(result)
    except ValueError:
        return match[1], result


def _find_tools(declared: list[Any], search_results: list[Any], note: Note) -> list[Tool]:
    """Return the tools that a row declares and those that its searches find."""
    tools = unique_tools([_read_tool(tool, note) for tool in declared], note)
    for result in search_results:
        for entry in result if isinstance(result, list) else [result]:
            if not isinstance(entry, dict):
                raise RowError("search result that declares no tool")
            tool = _read_tool(entry, note)
            if find_tool(tools, tool["function"]["name"]) is None:
                tools.append(tool)
    return tools


def _read_tool(declared: Any, note: Note) -> Tool:
    if not isinstance(declared, dict):
        raise RowError("tool declaration is not an object")
    flat = declared.get("input_parameters", declared.get("parameters")) or {}
    if not isinstance(flat, dict) or not all(isinstance(parameter, dict) for parameter in flat.values()):
        raise RowError("tool parameter is not an object")
    properties = {}
    for name, parameter in flat.items():
        schema = type_schema(str(parameter.get("type", "Any")), note)
        if isinstance(parameter.get("description"), str):
            schema["description"] = parameter["description"]
        properties[name] = schema
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return as_tool(declared.get("name", declared.get("apiCode")), declared.get("description"), parameters, note)


def _convert_dialogue(raw_turns: Any, note: Note) -> Turns:
    """Convert turns of User and AI (`text`) and API (`api_name`, `param_dict`, `result`)."""
    if not isinstance(raw_turns, list) or not all(isinstance(turn, dict) for turn in raw_turns):
        raise RowError("row of an unknown format")
    searches = [_get_result(turn) for turn in raw_turns if turn.get("api_name") == "ToolSearcher"]
    tools = _find_tools([_SEARCHER] if searches else [], searches, note)
    turns = Turns(tools, note)
    for turn in raw_turns:
        role, text = turn.get("role"), turn.get("text")
        if role == "API":
            name = turn.get("api_name")
            if not isinstance(name, str) or find_tool(tools, name) is None:
                raise RowError("called tool is not declared")
            _add_answered_call(turns, [(name, turn.get("param_dict"), None)], _get_result(turn))
        elif not isinstance(text, str):
            raise RowError("turn is not text")
        elif role == "User":
            turns.add_user(text.strip())
        elif role == "AI":
            _add_text(turns, text.strip())
        else:
            raise RowError(f"turn of an unknown speaker ({str(role)[:40]!r})")
    return turns


def _get_result(turn: dict[str, Any]) -> Any:
    """Return the API's output, or the text of its exception."""
    result = turn.get("result")
    if not isinstance(result, dict) or "output" not in result:
        raise RowError("request without a result")
    return result["output"] if result.get("exception") is None else result["exception"]


def _add_answered_call(turns: Turns, calls: list[Call], result: Any) -> None:
    if len(calls) != 1:
        raise RowError("one result for several calls")
    if problem := check_value(result):
        raise RowError(problem)
    turns.add_calls(calls)
    turns.add_response(as_text(result))


def _add_text(turns: Turns, text: str) -> None:
    if _REQUEST_IN_TEXT.search(text):
        raise RowError("request inside a text")
    turns.add_assistant(text)
