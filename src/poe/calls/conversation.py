"""The data types of a conversation: messages, tools, calls, and the form in which text presents them."""

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PromptForm:
    """The names of the forms in which text presents tools and calls.

    `tools` is a tool form (`poe.calls.forms.tool_forms`), `calls` a call form (`poe.calls.forms.call_forms`), `place`
    the message that lists the tools ("system" or "user"), and `phrasing` the number of a wording
    (`poe.calls.forms.prompt_forms`). A name is checked when the form is used.
    """

    tools: str = "lines"
    calls: str = "hermes"
    place: str = "system"
    phrasing: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One function call. `arguments` is what the text holds; `check_calls` compares it with the tool's schema."""

    name: str
    arguments: Any

    def as_openai(self, index: int = 0) -> dict[str, Any]:
        """Return the call in OpenAI's format, with the arguments as a JSON string."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"id": f"call_{index + 1}", "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training or evaluation row, in the same format for every source.

    `messages`: `{"role": "system" | "user" | "assistant" | "tool", "content": str | None}`. An assistant message may
    have `tool_calls: [{"id": str, "type": "function", "function": {"name": str, "arguments": dict}}]`; the arguments
    are an object, as chat templates expect, in the property order of the schema. One with `weight: 0` is not trained
    on. A tool message may have `tool_call_id` and `name`.
    `tools`: `{"type": "function", "function": {"name", "description", "parameters": <JSON Schema object>}}`.
    `source`, `license`, `id`: the reader's name, the license of the rows, and the row's position in its source.
    `form`: how text presents tools and calls when the row is rendered. None: the chat template presents them.
    """

    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    source: str = ""
    license: str = ""
    id: str = ""
    form: PromptForm | None = None

    @property
    def query(self) -> str:
        """The first user text in lower case with white space collapsed. Splits and de-duplication compare it."""
        text = next((m["content"] for m in self.messages if m["role"] == "user" and m["content"]), "")
        return re.sub(r"\s+", " ", text).strip().lower()

    @property
    def question(self) -> list[Message]:
        """The messages before the first assistant turn that is trained on."""
        is_answer = (m["role"] == "assistant" and m.get("weight") != 0 for m in self.messages)
        return self.messages[: next(i for i, found in enumerate(is_answer) if found)]

    def cut_at_answers(self) -> list["Conversation"]:
        """Return the row up to each assistant turn that is trained on, with the weight 0 for those before it."""
        cut = []
        for position, message in enumerate(self.messages):
            if message["role"] == "assistant" and message.get("weight") != 0:
                before = ({**m, "weight": 0} if m["role"] == "assistant" else m for m in self.messages[:position])
                cut.append(replace(self, messages=[*before, message]))
        return cut

    def key(self) -> str:
        """Return messages and tools as canonical text, independent of source, form and key order."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)


class Text(NamedTuple):
    """A plain document, or a part of one.

    `answers` are the character ranges that are trained on; None: all of the text. `source` identifies the row, or the
    part of a plain file; all parts of a long row have the same source.
    """

    text: str
    answers: list[tuple[int, int]] | None = None
    source: str | None = None
