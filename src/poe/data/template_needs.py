"""Adapt messages to a chat template that refuses our canonical form, without a change of their content.

Templates differ in what they require: some have no system role, some want call ids of nine letters and digits
(Mistral), some want a content beside calls or arguments as JSON text (DeepSeek). Probes find out once per template.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from poe.calls.conversation import Message, Tool
from poe.errors import DataError

__all__ = ["CALL", "QUESTION", "RESULT", "TOOL", "TemplateNeeds", "find_needs"]

Render = Callable[[Sequence[Message], Sequence[Tool]], str]  # raises `DataError` for messages that it refuses

TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "probe_weather",
        "description": "Look at the probed sky",
        "parameters": {"type": "object", "properties": {"probed_city": {"type": "string", "description": "which"}}},
    },
}
QUESTION: list[Message] = [{"role": "user", "content": "How is it there?"}]
CALL: Message = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "probe_weather", "arguments": {"probed_city": "Probeville"}},
        }
    ],
}
RESULT: list[Message] = [
    {"role": "tool", "tool_call_id": "call_1", "name": "probe_weather", "content": "probably sunny"},
    {"role": "assistant", "content": "Sunny."},
]
_RULE = "The probe's rule."
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True, slots=True)
class TemplateNeeds:
    """What a chat template requires. The default is our canonical form."""

    no_system: bool = False
    short_ids: bool = False
    call_content: bool = False
    text_arguments: bool = False

    def adapt(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages as the template requires them, without keys that are None.

        Templates handle a missing key, but many print `None`.
        """
        adapted = [
            {k: value for k, value in message.items() if value is not None and k != "weight"} for message in messages
        ]
        if self.no_system:
            adapted = _join_system(adapted)
        if self.short_ids:
            adapted = _shorten_ids(adapted)
        return [self._adapt_calls(message) if message.get("tool_calls") else message for message in adapted]

    def _adapt_calls(self, message: Message) -> Message:
        if self.call_content:
            message = {**message, "content": message.get("content", "")}
        if self.text_arguments:
            functions = [(call, call["function"]) for call in message["tool_calls"]]
            message["tool_calls"] = [
                {**call, "function": {**function, "arguments": _as_json(function["arguments"])}}
                for call, function in functions
            ]
        return message


def find_needs(render: Render) -> TemplateNeeds:
    """Return what the template behind `render` requires. What it refuses in any form stays as it is."""

    def shows(needs: TemplateNeeds, messages: Sequence[Message], tools: Sequence[Tool], *texts: str) -> bool:
        try:
            rendered = render(needs.adapt(messages), tools)
        except DataError:
            return False
        return all(text in rendered for text in texts)

    needs = TemplateNeeds()
    system = [{"role": "system", "content": _RULE}, *QUESTION]
    joined = replace(needs, no_system=True)
    if not shows(needs, system, (), _RULE) and shows(joined, system, (), _RULE):
        needs = joined
    for text_arguments, call_content, short_ids in product((False, True), repeat=3):
        calls = replace(needs, short_ids=short_ids, call_content=call_content, text_arguments=text_arguments)
        if shows(calls, [*QUESTION, CALL, *RESULT], [TOOL], "Probeville", "probably sunny"):
            return calls
    return needs


def _join_system(messages: Sequence[Message]) -> list[Message]:
    """Put the text of each system message before the user message that follows it, or make it one."""
    joined: list[Message] = []
    text = ""
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "system":
            text += f"\n\n{content}" if text else content
            continue
        if text and message["role"] == "user":
            message = {**message, "content": f"{text}\n\n{content}"}
        elif text:
            joined.append({"role": "user", "content": text})
        joined.append(message)
        text = ""
    return [*joined, {"role": "user", "content": text}] if text else joined


def _shorten_ids(messages: Sequence[Message]) -> list[Message]:
    """Give each call an id of nine letters and digits, and each result the id of its call."""
    ids = [call.get("id") for message in messages for call in message.get("tool_calls") or ()]
    ids += [message.get("tool_call_id") for message in messages if message["role"] == "tool"]
    if all(isinstance(one, str) and _SHORT_ID.fullmatch(one) for one in ids):
        return list(messages)
    shortened: list[Message] = []
    calls = 0
    open_calls: list[tuple[Any, str]] = []  # (id, new id) of the calls without a result
    for message in messages:
        if message.get("tool_calls"):
            open_calls = [(c.get("id"), f"call{calls + i:05d}") for i, c in enumerate(message["tool_calls"], 1)]
            calls += len(open_calls)
            pairs = zip(message["tool_calls"], open_calls, strict=True)
            message = {**message, "tool_calls": [{**call, "id": new} for call, (_, new) in pairs]}
        elif message["role"] == "tool" and open_calls:
            given = message.get("tool_call_id")
            index = next((i for i, (old, _) in enumerate(open_calls) if given is not None and old == given), 0)
            message = {**message, "tool_call_id": open_calls.pop(index)[1]}
        shortened.append(message)
    return shortened


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
