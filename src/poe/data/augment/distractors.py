"""Distractors: add tools that the question does not need, drawn from the tools of other rows."""

import hashlib
import json
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random

from poe.calls.conversation import Conversation, Tool
from poe.data.augment.fitting import ToolTraits, distractor_filter, get_traits

MAX_CHARACTERS = 4000
"""The maximum length of a definition; longer ones would take too much space in the row."""

MAX_TRIES_PER_TOOL = 20


class ToolPool:
    """At most `size` different tools, those with the smallest hashes of their definitions.

    The pool has the same tools in the same order for any order of the rows, and pools can be merged. Build it only from
    training rows, because a held-out tool must not be offered as a distractor.
    """

    def __init__(self, tools: Iterable[Tool] = (), size: int = 10_000) -> None:
        entries: list[tuple[bytes, str]] = []
        digests: set[bytes] = set()
        for tool in tools:
            text = json.dumps(tool, ensure_ascii=False)
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            full = len(entries) >= size
            if digest in digests or len(text) > MAX_CHARACTERS or (full and (not size or digest > entries[-1][0])):
                continue
            digests.add(digest)
            insort(entries, (digest, text))
            if full:
                digests.discard(entries.pop()[0])
        self.tools: tuple[Tool, ...] = tuple(json.loads(text) for _, text in entries)
        self._traits = tuple(map(get_traits, self.tools))

    @classmethod
    def from_conversations(cls, conversations: Iterable[Conversation], size: int = 10_000) -> "ToolPool":
        """Return the pool of the tools of these rows."""
        return cls((tool for conversation in conversations for tool in conversation.tools), size)

    def __len__(self) -> int:
        return len(self.tools)

    def draw(self, rng: Random, count: int, is_harmless: Callable[[ToolTraits], bool]) -> list[Tool]:
        """Return up to `count` tools with different names that pass the test, fewer if the tries find fewer."""
        drawn: list[Tool] = []
        names: set[str] = set()
        for _ in range(MAX_TRIES_PER_TOOL * count if self.tools else 0):
            index = rng.randrange(len(self.tools))
            traits = self._traits[index]
            if traits.name not in names and is_harmless(traits):
                names.add(traits.name)
                drawn.append(self.tools[index])
                if len(drawn) == count:
                    break
        return drawn


def add_tools(conversation: Conversation, added: list[Tool], rng: Random) -> Conversation:
    """Return the row with more tools, in random order, so that a position does not reveal which tools were added."""
    if not added:
        return conversation
    return replace(conversation, tools=rng.sample([*conversation.tools, *added], len(conversation.tools) + len(added)))


def add_distractors(
    rows: list[Conversation], rng: Random, pool: ToolPool, max_tools: int, origin: Conversation | None = None
) -> list[Conversation]:
    """Add the same one to `max_tools` tools of the pool to each row, in random order. No added tool serves any row.

    `origin` is the row from which `rows` were made; no added tool fits its calls.
    """
    added = pool.draw(rng, rng.randint(1, max_tools), distractor_filter(*rows, *([origin] if origin else [])))
    return [add_tools(row, added, rng) for row in rows]
