"""Rows that are packed from a stream of text during training. Memory holds one chunk of the stream at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from poe.calls.conversation import Text
from poe.data.packing import Batch, Document, LongPolicy, PackedRows, pack
from poe.errors import DataError
from poe.files.output import convert_os_errors

CHUNK_CHARACTERS = 8_000_000  # about two million tokens, shuffled and held in memory together


class _Chunk(NamedTuple):
    """The index entry of a chunk: its pass through the texts (from 0), its numbers of texts and rows, its digest."""

    pass_number: int
    texts: int
    rows: int
    digest: str  # of the texts


class StreamedRows:
    """Rows by step number, with only the current chunk in memory. A step always gives the same rows.

    `texts` starts a pass through the documents; every pass yields the same documents. After the last document the next
    pass starts. A chunk has `CHUNK_CHARACTERS` of text. `encode` tokenizes it; each chunk is shuffled and packed
    separately, differently in each pass. Steps are expected in increasing order: a step back reads the texts again from
    the beginning, and a step ahead reads and skips the texts between.

    `index` is a file that records the chunks, so that a resumed run does not pack the chunks before its step again. An
    existing index is used if `resume` is set; it must describe the same texts.

    `num_rows` is the number of rows of the run, `num_first_rows` that of the first chunk. Raises `DataError` when there
    is no text, or when the texts have changed.
    """

    def __init__(
        self,
        texts: Callable[[], Iterator[Text]],
        encode: Callable[[list[Text]], Iterator[Document]],
        seq_len: int,
        num_rows: int,
        *,
        long: LongPolicy = "split",
        seed: int = 0,
        pad_id: int = 0,
        index: Path | None = None,
        resume: bool = False,
    ) -> None:
        self.num_rows, self.seq_len, self.seed = num_rows, seq_len, seed
        self._texts, self._encode, self._long, self._pad_id = texts, encode, long, pad_id
        self._index = index
        self._index_entries = _read_index(index) if index is not None and resume else []
        self._current_row = 0
        self._chunks = self._read_chunks()
        self._start, self._rows = next(self._chunks)
        self.num_first_rows = self._rows.num_rows

    @property
    def passes(self) -> int:
        """The number of passes through the texts so far, from 1, including an unfinished one."""
        return self._index_entries[-1].pass_number + 1

    def batch(self, step: int, rows_per_step: int) -> Batch:
        """Return `rows_per_step` rows from row `step * rows_per_step` on."""
        first = step * rows_per_step
        rows = [self._row(i) for i in range(first, first + rows_per_step)]
        return Batch(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def _row(self, number: int) -> Batch:
        self._current_row = number
        if number < self._start:
            self._chunks = self._read_chunks()
            self._start, self._rows = next(self._chunks)
        while number >= self._start + self._rows.num_rows:
            self._start, self._rows = next(self._chunks)
        return self._rows.batch(number - self._start, 1)

    def _read_chunks(self) -> Iterator[tuple[int, PackedRows]]:
        """Yield each packed chunk with the number of its first row.

        Chunks that are in the index and end before the current row are skipped without packing them.
        """
        start = number = pass_number = 0
        while True:
            texts = self._texts()
            first_of_pass = number
            while True:
                known = self._index_entries[number] if number < len(self._index_entries) else None
                if known and known.pass_number > pass_number:
                    break
                if known and start + known.rows <= self._current_row:
                    chunk = list(islice(texts, known.texts))
                    entry = _Chunk(pass_number, len(chunk), known.rows, _digest(chunk))
                    packed = None
                else:
                    chunk = _take_chunk(texts)
                    if not chunk:
                        break
                    packed = self._pack(chunk, number)
                    entry = _Chunk(pass_number, len(chunk), packed.num_rows, _digest(chunk))
                self._record(number, entry)
                if packed is not None:
                    yield start, packed
                start, number = start + entry.rows, number + 1
            if number == first_of_pass:
                raise DataError("No text is left to train on after the validation rows are held out: give more rows.")
            pass_number += 1

    def _pack(self, chunk: list[Text], number: int) -> PackedRows:
        seed = Random(f"{self.seed}/{number}").getrandbits(63)
        return pack(self._encode(chunk), self.seq_len, long=self._long, seed=seed, pad_id=self._pad_id)

    def _record(self, number: int, entry: _Chunk) -> None:
        if number < len(self._index_entries):
            known = self._index_entries[number]
            if entry != known:
                raise DataError(
                    f"The texts have changed since the run began: chunk {number} had {known.texts} texts in "
                    f"{known.rows} rows ({known.digest}), now {entry.texts} in {entry.rows} ({entry.digest}). Start a "
                    "new run in another folder."
                )
            return
        self._index_entries.append(entry)
        if self._index is not None:
            with convert_os_errors(self._index), self._index.open("a" if number else "w", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def _read_index(index: Path) -> list[_Chunk]:
    """Return the chunks in an index file, up to the first line that cannot be read."""
    entries: list[_Chunk] = []
    with suppress(OSError, ValueError, TypeError):
        for line in index.read_text(encoding="utf-8").splitlines():
            entries.append(_Chunk(*json.loads(line)))
    return entries


def _digest(texts: list[Text]) -> str:
    """Return a short hash of texts in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        encoded = text.text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _take_chunk(texts: Iterator[Text]) -> list[Text]:
    """Return the next texts, with at least `CHUNK_CHARACTERS` characters, or the remaining ones."""
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text.text)
        if characters >= CHUNK_CHARACTERS:
            break
    return chunk
