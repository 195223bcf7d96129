"""Packing loses no document, cuts none that fits, sets no label across documents, and repeats for a seed."""

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poe.data import packing
from poe.data.packing import open_packed_rows, pack, pack_to_folder
from poe.errors import DataError

PAD = 999_999


def make_documents(lengths, seed=0):
    """Return documents in which every token id occurs once, with random masks."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum([0, *lengths])
    return [(list(range(a, b)), list(rng.random(b - a) < 0.6)) for a, b in pairwise(ends)]


def unpack(batch):
    """Return a batch's documents as (ids, labels) tuples, without padding."""
    found = []
    for ids, labels, positions in zip(*(t.tolist() for t in batch), strict=True):
        starts = [t for t, p in enumerate(positions) if p == 0]
        for a, b in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[a:b] == list(range(b - a))
            if ids[a] == PAD:
                assert set(ids[a:b]) == {PAD}
                assert b == len(ids)
                assert set(labels[a:b]) == {-100}
            else:
                found.append((tuple(ids[a:b]), tuple(labels[a:b])))
    return found


def expected_documents(documents):
    """Return the documents that rows must contain, by the definition of labels."""
    return Counter(
        (tuple(ids), tuple([t if m else -100 for t, m in zip(ids[1:], mask[1:], strict=True)] + [-100]))
        for ids, mask in documents
    )


lengths_lists = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@given(
    lengths=lengths_lists, seq_len=st.integers(1, 48), seed=st.integers(0, 99), buffer_size=st.sampled_from([1, 5, 99])
)
@settings(max_examples=60, deadline=None)
def test_no_document_is_lost_cut_or_joined(lengths, seq_len, seed, buffer_size):
    documents = make_documents(lengths, seed)
    kept = [d for d in documents if 0 < len(d[0]) <= seq_len]
    if not kept:
        with pytest.raises(DataError, match="No rows"):
            pack(documents, seq_len, seed=seed, pad_id=PAD, buffer_size=buffer_size)
        return
    rows = pack(documents, seq_len, seed=seed, pad_id=PAD, buffer_size=buffer_size)
    batch = rows.batch(0, rows.num_rows)
    assert Counter(unpack(batch)) == expected_documents(kept)
    assert all(t.shape == (rows.num_rows, seq_len) and t.dtype == torch.int64 for t in batch)

    stats = rows.stats
    too_long = [len(d[0]) for d in documents if len(d[0]) > seq_len]
    assert (stats.dropped_documents, stats.dropped_tokens) == (len(too_long), sum(too_long))
    assert stats.empty_documents == lengths.count(0)
    assert stats.documents == len(kept)
    assert stats.tokens == sum(len(d[0]) for d in kept) == int((batch.input_ids != PAD).sum())
    assert rows.trained_tokens == sum(sum(d[1][1:]) for d in kept) == int((batch.labels != -100).sum())
    assert rows.fill == stats.tokens / (rows.num_rows * seq_len)
    assert len(rows) == rows.num_rows
    assert rows.seq_len == seq_len


@given(lengths=lengths_lists, seq_len=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_splitting_keeps_every_token_and_every_label(lengths, seq_len, seed):
    documents = make_documents(lengths, seed)
    if not any(lengths):
        return
    rows = pack(documents, seq_len, long="split", seed=seed, pad_id=PAD)
    pieces = unpack(rows.batch(0, rows.num_rows))
    joined = {}  # pieces in order of their ids, which increase within a document
    for ids, labels in sorted(pieces):
        origin = next(i for i, (d, _) in enumerate(documents) if d and d[0] <= ids[0] <= d[-1])
        first, second = joined.get(origin, ((), ()))
        joined[origin] = (first + ids, second + labels)
    assert Counter(joined.values()) == expected_documents([d for d in documents if d[0]])
    # Only documents that do not fit are cut, and only into full rows.
    assert len(pieces) == sum(-(-n // seq_len) for n in lengths)
    assert rows.stats.dropped_documents == 0


@given(lengths=lengths_lists, seed=st.integers(0, 99), rows_per_step=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_packing_to_a_folder_loses_nothing_and_its_rows_depend_on_the_step(lengths, seed, rows_per_step):
    documents = make_documents(lengths, seed)
    kept = [d for d in documents if 0 < len(d[0]) <= 16]
    if not kept:
        return
    with TemporaryDirectory() as folder:
        stats = pack_to_folder(Path(folder) / "p", iter(documents), 16, seed=seed, pad_id=PAD, buffer_size=7)
        rows = open_packed_rows(Path(folder) / "p")
        batch = rows.batch(0, rows.num_rows)
        assert Counter(unpack(batch)) == expected_documents(kept)
        assert stats.tokens == sum(len(d[0]) for d in kept) == int((batch.input_ids != PAD).sum())
        assert stats.rows == rows.num_rows == len(batch.input_ids)
        for step in reversed(range(rows.num_rows // rows_per_step)):
            part = rows.batch(step, rows_per_step)
            first = step * rows_per_step
            assert all(torch.equal(a, b[first : first + rows_per_step]) for a, b in zip(part, batch, strict=True))


def test_packing_to_a_folder_holds_a_bounded_number_of_documents(tmp_path, monkeypatch):
    taken = placed = most_held = 0
    assemble = packing._assemble

    def documents():
        nonlocal taken
        for i in range(2000):
            taken += 1
            yield [i] * (1 + i % 9), [True] * (1 + i % 9)

    def count_pieces(row, seq_len, pad_id):
        nonlocal placed, most_held
        most_held = max(most_held, taken - placed)
        placed += len(row)
        return assemble(row, seq_len, pad_id)

    monkeypatch.setattr(packing, "_assemble", count_pieces)
    stats = pack_to_folder(tmp_path / "p", documents(), 32, buffer_size=50)
    assert placed == taken == 2000
    assert most_held <= 50
    assert stats.fill > 0.95


def test_rows_repeat_for_a_seed_and_differ_for_another():
    documents = make_documents([5, 9, 3, 7, 8, 2, 6, 4] * 5)
    first, again, other = (pack(documents, 16, seed=s) for s in (1, 1, 2))
    inputs = [r.batch(0, r.num_rows).input_ids for r in (first, again, other)]
    assert torch.equal(inputs[0], inputs[1])
    assert inputs[0].shape != inputs[2].shape or not torch.equal(inputs[0], inputs[2])


def test_batches_depend_on_the_step_alone():
    documents = make_documents([6] * 40)
    rows, fresh = pack(documents, 12, seed=3), pack(documents, 12, seed=3)
    order = [7, 0, 3, 7, 12, 1]
    batches = {step: rows.batch(step, 3).input_ids for step in order}
    for step in sorted(set(order)):
        assert torch.equal(batches[step], fresh.batch(step, 3).input_ids)
    # Two processes with batch 3 have the rows of one process with batch 6.
    both = torch.cat([rows.batch(4 * 2 + r, 3).input_ids for r in range(2)])
    assert torch.equal(both, rows.batch(4, 6).input_ids)


def test_every_epoch_has_every_row_once_in_another_order():
    rows = pack(make_documents([6] * 40), 12, seed=3)
    passes = [rows.batch(epoch, rows.num_rows).input_ids[:, 0].tolist() for epoch in range(3)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert len({tuple(p) for p in passes}) == 3
    across = rows.batch(1, 15).input_ids[:, 0].tolist()  # 20 rows: 15..19 of one epoch, 0..9 of the next
    assert across == passes[0][15:] + passes[1][:10]
    assert len(rows.batch(0, 50).input_ids) == 50


@pytest.mark.parametrize(("rows_per_step", "epochs", "steps"), [(4, 1, 5), (3, 1, 6), (3, 2.5, 16), (50, 1, 1)])
def test_num_steps(rows_per_step, epochs, steps):
    assert pack(make_documents([6] * 40), 12).num_steps(rows_per_step, epochs) == steps


def test_rows_are_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 0.7, 3000).astype(int), 2, 512)
    documents = [(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]
    assert pack(documents, 512).fill > 0.99


def test_a_pair_of_documents_fills_a_gap_better_than_one():
    """With few documents per row, best fit without pairs leaves 1 to 6 % empty."""
    lengths = np.random.default_rng(0).normal(330, 120, 3000).clip(100, 1000).astype(int)
    documents = [(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]
    rows = pack(documents, 1024)
    assert rows.fill > 0.995
    assert rows.stats.documents == 3000
    assert rows.stats.tokens == lengths.sum()


def test_short_documents_are_kept_for_rows_that_need_them():
    """Six in ten documents are longer than half a row and need a row each, so 1800 rows are the minimum."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(257, 430, 1800), rng.integers(80, 257, 1200)])
    documents = [(np.zeros(n, np.int32), np.ones(n, bool)) for n in rng.permutation(lengths)]
    assert pack(documents, 512).num_rows <= 1.01 * 1800


def test_documents_are_shuffled(tmp_path):
    rows = pack(make_documents([4] * 200), 4)
    order = rows.batch(0, 200).input_ids[:, 0].tolist()
    assert order != sorted(order)
    pack_to_folder(tmp_path / "p", iter(make_documents([4] * 200)), 4, buffer_size=64)
    order = open_packed_rows(tmp_path / "p").batch(0, 200).input_ids[:, 0].tolist()
    assert order != sorted(order)


def test_a_row_by_hand():
    rows = pack([([1, 5, 6], [False, True, False]), ([1, 7, 8, 9], [False, False, True, True])], 8, pad_id=0)
    ids, labels, positions = (t[0].tolist() for t in rows.batch(0, 1))
    by_first = {
        (1, 5, 6, 1, 7, 8, 9, 0): ([5, -100, -100, -100, 8, 9, -100, -100], [0, 1, 2, 0, 1, 2, 3, 0]),
        (1, 7, 8, 9, 1, 5, 6, 0): ([-100, 8, 9, -100, 5, -100, -100, -100], [0, 1, 2, 3, 0, 1, 2, 0]),
    }
    assert (labels, positions) == by_first[tuple(ids)]


def test_positions_count_through_the_row_without_isolation(tmp_path):
    documents = [([1, 5, 6], [False, True, True])] * 4
    stats = pack_to_folder(tmp_path / "p", iter(documents), 8, pad_id=0)
    apart, together = open_packed_rows(tmp_path / "p"), open_packed_rows(tmp_path / "p", isolated=False)
    assert stats.rows == apart.num_rows == 2
    one, other = apart.batch(0, 2), together.batch(0, 2)
    assert one.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]] * 2
    assert other.position_ids.tolist() == [list(range(8))] * 2
    assert one.input_ids.equal(other.input_ids)
    assert one.labels.equal(other.labels)


def test_files_contain_the_same_documents_as_memory(tmp_path):
    documents = make_documents([3, 9, 4, 12, 5, 7, 2, 8] * 10)
    stats = pack_to_folder(tmp_path / "p", iter(documents), 12, seed=3, pad_id=PAD)
    rows = open_packed_rows(tmp_path / "p", seed=3)
    assert rows.stats == stats
    in_memory = pack(documents, 12, seed=3, pad_id=PAD)
    assert Counter(unpack(rows.batch(0, len(rows)))) == Counter(unpack(in_memory.batch(0, len(in_memory))))
    assert set(rows.target_ids) == set(in_memory.target_ids)


def test_invalid_arguments_raise_errors():
    with pytest.raises(DataError, match="Document 1"):
        pack([([1, 2], [True, True]), ([1, 2], [True])], 8)
    with pytest.raises(DataError, match=r"1 documents were empty and 1 longer than a row of 2"):
        pack([([], []), ([1, 2, 3], [True] * 3)], 2)
    with pytest.raises(ValueError, match="crop"):
        pack([([1], [True])], 8, long="crop")
    with pytest.raises(ValueError, match="seq_len"):
        pack([([1], [True])], 0)


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_documents_are_packed_in_seconds(count: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 0.8, count).astype(int), 2, 2048)
    documents = [(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]
    started = time.perf_counter()
    rows = pack(documents, 2048)
    assert time.perf_counter() - started < 20 * count / 100_000
    assert rows.fill > 0.995
