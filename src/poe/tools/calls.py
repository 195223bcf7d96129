"""Calls in a model's reply: read from its text, and checked against the tools before anybody acts on them."""

import json
from dataclasses import dataclass, field
from typing import Any

from poe.data.conversation import Tool
from poe.data.schema import check_call

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """One function call. `arguments` is what JSON said; whether it fits a schema is `problems`' to say."""

    name: str
    arguments: Any

    def as_openai(self, index: int = 0) -> dict[str, Any]:
        """The OpenAI form, arguments as a JSON string."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": f"call_{index + 1}", "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply taken apart: prose, calls, and what looked like a call but could not be read."""

    content: str
    calls: list[Call] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)


def parse_reply(text: str) -> Reply:
    """Read the calls, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and the prose around them.

    The text is data: it is parsed as JSON and nothing else. A call cut off, or not JSON, or without a name, is kept in
    `malformed`, never guessed at.
    """
    head, *parts = text.split(OPEN)
    prose, calls, malformed = [head], [], []
    for part in parts:
        body, closed, after = part.partition(CLOSE)
        prose.append(after)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if closed and isinstance(value, dict) and isinstance(value.get("name"), str) and "arguments" in value:
            calls.append(Call(value["name"], value["arguments"]))
        else:
            malformed.append(body.strip())
    return Reply("".join(prose).strip(), calls, malformed)


def problems(calls: list[Call], tools: list[Tool]) -> list[str]:
    """What is wrong with the calls, one sentence each: an undeclared tool, arguments that do not fit its schema."""
    found = []
    for call in calls:
        reason = check_call(tools, call.name, call.arguments)
        if reason is not None:
            found.append(f"{call.name}: {reason}")
    return found
