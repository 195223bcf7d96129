"""Call forms without a mark: xlam, llama, openai and python.

A call in these forms is meant to be the whole reply. Reading also accepts text around the calls. Writing puts text on
the lines before the calls (`openai` has a key for it). Only its structure distinguishes a call from text, so a text
that looks like a call cannot be written.

JSON in a reply is a call only if it has exactly the structure of the form. JSON that contains a call in another
structure (a list instead of an object, other keys) is malformed, and so is text that begins like a call and is not
JSON. Other JSON, and other text with braces, is prose. Reading stops at a call that is cut off, because the rest of the
text may be part of it.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from keyword import iskeyword
from typing import Any, ClassVar

from poe.calls.conversation import Call
from poe.calls.forms.base import CallForm, Reply, as_call, as_json, join_lines
from poe.calls.json_text import parse_json, parse_json_at
from poe.calls.literals import PythonCall, Variable, parse_calls
from poe.calls.values import check_value
from poe.errors import RowError


class _JsonForm(CallForm):
    keys: ClassVar[tuple[str, ...]]  # the keys of a call
    first: ClassVar[tuple[str, ...]]  # the possible first keys, to recognize a call that is cut off early
    start = re.compile(r'(?:\[\s*)?\{\s*"')
    between: ClassVar[re.Pattern[str] | None] = None

    def read(self, text: str) -> Reply:
        prose: list[str] = []
        calls: list[Call] = []
        malformed: list[str] = []
        position = call_end = 0  # where the search continues, and the end of the last call
        last_keys = min(text.rfind(f'"{key}"') for key in self.keys)
        last_brace = text.rfind("}")
        while match := self.start.search(text, position):
            start = match.start()
            marked = bool(self.mark) and text.startswith(self.mark, start)
            try:
                value, end = parse_json_at(text, match.end() if marked else start)
            except (ValueError, RecursionError) as error:
                cut_off = last_brace < start and text.startswith(self.first, match.end())
                if marked or cut_off or start < last_keys or isinstance(error, RecursionError):
                    prose.append(text[call_end:start])
                    malformed.append(text[start:].strip())
                    call_end = len(text)
                    break
                position = max(getattr(error, "pos", 0), start + 1)
                continue
            position = end
            try:
                reply = self._parse(value)
                if reply is None and (marked or _contains_call(value)):
                    raise ValueError("no call in this form")
            except (ValueError, RecursionError):
                prose.append(text[call_end:start])
                malformed.append(text[start:end].strip())
                call_end = end
                continue
            if reply is not None:
                prose += [text[call_end:start], reply.content]
                calls += reply.calls
                separator = self.between.match(text, end) if self.between else None
                call_end = position = separator.end() if separator else end
        prose.append(text[call_end:])
        return Reply("".join(prose).strip(), calls, malformed)

    @abstractmethod
    def _parse(self, value: Any) -> Reply | None:
        """Return the reply in a JSON value, None if it is not in this form. Raises `ValueError` for an invalid call."""


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
    start = re.compile(rf"{re.escape(mark)}|{_JsonForm.start.pattern}")
    between = re.compile(r"\s*;\s*(?=\{|<\|python_tag\|>)")
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
        if not isinstance(members, list) or not isinstance(content, str | None) or check_value(content):
            raise ValueError("not a message with calls")
        calls = []
        for member in members:
            function = member.get("function") if isinstance(member, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                function = {**function, "arguments": parse_json(function["arguments"])}
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
    _START = re.compile(r"""\[\s*[^\W\d]\w*(?:\.[^\W\d]\w*)*\(\s*(?:[)'"\d\-]|\Z|[^\W\d]\w*\s*(?:=|\Z))""")
    _TOKEN = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|['"\[\](){}]""", re.DOTALL)

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

    def read(self, text: str) -> Reply:
        prose: list[str] = []
        calls: list[Call] = []
        malformed: list[str] = []
        position = 0
        while match := self._START.search(text, position):
            prose.append(text[position : match.start()])
            position = self._find_end(text, match.start())
            part = text[match.start() : position]
            try:
                calls += [_as_call(call) for call in parse_calls(part)]
            except ValueError:
                malformed.append(part.strip())
        prose.append(text[position:])
        return Reply("".join(prose).strip(), calls, malformed)

    def _find_end(self, text: str, start: int) -> int:
        """Return the end of the bracket that opens at `start`, or the end of the text if it is not closed."""
        depth = 0
        for token in self._TOKEN.finditer(text, start):
            if token[0] in ("'", '"'):
                break
            if token[0] in "[({":
                depth += 1
            elif token[0] in "])}":
                depth -= 1
                if depth == 0:
                    return token.end()
        return len(text)

    def write_result(self, name: str, text: str) -> str:
        return f"{name} returned: {text}"


def _as_call(call: PythonCall) -> Call:
    if call.positional:
        raise ValueError("an argument without a name")
    stack: list[Any] = [call.named]
    while stack:
        item = stack.pop()
        if isinstance(item, PythonCall | Variable):
            raise ValueError("an argument that is not a value")
        if isinstance(item, dict | list):
            stack.extend(item.values() if isinstance(item, dict) else item)
    if problem := check_value(call.named):
        raise ValueError(problem)
    return Call(call.name, call.named)
