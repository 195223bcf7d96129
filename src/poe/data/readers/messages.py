"""Rows in the format of OpenAI and TRL: `messages` and optional `tools`.

Hub: none; give a file (`messages=rows.jsonl`). License: that of the file, so none is given here.

`tools` is a list or its JSON text. A tool may be inside `{"type": "function", "function": {...}}`. `input_schema` and
`inputSchema` are read as `parameters`. `tool_calls` are `{"id", "type", "function": {"name", "arguments"}}` or
`{"name", "arguments"}`; arguments are an object or its JSON text. The older `function_call` and the role `function` are
read as a call and its response, and `developer` as `system`. Content is text, null, or a list of text parts.

LLaMA-Factory's typed content is also read: a list of `{"type": "text" | "reasoning" | "tool_call", "value"}`, with a
call as JSON text. Its single tool message answers all previous calls; for several calls, it is a list of objects with
the names of the calls.

A list `required` beside `parameters` is moved into them. Flat parameters and Python types ("int, optional",
"List[str]") are read as in xLAM's rows.

Trap: parquet stores tools as structs, which adds the keys of all other tools to each tool, with the value null. If
tools are stored as a list, null members of tools are therefore removed, and null arguments that the schema does not
declare. Call ids are replaced. Weights, user names, reasoning and other extra keys of a message are not used.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.schema import Note, as_tool, find_tool, move_required, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.flat import convert_types, is_flat, object_schema
from poe.data.readers.turns import Turns, as_text, parse_call_object, parse_field, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "messages"
HUB_ID = None
LICENSE = ""

_FIELDS = ("messages", "tools")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of rows with `messages` and `tools`."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    messages = parse_field(row.get("messages"), "messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("row without a list of messages")
    stored_as_list = isinstance(row.get("tools"), list)
    turns = Turns(read_tools(row.get("tools"), note), note)
    for message in messages:
        if not isinstance(message, dict):
            raise RowError("message is not an object")
        _add(turns, message, stored_as_list)
    return turns


def _add(turns: Turns, message: dict[str, Any], prune: bool) -> None:
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and any(isinstance(part, dict) and "value" in part for part in content):
        _add_typed(turns, role, content)
        return
    text = content_text(content)
    if role in ("system", "developer"):
        turns.add_system(text)
    elif role == "user":
        turns.add_user(text)
    elif role == "assistant":
        calls = parse_field(message.get("tool_calls"), "tool_calls") or []
        if message.get("function_call"):
            calls = [{"function": parse_field(message["function_call"], "function_call")}]
        if not isinstance(calls, list):
            raise RowError("tool_calls are not a list")
        if calls:
            turns.add_calls([read_call(call, turns.tools, prune) for call in calls], text)
        else:
            turns.add_assistant(text)
    elif role in ("tool", "function"):
        source_id, name = message.get("tool_call_id"), message.get("name")
        turns.add_response(
            text, source_id if isinstance(source_id, str) else None, name if isinstance(name, str) else None
        )
    else:
        raise RowError(f"message of an unknown role ({str(role)[:40]!r})")


def _add_typed(turns: Turns, role: Any, parts: list[Any]) -> None:
    """Add a message with typed content parts, without its reasoning."""
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
        turns.add_calls(calls, text)
    elif role == "tool":
        turns.add_results([text])
    else:
        _add(turns, {"role": role, "content": text}, prune=False)


def content_text(content: Any) -> str:
    """Return the text of a message. Objects, such as some tool results, become JSON; images raise `RowError`."""
    if content is None:
        return ""
    if isinstance(content, list) and content and all(isinstance(p, dict) and "type" in p for p in content):
        if not all(
            p["type"] in ("text", "input_text", "output_text") and isinstance(p.get("text"), str) for p in content
        ):
            raise RowError("content that is not text")
        return "".join(p["text"] for p in content)
    return as_text(content)


def read_tools(tools: Any, note: Note) -> list[Tool]:
    """Return the tools of a row, from a list or its JSON text; an empty list if there are none."""
    prune = isinstance(tools, list)
    tools = parse_field(tools, "tools") if tools else []
    if not isinstance(tools, list):
        raise RowError("tools are not a list")
    return unique_tools([read_tool(without_nulls(tool) if prune else tool, note) for tool in tools], note)


def read_tool(tool: Any, note: Note) -> Tool:
    """Read one tool, with or without its envelope, from an object or its JSON text."""
    if isinstance(tool, str):
        tool = parse_field(tool, "tool")
    if not isinstance(tool, dict):
        raise RowError("tool is not an object")
    function = tool.get("function", tool)
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise RowError("tool that is not a function")
    parameters = next((function[k] for k in ("parameters", "input_schema", "inputSchema") if k in function), None)
    parameters = parse_field(parameters, "parameters")
    if is_flat(parameters):
        note("flat parameters written as an object schema")
        parameters = object_schema(parameters, function.get("required"), note)
    else:
        parameters = convert_types(move_required({**function, "parameters": parameters}, note), note)
    return as_tool(function.get("name"), function.get("description"), parameters, note)


def read_call(call: Any, tools: list[Tool], prune: bool) -> tuple[Any, Any, str | None]:
    """Return the name, arguments and id of one entry of `tool_calls`."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RowError("call is not an object")
    if call.get("type") not in (None, "function"):
        raise RowError("call that is not a function call")
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_field(arguments.strip() or "{}", "arguments")
    elif arguments is None:
        arguments = {}
    elif prune and isinstance(arguments, dict) and isinstance(name, str) and (tool := find_tool(tools, name)):
        declared = tool["parameters"].get("properties", {})
        arguments = {k: v for k, v in arguments.items() if v is not None or k in declared}
    source_id = call.get("id")
    return name, arguments, source_id if isinstance(source_id, str) else None


def without_nulls(value: Any) -> Any:
    """Return the value without the null members of its objects. Null members of lists stay."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
