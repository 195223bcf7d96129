"""Call forms with a mark before every call: hermes, glaive and mistral.

The mark tells a call from prose, so text may stand before, between and after calls; the calls themselves are found by
parsing, not by searching for the end, so that strings may hold the marks. A mark that no call follows makes what is
behind it malformed, up to the end mark, the next mark or the end of the text.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from poe.calls.conversation import Call
from poe.calls.forms.base import CallForm, Reply, as_call, as_json, expect, join_lines, parse_json_at


class _Marked(CallForm):
    mark: ClassVar[str]
    end: ClassVar[str] = ""

    def read(self, text: str) -> Reply:
        prose: list[str] = []
        calls: list[Call] = []
        malformed: list[str] = []
        at = 0
        while (start := text.find(self.mark, at)) >= 0:
            prose.append(text[at:start])
            body = start + len(self.mark)
            try:
                found, at = self._calls_at(text, body)
                calls += found
            except (ValueError, RecursionError):
                past = at = self._or_end(text, self.mark, body, len(text))
                if self.end:
                    past = self._or_end(text, self.end, body, at)
                    at = past + len(self.end) if past < at else at
                malformed.append(text[body:past].strip())
        prose.append(text[at:])
        return Reply("".join(prose).strip(), calls, malformed)

    @staticmethod
    def _or_end(text: str, mark: str, at: int, end: int) -> int:
        found = text.find(mark, at, end)
        return end if found < 0 else found

    @abstractmethod
    def _calls_at(self, text: str, at: int) -> tuple[list[Call], int]:
        """The calls behind a mark, and where they end. Raises ValueError or RecursionError."""


class Hermes(_Marked):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one after the other; what Qwen's templates write."""

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
        made = ({"name": call.name, "arguments": call.arguments} for call in calls)
        return join_lines(text, "\n".join(f"{self.mark}\n{as_json(call)}\n{self.end}" for call in made))

    def _calls_at(self, text: str, at: int) -> tuple[list[Call], int]:
        value, at = parse_json_at(text, at)
        return [as_call(value)], expect(text, self.end, at)

    def write_result(self, name: str, text: str) -> str:
        """Without the name, as Qwen has it: results follow each other in the order of the calls."""
        return f"<tool_response>\n{text}\n</tool_response>"


class Glaive(_Marked):
    """`<functioncall> {"name": ..., "arguments": '{...}'}`: JSON inside single quotes, so the whole is not JSON.

    The inner JSON is parsed where it begins, so it says itself where it ends: apostrophes need no escape and get none.
    Arguments written as an object are read too; an escaped apostrophe is not JSON, so malformed.
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

    def _calls_at(self, text: str, at: int) -> tuple[list[Call], int]:
        start, at = at, expect(text, "{", at)
        try:
            for mark in ('"name"', ":"):
                at = expect(text, mark, at)
            name, at = parse_json_at(text, at)
            for mark in (",", '"arguments"', ":", "'"):
                at = expect(text, mark, at)
        except ValueError:
            value, end = parse_json_at(text, start)
            return [as_call(value)], end
        arguments, at = parse_json_at(text, at)
        for mark in ("'", "}"):
            at = expect(text, mark, at)
        return [as_call({"name": name, "arguments": arguments})], at

    def write_result(self, name: str, text: str) -> str:
        return f"FUNCTION RESPONSE: {text}"


class Mistral(_Marked):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`: all calls in one JSON list behind one mark."""

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
        made = [{"name": call.name, "arguments": call.arguments} for call in calls]
        return join_lines(text, f"{self.mark} {as_json(made)}")

    def _calls_at(self, text: str, at: int) -> tuple[list[Call], int]:
        value, at = parse_json_at(text, at)
        if not isinstance(value, list) or not value:
            raise ValueError("no calls behind their mark")
        return [as_call(member) for member in value], at

    def write_result(self, name: str, text: str) -> str:
        return f"[TOOL_RESULTS] {as_json({'name': name, 'content': text})}[/TOOL_RESULTS]"
