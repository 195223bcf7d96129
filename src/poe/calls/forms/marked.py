"""Call forms with a mark before every call: hermes, glaive and mistral.

The mark distinguishes a call from prose, so text may come before, between and after calls. The end of a call is found
by parsing it, so its strings may contain the marks. If no call follows a mark, the text after the mark is malformed, up
to the end mark, the next mark or the end of the text.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import regex

from poe.calls.conversation import Call
from poe.calls.faults import Fault, FaultKind, UnreadableError
from poe.calls.forms.base import CallForm, as_call, as_json, expect, join_lines, name_fault, parse_value
from poe.calls.reading import (
    CallPart,
    FaultPart,
    Parts,
    Source,
    Wait,
    collect_text,
    read_closing_brackets,
    read_json,
)


class _Marked(CallForm):
    end: ClassVar[str] = ""

    @cached_property
    def _marks(self) -> tuple[Any, Any]:
        """The patterns of what begins a call, and of what ends a malformed one."""
        begin = regex.escape(self.mark)
        return regex.compile(begin), regex.compile(f"{regex.escape(self.end)}|{begin}" if self.end else begin)

    def scan(self, source: Source) -> Parts:
        begin, border = self._marks
        while (yield from source.text_before(begin)):
            yield from source.skip(self.mark)
            source.hold()
            try:
                calls = yield from self._read_calls(source)
            except UnreadableError as error:
                kind = name_fault(error, source)
                source.rewind()
                text, _ = yield from collect_text(source.text_before(border))
                if self.end:
                    yield from source.skip(self.end)
                yield FaultPart(Fault(kind, text.strip()))
                continue
            yield from map(CallPart, calls)
            if not self.end:
                yield from read_closing_brackets(source)

    @abstractmethod
    def _read_calls(self, source: Source) -> Wait:
        """Return the calls after a mark, and go past them. Raises `UnreadableError`."""


def _read_value(source: Source) -> Wait:
    """Return the JSON value that is here, and go past it."""
    start = source.count
    yield from read_json(source)
    return parse_value(source.held()[start:])


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

    def _read_calls(self, source: Source) -> Wait:
        call = as_call((yield from _read_value(source)))
        yield from expect(source, self.end)
        return [call]

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

    def _read_calls(self, source: Source) -> Wait:
        try:
            for mark in ("{", '"name"', ":"):
                yield from expect(source, mark)
            name = yield from _read_value(source)
            for mark in (",", '"arguments"', ":", "'"):
                yield from expect(source, mark)
        except UnreadableError:
            source.rewind()
            return [as_call((yield from _read_value(source)))]
        arguments = yield from _read_value(source)
        for mark in ("'", "}"):
            yield from expect(source, mark)
        return [as_call({"name": name, "arguments": arguments})]

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

    def _read_calls(self, source: Source) -> Wait:
        value = yield from _read_value(source)
        if not isinstance(value, list) or not value:
            raise UnreadableError(FaultKind.NOT_A_CALL)
        return [as_call(member) for member in value]

    def write_result(self, name: str, text: str) -> str:
        return f"[TOOL_RESULTS] {as_json({'name': name, 'content': text})}[/TOOL_RESULTS]"
