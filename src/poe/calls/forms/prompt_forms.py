"""Conversations written as plain text, so that every chat template renders them, with or without support for tools.

The list of tools and the request for a call form go into the system message or the first user message. The calls of an
assistant message become part of its text. The results become a user message: all results of one assistant message
together, in the order of its calls, joined with the next user message, because many templates require user and
assistant to alternate.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from poe.calls.conversation import Call, Conversation, Message, PromptForm, Tool
from poe.calls.forms.base import CallForm
from poe.calls.forms.call_forms import CALL_FORMS, call_form
from poe.calls.forms.tool_forms import TOOL_FORMS, write_tools
from poe.errors import DataError, RowError, suggest

PLACES = ("system", "user")

_HEADINGS = (
    "You have access to these functions:",
    "Functions that can be called:",
    "# Tools\nThe following tools are available to you.",
    "Here is a list of functions which you may use to help the user.",
)
# (heading, index of the call form's request, request before the tools, both before the message's own text)
_PHRASINGS = tuple(product(_HEADINGS, range(3), (False, True), (False, True)))
PHRASINGS = len(_PHRASINGS)
"""The number of phrasings. Larger numbers repeat them."""


def tools_heading(form: PromptForm) -> str:
    """Return the words before the list of tools."""
    return _PHRASINGS[form.phrasing % PHRASINGS][0]


def write_request(form: PromptForm, tools: Sequence[Tool]) -> str:
    """Return the part of the prompt that lists the tools and asks for the call form.

    Raises `DataError` for an unknown tool form or call form.
    """
    heading, request, request_first, _ = _PHRASINGS[form.phrasing % PHRASINGS]
    parts = [f"{heading}\n{write_tools(tools, form.tools)}", call_form(form.calls).request[request]]
    return "\n\n".join(parts[::-1] if request_first else parts)


def join_request(form: PromptForm, request: str, text: str) -> str:
    """Join the request and the message's own text, in the order of the phrasing."""
    parts = [request, text] if _PHRASINGS[form.phrasing % PHRASINGS][3] else [text, request]
    return "\n\n".join(part for part in parts if part.strip())


def random_form(
    rng: random.Random, tools: Sequence[str] | None = None, calls: Sequence[str] | None = None
) -> PromptForm:
    """Draw a form uniformly from the named tool and call forms (None: all), with a random place and phrasing."""
    return PromptForm(
        rng.choice(tools or list(TOOL_FORMS)),
        rng.choice(calls or list(CALL_FORMS)),
        rng.choice(PLACES),
        rng.randrange(PHRASINGS),
    )


def write_as_text(conversation: Conversation, form: PromptForm) -> Conversation:
    """Return the row without `tools`, `tool_calls` and tool messages; a row without tools is returned unchanged.

    The text up to any assistant message is a prefix of the whole text. Raises `DataError` for an unknown name in the
    form, and `RowError` where the call form cannot hold an assistant's text or calls, or where there is no user message
    to hold the tools.
    """
    if form.place not in PLACES:
        raise DataError(f"Unknown place {form.place!r}.{suggest(form.place, PLACES)}")
    if not conversation.tools:
        return conversation
    messages = _write_messages(conversation.messages, call_form(form.calls))
    position = next((i for i, message in enumerate(messages) if message["role"] == form.place), None)
    if position is None and form.place == "user":
        raise RowError("no user turn that could hold the tools")
    if position is None:
        messages.insert(0, {"role": "system", "content": ""})
        position = 0
    text = join_request(form, write_request(form, conversation.tools), messages[position].get("content") or "")
    messages[position] = {**messages[position], "content": text}
    return replace(conversation, messages=messages, tools=[], form=None)


def _write_messages(messages: Sequence[Message], form: CallForm) -> list[Message]:
    written: list[Message] = []
    open_calls: dict[str, tuple[int, str]] = {}  # id -> (position, name) of each call of the last assistant message
    results: list[tuple[int, str]] = []

    def write_results() -> None:
        if results:
            texts = [text for _, text in sorted(results, key=lambda result: result[0])]
            written.append({"role": "user", "content": "\n".join(texts)})
            results.clear()

    for message in messages:
        role, text = message["role"], message.get("content") or ""
        if role == "tool":
            position, name = open_calls.get(message.get("tool_call_id", ""), (len(open_calls), ""))
            results.append((position, form.write_result(message.get("name") or name, text)))
            continue
        follows_results = bool(results)
        write_results()
        if role == "assistant":
            tool_calls = message.get("tool_calls") or []
            open_calls = {call.get("id", ""): (i, call["function"]["name"]) for i, call in enumerate(tool_calls)}
            calls = [Call(call["function"]["name"], call["function"]["arguments"]) for call in tool_calls]
            others = {key: value for key, value in message.items() if key != "tool_calls"}
            written.append({**others, "content": form.write(calls, text)})
        elif role == "user" and follows_results:
            written[-1]["content"] += f"\n\n{text}"
        else:
            written.append(dict(message))
    write_results()
    return written
