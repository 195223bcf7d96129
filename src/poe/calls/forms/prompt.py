"""A conversation told in text alone, so that every chat template renders it, whatever it knows of tools.

The list of tools and the request for a form of calls go into the system message or the first user message; an
assistant's calls become part of its text, and results a user's turn: the results of one message together, in the order
of its calls, and in one turn with what the user says next, because many templates want user and assistant to alternate.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from poe.calls.conversation import Conversation, Message, Tool
from poe.calls.forms.calls import CALL_FORMS, Call, CallForm, call_form
from poe.calls.forms.tools import TOOL_FORMS, write_tools
from poe.errors import DataError, RowError, suggest

PLACES = ("system", "user")

_HEADINGS = (
    "You have access to these functions:",
    "Functions that can be called:",
    "# Tools\nThe following tools are available to you.",
    "Here is a list of functions which you may use to help the user.",
)
# heading, which of the form's requests, whether that comes before the list, whether both come before other text
_PHRASINGS = tuple(product(_HEADINGS, range(3), (False, True), (False, True)))
PHRASINGS = len(_PHRASINGS)
"""How many phrasings there are; a number beyond begins anew."""


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How a conversation is told: the names of a tool form and a call form, where both stand, and the phrasing."""

    tools: str = "lines"
    calls: str = "hermes"
    place: str = "system"
    phrasing: int = 0

    def __post_init__(self) -> None:
        for what, name, known in (
            ("tool form", self.tools, TOOL_FORMS),
            ("call form", self.calls, CALL_FORMS),
            ("place", self.place, PLACES),
        ):
            if name not in known:
                raise DataError(f"Unknown {what} {name!r}.{suggest(name, known)}")

    @property
    def heading(self) -> str:
        """The words before the list of tools."""
        return _PHRASINGS[self.phrasing % PHRASINGS][0]

    def request(self, tools: Sequence[Tool]) -> str:
        """The part of the prompt that lists the tools and asks for the form."""
        heading, which, request_first, _ = _PHRASINGS[self.phrasing % PHRASINGS]
        parts = [f"{heading}\n{write_tools(tools, self.tools)}", call_form(self.calls).request[which]]
        return "\n\n".join(parts[::-1] if request_first else parts)

    def placed(self, request: str, text: str) -> str:
        """The request and the text that was in its place, in the order of the phrasing."""
        parts = [request, text] if _PHRASINGS[self.phrasing % PHRASINGS][3] else [text, request]
        return "\n\n".join(part for part in parts if part.strip())


def random_form(
    rng: random.Random, tools: Sequence[str] | None = None, calls: Sequence[str] | None = None
) -> PromptForm:
    """A form drawn evenly from those named (all, where None), with a random place and phrasing."""
    return PromptForm(
        rng.choice(tools or list(TOOL_FORMS)),
        rng.choice(calls or list(CALL_FORMS)),
        rng.choice(PLACES),
        rng.randrange(PHRASINGS),
    )


def flatten(conversation: Conversation, form: PromptForm) -> Conversation:
    """The same row without `tools`, `tool_calls` and tool turns; one that offers no tools is returned as it is.

    What is told up to some assistant turn is how the whole begins. Raises `RowError` where the call form cannot hold
    an assistant's text or calls, or the first user message is to hold the tools and there is none.
    """
    if not conversation.tools:
        return conversation
    messages = _write_messages(conversation.messages, call_form(form.calls))
    at = next((i for i, message in enumerate(messages) if message["role"] == form.place), None)
    if at is None and form.place == "user":
        raise RowError("no user turn that could hold the tools")
    if at is None:
        messages.insert(0, {"role": "system", "content": ""})
        at = 0
    text = form.placed(form.request(conversation.tools), messages[at].get("content") or "")
    messages[at] = {**messages[at], "content": text}
    return replace(conversation, messages=messages, tools=[], form=None)


def _write_messages(messages: Sequence[Message], form: CallForm) -> list[Message]:
    told: list[Message] = []
    called: dict[str, tuple[int, str]] = {}  # place and name of each call of the last assistant turn, by id
    results: list[tuple[int, str]] = []

    def tell_results() -> None:
        if results:
            texts = [text for _, text in sorted(results, key=lambda result: result[0])]
            told.append({"role": "user", "content": "\n".join(texts)})
            results.clear()

    for message in messages:
        role, text = message["role"], message.get("content") or ""
        if role == "tool":
            place, name = called.get(message.get("tool_call_id", ""), (len(called), ""))
            results.append((place, form.write_result(message.get("name") or name, text)))
            continue
        after_results = bool(results)
        tell_results()
        if role == "assistant":
            calls = message.get("tool_calls") or []
            called = {call.get("id", ""): (i, call["function"]["name"]) for i, call in enumerate(calls)}
            made = [Call(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            told.append({**rest, "content": form.write(made, text)})
        elif role == "user" and after_results:
            told[-1]["content"] += f"\n\n{text}"
        else:
            told.append(dict(message))
    tell_results()
    return told
