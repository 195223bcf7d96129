"""De-duplication and the held-out split depend on the content of rows, not on their position."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poe.calls.conversation import Conversation
from poe.calls.tools import as_tool
from poe.data.split import find_held_out, find_repetition, split_number

WEATHER = as_tool("weather", "", {"type": "object", "properties": {"city": {"type": "string"}}})
CLOCK = as_tool("clock", "", None)


def row(
    question: str, answer: str = "Yes.", tools: tuple = (), source: str = "s", more: str | None = None
) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if more is not None:
        messages += [{"role": "user", "content": more}, {"role": "assistant", "content": answer}]
    return Conversation(messages, list(tools), source=source)


def split(rows: list[Conversation], share: float = 0.02, seed: int = 0) -> tuple[list, list]:
    """Return the training rows and the held-out rows."""
    sides: tuple[list, list] = ([], [])
    numbers = np.array([split_number(conversation, seed) for conversation in rows], dtype=np.uint64)
    for conversation, is_held_out in zip(rows, find_held_out(numbers, share).tolist(), strict=True):
        sides[is_held_out].append(conversation)
    return sides


def deduplicate(rows: list[Conversation]) -> list[Conversation]:
    seen: set[bytes] = set()
    return [conversation for conversation in rows if find_repetition(conversation, seen) is None]


texts = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=40)


@given(texts, st.integers(0, 3), st.randoms())
def test_all_rows_with_a_query_are_on_one_side(questions: list[str], seed: int, rng: random.Random) -> None:
    rows = [row(q) for q in questions]
    train, held = split(rows, 0.3, seed)
    shuffled = [*rows, *(row(q.upper() + "  ") for q in questions if q.upper().lower() == q.lower())]
    rng.shuffle(shuffled)
    train2, held2 = split(shuffled, 0.3, seed)
    assert len(train) + len(held) == len(rows)
    sides = {c.query for c in train + train2}, {c.query for c in held + held2}
    assert not sides[0] & sides[1]


@given(texts, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_out_all_rows_of_a_smaller_one(questions: list[str], a: float, b: float) -> None:
    few, many = ({c.query for c in split([row(q) for q in questions], share)[1]} for share in sorted((a, b)))
    assert few <= many


def test_the_share_is_approximate_and_seeds_differ() -> None:
    rows = [row(f"question {i}") for i in range(20_000)]
    held = split(rows, 0.02, seed=1)[1]
    assert 300 < len(held) < 500
    assert {c.query for c in held} != {c.query for c in split(rows, 0.02, seed=2)[1]}
    assert split(rows, 0)[1] == []
    assert split(rows, 1)[0] == []
    with pytest.raises(ValueError, match="share from 0 to 1"):
        split(rows, 2)


def test_the_side_is_the_same_on_every_machine() -> None:
    held = [int(c.query.split()[1]) for c in split([row(f"question {i}") for i in range(200)], 0.05)[1]]
    assert held == [11, 32, 110, 168, 187, 197]


def test_at_least_one_query_is_held_out_of_the_smallest_set() -> None:
    rows = [row("the same question", answer) for answer in "ab"]
    assert split(rows, 1e-9)[1] == rows  # both have one query
    (held,) = split([*rows[:1], *(row(f"question {i}") for i in range(20))], 1e-9)[1]
    assert held.query.startswith("question")


def test_rows_without_a_user_are_split_too() -> None:
    assert sum(map(len, split([Conversation([{"role": "assistant", "content": "x"}])]))) == 1


def test_repetitions_are_equal_rows_or_equal_questions_with_equal_tools() -> None:
    rows = [
        (row("Is it raining?", tools=(WEATHER, CLOCK)), None),
        (row("Is it raining?", tools=(WEATHER, CLOCK)), "duplicate row"),
        (row("is it  raining?", "No.", tools=(CLOCK, WEATHER)), "same questions and tools"),  # another answer
        (row("Is it raining?", tools=(WEATHER,)), None),  # other tools
        (row("Is it raining?", tools=(WEATHER, CLOCK), more="And now?"), None),  # another question follows
        (row("Is it raining?", tools=(WEATHER, CLOCK), more="And later?"), None),
        (row("Is it snowing?"), None),
    ]
    seen: set[bytes] = set()
    assert [find_repetition(conversation, seen) for conversation, _ in rows] == [why for _, why in rows]


@settings(max_examples=50)
@given(texts)
def test_deduplication_is_idempotent_and_keeps_every_query(questions: list[str]) -> None:
    rows = [row(q) for q in questions]
    once = deduplicate(rows)
    assert deduplicate(once) == once
    assert {c.query for c in once} == {c.query for c in rows}
    assert len(once) == len({c.query for c in rows})
