"""Distractors: tools that the question does not need, drawn from the tools of other rows."""

import hashlib
import json
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random

from poe.calls.conversation import Conversation, Tool
from poe.data.augment.fitting import Traits, harmless_to, traits

MAX_CHARACTERS = 4000
"""A longer definition would crowd out the row that it is added to."""

TRIES_PER_TOOL = 20


class ToolPool:
    """At most `size` different tools, those whose definitions have the smallest hashes.

    So it holds the same tools in the same order however the rows come, and the pool of several pools' tools is the pool
    of all their rows. Build it from training rows alone: what is held out must not be offered as a distractor.
    """

    def __init__(self, tools: Iterable[Tool] = (), size: int = 10_000) -> None:
        smallest: list[tuple[bytes, str]] = []
        known: set[bytes] = set()
        for tool in tools:
            text = json.dumps(tool, ensure_ascii=False)
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            full = len(smallest) >= size
            if digest in known or len(text) > MAX_CHARACTERS or (full and (not size or digest > smallest[-1][0])):
                continue
            known.add(digest)
            insort(smallest, (digest, text))
            if full:
                known.discard(smallest.pop()[0])
        self.tools: tuple[Tool, ...] = tuple(json.loads(text) for _, text in smallest)
        self._traits = tuple(map(traits, self.tools))

    @classmethod
    def from_conversations(cls, conversations: Iterable[Conversation], size: int = 10_000) -> "ToolPool":
        return cls((tool for conversation in conversations for tool in conversation.tools), size)

    def __len__(self) -> int:
        return len(self.tools)

    def draw(self, rng: Random, count: int, harmless: Callable[[Traits], bool]) -> list[Tool]:
        """Up to `count` tools of different names that pass the test; fewer if some tries do not find them."""
        found: list[Tool] = []
        names: set[str] = set()
        for _ in range(TRIES_PER_TOOL * count if self.tools else 0):
            at = rng.randrange(len(self.tools))
            if self._traits[at].name not in names and harmless(self._traits[at]):
                names.add(self._traits[at].name)
                found.append(self.tools[at])
                if len(found) == count:
                    break
        return found


def add_tools(conversation: Conversation, added: list[Tool], rng: Random) -> Conversation:
    """The row with more tools, in random order: a place must not give away which ones were there."""
    if not added:
        return conversation
    return replace(conversation, tools=rng.sample([*conversation.tools, *added], len(conversation.tools) + len(added)))


def add_distractors(
    rows: list[Conversation], rng: Random, pool: ToolPool, most: int, origin: Conversation | None = None
) -> list[Conversation]:
    """The rows, each with the same one to `most` tools of the pool, none of which could serve any of them; shuffled.

    `origin`: the row that they were made of, whose calls no added tool may fit either.
    """
    added = pool.draw(rng, rng.randint(1, most), harmless_to(*rows, *([origin] if origin else [])))
    return [add_tools(row, added, rng) for row in rows]
