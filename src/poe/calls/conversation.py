"""The canonical row: OpenAI-style messages and JSON-Schema tools, whatever the source looked like."""

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from poe.calls.forms.prompt import PromptForm

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training or evaluation row.

    `messages`: `{"role": "system" | "user" | "assistant" | "tool", "content": str | None}`; an assistant message may
    carry `tool_calls: [{"id": str, "type": "function", "function": {"name": str, "arguments": dict}}]` (arguments are
    an object, as chat templates expect, in the property order of the schema), a tool message `tool_call_id` and `name`.
    `tools`: `{"type": "function", "function": {"name", "description", "parameters": <JSON Schema object>}}`.
    `source`, `license`, `id`: the reader's name, the license of the rows, and where the row stood (for reports).
    `form`: how tools and calls are told in text when the row is rendered; None leaves both to the chat template.
    """

    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    source: str = ""
    license: str = ""
    id: str = ""
    form: "PromptForm | None" = None

    @property
    def query(self) -> str:
        """The first user text, lower-cased with white space collapsed: what de-duplication and splits go by."""
        text = next((m["content"] for m in self.messages if m["role"] == "user" and m["content"]), "")
        return re.sub(r"\s+", " ", text).strip().lower()

    def key(self) -> str:
        """A canonical text of messages and tools: equal for equal rows, whatever the source, form or key order."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)


class Text(NamedTuple):
    """A plain document, or a part of one. `answers` are what is to be learned, ranges of characters; None: all of it.

    `source` says which row, or which part of a plain file, it is: the parts of a long row have the same.
    """

    text: str
    answers: list[tuple[int, int]] | None = None
    source: str | None = None
