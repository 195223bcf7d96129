"""Case: a user's text in lower case, in upper case, or with capitals only where sentences begin.

Values that a call copies must still be derivable. So:

* A text argument that stands word for word in a user's text changes as it does there: "WEATHER IN OSLO" asks for the
  city "OSLO". If it stands in two places that change differently, the row is left alone.
* Texts that an `enum` or `const` of the tool lists do not change: the list tells how they are written.
* A row is left alone when an argument is put together of words of the text ("Paris, France" of "Paris"), is a part of a
  longer word there, is a key of an object, or no longer fits its schema (a `pattern`); when a text holds code, markup
  or an address (case matters there), names a tool, or speaks of letters and case itself.
* Answers, results and numbers stay as they are.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.renaming import is_identifier
from poe.calls.schema import check_call, find_tool, map_arguments
from poe.data.augment.copied import argument_strings, occurrences
from poe.data.augment.rows import calls, strings, user_texts

_UNSAFE = re.compile(
    r"://|[`{}<>\\=]|\b(?:case|capital\w*|uppercase|lowercase|caps|acronym\w*|letters?|spell\w*)\b", re.I
)
_SENTENCE = re.compile(r"(?:\A|[.!?]\s+|\n\s*)[\"'“‘(]*(\w)")
_LETTERS = re.compile(r"[^\W\d_]+")


def _lower(text: str) -> str:
    """Letter by letter, so that every place stays where it is; a letter whose other case is longer stays."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _upper(text: str) -> str:
    return "".join(c.upper() if len(c.upper()) == 1 else c for c in text)


def _sentence(text: str) -> str:
    letters = list(re.sub(r"\bi\b", "I", _lower(text)))
    for found in _SENTENCE.finditer(text):
        letters[found.start(1)] = _upper(letters[found.start(1)])
    return "".join(letters)


MODES: tuple[Callable[[str], str], ...] = (_lower, _lower, _lower, _sentence, _upper)
"""As people write: mostly in lower case."""


def change_case(conversation: Conversation, rng: Random) -> Conversation:
    """The row with its user's texts in another case, or the row itself where that is not safe."""
    change = rng.choice(MODES)
    texts = {text: change(text) for text in user_texts(conversation)}
    if any(_UNSAFE.search(text) for text in texts) or all(text == changed for text, changed in texts.items()):
        return conversation
    kept = [*_free_keys(conversation), *(name for name in _tool_names(conversation) if is_identifier(name))]
    if any(word in text for word in kept for text in texts):
        return conversation
    values: dict[str, str] = {}
    for value in argument_strings(conversation):
        forms = {changed[a:b] for text, changed in texts.items() for a, b in occurrences(text, value)}
        if len(forms) > 1 or (not forms and _is_made_of(value, texts)):
            return conversation
        values[value] = forms.pop() if forms else value

    def arguments(function: dict[str, Any] | None, given: Any) -> Any:
        listed = set(_listed(function["parameters"])) if function else set()
        return _replace(given, {value: new for value, new in values.items() if value not in listed})

    messages = []
    for message in conversation.messages:
        if message["role"] == "user" and message["content"]:
            message = {**message, "content": texts[message["content"]]}
        elif message.get("tool_calls"):
            message = map_arguments(message, arguments, conversation.tools)
        messages.append(message)
    changed_row = replace(conversation, messages=messages)
    return conversation if _breaks_a_call(conversation, changed_row) else changed_row


def _is_made_of(value: str, texts: dict[str, str]) -> bool:
    """Whether a value that is not in the texts as it stands owes them a word, or is inside one, that now changes."""
    for text, changed in texts.items():
        at = text.find(value)
        if len(value) > 2 and at >= 0 and changed[at : at + len(value)] != value:
            return True
        for word in _LETTERS.findall(value):
            if any(changed[a:b] != word for a, b in occurrences(text, word)):
                return True
    return False


def _breaks_a_call(before: Conversation, after: Conversation) -> bool:
    for old, new in zip(calls(before), calls(after), strict=True):
        if old != new and check_call(after.tools, new["name"], new["arguments"]):
            return True
    return False


def _tool_names(conversation: Conversation) -> list[str]:
    return [tool["function"]["name"] for tool in conversation.tools]


def _free_keys(conversation: Conversation) -> Iterator[str]:
    """The keys inside arguments that are the user's words, perhaps: those below the first level that have letters."""
    for call in calls(conversation):
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


def _listed(schema: Any) -> Iterator[str]:
    """The texts that a schema lists as possible values, at any depth."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield from strings(value) if key in ("enum", "const") else _listed(value)
    elif isinstance(schema, list):
        for member in schema:
            yield from _listed(member)


def _replace(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, str):
        return texts.get(value, value)
    if isinstance(value, dict):
        return {key: _replace(member, texts) for key, member in value.items()}
    return [_replace(member, texts) for member in value] if isinstance(value, list) else value
