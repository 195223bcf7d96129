"""Call forms with a mark before every call: hermes, glaive and mistral.

The mark distinguishes a call from prose, so text may come before, between and after calls. The end of a call is found
by parsing it, so its strings may contain the marks. If no call follows a mark, the text after the mark is malformed, up
to the end mark, the next mark or the end of the text.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from poe.calls.conversation import Call
from poe.calls.forms.base import CallForm, Reply, as_call, as_json, expect, join_lines
from poe.calls.json_text import parse_json_at


class _Marked(CallForm):
    end: ClassVar[str] = ""

    def read(self, text: str) -> Reply:
        prose: list[str] = []
        calls: list[Call] = []
        malformed: list[str] = []
        position = 0
        while (start := text.find(self.mark, position)) >= 0:
            prose.append(text[position:start])
            body = start + len(self.mark)
            try:
                parsed, position = self._parse_calls_at(text, body)
                calls += parsed
            except (ValueError, RecursionError):
                end = position = self._find_or(text, self.mark, body, len(text))
                if self.end:
                    end = self._find_or(text, self.end, body, position)
                    position = end + len(self.end) if end < position else position
                malformed.append(text[body:end].strip())
        prose.append(text[position:])
        return Reply("".join(prose).strip(), calls, malformed)

    @staticmethod
    def _find_or(text: str, mark: str, start: int, end: int) -> int:
        """Return the position of `mark` between `start` and `end`, or `end`."""
        position = text.find(mark, start, end)
        return end if position < 0 else position

    @abstractmethod
    def _parse_calls_at(self, text: str, start: int) -> tuple[list[Call], int]:
        """Return the calls after a mark and the position of their end. Raises `ValueError` or `RecursionError`."""


class Hermes(_Marked):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one per call, as in Qwen's chat templates."""

    name = "hermes"
    mark, end = "<tool_call>", "</tool_call>"
    request = (
        'To call a function, answer with <tool_call>{"name": <name>, "arguments": <arguments as JSON>}</tool_call>, '
        "once for each call. If no function is needed, answer in plain text.",
        "Each call is a JSON object with the function's name and its arguments between <tool_call> and </tool_call> "
        'tags:\n<tool_call>\n{"name": "function_name", "arguments": {"argument": "value"}}\n</tool_call>\n'
        "Make no call where none of the functions helps.",
        "Whenever one of these functions serves the request, call it: a JSON object with the keys name and arguments, "
        "inside <tool_call></tool_call>. Several calls follow each other. Otherwise reply as usual.",
    )

    def _write(self, calls: Sequence[Call], text: str) -> str:
        objects = ({"name": call.name, "arguments": call.arguments} for call in calls)
        return join_lines(text, "\n".join(f"{self.mark}\n{as_json(call)}\n{self.end}" for call in objects))

    def _parse_calls_at(self, text: str, start: int) -> tuple[list[Call], int]:
        value, end = parse_json_at(text, start)
        return [as_call(value)], expect(text, self.end, end)

    def write_result(self, name: str, text: str) -> str:
        """Return the result without the name, as Qwen writes it: results have the order of the calls."""
        return f"<tool_response>\n{text}\n</tool_response>"


class Glaive(_Marked):
    """`<functioncall> {"name": ..., "arguments": '{...}'}`: JSON inside single quotes, so the whole is not JSON.

    The parser of the inner JSON finds its end, so apostrophes are written without an escape. Arguments may also be an
    object. An escaped apostrophe is not valid JSON and makes the call malformed.
    """

    name = "glaive"
    mark = "<functioncall>"
    request = (
        "To use a function, write <functioncall> and then a JSON object with its name, and its arguments as JSON in "
        'single quotes: <functioncall> {"name": "function_name", "arguments": \'{"argument": "value"}\'}. '
        "Use one only if it is required.",
        'A function is called as <functioncall> {"name": ..., "arguments": \'{...}\'}, one such line for each call. '
        "When none is required, just answer.",
        'Use the functions if required. The form of a call is `<functioncall> {"name": <name>, "arguments": '
        "'<arguments as JSON>'}`; the arguments stand between single quotes.",
    )

    def _write(self, calls: Sequence[Call], text: str) -> str:
        return join_lines(
            text,
            "\n".join(
                f'{self.mark} {{"name": {as_json(call.name)}, "arguments": \'{as_json(call.arguments)}\'}}'
                for call in calls
            ),
        )

    def _parse_calls_at(self, text: str, start: int) -> tuple[list[Call], int]:
        position = expect(text, "{", start)
        try:
            for mark in ('"name"', ":"):
                position = expect(text, mark, position)
            name, position = parse_json_at(text, position)
            for mark in (",", '"arguments"', ":", "'"):
                position = expect(text, mark, position)
        except ValueError:
            value, end = parse_json_at(text, start)
            return [as_call(value)], end
        arguments, position = parse_json_at(text, position)
        for mark in ("'", "}"):
            position = expect(text, mark, position)
        return [as_call({"name": name, "arguments": arguments})], position

    def write_result(self, name: str, text: str) -> str:
        return f"FUNCTION RESPONSE: {text}"


class Mistral(_Marked):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`: all calls in one JSON list after one mark."""

    name = "mistral"
    mark = "[TOOL_CALLS]"
    request = (
        'Call functions by writing [TOOL_CALLS] and a JSON list: [TOOL_CALLS] [{"name": "function_name", "arguments": '
        '{"argument": "value"}}]. Without need for a function, answer directly.',
        "If functions are needed, reply with [TOOL_CALLS] and then a list of all calls as JSON objects with name and "
        "arguments. Reply in words if they are not.",
        "Your calls go behind the mark [TOOL_CALLS], in one JSON list whose objects have a name and arguments. Leave "
        "out the mark when you make no call.",
    )

    def _write(self, calls: Sequence[Call], text: str) -> str:
        objects = [{"name": call.name, "arguments": call.arguments} for call in calls]
        return join_lines(text, f"{self.mark} {as_json(objects)}")

    def _parse_calls_at(self, text: str, start: int) -> tuple[list[Call], int]:
        value, end = parse_json_at(text, start)
        if not isinstance(value, list) or not value:
            raise ValueError("no calls after their mark")
        return [as_call(member) for member in value], end

    def write_result(self, name: str, text: str) -> str:
        return f"[TOOL_RESULTS] {as_json({'name': name, 'content': text})}[/TOOL_RESULTS]"
