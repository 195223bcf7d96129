"""Rows of the suite `plans`: questions that are answered with all calls at once, some of which use results of others.

Two formats are read:

* `{"question", "tools", "plan"}`, optional `"system"`: `plan` is a list of calls `{"name", "arguments"}`, as
  `poe.tools.plans` reads it: `$2` is the result of call 2, `$2.user` a part of it, `$$` a dollar sign. `system`
  replaces the prompt that explains references, `INSTRUCTION`.
* Rows of Seal-Tools. The name of a result (`API_call_0`) becomes a reference to the call that gives it, without the
  part, because the tools do not declare their results. Rows in which no call uses a result are dropped.

A row becomes a conversation with one answer, which has all calls of the plan.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.json_text import parse_json
from poe.calls.schema import Note
from poe.calls.tools import read_tools
from poe.data.drops import DropReport
from poe.data.readers import READERS
from poe.data.readers.turns import Turns, parse_call_object, read_rows
from poe.data.sources import file_rows
from poe.errors import DataError, RowError
from poe.tools.plans import parse_plan

NAME = "plans"
INSTRUCTION = (
    "Answer with all calls that are needed, at once. The calls are numbered from 1 in the order in which you write "
    "them. In an argument, $1 stands for the result of call 1. Write $$ for a dollar sign."
)

_FIELDS = ("question", "tools", "plan", "system")
_SEALTOOLS = "sealtools"


def read_plans(path: str | None, report: DropReport) -> Iterator[Conversation]:
    """Yield the rows of a file, a folder, or a glob. The report counts those that are dropped."""
    if path is None:
        raise DataError(f"The suite {NAME!r} has no public data set; give a file: {NAME}=rows.jsonl.")
    first = next((row for _, row in file_rows(path, NAME, DropReport())), None)
    if isinstance(first, dict) and first.keys() & {"calling", "conversations"}:
        for conversation in READERS[_SEALTOOLS].read(path, report):
            plan = _join_steps(conversation)
            if plan is None:
                report.drop_kept(conversation, "no call that uses the result of another")
            else:
                yield plan
        return
    yield from read_rows(NAME, "", _FIELDS, file_rows(path, NAME, report), report, _convert)


def allow_references(tool: Tool) -> Tool:
    """Return a tool of which every argument, and every member of one, may be a reference to a call."""
    function = tool["function"]
    parameters = function["parameters"]
    properties = {name: _or_reference(schema) for name, schema in (parameters.get("properties") or {}).items()}
    return {**tool, "function": {**function, "parameters": {**parameters, "properties": properties}}}


def _or_reference(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    inner = dict(schema)
    if isinstance(inner.get("properties"), dict):
        inner["properties"] = {name: _or_reference(member) for name, member in inner["properties"].items()}
    if isinstance(inner.get("items"), dict):
        inner["items"] = _or_reference(inner["items"])
    return {"anyOf": [inner, {"type": "string", "pattern": r"^\$[0-9]+(\.\w+|\[[0-9]+\])*$"}]}


def _convert(row: dict[str, Any], note: Note) -> Turns:
    question, plan, system = row.get("question"), row.get("plan"), row.get("system", INSTRUCTION)
    if not isinstance(question, str) or not isinstance(plan, list) or not plan or not isinstance(system, str):
        raise RowError("row of an unknown format")
    tools = read_tools(row.get("tools"), note)
    turns = Turns(list(map(allow_references, tools)), note)
    turns.add_system(system)
    turns.add_user(question)
    turns.add_calls(map(parse_call_object, plan))
    _check_plan([call["function"] for call in turns.messages[-1]["tool_calls"]])
    turns.tools = tools
    return turns


def _check_plan(calls: list[dict[str, Any]]) -> None:
    try:
        parse_plan(calls)
    except DataError:
        raise RowError("plan with a reference to no other call, or with a circle") from None


def _join_steps(conversation: Conversation) -> Conversation | None:
    """Return a row of Seal-Tools with all calls in one answer, None if no call uses the result of another."""
    results: dict[str, str] = {}  # the name of a result -> the reference to the call that gives it
    numbers: dict[str, int] = {}
    calls: list[dict[str, Any]] = []
    for message in conversation.messages:
        if message["role"] == "tool":
            reference = f"${numbers[message['tool_call_id']]}"
            results |= dict.fromkeys(parse_json(message["content"]).values(), reference)
        for call in message.get("tool_calls") or ():
            function = call["function"]
            calls.append({**call, "function": {**function, "arguments": _refer(function["arguments"], results)}})
            numbers[call["id"]] = len(calls)
    if not any(parse_plan([call["function"] for call in calls]).needs):
        return None
    question = [{"role": "system", "content": INSTRUCTION}, *conversation.question]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    return Conversation([*question, answer], conversation.tools, NAME, conversation.license, conversation.id)


def _refer(value: Any, results: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _refer(member, results) for name, member in value.items()}
    if isinstance(value, list):
        return [_refer(member, results) for member in value]
    return results.get(value, value.replace("$", "$$")) if isinstance(value, str) else value
