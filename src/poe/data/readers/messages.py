"""Rows of OpenAI, TRL and ShareGPT: `messages`, `conversations`, or `prompt` and `completion`; optional `tools`.

Hub: none; give a file (`messages=rows.jsonl`). License: that of the file, so none is given here.

`tools` is a list in any spelling of `poe.calls.tools`; so is `functions`, the older name. `tool_calls` are `{"id",
"type", "function": {"name", "arguments"}}`, `{"name", "arguments"}`, or the same with `parameters`, `input` or `args`.
The older `function_call` and the role `function` are read as a call and its response, and `developer` as `system`.
Content is text, null, or a list of blocks (`poe.calls.content`): text, and the `tool_use` and `tool_result` of
Anthropic, which also has a system text beside the messages (`system`). Every part of a row may be JSON text.

A row with `conversations` is in ShareGPT's format, with `from` and `value` in each message (LLaMA-Factory's
`function_call` and `observation` too) and `system` beside them.

LLaMA-Factory's typed content is also read: a list of `{"type": "text" | "reasoning" | "tool_call", "value"}`, with a
call as JSON text. Its single tool message answers all previous calls; for several calls, it is a list of objects with
the names of the calls.

`prompt` and `completion` are texts of the user and the assistant, or lists of messages; only the completion is trained
on.

A message of the assistant with `weight: 0`, or with `train: false` and the like of other trainers, is in the prompt of
later turns and is not trained on.

Trap: parquet stores objects as structs, which adds the keys of all other rows to each object, with the value null. In a
row of a columnar file, null members are therefore removed, except arguments that are required and may be null. In any
row, a null argument is left out if it is not declared, or if it is optional and may not be null. Call ids are replaced.
User names, reasoning and other extra keys of a message are not used.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from poe.calls.arguments import find_tool, restore_nulls
from poe.calls.content import content_text, split_message
from poe.calls.conversation import Conversation, Tool
from poe.calls.json_text import parse_field
from poe.calls.schema import Note
from poe.calls.tools import read_tools, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, is_trained, parse_call_object, read_rows
from poe.data.sources import ColumnRow, Row
from poe.errors import RowError

NAME = "messages"
HUB_ID = None
LICENSE = ""

CONVERSATIONS = ("messages", "conversations", "conversation")  # in order of preference
FIELDS = (*CONVERSATIONS, "prompt", "completion", "tools", "functions", "system")
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
_ARGUMENTS = ("arguments", "parameters", "input", "args")
_CALL_TYPES = ("function", "function_call", "tool_call", "tool_use")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of rows with `messages` (or `prompt` and `completion`) and `tools`."""
    return read_rows(NAME, LICENSE, FIELDS, rows, report, _convert)


def holds_conversation(row: Mapping[str, Any]) -> bool:
    """Return whether a row has the keys of this format."""
    return any(row.get(key) is not None for key in CONVERSATIONS) or {"prompt", "completion"} <= row.keys()


def _convert(row: dict[str, Any], note: Note) -> Turns:
    key = next((key for key in CONVERSATIONS if row.get(key)), "messages")
    messages = parse_field(row.get(key, _join_completion(row)), "messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("row without a list of messages")
    declared = [row[key] for key in ("tools", "functions") if row.get(key)]
    turns = Turns(unique_tools([tool for tools in declared for tool in read_tools(tools, note)], note), note)
    from_columns = isinstance(row, ColumnRow) and not isinstance(row.get(key), str)
    if (system := content_text(row.get("system"))).strip() and not _begins_with(messages, system):
        turns.add_system(system)
    for message in messages:
        message = parse_field(message, "message") if _is_object_text(message) else message
        if not isinstance(message, dict):
            raise RowError("message is not an object")
        if "role" not in message and "from" in message:
            message = _from_sharegpt(message)
        _add(turns, message, from_columns)
    return turns


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    """Return a ShareGPT message (`from`, `value`) in OpenAI's form. A `function_call` is a call, or a list of calls."""
    kind = message["from"]
    if not isinstance(kind, str) or kind not in _SHAREGPT:
        raise RowError(f"message of an unknown role ({str(kind)[:40]!r})")
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    if kind != "function_call":
        return {**rest, "role": _SHAREGPT[kind], "content": message.get("value")}
    calls = parse_field(message.get("value"), "function_call")
    return {**rest, "role": "assistant", "content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _join_completion(row: dict[str, Any]) -> list[Any] | None:
    """Return the messages of a row with `prompt` and `completion`; those of the prompt are not trained on."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        return None
    given = [{**m, "weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
    return [*given, *completion]


def _begins_with(messages: list[Any], system: str) -> bool:
    """Return whether the first message is this system text."""
    first = messages[0] if isinstance(messages[0], dict) else {}
    return first.get("role") in ("system", "developer") and first.get("content") == system


def _is_object_text(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{")


def _add(turns: Turns, message: dict[str, Any], from_columns: bool) -> None:
    content = message.get("content")
    if isinstance(content, list) and any(isinstance(p, dict) and p.get("value") is not None for p in content):
        _add_typed(turns, message, content)
        return
    for part in split_message(message, turns.note):
        _add_plain(turns, part, from_columns)


def _add_plain(turns: Turns, message: dict[str, Any], from_columns: bool) -> None:
    """Add a message without blocks."""
    role, text = message.get("role"), content_text(message.get("content"))
    if role in ("system", "developer"):
        turns.add_system(text)
    elif role == "user":
        turns.add_user(text)
    elif role == "assistant":
        calls = parse_field(message.get("tool_calls") or None, "tool_calls") or []
        if function_call := parse_field(message.get("function_call") or None, "function_call"):
            calls = [{"function": function_call}]
        if not isinstance(calls, list):
            raise RowError("tool_calls are not a list")
        if calls:
            from_columns = from_columns and not isinstance(message.get("tool_calls"), str)
            read = [read_call(call, turns.tools, from_columns) for call in calls]
            turns.add_calls(read, text, trained=is_trained(message))
        else:
            turns.add_assistant(text, trained=is_trained(message))
    elif role in ("tool", "function"):
        source_id, name = message.get("tool_call_id"), message.get("name")
        turns.add_response(
            text, source_id if isinstance(source_id, str) else None, name if isinstance(name, str) else None
        )
    else:
        raise RowError(f"message of an unknown role ({str(role)[:40]!r})")


def _add_typed(turns: Turns, message: dict[str, Any], parts: list[Any]) -> None:
    """Add a message with typed content parts, without its reasoning."""
    role = message.get("role")
    texts: list[str] = []
    calls: list[tuple[Any, Any, None]] = []
    for part in parts:
        kind, value = (part.get("type"), part.get("value")) if isinstance(part, dict) else (None, None)
        if not isinstance(value, str):
            raise RowError("content that is not text")
        if kind == "text" and calls:
            raise RowError("text after a call")
        if kind == "text":
            texts.append(value)
        elif kind == "tool_call" and role == "assistant":
            calls.append(parse_call_object(parse_field(value, "call")))
        elif kind != "reasoning" or role != "assistant":
            raise RowError(f"part of an unknown kind ({str(kind)[:40]!r})")
    text = "".join(texts)
    if calls:
        turns.add_calls(calls, text, trained=is_trained(message))
    elif role == "tool":
        turns.add_results([text])
    else:
        _add(turns, {**message, "content": text}, from_columns=False)


def read_call(call: Any, tools: list[Tool], from_columns: bool) -> tuple[Any, Any, str | None]:
    """Return the name, arguments and id of one entry of `tool_calls`."""
    call = parse_field(call, "call")
    function = parse_field(call.get("function"), "call") or call if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RowError("call is not an object")
    if call.get("type") not in (None, *_CALL_TYPES):
        raise RowError("call that is not a function call")
    name = function.get("name")
    given = next((function[key] for key in _ARGUMENTS if function.get(key) is not None), None)
    arguments = given
    for _ in range(2):  # JSON text, sometimes of JSON text
        arguments = parse_field(arguments.strip() or "{}", "arguments") if isinstance(arguments, str) else arguments
    if arguments is None:
        arguments = {}
    if from_columns and isinstance(given, dict | None) and isinstance(name, str) and (tool := find_tool(tools, name)):
        arguments = restore_nulls(tool["parameters"], arguments)
    source_id = next((call[key] for key in ("id", "call_id") if isinstance(call.get(key), str)), None)
    return name, arguments, source_id
