"""Glaive function-calling v2: synthetic multi-turn chats with at most one call per turn.

Hub: `glaiveai/glaive-function-calling-v2` (112,960 rows, one split). License: Apache-2.0.

Three formats are read.

* The original, `{"system", "chat"}`, both flat text. `system` is one sentence and then pretty-printed function objects,
  separated by blank lines (not a list). `chat` is turns headed `USER: `, `ASSISTANT: `, `FUNCTION RESPONSE: ` after
  two or three line feeds; assistant turns, and only they, end in `<|endoftext|>`. A call is
  `<functioncall> {"name": "f", "arguments": '{...}'}`: JSON inside single quotes, so neither JSON nor Python.
* The ShareGPT form of LLaMA-Factory, `{"conversations": [{"from", "value"}], "tools": "<JSON list>"}` with human, gpt,
  function_call, observation and, sometimes, system (as a turn or as a field).
* The original cut into turns, as studies of single answers keep it: `{"system", "input_messages", "ground_truth"}`, the
  messages with the roles system (the `system` text again), user, assistant and tool, the last answer apart. The same
  beginning stands in several rows, once for each of its answers: repetitions are left out later, by their questions.

Traps, and what is done about each:

* Arguments hold unescaped apostrophes: they are what stands between the first and the last single quote.
* `\\'`, raw line feeds inside strings, one closing brace too many, `parameters` for `arguments`, null arguments, and
  arguments written as an object or as a JSON string mean one thing only: read, and counted as repairs.
* A list as arguments, bare words, NaN and Infinity, and calls that break off mean nothing certain: the row is dropped.
* A filler turn ("Let me calculate that for you.") followed by the call as a turn of its own, and text before
  `<functioncall>`: one assistant message with text and call.
* The upstream authors replaced `AI:` by `<|endoftext|>`-and-`ASSISTANT:` everywhere, in the middle of texts too. Such a
  row (an end mark or a heading inside a turn, two text turns in a row) is dropped: the text is lost.
* Names declared twice, undeclared names, responses without a call, empty turns: dropped. A word-for-word repeated
  declaration is removed.
* Some rows end on a user turn; it is trimmed.
* `required` beside `parameters` instead of inside it is moved.

The two fixed `system` sentences say only whether tools are there, which a chat template says itself: they do not become
a system message. Any other text does.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.schema import Note, as_tool, move_required, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, parse_field, read_rows
from poe.data.sources import Row, parse_json
from poe.errors import RowError

NAME = "glaive"
HUB_ID = "glaiveai/glaive-function-calling-v2"
LICENSE = "Apache-2.0"

END = "<|endoftext|>"
CALL = "<functioncall>"
FIXED_SENTENCES = (
    "You are a helpful assistant with access to the following functions. Use them if required -",
    "You are a helpful assistant, with no access to external functions.",
)

_FIELDS = ("system", "chat", "conversations", "tools", "input_messages", "ground_truth")
_HEADINGS = {"user": "USER", "assistant": "ASSISTANT", "tool": "FUNCTION RESPONSE"}
_HEADING = re.compile(r"(?:\A\s{0,8}|\n\n[ \t]{0,8})(USER|ASSISTANT|FUNCTION RESPONSE):")
_STRAY_HEADING = re.compile(r"^[ \t]{0,8}(USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)
_QUOTED_CALL = re.compile(
    r"""\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(arguments|parameters)"\s*:\s*'(.*)'\s*(\}\s*\}?)\s*\Z""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows in either format; what cannot be read faithfully is dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    if "conversations" in row:
        return _sharegpt(row, note)
    system, chat = row.get("system", ""), row.get("chat")
    if not isinstance(system, str):
        raise RowError("row is of no known format")
    if "input_messages" in row:
        headed = _headed(row, system)
    elif isinstance(chat, str):
        headed = split_chat(chat)
    else:
        raise RowError("row is of no known format")
    text, tools = read_system(system, note)
    turns = Turns(tools, note)
    turns.system(text)
    for heading, body in headed:
        if heading == "USER":
            turns.user(body)
        elif heading == "FUNCTION RESPONSE":
            if not body:
                raise RowError("empty turn")
            turns.response(body)
        elif CALL in body:
            said, _, call = body.partition(CALL)
            name, arguments = read_call(call, note)
            turns.calls([(name, arguments, None)], said.strip())
        else:
            turns.assistant(body)
    return turns


def read_system(system: str, note: Note) -> tuple[str, list[Tool]]:
    """The tools declared in a `system` text, and what it says besides the two fixed sentences."""
    at = min((i for i in (system.find("{"), system.find("[")) if i >= 0), default=len(system))
    said = system[:at].strip().removeprefix("SYSTEM:").strip()
    declared: list[Any] = []
    decoder = json.JSONDecoder()
    while at < len(system):
        try:
            value, at = decoder.raw_decode(system, at)
        except (ValueError, RecursionError):
            raise RowError("tool declarations not JSON") from None
        declared.extend(value if isinstance(value, list) else [value])
        while at < len(system) and (system[at].isspace() or system[at] == ","):
            at += 1
    return "" if said in FIXED_SENTENCES else said, _tools(declared, note)


def _tools(declared: list[Any], note: Note) -> list[Tool]:
    tools = []
    for function in declared:
        if isinstance(function, dict) and isinstance(function.get("function"), dict):
            function = function["function"]
        if not isinstance(function, dict):
            raise RowError("tool declaration is not an object")
        parameters = move_required(function, note)
        tools.append(as_tool(function.get("name"), function.get("description"), parameters, note))
    return unique_tools(tools, note)


def split_chat(chat: str) -> list[tuple[str, str]]:
    """The turns of a `chat` text as (heading, text), end marks taken off."""
    before, *parts = _HEADING.split(chat)
    if before.strip() or not parts:
        raise RowError("text before the first turn" if before.strip() else "no turns")
    turns = []
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        body = body.strip()
        if heading == "ASSISTANT":
            if not body.endswith(END):
                raise RowError("assistant turn without an end mark")
            body = body.removesuffix(END).strip()
        if END in body:
            raise RowError("end mark inside a turn")
        if _STRAY_HEADING.search(body):
            raise RowError("turn heading inside a turn")
        turns.append((heading, body))
    return turns


def _headed(row: dict[str, Any], system: str) -> list[tuple[str, str]]:
    """The turns of a row that was cut into them, as `split_chat` gives them."""
    messages, last = row["input_messages"], row.get("ground_truth")
    if not isinstance(messages, list):
        raise RowError("row is of no known format")
    turns = []
    for message in [*messages, {"role": "assistant", "content": last}]:
        role, text = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(text, str):
            raise RowError("turn is not text")
        if role == "system" and text.strip() == system.strip():
            continue
        if role not in _HEADINGS:
            raise RowError(f"turn of an unknown speaker ({str(role)[:40]!r})")
        text = text.strip()
        if role == "assistant":
            text = text.removesuffix(END).strip()
        if END in text:
            raise RowError("end mark inside a turn")
        turns.append((_HEADINGS[role], text))
    return turns


def read_call(text: str, note: Note) -> tuple[str, Any]:
    """The name and the arguments of a call, from the text after `<functioncall>`."""
    text = text.strip()
    if CALL in text:
        raise RowError("two calls in one turn")
    try:
        call = parse_json(text)
    except ValueError:
        call = None
    if call is not None:
        if not isinstance(call, dict):
            raise RowError("call is not an object")
        return _json_call(call, note)
    found = _QUOTED_CALL.match(text)
    if found is None:
        raise RowError("call breaks off" if not text.endswith("}") else "call not JSON")
    if found[2] == "parameters":
        note("parameters read as arguments")
    if found[4].count("}") == 2:
        note("extra closing brace removed")
    return parse_json(found[1], strict=False), _arguments(found[3], note)


def _json_call(call: dict[str, Any], note: Note) -> tuple[str, Any]:
    key = "arguments"
    if key not in call and "parameters" in call:
        key = "parameters"
        note("parameters read as arguments")
    if "name" not in call or key not in call:
        raise RowError("call without a name or arguments")
    arguments = call[key]
    if isinstance(arguments, str):
        arguments = _arguments(arguments, note)
    if arguments is None:
        note("null arguments read as none")
        arguments = {}
    return call["name"], arguments


def _arguments(text: str, note: Note) -> Any:
    """JSON that may have been written for a single-quoted literal."""
    unescaped = _ESCAPE.sub(lambda m: "'" if m[1] == "'" else m[0], text)
    for candidate, strict, rule in (
        (text, True, ""),
        (unescaped, True, "escaped apostrophe read as an apostrophe"),
        (unescaped, False, "raw line feed inside a string"),
    ):
        try:
            arguments = parse_json(candidate, strict=strict)
        except ValueError:
            continue
        if rule:
            note(rule)
        if arguments is None:
            note("null arguments read as none")
            return {}
        return arguments
    raise RowError("arguments not JSON")


def _sharegpt(row: dict[str, Any], note: Note) -> Turns:
    declared = parse_field(row.get("tools") or "[]", "tools")
    turns = Turns(_tools(declared if isinstance(declared, list) else [declared], note), note)
    system = row.get("system", "")
    if not isinstance(system, str) or not isinstance(row["conversations"], list):
        raise RowError("row is of no known format")
    system = system.strip().removeprefix("SYSTEM:").strip()
    turns.system("" if system in FIXED_SENTENCES else system)
    for turn in row["conversations"]:
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(value, str):
            raise RowError("turn is not text")
        value = value.strip()
        if END in value:
            raise RowError("end mark inside a turn")
        if speaker == "system":
            turns.system(value)
        elif speaker in ("human", "user"):
            turns.user(value)
        elif speaker in ("gpt", "assistant"):
            if CALL in value:
                raise RowError("call not in a turn of its own")
            turns.assistant(value)
        elif speaker == "function_call":
            parsed = parse_field(value, "call")
            calls = parsed if isinstance(parsed, list) else [parsed]
            if not all(isinstance(call, dict) for call in calls):
                raise RowError("call is not an object")
            turns.calls([(*_json_call(call, note), None) for call in calls])
        elif speaker in ("observation", "tool"):
            turns.response(value)
        else:
            raise RowError(f"turn of an unknown speaker ({str(speaker)[:40]!r})")
    return turns
