"""What the augmentations share: a row's own randomness, and ways to look at a row."""

import hashlib
from collections.abc import Iterator
from random import Random
from typing import Any

from poe.calls.conversation import Conversation, Tool


def row_digest(conversation: Conversation) -> str:
    """What a row says, as a short text: equal rows are augmented alike, wherever they stand."""
    return hashlib.blake2b(conversation.key().encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def row_rng(digest: str, *, seed: int, epoch: int, step: str) -> Random:
    """The randomness of one step for one row: no other row, step, epoch or seed can move it."""
    return Random(f"{seed}/{epoch}/{step}/{digest}")


def calls(conversation: Conversation) -> Iterator[dict[str, Any]]:
    """The `{"name", "arguments"}` of every call, in order."""
    for message in conversation.messages:
        for call in message.get("tool_calls") or ():
            yield call["function"]


def called_tools(conversation: Conversation) -> list[Tool]:
    """The offered tools that the row calls, each once, in the order of its tools."""
    called = {call["name"] for call in calls(conversation)}
    return [tool for tool in conversation.tools if tool["function"]["name"] in called]


def user_texts(conversation: Conversation) -> list[str]:
    return [m["content"] for m in conversation.messages if m["role"] == "user" and m["content"]]


def questions_answered_in_words(conversation: Conversation) -> list[str]:
    """The user texts that the assistant answers without a call: no tool on offer was right for them."""
    found = []
    for message, answer in zip(conversation.messages, conversation.messages[1:], strict=False):
        if message["role"] == "user" and answer["role"] == "assistant" and not answer.get("tool_calls"):
            found.append(message["content"] or "")
    return found


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value; the keys of objects are not values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from strings(member)
