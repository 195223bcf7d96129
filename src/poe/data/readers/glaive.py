"""Glaive function-calling v2: synthetic multi-turn chats with at most one call per turn.

Hub: `glaiveai/glaive-function-calling-v2` (112,960 rows, one split). License: Apache-2.0.

Three formats are read.

* The original, `{"system", "chat"}`, both plain text. `system` is one sentence, followed by pretty-printed function
  objects that are separated by blank lines (not a list). `chat` contains turns with the headings `USER: `,
  `ASSISTANT: ` and `FUNCTION RESPONSE: ` after two or three line feeds. Only assistant turns end in `<|endoftext|>`. A
  call is `<functioncall> {"name": "f", "arguments": '{...}'}`: JSON inside single quotes, so neither JSON nor Python.
* The ShareGPT format of LLaMA-Factory, `{"conversations": [{"from", "value"}], "tools": "<JSON list>"}`, with the
  speakers human, gpt, function_call, observation and sometimes system (as a turn or as a field).
* The original cut into turns, as studies of single answers use it: `{"system", "input_messages", "ground_truth"}`. The
  messages have the roles system (the `system` text again), user, assistant and tool; the last answer is separate.
  Several rows have the same beginning, one for each of its answers. De-duplication removes them later.

Traps and how the reader handles them:

* Arguments contain unescaped apostrophes: the text between the first and the last single quote is read.
* `\\'`, raw line feeds inside strings, one extra closing brace, `parameters` in place of `arguments`, null arguments,
  and arguments written as an object or as a JSON string are unambiguous: they are read and counted as repairs.
* A list as arguments, bare words, NaN and Infinity, and calls that are cut off are ambiguous: the row is dropped.
* A filler turn ("Let me calculate that for you.") before a turn with the call, and text before `<functioncall>`, become
  one assistant message with text and call.
* The upstream authors replaced `AI:` by `<|endoftext|>` and `ASSISTANT:` everywhere, also inside texts. A row with an
  end mark or a heading inside a turn, or with two text turns in a row, is dropped, because its text is damaged.
* Names that are declared twice, undeclared names, responses without a call, and empty turns: dropped. An exact
  repetition of a declaration is removed.
* A final user turn is removed.
* A list `required` beside `parameters` is moved into them.

The two fixed `system` sentences only say whether tools are available. A chat template says this itself, so they do not
become a system message. Any other text does.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.json_text import DuplicateKeyError, parse_field, parse_json, parse_json_at
from poe.calls.schema import Note
from poe.calls.tools import read_tools
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, is_trained, read_rows
from poe.data.sources import Row
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
    """Yield the conversations of rows in either format; rows that lose content are dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    if "conversations" in row:
        return _convert_sharegpt(row, note)
    system, chat = row.get("system", ""), row.get("chat")
    if not isinstance(system, str):
        raise RowError("row of an unknown format")
    if "input_messages" in row:
        raw_turns = _split_messages(row, system)
    elif isinstance(chat, str):
        raw_turns = split_chat(chat)
    else:
        raise RowError("row of an unknown format")
    text, tools = read_system(system, note)
    turns = Turns(tools, note)
    turns.add_system(text)
    for heading, body in raw_turns:
        if heading == "USER":
            turns.add_user(body)
        elif heading == "FUNCTION RESPONSE":
            if not body:
                raise RowError("empty turn")
            turns.add_response(body)
        elif CALL in body:
            text, _, call = body.partition(CALL)
            name, arguments = read_call(call, note)
            turns.add_calls([(name, arguments, None)], text.strip())
        else:
            turns.add_assistant(body)
    return turns


def read_system(system: str, note: Note) -> tuple[str, list[Tool]]:
    """Return the text of a `system` field without the two fixed sentences, and the tools that it declares."""
    position = min((i for i in (system.find("{"), system.find("[")) if i >= 0), default=len(system))
    text = system[:position].strip().removeprefix("SYSTEM:").strip()
    declarations: list[Any] = []
    while position < len(system):
        try:
            value, position = parse_json_at(system, position)
        except (ValueError, RecursionError):
            raise RowError("tool declarations not JSON") from None
        declarations.extend(value if isinstance(value, list) else [value])
        while position < len(system) and (system[position].isspace() or system[position] == ","):
            position += 1
    return "" if text in FIXED_SENTENCES else text, read_tools(declarations, note)


def split_chat(chat: str) -> list[tuple[str, str]]:
    """Return the turns of a `chat` text as (heading, text), without end marks."""
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


def _split_messages(row: dict[str, Any], system: str) -> list[tuple[str, str]]:
    """Return the turns of a row with messages in the format of `split_chat`."""
    messages, last = row["input_messages"], row.get("ground_truth")
    if not isinstance(messages, list):
        raise RowError("row of an unknown format")
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
    """Return the name and the arguments of a call from the text after `<functioncall>`."""
    text = text.strip()
    if CALL in text:
        raise RowError("two calls in one turn")
    try:
        call = parse_json(text)
    except DuplicateKeyError:
        raise RowError("call with one key twice") from None
    except ValueError:
        call = None
    if call is not None:
        if not isinstance(call, dict):
            raise RowError("call is not an object")
        return _read_json_call(call, note)
    match = _QUOTED_CALL.match(text)
    if match is None:
        raise RowError("call cut off" if not text.endswith("}") else "call not JSON")
    if match[2] == "parameters":
        note("parameters read as arguments")
    if match[4].count("}") == 2:
        note("extra closing brace removed")
    return parse_json(match[1], strict=False), _parse_arguments(match[3], note)


def _read_json_call(call: dict[str, Any], note: Note) -> tuple[str, Any]:
    key = "arguments"
    if key not in call and "parameters" in call:
        key = "parameters"
        note("parameters read as arguments")
    if "name" not in call or key not in call:
        raise RowError("call without a name or arguments")
    arguments = call[key]
    if isinstance(arguments, str):
        arguments = _parse_arguments(arguments, note)
    if arguments is None:
        note("null arguments read as no arguments")
        arguments = {}
    return call["name"], arguments


def _parse_arguments(text: str, note: Note) -> Any:
    """Parse arguments that are JSON, or JSON with the escapes of a single-quoted literal."""
    unescaped = _ESCAPE.sub(lambda m: "'" if m[1] == "'" else m[0], text)
    for candidate, strict, rule in (
        (text, True, ""),
        (unescaped, True, "escaped apostrophe read as an apostrophe"),
        (unescaped, False, "raw line feed inside a string"),
    ):
        try:
            arguments = parse_json(candidate, strict=strict)
        except DuplicateKeyError:
            raise RowError("arguments with one key twice") from None
        except ValueError:
            continue
        if rule:
            note(rule)
        if arguments is None:
            note("null arguments read as no arguments")
            return {}
        return arguments
    raise RowError("arguments not JSON")


def _convert_sharegpt(row: dict[str, Any], note: Note) -> Turns:
    turns = Turns(read_tools(row.get("tools"), note), note)
    system = row.get("system", "")
    if not isinstance(system, str) or not isinstance(row["conversations"], list):
        raise RowError("row of an unknown format")
    system = system.strip().removeprefix("SYSTEM:").strip()
    turns.add_system("" if system in FIXED_SENTENCES else system)
    for turn in row["conversations"]:
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(value, str):
            raise RowError("turn is not text")
        value = value.strip()
        if END in value:
            raise RowError("end mark inside a turn")
        if speaker == "system":
            turns.add_system(value)
        elif speaker in ("human", "user"):
            turns.add_user(value)
        elif speaker in ("gpt", "assistant"):
            if CALL in value:
                raise RowError("call inside a text turn")
            turns.add_assistant(value, trained=is_trained(turn))
        elif speaker == "function_call":
            parsed = parse_field(value, "call")
            calls = parsed if isinstance(parsed, list) else [parsed]
            if not all(isinstance(call, dict) for call in calls):
                raise RowError("call is not an object")
            made = [(*_read_json_call(call, note), None) for call in calls]
            turns.add_calls(made, trained=is_trained(turn))
        elif speaker in ("observation", "tool"):
            turns.add_response(value)
        else:
            raise RowError(f"turn of an unknown speaker ({str(speaker)[:40]!r})")
    return turns
