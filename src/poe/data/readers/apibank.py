"""API-Bank: dialogues with API requests, some of which must first search for the API.

Hub: `liminghao1630/API-Bank`. Its files differ in their columns, so they do not load as one table: download them and
give a file. `lvN-train.json` is the union of `lvN-api-train.json` and `lvN-response-train.json`: read one or the other.
License: Apache-2.0 (the repository; the Hub says MIT).

Three forms are read.

* Steps, `{"instruction", "input", "output"}` (`expected_output` in the tests of level 1 and 2): the dialogue so far as
  lines headed `User:`, `AI:` and `API-Request: [Api(key='value')]->result`, and the step to learn. The same dialogue
  recurs in rows that end one step later.
* Dialogues, `{"file", "turns"}` with roles User, AI and API: the sample files of levels 1 and 2, one per row.
* Tests of level 3, `{"requirement", "apis", "response"}`.

Traps, and what is done about each:

* Calls are Python-like. Unquoted words (`location=New York`, `id=ABC123`), quotes inside quotes and whatever else is
  not Python notation, wherever in the row it stands: dropped, nothing is guessed. Missing brackets do no harm.
* An API that `ToolSearcher` finds is declared in its result. It is offered from the first turn on, since a conversation
  has one list of tools; a tool that is found again is offered once, as first declared.
* Rows of the second and third form do not declare `ToolSearcher`, which takes `keywords` everywhere: it is declared
  here. Whatever else a row calls and does not declare (all dialogues of level 1): dropped.
* The instruction describes a form of answer that the conversation no longer has. Only the sentence on the current time
  or year is kept, as the system's. It is an unfilled template in training rows (`{{time}}`); the time is then glued to
  the question (`...check-up.TIME: 2034-04-15 10:00:00`) and moves into that sentence, or is not there at all.
* No parameter is marked optional, so all are required. Dates and times are text. A type that JSON has no name for is
  left out of the schema. Arguments of another type than declared: dropped, unless they spell it.
* Python literals in results become JSON; any other result stays as it stands.
* Some `AI:` texts hold a request in the middle of a sentence: dropped, for calls are not to be learned as prose.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.literals import parse_literal
from poe.calls.schema import Note, as_tool, check_value, find_tool, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.signatures import Call, read_calls, type_schema
from poe.data.readers.turns import Turns, as_text, parse_field, read_rows
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
    """Conversations of rows in any of the three forms; what cannot be read faithfully is dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    if "turns" in row:
        return _dialogue(row["turns"], note)
    if "apis" in row:
        if not isinstance(row["apis"], list) or not all(isinstance(api, dict) for api in row["apis"]):
            raise RowError("row is of no known format")
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
        return _dialogue([{"role": "User", "text": question}, *calls, {"role": "AI", "text": answer}], note)
    return _step(row, note)


def _step(row: dict[str, Any], note: Note) -> Turns:
    match row.get("instruction"), row.get("input"), row.get("output", row.get("expected_output")):
        case str() as instruction, str() as history, str() as answer:
            pass
        case _:
            raise RowError("row is of no known format")
    before, *parts = _HEADING.split(history)
    spoken = [(head, body.strip()) for head, body in zip(parts[::2], parts[1::2], strict=True)]
    if not spoken or not spoken[-1][0].startswith("Generate"):
        raise RowError("row is of no known format")
    requests = [_request(body) if head == "API-Request" else None for head, body in spoken]
    declared = [*_lines(instruction.partition("API descriptions:")[2]), *_lines(before)]
    tools = _offered(
        declared, [result for request, result in filter(None, requests) if "ToolSearcher" in request], note
    )

    turns = Turns(tools, note)
    turns.system(_now(instruction, spoken, note))
    for (head, body), request in zip(spoken[:-1], requests[:-1], strict=True):
        if request:
            _answered_call(turns, read_calls(request[0], tools), request[1])
        elif head == "User":
            turns.user(body)
        elif head == "AI":
            _say(turns, body)
        else:
            raise RowError("row is of no known format")
    if answer.strip().startswith("API-Request:"):
        turns.calls(read_calls(answer.strip().removeprefix("API-Request:").strip(), tools))
    else:
        _say(turns, answer.strip().removeprefix("AI:").strip())
    return turns


def _now(instruction: str, spoken: list[tuple[str, str]], note: Note) -> str:
    """The sentence on the current time; a time that is glued to the first question is cut off there."""
    for at, (head, body) in enumerate(spoken):
        if head == "User" and (found := _TIME.search(body)):
            note("time moved from the question into the system text")
            spoken[at] = head, body[: found.start()].strip()
            return f"The current time is {found[1].strip()}."
    stated = _NOW.search(instruction)
    return stated[0].strip() if stated else ""


def _lines(text: str) -> list[Any]:
    return [parse_field(line, "tool declaration") for line in text.splitlines() if line.strip()]


def _request(body: str) -> tuple[str, Any]:
    """`[Api(key='value')]->result` as the text of the call and the result, a Python literal as its value."""
    found = _REQUEST.fullmatch(body)
    if found is None:
        raise RowError("request without a result")
    result = found[2].strip()
    try:
        return found[1], parse_literal(result)
    except ValueError:
        return found[1], result


def _offered(declared: list[Any], search_results: list[Any], note: Note) -> list[Tool]:
    """The tools that a row declares, and those that its searches find."""
    tools = unique_tools([_tool(tool, note) for tool in declared], note)
    for result in search_results:
        for found in result if isinstance(result, list) else [result]:
            if not isinstance(found, dict):
                raise RowError("search result that declares no tool")
            tool = _tool(found, note)
            if find_tool(tools, tool["function"]["name"]) is None:
                tools.append(tool)
    return tools


def _tool(declared: Any, note: Note) -> Tool:
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


def _dialogue(spoken: Any, note: Note) -> Turns:
    """Turns of User and AI (`text`) and API (`api_name`, `param_dict`, `result`)."""
    if not isinstance(spoken, list) or not all(isinstance(turn, dict) for turn in spoken):
        raise RowError("row is of no known format")
    searches = [_result(turn) for turn in spoken if turn.get("api_name") == "ToolSearcher"]
    tools = _offered([_SEARCHER] if searches else [], searches, note)
    turns = Turns(tools, note)
    for turn in spoken:
        role, text = turn.get("role"), turn.get("text")
        if role == "API":
            name = turn.get("api_name")
            if not isinstance(name, str) or find_tool(tools, name) is None:
                raise RowError("no declaration of a tool that is called")
            _answered_call(turns, [(name, turn.get("param_dict"), None)], _result(turn))
        elif not isinstance(text, str):
            raise RowError("turn is not text")
        elif role == "User":
            turns.user(text.strip())
        elif role == "AI":
            _say(turns, text.strip())
        else:
            raise RowError(f"turn of an unknown speaker ({str(role)[:40]!r})")
    return turns


def _result(turn: dict[str, Any]) -> Any:
    """What the API returned, or the text of its exception."""
    result = turn.get("result")
    if not isinstance(result, dict) or "output" not in result:
        raise RowError("request without a result")
    return result["output"] if result.get("exception") is None else result["exception"]


def _answered_call(turns: Turns, calls: list[Call], result: Any) -> None:
    if len(calls) != 1:
        raise RowError("one result for several calls")
    if problem := check_value(result):
        raise RowError(problem)
    turns.calls(calls)
    turns.response(as_text(result))


def _say(turns: Turns, text: str) -> None:
    if _REQUEST_IN_TEXT.search(text):
        raise RowError("request inside a text")
    turns.assistant(text)
