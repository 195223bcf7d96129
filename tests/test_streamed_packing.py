"""Rows packed during training: a step always has the same rows, and memory holds one chunk."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poe.calls.conversation import Text
from poe.data import streamed
from poe.data.packing import Document
from poe.data.streamed import StreamedRows
from poe.errors import DataError

SEQ_LEN = 16


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "CHUNK_CHARACTERS", 60)


class Source:
    """Texts that repeat one letter each. Counts the texts that are read and tokenized."""

    def __init__(self, lengths: list[int], first: int = 97) -> None:
        self.lengths, self.first = lengths, first
        self.read = self.encoded = 0

    def texts(self) -> Iterator[Text]:
        for number, length in enumerate(self.lengths):
            self.read += 1
            yield Text(chr(self.first + number % 26) * length)

    def encode(self, texts: list[Text]) -> Iterator[Document]:
        for text in texts:
            self.encoded += 1
            ids = np.frombuffer(text.text.encode(), dtype=np.uint8).astype(np.int32)
            yield ids, np.ones(len(ids), dtype=bool)

    def rows(self, **options: Any) -> StreamedRows:
        return StreamedRows(self.texts, self.encode, SEQ_LEN, 1000, **options)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.integers(1, 5),
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
)
@settings(max_examples=50, deadline=None)
def test_a_step_has_the_same_rows_in_any_order_of_steps(lengths: list[int], per_step: int, steps: list[int]) -> None:
    rows = Source(lengths).rows(seed=3)
    in_order = [rows.batch(step, per_step) for step in range(31)]
    assert all(batch.input_ids.shape == (per_step, SEQ_LEN) for batch in in_order)
    other = Source(lengths).rows(seed=3)
    for step in steps:
        assert same(other.batch(step, per_step), in_order[step])


@given(st.lists(st.integers(2, 40), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_every_pass_has_every_token_once(lengths: list[int]) -> None:
    source = Source(lengths)
    rows = source.rows(pad_id=0)
    counted = {1: 0, 2: 0}
    for number in itertools.count():
        batch = rows.batch(number, 1)
        if rows.passes > 2:
            break
        counted[rows.passes] += int((batch.input_ids != 0).sum())
    assert counted == {1: sum(lengths), 2: sum(lengths)}


def test_rows_are_shuffled_in_their_chunk_and_differently_in_each_pass() -> None:
    rows = Source([SEQ_LEN] * 26).rows()
    firsts = [int(rows.batch(n, 1).input_ids[0, 0]) for n in range(52)]
    assert sorted(firsts[:26]) == sorted(firsts[26:]) == list(range(97, 123))
    assert firsts[:26] != sorted(firsts[:26])
    assert firsts[:26] != firsts[26:]


def test_only_the_needed_texts_are_read() -> None:
    source = Source([10] * 10_000)
    rows = source.rows()
    rows.batch(3, 2)
    assert source.read <= 20
    assert rows.num_rows == 1000
    assert rows.num_first_rows < 10


def test_a_resumed_run_packs_no_chunk_again(tmp_path: Path) -> None:
    index = tmp_path / "chunks.jsonl"
    lengths = [7, 20, 33, 12, 5, 9] * 20
    source = Source(lengths)
    rows = source.rows(index=index)
    expected = [rows.batch(step, 3) for step in range(150)]  # several passes
    first = source.encoded
    again = Source(lengths)
    rows = again.rows(index=index, resume=True)
    for step in range(140, 150):
        assert same(rows.batch(step, 3), expected[step])
    assert again.encoded < first / 5
    assert rows.passes > 2
    index.write_text(index.read_text()[:-5])  # as if the process was killed while writing
    assert same(Source(lengths).rows(index=index, resume=True).batch(149, 3), expected[149])
    Source([9] * 100).rows(index=index)  # a new run does not use the old index
    with pytest.raises(DataError, match="have changed since the run began: chunk 0"):
        Source([8] * 100).rows(index=index, resume=True)
    with pytest.raises(DataError, match="have changed since the run began: chunk 0"):
        Source([9] * 100, first=98).rows(index=index, resume=True).batch(20, 3)  # other texts of the same lengths


def test_no_text_is_an_error() -> None:
    with pytest.raises(DataError, match="No text is left to train on"):
        Source([]).rows()
