"""Case: change the user's texts to lower case, to upper case, or to capitals only at the start of sentences.

The values that a call copies must still follow from the texts:

* A text argument that occurs word for word in a user's text changes with it: "WEATHER IN OSLO" asks for the city
  "OSLO". If it occurs in two places that change differently, the row stays unchanged.
* Texts in an `enum` or `const` of the tool do not change, because the list defines their spelling.
* A row stays unchanged if an argument combines words of the text ("Paris, France" from "Paris"), is part of a longer
  word in it, is a key of an object, or no longer fits its schema (a `pattern`). It also stays unchanged if a text
  contains code, markup or an address, in which case matters, names a tool, or is about letters and case.
* Answers, results and numbers do not change.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

from poe.calls.arguments import check_call, find_tool, map_arguments
from poe.calls.conversation import Conversation
from poe.calls.renaming import is_identifier
from poe.data.augment.rows import argument_strings, find_occurrences, iter_calls, iter_strings, user_texts

_UNSAFE = re.compile(
    r"://|[`{}<>\\=]|\b(?:case|capital\w*|uppercase|lowercase|caps|acronym\w*|letters?|spell\w*)\b", re.I
)
_SENTENCE = re.compile(r"(?:\A|[.!?]\s+|\n\s*)[\"'“‘(]*(\w)")
_LETTERS = re.compile(r"[^\W\d_]+")


def _lower(text: str) -> str:
    """Lower each letter separately, so that positions stay. A letter with a longer other case is unchanged."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _upper(text: str) -> str:
    return "".join(c.upper() if len(c.upper()) == 1 else c for c in text)


def _sentence_case(text: str) -> str:
    letters = list(re.sub(r"\bi\b", "I", _lower(text)))
    for match in _SENTENCE.finditer(text):
        letters[match.start(1)] = _upper(letters[match.start(1)])
    return "".join(letters)


MODES: tuple[Callable[[str], str], ...] = (_lower, _lower, _lower, _sentence_case, _upper)
"""The changes to choose from; most people write in lower case."""


def change_case(conversation: Conversation, rng: Random) -> Conversation:
    """Return the row with the user's texts in another case, or the row itself if that is not safe."""
    change = rng.choice(MODES)
    texts = {text: change(text) for text in user_texts(conversation)}
    if any(_UNSAFE.search(text) for text in texts) or all(text == changed for text, changed in texts.items()):
        return conversation
    fixed = [*_free_keys(conversation), *(name for name in _tool_names(conversation) if is_identifier(name))]
    if any(word in text for word in fixed for text in texts):
        return conversation
    values: dict[str, str] = {}
    for value in argument_strings(conversation):
        spellings = {changed[a:b] for text, changed in texts.items() for a, b in find_occurrences(text, value)}
        if len(spellings) > 1 or (not spellings and _depends_on(value, texts)):
            return conversation
        values[value] = spellings.pop() if spellings else value

    def change_arguments(function: dict[str, Any] | None, arguments: Any) -> Any:
        fixed_texts = set(_listed_texts(function["parameters"])) if function else set()
        return _replace(arguments, {value: new for value, new in values.items() if value not in fixed_texts})

    messages = []
    for message in conversation.messages:
        if message["role"] == "user" and message["content"]:
            message = {**message, "content": texts[message["content"]]}
        elif message.get("tool_calls"):
            message = map_arguments(message, change_arguments, conversation.tools)
        messages.append(message)
    changed_row = replace(conversation, messages=messages)
    return conversation if _breaks_a_call(conversation, changed_row) else changed_row


def _depends_on(value: str, texts: dict[str, str]) -> bool:
    """Return whether a value has a changed word of the texts, or is part of a changed word."""
    for text, changed in texts.items():
        start = text.find(value)
        if len(value) > 2 and start >= 0 and changed[start : start + len(value)] != value:
            return True
        for word in _LETTERS.findall(value):
            if any(changed[a:b] != word for a, b in find_occurrences(text, word)):
                return True
    return False


def _breaks_a_call(before: Conversation, after: Conversation) -> bool:
    for old, new in zip(iter_calls(before), iter_calls(after), strict=True):
        if old != new and check_call(after.tools, new["name"], new["arguments"]):
            return True
    return False


def _tool_names(conversation: Conversation) -> list[str]:
    return [tool["function"]["name"] for tool in conversation.tools]


def _free_keys(conversation: Conversation) -> Iterator[str]:
    """Yield the keys inside arguments that may be the user's words: undeclared names, and nested keys with letters."""
    for call in iter_calls(conversation):
        tool = find_tool(conversation.tools, call["name"])
        declared = tool["parameters"].get("properties", {}) if tool else {}
        for name, value in call["arguments"].items():
            yield from _keys(value)
            if name not in declared:
                yield name


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (key for key in value if _LETTERS.search(key))
    if isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _keys(member)


def _listed_texts(schema: Any) -> Iterator[str]:
    """Yield the texts that a schema lists as possible values, at any depth."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield from iter_strings(value) if key in ("enum", "const") else _listed_texts(value)
    elif isinstance(schema, list):
        for member in schema:
            yield from _listed_texts(member)


def _replace(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, str):
        return texts.get(value, value)
    if isinstance(value, dict):
        return {key: _replace(member, texts) for key, member in value.items()}
    return [_replace(member, texts) for member in value] if isinstance(value, list) else value
