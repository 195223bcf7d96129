"""Documents -> rows of equal length -> batches, without cutting a document that fits in a row.

A row holds `seq_len` input tokens of whole documents, each beginning with its own BOS, then padding. The label of slot
t is the token after it *in its document*: labels are already shifted, and -100 where the loss mask is off, after a
document's last token, and on padding. Positions restart at every document (and at the padding), which is what attention
kernels tell packed documents by.

Best-fit packing from a bounded buffer: a row starts with a document drawn at random from the buffer (which so shuffles,
too), then takes the longest document that still fits, or a pair that fills the rest better, until none does.
"""

import json
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from poe.errors import DataError

__all__ = ["Batch", "PackedRows", "PackingStats", "Rows", "open_packed_rows", "pack", "pack_stream", "pack_to_folder"]

IGNORED = -100
BUFFER_SIZE = 1000
PAIRS = 32  # of documents that are tried for a hole, at least, where so many fit
SLACK = 1 / 64  # of a row: a smaller hole is not worth a short document, which a long one may need beside it
_ROWS_AT_ONCE = 1024
_FILES = (("tokens", np.int32, 1), ("trained", np.bool_, 0), ("starts", np.bool_, 0))

# token ids, and for each whether the loss counts it as a target
Document = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]
LongPolicy = Literal["drop", "split"]


class Batch(NamedTuple):
    """One step's rows, each int64 (B, T). `labels` are shifted already: transformers calls such `shift_labels`."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor


class Rows(Protocol):
    """Rows by step number: the same step gives the same rows, before and after a resume."""

    @property
    def num_rows(self) -> int: ...

    def batch(self, step: int, rows_per_step: int) -> Batch: ...


@dataclass(slots=True)
class PackingStats:
    """What became of the documents. `tokens` and `trained_tokens` (labels) count what lies in rows."""

    seq_len: int
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped_documents: int = 0  # longer than a row, under "drop"
    dropped_tokens: int = 0
    empty_documents: int = 0

    @property
    def fill(self) -> float:
        """The share of all slots that hold a token rather than padding, 0 .. 1."""
        return self.tokens / (self.rows * self.seq_len) if self.rows else 0.0


class _Piece(NamedTuple):
    """A document, or a row's worth of one: `ids` int32 (n + 1,) with the token after it, `trained` bool (n,)."""

    ids: np.ndarray
    trained: np.ndarray  # whether slot t's label, ids[t + 1], counts


class _Row(NamedTuple):
    tokens: np.ndarray  # int32 (T + 1,)
    trained: np.ndarray  # bool (T,)
    starts: np.ndarray  # bool (T,), True where a document or the padding begins


class PackedRows:
    """Rows (6 bytes a token, in memory or mapped), handed out by step number: a run resumes exactly where it stopped.

    `tokens` int32 (N, T + 1), `trained` bool (N, T), `starts` bool (N, T), True where a document or the padding begins.
    With `isolated` positions restart at every document, by which attention keeps them apart; else a row counts through.
    The first pass takes the rows in order (`pack` has shuffled them), every later pass in an order of its own drawn
    from `(seed, epoch)`. `stats` says what was packed and dropped.

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
        """The share of all slots that hold a token rather than padding, 0 .. 1."""
        return self.stats.fill

    @property
    def target_ids(self) -> np.ndarray:
        """The token ids that occur as a label, sorted."""
        found = [
            np.unique(self._tokens[i : i + _ROWS_AT_ONCE, 1:][self._trained[i : i + _ROWS_AT_ONCE]])
            for i in range(0, self.num_rows, _ROWS_AT_ONCE)
        ]
        return np.unique(np.concatenate(found))

    @property
    def trained_tokens(self) -> int:
        """Labels other than -100 in all rows."""
        return self.stats.trained_tokens

    def num_steps(self, rows_per_step: int, epochs: float = 1.0) -> int:
        """How many whole steps `epochs` passes make; at least 1 (a batch larger than the data repeats rows)."""
        return max(1, int(self.num_rows * epochs) // rows_per_step)

    def batch(self, step: int, rows_per_step: int) -> Batch:
        """The rows of step `step` (0, 1, ...): rows `step * rows_per_step` and following, running over into new passes.

        A function of the numbers alone: the same before and after a resume. Over `num_steps` processes, hand process r
        of w the step `step * w + r`.
        """
        first = step * rows_per_step
        picked = [self._row_at(i) for i in range(first, first + rows_per_step)]
        batch = _batch(self._tokens[picked], self._trained[picked], self._starts[picked])
        if self.isolated:
            return batch
        return batch._replace(position_ids=torch.arange(self.seq_len).expand_as(batch.input_ids).contiguous())

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
    """Pack `(ids, loss_mask)` pairs, all at once, into rows of `seq_len`; the documents are shuffled by `seed` first.

    `long`: documents of more than `seq_len` tokens are dropped and counted ("drop", for conversations) or cut into
    rows ("split", for plain text: the last slot of a cut row still has the next token as its label, so that every token
    after the first is a target once). No other document is ever cut. The same input and seed give the same rows.

    Raises `DataError` when ids and mask differ in length, or no row comes out.
    """
    stats = PackingStats(seq_len)
    rng = np.random.default_rng(seed)
    everything = list(documents)
    shuffled = (everything[i] for i in rng.permutation(len(everything)))
    rows = _rows(_pieces(shuffled, stats, long), stats, buffer_size, rng)
    tokens, trained, starts = _stacked([_assemble(row, seq_len, pad_id) for row in rows], seq_len)
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
    """Pack documents, in the order given, into files in a new `folder`; `open_packed_rows` opens them.

    Memory holds `buffer_size` documents. What is longer than a row is dropped and counted. Other arguments as `pack`.
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
    """Open what `pack_to_folder` wrote, mapped into memory. `seed` orders the passes after the first."""
    stats = PackingStats(**json.loads((folder / "stats.json").read_text()))
    shape = (stats.rows, stats.seq_len)
    tokens, trained, starts = (
        np.memmap(folder / f"{name}.bin", kind, "r", shape=(shape[0], shape[1] + extra)) if stats.rows else np.zeros(0)
        for name, kind, extra in _FILES
    )
    return PackedRows(tokens, trained, starts, stats, seed, isolated)


def pack_stream(
    documents: Iterable[Document],
    seq_len: int,
    rows_per_step: int,
    *,
    long: LongPolicy = "drop",
    seed: int = 0,
    pad_id: int = 0,
    buffer_size: int = BUFFER_SIZE,
    start_step: int = 0,
    stats: PackingStats | None = None,
) -> Iterator[Batch]:
    """Pack an endless or long iterable of `(ids, loss_mask)` pairs with at most `buffer_size` documents in memory.

    Yields one `Batch` a step; the last may have fewer rows. To resume, pass the same documents and seed with
    `start_step`: earlier steps are packed again but not handed out. `stats` is updated as rows are made. Otherwise as
    `pack`, except that the only shuffling is the buffer's.
    """
    stats = PackingStats(seq_len) if stats is None else stats
    rows = _rows(_pieces(documents, stats, long), stats, buffer_size, np.random.default_rng(seed))
    for _ in islice(rows, start_step * rows_per_step):
        pass
    while chunk := [_assemble(row, seq_len, pad_id) for row in islice(rows, rows_per_step)]:
        yield _batch(*_stacked(chunk, seq_len))


def _pieces(documents: Iterable[Document], stats: PackingStats, long: LongPolicy) -> Iterator[_Piece]:
    """Check the documents, count and leave out what cannot be packed, cut what is too long; pieces of <= T tokens."""
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
            # slot t predicts token t + 1; the last token predicts nothing
            ids, trained = np.append(ids, np.int32(0)), np.append(mask[1:], False)
            for at in range(0, trained.size, length):
                end = min(at + length, trained.size)
                yield _Piece(ids[at : end + 1], trained[at:end])


def _rows(
    pieces: Iterator[_Piece], stats: PackingStats, buffer_size: int, rng: np.random.Generator
) -> Iterator[list[_Piece]]:
    """Group the pieces into rows of at most T tokens, from a buffer of `buffer_size`."""
    buffer: list[tuple[int, int]] = []  # (length, arrival), sorted: best fit is a bisection
    held: dict[int, _Piece] = {}
    arrivals = enumerate(pieces)

    def take(position: int) -> _Piece:
        return held.pop(buffer.pop(position)[1])

    while True:
        for arrival, piece in islice(arrivals, max(1, buffer_size) - len(buffer)):
            insort(buffer, (len(piece.trained), arrival))
            held[arrival] = piece
        if not buffer:
            return
        row = [take(int(rng.integers(len(buffer))))]
        left = stats.seq_len - len(row[0].trained)
        while (position := _best_fit(buffer, left, int(SLACK * stats.seq_len))) is not None:
            row.append(take(position))
            left -= len(row[-1].trained)
        stats.rows += 1
        stats.tokens += stats.seq_len - left
        stats.trained_tokens += sum(int(p.trained.sum()) for p in row)
        yield row


def _best_fit(buffer: list[tuple[int, int]], left: int, slack: int) -> int | None:
    """Where in the sorted buffer the next piece for a hole of `left` tokens lies; None if none fits.

    The longest that fits; or, where it leaves more than `slack` tokens empty, the longer one of two that fill more.
    """
    fitting = bisect_left(buffer, (left + 1, -1))
    if not fitting:
        return None
    chosen = fitting - 1
    filled = buffer[chosen][0]
    if left - filled <= slack:
        return chosen
    for one in range(0, fitting, max(1, fitting // PAIRS)):
        other = bisect_left(buffer, (left - buffer[one][0] + 1, -1)) - 1
        other -= other == one  # no document twice
        if other >= 0 and buffer[one][0] + buffer[other][0] > filled:
            chosen, filled = max(one, other), buffer[one][0] + buffer[other][0]
    return chosen


def _assemble(row: list[_Piece], seq_len: int, pad_id: int) -> _Row:
    tokens = np.full(seq_len + 1, pad_id, dtype=np.int32)
    trained, starts = np.zeros(seq_len, dtype=bool), np.zeros(seq_len, dtype=bool)
    at = 0
    for piece in row:
        end = at + len(piece.trained)
        # the extra token is the label of a cut row's last slot; elsewhere the next piece or the padding overwrites it
        tokens[at : end + 1] = piece.ids
        trained[at:end] = piece.trained
        starts[at] = True
        at = end
    tokens[at:seq_len] = pad_id
    starts[at : at + 1] = True
    return _Row(tokens, trained, starts)


def _stacked(rows: list[_Row], seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not rows:
        return np.zeros((0, seq_len + 1), np.int32), np.zeros((0, seq_len), bool), np.zeros((0, seq_len), bool)
    tokens, trained, starts = (np.stack(part) for part in zip(*rows, strict=True))
    return tokens, trained, starts


def _batch(tokens: np.ndarray, trained: np.ndarray, starts: np.ndarray) -> Batch:
    """`tokens` int32 (B, T + 1), `trained` and `starts` bool (B, T) -> tensors (B, T)."""
    slots = np.arange(trained.shape[1])
    positions = slots - np.maximum.accumulate(np.where(starts, slots, 0), axis=1)
    labels = np.where(trained, tokens[:, 1:], IGNORED)
    return Batch(*(torch.from_numpy(a.astype(np.int64)) for a in (tokens[:, :-1], labels, positions)))
