"""Near-duplicates: the estimate matches the sets' similarity, and kept rows are not near-duplicates."""

import random

import numpy as np
import pytest

from poe.calls.conversation import Conversation
from poe.data.near import NearDuplicates, shingles


def row(text: str) -> Conversation:
    return Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}])


def sentence(rng: random.Random, length: int = 60) -> list[str]:
    return [f"w{rng.randrange(10_000)}" for _ in range(length)]


def similarity(a: Conversation, b: Conversation) -> float:
    x, y = shingles(a), shingles(b)
    return len(x & y) / len(x | y)


def test_dropped_rows_are_similar_and_kept_rows_are_not() -> None:
    rng = random.Random(0)
    rows = []
    for _ in range(300):
        words = sentence(rng)
        rows.append(row(" ".join(words)))
        for _ in range(3):
            changed = list(words)
            for at in rng.sample(range(len(words)), rng.randrange(8)):
                changed[at] = "other"
            rows.append(row(" ".join(changed)))
    rng.shuffle(rows)
    near = NearDuplicates(0.7)
    for conversation in rows:
        near.add(conversation)
    found = dict(near.find())
    truth = [similarity(rows[later], rows[earlier]) for later, earlier in found.items()]
    assert all(earlier < later and earlier not in found for later, earlier in found.items())
    assert min(truth) > 0.55  # an estimate from 128 values has a standard error of 0.04
    assert np.mean(truth) > 0.8
    kept = [i for i in range(len(rows)) if i not in found]
    by_word: dict[str, list[int]] = {}
    for i in kept:
        for text in shingles(rows[i]):
            by_word.setdefault(text, []).append(i)
    pairs = {(a, b) for group in by_word.values() for a in group for b in group if a < b}
    missed = sum(similarity(rows[a], rows[b]) > 0.85 for a, b in pairs)
    assert missed <= 0.02 * len(found)


@pytest.mark.parametrize("texts", [[], ["one"], ["one", "two words here"], ["", ""]])
def test_few_rows_are_compared(texts: list[str]) -> None:
    near = NearDuplicates(0.9)
    for text in texts:
        near.add(row(text))
    assert dict(near.find()) == ({1: 0} if texts == ["", ""] else {})


def test_calls_and_tools_distinguish_rows() -> None:
    def make_row(n: int, tools: tuple[str, ...]) -> Conversation:
        call = {"function": {"name": "act", "arguments": {"n": n}}}
        messages = [{"role": "user", "content": "do it"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return Conversation(messages, [{"type": "function", "function": {"name": name}} for name in tools])

    assert similarity(make_row(1, ("act",)), make_row(1, ("act",))) == 1
    assert similarity(make_row(1, ("act",)), make_row(2, ("act",))) < 0.8
    assert similarity(make_row(1, ("act",)), make_row(1, ("act", "wait", "see"))) < 0.8
