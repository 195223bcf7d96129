"""Functions that several augmentations use: a row's random generator, and access to its calls and texts."""

import hashlib
import re
from collections.abc import Iterator
from random import Random
from typing import Any

from poe.calls.conversation import Conversation, Tool

Span = tuple[int, int]  # character range [start, end)

_QUOTED = re.compile(r'"[^"]*"|“[^”]*”|`[^`]*`|(?<!\w)\'[^\']*\'(?!\w)|(?<!\w)‘[^’]*’(?!\w)')


def row_digest(conversation: Conversation) -> str:
    """Return a hash of a row's messages and tools. Equal rows are augmented alike."""
    return hashlib.blake2b(conversation.key().encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def row_rng(digest: str, *, seed: int, epoch: int, step: str) -> Random:
    """Return the random generator of one step for one row, independent of other rows, steps, epochs and seeds."""
    return Random(f"{seed}/{epoch}/{step}/{digest}")


def iter_calls(conversation: Conversation) -> Iterator[dict[str, Any]]:
    """Yield the `{"name", "arguments"}` of every call, in order."""
    for message in conversation.messages:
        for call in message.get("tool_calls") or ():
            yield call["function"]


def called_tools(conversation: Conversation) -> list[Tool]:
    """Return the tools that the row calls, in the order of its tools."""
    called = {call["name"] for call in iter_calls(conversation)}
    return [tool for tool in conversation.tools if tool["function"]["name"] in called]


def user_texts(conversation: Conversation) -> list[str]:
    """Return the texts of the user messages."""
    return [m["content"] for m in conversation.messages if m["role"] == "user" and m["content"]]


def questions_without_calls(conversation: Conversation) -> list[str]:
    """Return the user texts that the assistant answers without a call, because no offered tool serves them."""
    return [
        message["content"] or ""
        for message, answer in zip(conversation.messages, conversation.messages[1:], strict=False)
        if message["role"] == "user" and answer["role"] == "assistant" and not answer.get("tool_calls")
    ]


def iter_strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, without the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from iter_strings(member)


def argument_strings(conversation: Conversation) -> list[str]:
    """Return the distinct texts in the arguments of all calls, without blank texts."""
    texts = (text for call in iter_calls(conversation) for text in iter_strings(call["arguments"]) if text.strip())
    return list(dict.fromkeys(texts))


def find_occurrences(text: str, value: str, flags: int = 0) -> Iterator[Span]:
    """Yield the spans of `value` in `text` that are not part of a longer word."""
    before, after = r"(?<!\w)" if value[0].isalnum() else "", r"(?!\w)" if value[-1].isalnum() else ""
    for match in re.finditer(before + re.escape(value) + after, text, flags):
        yield match.span()


def find_quotations(text: str) -> list[Span]:
    """Return the spans of the quoted parts of a text."""
    return [match.span() for match in _QUOTED.finditer(text)]
