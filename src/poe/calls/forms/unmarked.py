"""Call forms without a mark: xlam, llama, openai and python.

These forms are meant to be the whole reply. Text around the calls is read all the same, and written on the lines before
them (`openai` has a place for it); since nothing but its shape tells a call there, a text that looks like one cannot be
written.

JSON in a reply counts as a call only where it has exactly the shape of the form. What holds a call in another shape
(a list where one object is due, other keys), or begins like a call and is not JSON, is malformed; all other JSON, and
whatever else has braces, is prose. Where a call breaks off, so does the reading: the rest may be part of it.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from keyword import iskeyword
from typing import Any, ClassVar

from poe.calls.conversation import Call
from poe.calls.forms.base import CallForm, Reply, as_call, as_json, join_lines, parse_json_at, parse_whole_json
from poe.calls.literals import PythonCall, Variable, parse_calls
from poe.calls.schema import check_value
from poe.errors import RowError


class _Json(CallForm):
    keys: ClassVar[tuple[str, ...]]  # what a call in this form holds
    first: ClassVar[tuple[str, ...]]  # what it may begin with, so that one that breaks off early is known
    start = re.compile(r'(?:\[\s*)?\{\s*"')
    between: ClassVar[re.Pattern[str] | None] = None
    mark: ClassVar[str] = ""

    def read(self, text: str) -> Reply:
        prose: list[str] = []
        calls: list[Call] = []
        malformed: list[str] = []
        at = past = 0  # where to look on, and where the last call ended
        last_keys = min(text.rfind(f'"{key}"') for key in self.keys)
        last_brace = text.rfind("}")
        while found := self.start.search(text, at):
            start = found.start()
            marked = bool(self.mark) and text.startswith(self.mark, start)
            try:
                value, end = parse_json_at(text, found.end() if marked else start)
            except (ValueError, RecursionError) as error:
                begun = last_brace < start and text.startswith(self.first, found.end())
                if marked or begun or start < last_keys or isinstance(error, RecursionError):
                    prose.append(text[past:start])
                    malformed.append(text[start:].strip())
                    past = len(text)
                    break
                at = max(getattr(error, "pos", 0), start + 1)
                continue
            at = end
            try:
                reply = self._take(value)
                if reply is None and (marked or _holds_call(value)):
                    raise ValueError("no call in this form")
            except (ValueError, RecursionError):
                prose.append(text[past:start])
                malformed.append(text[start:end].strip())
                past = end
                continue
            if reply is not None:
                prose += [text[past:start], reply.content]
                calls += reply.calls
                after = self.between.match(text, end) if self.between else None
                past = at = after.end() if after else end
        prose.append(text[past:])
        return Reply("".join(prose).strip(), calls, malformed)

    @abstractmethod
    def _take(self, value: Any) -> Reply | None:
        """What a JSON value says: calls, or None where it is not in this form. Raises ValueError for broken calls."""


def _holds_call(value: Any) -> bool:
    """Whether a call of some shape is anywhere in a JSON value."""
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


class Xlam(_Json):
    """`[{"name": ..., "arguments": {...}}]`: a JSON list of all calls. `[]` is never written; read, it is text."""

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

    def _take(self, value: Any) -> Reply | None:
        if not isinstance(value, list) or not any(isinstance(m, dict) and m.keys() >= {*self.keys} for m in value):
            return None
        return Reply("", [as_call(member) for member in value])

    def write_result(self, name: str, text: str) -> str:
        return as_json({"name": name, "result": text})


class Llama(_Json):
    """`{"name": ..., "parameters": {...}}`, several with `; ` between them; what Llama 3.1 writes.

    `<|python_tag|>` before a call is read, and never written; before anything else it is malformed.
    """

    name = "llama"
    keys, first = ("name", "parameters"), ("name", "parameters", "type")
    mark = "<|python_tag|>"
    start = re.compile(rf"{re.escape(mark)}|{_Json.start.pattern}")
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
        made = ({"name": call.name, "parameters": call.arguments} for call in calls)
        return join_lines(text, "; ".join(as_json(call) for call in made))

    def _take(self, value: Any) -> Reply | None:
        if not isinstance(value, dict) or not value.keys() >= {*self.keys}:
            return None
        return Reply("", [as_call(value, "parameters")])

    def write_result(self, name: str, text: str) -> str:
        return f"Output of {name}: {text}"


class OpenAI(_Json):
    """`{"tool_calls": [{"id", "type", "function": {"name", "arguments": "<JSON text>"}}]}`; text is its `content`.

    Arguments written as an object are read too. Other members of the message, `role` for one, say nothing of calls.
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

    def _take(self, value: Any) -> Reply | None:
        if not isinstance(value, dict) or not value.get("tool_calls"):
            return None
        listed, content = value["tool_calls"], value.get("content")
        if not isinstance(listed, list) or not isinstance(content, str | None) or check_value(content):
            raise ValueError("not a message with calls")
        calls = []
        for member in listed:
            function = member.get("function") if isinstance(member, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                function = {**function, "arguments": parse_whole_json(function["arguments"])}
            calls.append(as_call(function))
        return Reply(content or "", calls)

    def write_result(self, name: str, text: str) -> str:
        return as_json({"role": "tool", "name": name, "content": text})


class Python(CallForm):
    """`[name(a=1, b='x'), ...]`: Python notation, which is parsed and never run.

    Only names that Python accepts can be written (dots between the parts of a function's name are allowed): a call with
    another name, or one that Python would respell, raises `RowError`. On reading, arguments without a name, variables
    and calls inside calls are malformed; `[f(x)]` in prose is prose.
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
        at = 0
        while found := self._START.search(text, at):
            prose.append(text[at : found.start()])
            at = self._end(text, found.start())
            part = text[found.start() : at]
            try:
                calls += [_named_only(call) for call in parse_calls(part)]
            except ValueError:
                malformed.append(part.strip())
        prose.append(text[at:])
        return Reply("".join(prose).strip(), calls, malformed)

    def _end(self, text: str, start: int) -> int:
        """Where the brackets that open at `start` are closed again; the end of the text if they are not."""
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


def _named_only(call: PythonCall) -> Call:
    if call.positional:
        raise ValueError("an argument without a name")
    stack: list[Any] = [call.named]
    while stack:
        item = stack.pop()
        if isinstance(item, PythonCall | Variable):
            raise ValueError("an argument that is no value")
        if isinstance(item, dict | list):
            stack.extend(item.values() if isinstance(item, dict) else item)
    if problem := check_value(call.named):
        raise ValueError(problem)
    return Call(call.name, call.named)
