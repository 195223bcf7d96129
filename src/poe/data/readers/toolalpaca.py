"""ToolAlpaca's evaluation files: OpenAPI documents, questions about them, and the calls that answer each question.

Repository: tangqiaoyu/ToolAlpaca, `data/eval_real.json` and `data/eval_simulated.json` (`eval_mix.json` of a fork
combines both, with some answers rewritten: read one or the other); give a file, `toolalpaca=eval_real.json`. License:
Apache-2.0.

An element of a file is one API: `Documentation` (OpenAPI as JSON text), `Function_Projection` (function name to path
and method), `Instructions` (questions) and, for each question, `Golden_Answers`, a list of `{"Action",
"Action_Input"}`. Every question becomes a row. The training file has no golden answers and is not read.

Traps and how the reader handles them:

* A tool's parameters are those of the operation (path, query and header) and the properties of its request body.
  References inside the document are resolved. A row with a schema that contains itself is dropped.
* `Action_Input` is JSON text that does not always parse: dropped. Placeholders for the result of an earlier call,
  `${id from search}`: the result is not given, so the row is dropped and counted with its own reason.
* Empty text means "not given" for an optional argument if it does not fit the argument's type or enum: left out.
* Actions that are not functions of the API (asking the user, searching the web): dropped.
* All calls of one answer are known at the start, because there are no results: they become one message.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.arguments import find_tool
from poe.calls.conversation import Conversation, Tool
from poe.calls.json_text import parse_field
from poe.calls.schema import Note
from poe.calls.tools import as_tool, unique_tools
from poe.calls.values import fits_type
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, parse_call_object, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "toolalpaca"
HUB_ID = None
LICENSE = "Apache-2.0"

_SHARED = ("Documentation", "Function_Projection")
_FIELDS = (*_SHARED, "Instruction", "Golden_Answer")
_PLACEHOLDER = re.compile(r"\$\{[^{}]*\}")
_MAX_PARTS = 20_000
"""The maximum number of values in one function's schema after its references are resolved."""


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield one conversation per question; rows that lose content are dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, _split_questions(rows), report, _convert)


def _split_questions(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the questions of each API as rows. A row that is not an API is passed on and dropped later."""
    for row_id, row in rows:
        questions = row.get("Instructions") if isinstance(row, dict) else None
        if not isinstance(questions, list):
            yield row_id, row
            continue
        answers = row.get("Golden_Answers")
        answers = answers if isinstance(answers, list) and len(answers) == len(questions) else [None] * len(questions)
        shared = {field: row.get(field) for field in _SHARED}
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield f"{row_id}.{index}", {**shared, "Instruction": question, "Golden_Answer": answer}


def _convert(row: dict[str, Any], note: Note) -> Turns:
    question, answer = row.get("Instruction"), row.get("Golden_Answer")
    if not isinstance(question, str):
        raise RowError("row of an unknown format")
    if not isinstance(answer, list):
        raise RowError("question without a golden answer")
    turns = Turns(read_tools(row, note), note)
    turns.add_user(question.strip())
    turns.add_calls([_read_call(step, turns.tools, note) for step in answer])
    return turns


def _read_call(step: Any, tools: list[Tool], note: Note) -> tuple[Any, Any, None]:
    if isinstance(step, dict) and _PLACEHOLDER.search(str(step.get("Action_Input"))):
        raise RowError("placeholder for the result of an earlier call")
    name, arguments, _ = parse_call_object(step, "Action", "Action_Input")
    tool = find_tool(tools, name)
    if tool is not None and isinstance(arguments, dict):
        present = {key: value for key, value in arguments.items() if not _is_blank(tool["parameters"], key, value)}
        if len(present) < len(arguments):
            note("empty text for an optional argument left out")
        arguments = present
    return name, arguments, None


def _is_blank(parameters: dict[str, Any], key: str, value: Any) -> bool:
    schema = parameters["properties"].get(key)
    if value != "" or not isinstance(schema, dict) or key in parameters.get("required", ()):
        return False
    kind, choices = schema.get("type"), schema.get("enum")
    return (isinstance(choices, list) and "" not in choices) or (isinstance(kind, str) and not fits_type(kind, ""))


def read_tools(row: dict[str, Any], note: Note) -> list[Tool]:
    """Return the functions of an API from its OpenAPI document."""
    document = parse_field(row.get("Documentation"), "documentation")
    projection = row.get("Function_Projection")
    if not isinstance(document, dict) or not isinstance(projection, dict):
        raise RowError("row of an unknown format")
    tools = []
    for name, place in projection.items():
        if not isinstance(place, list) or len(place) != 2:
            raise RowError("function without a path and a method")
        path, method = place
        item = _get_object(_get_object(document, "paths"), path)
        operation = _get_object(item, str(method).lower())
        description = operation.get("summary") or operation.get("description")
        tools.append(as_tool(name, description, _read_parameters(item, operation, document), note))
    return unique_tools(tools, note)


def _get_object(value: Any, key: Any) -> dict[str, Any]:
    member = value.get(key) if isinstance(value, dict) and isinstance(key, str) else None
    if not isinstance(member, dict):
        raise RowError("function that the documentation does not describe")
    return member


def _read_parameters(item: dict[str, Any], operation: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    resolve = _Resolver(document)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for part in [*_as_list(item.get("parameters")), *_as_list(operation.get("parameters"))]:
        parameter = resolve(part)
        name = parameter.get("name") if isinstance(parameter, dict) else None
        if not isinstance(name, str) or not isinstance(parameter.get("schema", {}), dict):
            raise RowError("parameter without a name or a schema")
        schema = dict(parameter.get("schema", {}))
        if isinstance(parameter.get("description"), str):
            schema["description"] = parameter["description"]
        properties[name] = schema
        if parameter.get("required") is True and name not in required:
            required.append(name)
    body = resolve(operation.get("requestBody") or {})
    content = body.get("content") if isinstance(body, dict) else None
    if content and isinstance(content, dict):
        medium = content.get("application/json") or next(iter(content.values()))
        whole = medium.get("schema") if isinstance(medium, dict) else None
        if not isinstance(whole, dict) or not isinstance(whole.get("properties"), dict):
            raise RowError("request body that is not an object")
        if set(whole["properties"]) & set(properties):
            raise RowError("one parameter name, two places")
        properties |= whole["properties"]
        required += _as_list(whole.get("required")) if body.get("required") is True else []
    return {"type": "object", "properties": properties, "required": required}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


class _Resolver:
    """Replaces the references of a document by their targets."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.parts = 0

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self.parts += 1
        if depth > 32 or self.parts > _MAX_PARTS:
            raise RowError("schema that contains itself")
        if isinstance(value, list):
            return [self(member, depth + 1) for member in value]
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("$ref"), str):
            return self(self._target(value["$ref"]), depth + 1)
        return {key: self(member, depth + 1) for key, member in value.items()}

    def _target(self, reference: str) -> Any:
        target: Any = self.document
        if not reference.startswith("#/"):
            raise RowError("tool schema that refers to another document")
        for key in reference[2:].split("/"):
            key = key.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or key not in target:
                raise RowError("unresolvable reference")
            target = target[key]
        return target
