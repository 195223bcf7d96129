"""Call forms without a mark: xlam, llama, openai and python.

A call in these forms is meant to be the whole reply. Reading also accepts text around the calls. Writing puts text on
the lines before the calls (`openai` has a key for it). Only its structure distinguishes a call from text, so a text
that looks like a call cannot be written.

JSON in a reply is a call only if it has exactly the structure of the form. JSON that contains a call in another
structure (a list instead of an object, other keys) is malformed. Text that begins like JSON and is not JSON is
malformed if it has the keys of a call before its brackets are closed; reading stops there, because the rest of the
text may be part of it. Other JSON, and other text with braces, is prose.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from keyword import iskeyword
from typing import Any, ClassVar

import regex

from poe.calls.conversation import Call
from poe.calls.faults import Fault, FaultKind, UnreadableError
from poe.calls.forms.base import CallForm, as_call, as_json, check_values, join_lines, name_fault, parse_value
from poe.calls.literals import PythonCall, Variable, parse_calls
from poe.calls.reading import (
    CallPart,
    FaultPart,
    Parts,
    Reply,
    Source,
    TextPart,
    Wait,
    read_closing_brackets,
    read_json,
    read_rest,
    read_to_close,
)
from poe.errors import RowError

_JSON_START = r'(?:\[\s{0,999})?\{\s{0,999}"'  # bounded, because it is looked for again with every piece


class _JsonForm(CallForm):
    keys: ClassVar[tuple[str, ...]]  # the keys of a call
    first: ClassVar[tuple[str, ...]]  # the possible first keys, to recognize a call that is cut off early
    start: ClassVar[Any] = regex.compile(_JSON_START)
    between: ClassVar[Any] = None

    def scan(self, source: Source) -> Parts:
        while (yield from source.text_before(self.start)):
            source.hold()
            marked = bool(self.mark) and (yield from source.skip(self.mark))
            start = source.count
            try:
                yield from read_json(source)
            except UnreadableError as error:
                yield from self._read_broken(source, error, marked)
                continue
            text = source.held()
            is_call = marked or self._has_keys(text)
            try:
                value = parse_value(text[start:])
                is_call = is_call or _contains_call(value)
                reply = self._parse(value)
                if reply is None and (marked or _contains_call(value)):
                    raise UnreadableError(FaultKind.NOT_A_CALL)
            except UnreadableError as error:
                yield FaultPart(Fault(error.kind, text.strip())) if is_call else TextPart(text)
                continue
            if reply is None:
                yield TextPart(text)
                continue
            yield TextPart(reply.content)
            yield from map(CallPart, reply.calls)
            if not (self.between and (yield from source.match(self.between))):
                yield from read_closing_brackets(source)

    def _read_broken(self, source: Source, error: UnreadableError, marked: bool) -> Parts:
        """Yield text that begins like JSON: as text up to its closing bracket, or as a malformed call up to the end."""
        kind = name_fault(error, source)
        closed = kind is not FaultKind.UNCLOSED and (yield from read_to_close(source, error.depth))
        text = source.held()
        looks_like_call = self._has_keys(text) or (not closed and self._begins_call(text))
        if marked or kind is FaultKind.TOO_DEEP or looks_like_call:
            yield from read_rest(source)
            yield FaultPart(Fault(kind, source.held().strip()))
        else:
            yield TextPart(text)

    def _has_keys(self, text: str) -> bool:
        """Return whether the keys of a call are in a text, those of this form or of another."""
        found = [f'"{key}"' in text for key in ("name", "arguments", "parameters")]
        return all(f'"{key}"' in text for key in self.keys) or (found[0] and any(found[1:]))

    def _begins_call(self, text: str) -> bool:
        """Return whether a text that is cut off ends in the beginning of a call."""
        return bool(self._cut_off.search(text, text.rfind("}") + 1))

    @cached_property
    def _cut_off(self) -> re.Pattern[str]:
        return re.compile(rf'\{{\s*"(?:{"|".join(self.first)})')

    @abstractmethod
    def _parse(self, value: Any) -> Reply | None:
        """Return the reply in a JSON value, None if it is not in this form. Raises `UnreadableError`."""


def _contains_call(value: Any) -> bool:
    """Return whether a JSON value contains a call in any structure, at any depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if "name" in item and ("arguments" in item or "parameters" in item):
                return True
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return False


class Xlam(_JsonForm):
    """`[{"name": ..., "arguments": {...}}]`: a JSON list of all calls. `[]` is never written and is read as text."""

    name = "xlam"
    keys = first = ("name", "arguments")
    request = (
        'Answer with a JSON list of function calls, [{"name": "function_name", "arguments": {"argument": "value"}}], '
        "or in plain words if no function fits.",
        "Give the calls that the question needs as one JSON list. Each member is an object with the keys name and "
        "arguments. If none is needed, answer without a list.",
        "The format of your answer is a JSON array, one object per call: "
        '[{"name": "...", "arguments": {...}}, ...]. Questions that no function can answer are answered as text.',
    )

    def _write(self, calls: Sequence[Call], text: str) -> str:
        return join_lines(text, as_json([{"name": call.name, "arguments": call.arguments} for call in calls]))

    def _parse(self, value: Any) -> Reply | None:
        if not isinstance(value, list) or not any(isinstance(m, dict) and m.keys() >= {*self.keys} for m in value):
            return None
        return Reply("", [as_call(member) for member in value])

    def write_result(self, name: str, text: str) -> str:
        return as_json({"name": name, "result": text})


class Llama(_JsonForm):
    """`{"name": ..., "parameters": {...}}`, several calls joined by `; `, as Llama 3.1 writes them.

    `<|python_tag|>` before a call is accepted but never written. Before any other text it is malformed.
    """

    name = "llama"
    keys, first = ("name", "parameters"), ("name", "parameters", "type")
    mark = "<|python_tag|>"
    start = regex.compile(rf"{regex.escape(mark)}|{_JSON_START}")
    between = regex.compile(r"\s{0,999};\s{0,999}(?=\{|<\|python_tag\|>)")
    request = (
        'To call a function, respond with JSON of the form {"name": function name, "parameters": dictionary of '
        "argument name and its value}, and nothing else. Put `; ` between several calls.",
        'If a function is called for, reply only with {"name": "function_name", "parameters": {"argument": "value"}}; '
        "further calls follow after a semicolon. If not, reply in words.",
        "A function call is one JSON object with the keys name and parameters. Separate calls by `; `. Answer in plain "
        "text when the functions are of no use.",
    )

    def _write(self, calls: Sequence[Call], text: str) -> str:
        objects = ({"name": call.name, "parameters": call.arguments} for call in calls)
        return join_lines(text, "; ".join(as_json(call) for call in objects))

    def _parse(self, value: Any) -> Reply | None:
        if not isinstance(value, dict) or not value.keys() >= {*self.keys}:
            return None
        return Reply("", [as_call(value, "parameters")])

    def write_result(self, name: str, text: str) -> str:
        return f"Output of {name}: {text}"


class OpenAI(_JsonForm):
    """`{"tool_calls": [{"id", "type", "function": {"name", "arguments": "<JSON text>"}}]}`; text is its `content`.

    Arguments may also be an object. Other members of the message, such as `role`, are ignored.
    """

    name = "openai"
    keys, first = ("tool_calls",), ("tool_calls", "content", "role")
    request = (
        'Reply with one JSON object: {"tool_calls": [{"id": "call_1", "type": "function", "function": {"name": '
        '"function_name", "arguments": "{\\"argument\\": \\"value\\"}"}}]}, the arguments as a JSON string. Reply with '
        "plain text if nothing is to be called.",
        "Calls are written as an assistant message of the OpenAI API is: an object with a list tool_calls, where each "
        "has an id, the type function, and a function with its name and its arguments as JSON text. Text alone needs "
        "no object.",
        'If a function helps, answer with {"tool_calls": [...]} in the format of the chat completions API (arguments '
        "are a string that holds JSON), otherwise with ordinary text.",
    )

    def _write(self, calls: Sequence[Call], text: str) -> str:
        content = {"content": text} if text.strip() else {}
        return as_json({**content, "tool_calls": [call.as_openai(i) for i, call in enumerate(calls)]})

    def _parse(self, value: Any) -> Reply | None:
        if not isinstance(value, dict) or not value.get("tool_calls"):
            return None
        members, content = value["tool_calls"], value.get("content")
        if not isinstance(members, list) or not isinstance(content, str | None):
            raise UnreadableError(FaultKind.NOT_A_CALL)
        check_values(content)
        calls = []
        for member in members:
            function = member.get("function") if isinstance(member, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                function = {**function, "arguments": parse_value(function["arguments"])}
            calls.append(as_call(function))
        return Reply(content or "", calls)

    def write_result(self, name: str, text: str) -> str:
        return as_json({"role": "tool", "name": name, "content": text})


class Python(CallForm):
    """`[name(a=1, b='x'), ...]`: Python notation, which is parsed and never executed.

    Only names that are valid in Python can be written; a function's name may have dots. A call with another name, or
    with a name that Python normalizes differently, raises `RowError`. Positional arguments, variables and nested calls
    are malformed when read; `[f(x)]` is prose.
    """

    name = "python"
    request = (
        "Write the calls as a Python list, [function_name(argument='value', other=2)], with every argument named, and "
        "nothing beside it. If no function fits, answer in plain text.",
        "To use functions, answer with [first_function(argument=1), second_function(argument='text')] in Python "
        "notation. To use none, answer in words.",
        "Calls go into square brackets, in the notation of Python, with keyword arguments only: "
        "[function_name(argument=value)]. Make none unless the request needs it.",
    )
    # Bounded, because they are looked for again with every piece. A call that is cut off begins early at the end.
    _NAME = r"[^\W\d]\w{0,255}"
    _OPEN = rf"\[\s{{0,999}}{_NAME}(?:\.{_NAME}){{0,31}}\(\s{{0,999}}"
    _START = regex.compile(rf"""{_OPEN}(?:[)'"\d\-]|{_NAME}\s{{0,999}}=)""")
    _START_AT_END = regex.compile(rf"""{_OPEN}(?:[)'"\d\-]|\Z|{_NAME}\s{{0,999}}(?:=|\Z))""")

    def _write(self, calls: Sequence[Call], text: str) -> str:
        written = []
        for call in calls:
            if not isinstance(call.arguments, dict):
                raise RowError("arguments are not an object")
            for name in (*call.name.split("."), *call.arguments):
                if not name.isidentifier() or iskeyword(name):
                    raise RowError("name that Python notation cannot write")
            arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
            written.append(f"{call.name}({arguments})")
        return join_lines(text, f"[{', '.join(written)}]")

    def scan(self, source: Source) -> Parts:
        while (yield from source.text_before(self._START, self._START_AT_END)):
            source.hold()
            closed = yield from _read_brackets(source)
            if not closed:
                yield from read_rest(source)
            text = source.held()
            try:
                calls = [_as_call(call) for call in parse_calls(text)]
            except UnreadableError as error:
                yield FaultPart(Fault(error.kind, text.strip()))
            except ValueError:
                kind = FaultKind.NOT_PYTHON if closed else FaultKind.UNCLOSED
                yield FaultPart(Fault(kind, text.strip()))
            else:
                yield from map(CallPart, calls)
                yield from read_closing_brackets(source)

    def write_result(self, name: str, text: str) -> str:
        return f"{name} returned: {text}"


_OUTSIDE = re.compile(r"""[^'"\[\](){}]*""")
_INSIDE = {
    "'": re.compile(r"(?:[^'\\\n]|\\.)*", re.DOTALL),
    '"': re.compile(r'(?:[^"\\\n]|\\.)*', re.DOTALL),
}
_PART_OF_ESCAPE = re.compile(r"\\\Z")


def _read_brackets(source: Source) -> Wait:
    """Go past the bracket that opens here. Return whether it closes before the text, or the line of a string, ends."""
    depth = 0
    while True:
        character = yield from source.run(_OUTSIDE)
        if character == "":
            return False
        source.position += 1
        if character in "'\"":
            if (yield from source.run(_INSIDE[character], _PART_OF_ESCAPE)) != character:
                return False
            source.position += 1
        else:
            depth += 1 if character in "[({" else -1
            if depth == 0:
                return True


def _as_call(call: PythonCall) -> Call:
    if call.positional:
        raise UnreadableError(FaultKind.NOT_A_CALL)
    stack: list[Any] = [call.named]
    while stack:
        item = stack.pop()
        if isinstance(item, PythonCall | Variable):
            raise UnreadableError(FaultKind.NOT_A_CALL)
        if isinstance(item, dict | list):
            stack.extend(item.values() if isinstance(item, dict) else item)
    check_values(call.named)
    return Call(call.name, call.named)
