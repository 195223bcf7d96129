"""Which parts of a user's text a call repeats: what those parts say, and where they end, must not change."""

import re
from collections.abc import Iterator

from poe.calls.conversation import Conversation
from poe.data.augment.rows import calls, strings

Span = tuple[int, int]

_QUOTED = re.compile(r'"[^"]*"|“[^”]*”|`[^`]*`|(?<!\w)\'[^\']*\'(?!\w)|(?<!\w)‘[^’]*’(?!\w)')


def argument_strings(conversation: Conversation) -> list[str]:
    """Every text in the arguments of every call that holds more than white space, each once."""
    found = (text for call in calls(conversation) for text in strings(call["arguments"]) if text.strip())
    return list(dict.fromkeys(found))


def occurrences(text: str, value: str, flags: int = 0) -> Iterator[Span]:
    """Where `value` stands in `text`, not as a part of a longer word."""
    before, after = r"(?<!\w)" if value[0].isalnum() else "", r"(?!\w)" if value[-1].isalnum() else ""
    for found in re.finditer(before + re.escape(value) + after, text, flags):
        yield found.span()


def quotations(text: str) -> list[Span]:
    return [found.span() for found in _QUOTED.finditer(text)]
