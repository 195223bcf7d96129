"""Pack documents into rows of equal length and hand them out in batches. A document that fits in a row is never cut.

A row holds `seq_len` input tokens of whole documents, each with its own BOS token, and then padding. The label of slot
t is the next token *of its document*: labels are already shifted. A label is -100 where the loss mask is off, after
the last token of a document, and on padding. Positions restart at every document and at the padding, so attention
kernels can separate packed documents.

The algorithm is best-fit packing from a bounded buffer. A row starts with a random document of the buffer, which also
shuffles the documents. It then takes the longest document that fits, or a pair that fills the rest better, until no
document fits.
"""

import json
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from poe.errors import DataError

__all__ = ["Batch", "PackedRows", "PackingStats", "Rows", "open_packed_rows", "pack", "pack_to_folder"]

IGNORED = -100
BUFFER_SIZE = 1000  # documents
MIN_PAIRS = 32  # pairs of documents that are tried for a gap, at least, if so many fit
SLACK = 1 / 64  # of a row; a smaller gap stays, because a long document may need the short one later
_CHUNK_ROWS = 1024
_FILES = (("tokens", np.int32, 1), ("trained", np.bool_, 0), ("starts", np.bool_, 0))  # name, dtype, extra columns

# Token ids, and for each token whether the loss counts it as a target.
Document = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]
LongPolicy = Literal["drop", "split"]


class Batch(NamedTuple):
    """The rows of one step, each tensor int64 (B, T). `labels` are already shifted (`shift_labels` in transformers)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor


class Rows(Protocol):
    """Rows by step number. A step always gives the same rows, before and after a resume."""

    @property
    def num_rows(self) -> int: ...

    def batch(self, step: int, rows_per_step: int) -> Batch: ...


@dataclass(slots=True)
class PackingStats:
    """Counts of packed and dropped documents. `tokens` and `trained_tokens` (labels) count the tokens in rows."""

    seq_len: int
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped_documents: int = 0  # longer than a row, with the policy "drop"
    dropped_tokens: int = 0
    empty_documents: int = 0

    @property
    def fill(self) -> float:
        """The share of slots that hold a token instead of padding, 0 to 1."""
        return self.tokens / (self.rows * self.seq_len) if self.rows else 0.0


class _Piece(NamedTuple):
    """A document, or a part of one that fills a row: its n tokens and the token after them."""

    ids: np.ndarray  # int32 (n + 1,)
    trained: np.ndarray  # bool (n,), True where the loss counts the label ids[t + 1]


class _Row(NamedTuple):
    tokens: np.ndarray  # int32 (T + 1,)
    trained: np.ndarray  # bool (T,)
    starts: np.ndarray  # bool (T,), True where a document or the padding begins


class PackedRows:
    """Rows by step number, in memory or memory-mapped (6 bytes per token).

    `tokens` int32 (N, T + 1), `trained` bool (N, T), `starts` bool (N, T), True where a document or the padding begins.
    With `isolated`, positions restart at every document, so attention separates the documents; without it, positions
    count through the row. The first epoch takes the rows in order (`pack` has shuffled them). Each later epoch takes
    them in a random order that depends on `(seed, epoch)`.

    Raises `DataError` when there are no rows.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        trained: np.ndarray,
        starts: np.ndarray,
        stats: PackingStats,
        seed: int = 0,
        isolated: bool = True,
    ) -> None:
        if not len(tokens):
            raise DataError(
                f"No rows to train on: {stats.empty_documents} documents were empty and {stats.dropped_documents} "
                f"longer than a row of {stats.seq_len} tokens. Give more data, a longer seq_len, or long='split' for "
                "plain text."
            )
        self.stats = stats
        self.seed = seed
        self.isolated = isolated
        self._tokens, self._trained, self._starts = tokens, trained, starts
        self._order = (0, np.arange(len(tokens)))  # (epoch, row numbers)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_rows(self) -> int:
        return len(self._tokens)

    @property
    def seq_len(self) -> int:
        return self._trained.shape[1]

    @property
    def fill(self) -> float:
        """The share of slots that hold a token instead of padding, 0 to 1."""
        return self.stats.fill

    @property
    def target_ids(self) -> np.ndarray:
        """The token ids that occur as a label, sorted."""
        chunks = [slice(i, i + _CHUNK_ROWS) for i in range(0, self.num_rows, _CHUNK_ROWS)]
        return np.unique(np.concatenate([np.unique(self._tokens[c, 1:][self._trained[c]]) for c in chunks]))

    @property
    def trained_tokens(self) -> int:
        """The number of labels other than -100 in all rows."""
        return self.stats.trained_tokens

    def num_steps(self, rows_per_step: int, epochs: float = 1.0) -> int:
        """Return the number of whole steps in `epochs`, at least 1 (a batch larger than the data repeats rows)."""
        return max(1, int(self.num_rows * epochs) // rows_per_step)

    def batch(self, step: int, rows_per_step: int) -> Batch:
        """Return `rows_per_step` rows from row `step * rows_per_step` on, continuing into the next epoch.

        The result depends only on the arguments, so it is the same before and after a resume. With w processes, rank r
        takes the step `step * w + r`.
        """
        first = step * rows_per_step
        rows = [self._row_at(i) for i in range(first, first + rows_per_step)]
        batch = _make_batch(self._tokens[rows], self._trained[rows], self._starts[rows])
        if self.isolated:
            return batch
        return batch._replace(position_ids=torch.arange(self.seq_len).expand_as(batch.input_ids).contiguous())

    def first_prompts(self, most: int, most_tokens: int) -> list[list[int]]:
        """Return the tokens before the first label of documents that are spread over all rows.

        At most `most` prompts, and no further one once they have `most_tokens` tokens.
        """
        prompts: list[list[int]] = []
        rows = np.unique(np.linspace(0, self.num_rows - 1, num=most, dtype=int))
        for row in rows:
            starts, labels = np.flatnonzero(self._starts[row]), np.flatnonzero(self._trained[row])
            spans = [
                (start, own[0] + 1)  # a label is the next token
                for start, end in pairwise([*starts, self.seq_len])
                if len(own := labels[(labels >= start) & (labels < end)])
            ]
            for start, end in spans[: ceil(most / len(rows))]:
                if len(prompts) == most or sum(map(len, prompts)) >= most_tokens:
                    return prompts
                prompts.append(self._tokens[row, start:end].tolist())
        return prompts

    def _row_at(self, index: int) -> int:
        epoch, offset = divmod(index, self.num_rows)
        if self._order[0] != epoch:
            identity = np.arange(self.num_rows)
            rng = np.random.default_rng((self.seed, epoch))
            self._order = (epoch, rng.permutation(identity) if epoch else identity)
        return int(self._order[1][offset])


def pack(
    documents: Iterable[Document],
    seq_len: int,
    *,
    long: LongPolicy = "drop",
    seed: int = 0,
    pad_id: int = 0,
    buffer_size: int = BUFFER_SIZE,
) -> PackedRows:
    """Shuffle `(ids, loss_mask)` pairs and pack them into rows of `seq_len` tokens in memory.

    `long` is the policy for documents of more than `seq_len` tokens. "drop" (for conversations) drops and counts them.
    "split" (for plain text) cuts them into rows; the last slot of a cut row has the next token as its label, so every
    token after the first is a target once. No other document is cut. The same input and seed give the same rows.

    Raises `DataError` when ids and mask differ in length, or there are no rows.
    """
    stats = PackingStats(seq_len)
    rng = np.random.default_rng(seed)
    document_list = list(documents)
    shuffled = (document_list[i] for i in rng.permutation(len(document_list)))
    rows = _rows(_pieces(shuffled, stats, long), stats, buffer_size, rng)
    tokens, trained, starts = _stack_rows([_assemble(row, seq_len, pad_id) for row in rows], seq_len)
    return PackedRows(tokens, trained, starts, stats, seed)


def pack_to_folder(
    folder: Path,
    documents: Iterable[Document],
    seq_len: int,
    *,
    seed: int = 0,
    pad_id: int = 0,
    buffer_size: int = BUFFER_SIZE,
) -> PackingStats:
    """Pack documents, in the given order, into files in a new `folder` that `open_packed_rows` opens.

    At most `buffer_size` documents are in memory. Documents longer than a row are dropped and counted. The other
    arguments are those of `pack`.
    """
    folder.mkdir()
    stats = PackingStats(seq_len)
    rows = _rows(_pieces(iter(documents), stats, "drop"), stats, buffer_size, np.random.default_rng(seed))
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{name}.bin").open("wb")) for name, _, _ in _FILES]
        for row in rows:
            for file, part in zip(files, _assemble(row, seq_len, pad_id), strict=True):
                file.write(part.tobytes())
    (folder / "stats.json").write_text(json.dumps(asdict(stats)))
    return stats


def open_packed_rows(folder: Path, seed: int = 0, isolated: bool = True) -> PackedRows:
    """Open the files of `pack_to_folder` as memory maps. `seed` sets the order of the epochs after the first."""
    stats = PackingStats(**json.loads((folder / "stats.json").read_text()))
    tokens, trained, starts = (
        np.memmap(folder / f"{name}.bin", dtype, "r", shape=(stats.rows, stats.seq_len + extra))
        if stats.rows
        else np.zeros(0)
        for name, dtype, extra in _FILES
    )
    return PackedRows(tokens, trained, starts, stats, seed, isolated)


def _pieces(documents: Iterable[Document], stats: PackingStats, long: LongPolicy) -> Iterator[_Piece]:
    """Check and count the documents, and cut or drop those that are too long. Yields pieces of at most T tokens."""
    if stats.seq_len < 1 or long not in ("drop", "split"):
        raise ValueError(f"Expected seq_len >= 1 and long 'drop' or 'split', got {stats.seq_len} and {long!r}.")
    length = stats.seq_len
    for number, (raw_ids, raw_mask) in enumerate(documents):
        ids, mask = np.asarray(raw_ids, dtype=np.int32), np.asarray(raw_mask, dtype=bool)
        if ids.shape != mask.shape or ids.ndim != 1:
            raise DataError(f"Document {number}: {ids.shape} token ids but a loss mask of {mask.shape}; expected (n,).")
        if not ids.size:
            stats.empty_documents += 1
        elif ids.size > length and long == "drop":
            stats.dropped_documents += 1
            stats.dropped_tokens += ids.size
        else:
            stats.documents += 1
            # slot t predicts token t + 1; the last token has no label
            ids, trained = np.append(ids, np.int32(0)), np.append(mask[1:], False)
            for start in range(0, trained.size, length):
                end = min(start + length, trained.size)
                yield _Piece(ids[start : end + 1], trained[start:end])


def _rows(
    pieces: Iterator[_Piece], stats: PackingStats, buffer_size: int, rng: np.random.Generator
) -> Iterator[list[_Piece]]:
    """Group the pieces into rows of at most T tokens, from a buffer of `buffer_size` pieces."""
    buffer: list[tuple[int, int]] = []  # (length, number), sorted, so that best fit is a bisection
    pieces_by_number: dict[int, _Piece] = {}
    numbered = enumerate(pieces)

    def take(position: int) -> _Piece:
        return pieces_by_number.pop(buffer.pop(position)[1])

    while True:
        for number, piece in islice(numbered, max(1, buffer_size) - len(buffer)):
            insort(buffer, (len(piece.trained), number))
            pieces_by_number[number] = piece
        if not buffer:
            return
        row = [take(int(rng.integers(len(buffer))))]
        gap = stats.seq_len - len(row[0].trained)
        while (position := _best_fit(buffer, gap, int(SLACK * stats.seq_len))) is not None:
            row.append(take(position))
            gap -= len(row[-1].trained)
        stats.rows += 1
        stats.tokens += stats.seq_len - gap
        stats.trained_tokens += sum(int(p.trained.sum()) for p in row)
        yield row


def _best_fit(buffer: list[tuple[int, int]], gap: int, slack: int) -> int | None:
    """Return the position in the sorted buffer of the next piece for a gap of `gap` tokens; None if none fits.

    It is the longest piece that fits. If that piece leaves more than `slack` tokens empty, it is the longer piece of a
    pair that fills more.
    """
    num_fitting = bisect_left(buffer, (gap + 1, -1))
    if not num_fitting:
        return None
    best = num_fitting - 1
    filled = buffer[best][0]
    if gap - filled <= slack:
        return best
    for first in range(0, num_fitting, max(1, num_fitting // MIN_PAIRS)):
        second = bisect_left(buffer, (gap - buffer[first][0] + 1, -1)) - 1
        second -= second == first  # a pair has two different documents
        if second >= 0 and buffer[first][0] + buffer[second][0] > filled:
            best, filled = max(first, second), buffer[first][0] + buffer[second][0]
    return best


def _assemble(row: list[_Piece], seq_len: int, pad_id: int) -> _Row:
    tokens = np.full(seq_len + 1, pad_id, dtype=np.int32)
    trained, starts = np.zeros(seq_len, dtype=bool), np.zeros(seq_len, dtype=bool)
    start = 0
    for piece in row:
        end = start + len(piece.trained)
        # The extra token is the label of a cut row's last slot. Otherwise the next piece or the padding overwrites it.
        tokens[start : end + 1] = piece.ids
        trained[start:end] = piece.trained
        starts[start] = True
        start = end
    tokens[start:seq_len] = pad_id
    starts[start : start + 1] = True
    return _Row(tokens, trained, starts)


def _stack_rows(rows: list[_Row], seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not rows:
        return np.zeros((0, seq_len + 1), np.int32), np.zeros((0, seq_len), bool), np.zeros((0, seq_len), bool)
    tokens, trained, starts = (np.stack(part) for part in zip(*rows, strict=True))
    return tokens, trained, starts


def _make_batch(tokens: np.ndarray, trained: np.ndarray, starts: np.ndarray) -> Batch:
    """Convert `tokens` int32 (B, T + 1), `trained` and `starts` bool (B, T) to tensors (B, T)."""
    slots = np.arange(trained.shape[1])
    positions = slots - np.maximum.accumulate(np.where(starts, slots, 0), axis=1)
    labels = np.where(trained, tokens[:, 1:], IGNORED)
    return Batch(*(torch.from_numpy(a.astype(np.int64)) for a in (tokens[:, :-1], labels, positions)))
