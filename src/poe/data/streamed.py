"""Rows packed from a stream of text while training asks for them: memory holds one chunk, however long the stream."""

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

CHUNK_CHARACTERS = 8_000_000  # about two million tokens: what is shuffled together, and held


class _Chunk(NamedTuple):
    """What is noted of a chunk: in which pass through the texts it lies, how many it took, and the rows they made."""

    passed: int
    texts: int
    rows: int


class StreamedRows:
    """Rows by step number, of which the chunk in use is held: the same step gives the same rows, whenever it is asked.

    `texts` begins a pass through the documents, the same each time; where they end, the next pass begins. A chunk is
    `CHUNK_CHARACTERS` of them, tokenized by `encode`, and shuffled and packed by itself, differently in each pass.
    Steps are meant to be asked for in order: going back reads from the beginning, going on reads over what is between.
    `index` is a file that notes the chunks, so that a run that is resumed does not pack again those it has used; what
    is in it when rows are made holds if `resume`, and must be about the same texts.

    `num_rows` is how many there are to be; `num_first_rows` are those of the first chunk. Raises `DataError` when there
    is no text, or when it is not what it was.
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
        self._noted = _read(index) if index is not None and resume else []
        self._wanted = 0
        self._chunks = self._from_the_beginning()
        self._start, self._rows = next(self._chunks)
        self.num_first_rows = self._rows.num_rows

    @property
    def passes(self) -> int:
        """In which pass through the texts the furthest chunk lies, from 1."""
        return self._noted[-1].passed + 1

    def batch(self, step: int, rows_per_step: int) -> Batch:
        """The rows of step `step` (0, 1, ...): rows `step * rows_per_step` and following."""
        first = step * rows_per_step
        rows = [self._row(i) for i in range(first, first + rows_per_step)]
        return Batch(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def _row(self, number: int) -> Batch:
        self._wanted = number
        if number < self._start:
            self._chunks = self._from_the_beginning()
            self._start, self._rows = next(self._chunks)
        while number >= self._start + self._rows.num_rows:
            self._start, self._rows = next(self._chunks)
        return self._rows.batch(number - self._start, 1)

    def _from_the_beginning(self) -> Iterator[tuple[int, PackedRows]]:
        """The chunks, each with the number of its first row; noted ones before the wanted row are only read over."""
        start = number = passed = 0
        while True:
            texts = self._texts()
            before = number
            while True:
                noted = self._noted[number] if number < len(self._noted) else None
                if noted and noted.passed > passed:
                    break
                if noted and start + noted.rows <= self._wanted:
                    made = _Chunk(passed, sum(1 for _ in islice(texts, noted.texts)), noted.rows)
                    packed = None
                else:
                    chunk = _take(texts)
                    if not chunk:
                        break
                    packed = self._packed(chunk, number)
                    made = _Chunk(passed, len(chunk), packed.num_rows)
                self._note(number, made)
                if packed is not None:
                    yield start, packed
                start, number = start + made.rows, number + 1
            if number == before:
                raise DataError("There is no text to train on beside what is held out for validation: give more rows.")
            passed += 1

    def _packed(self, chunk: list[Text], number: int) -> PackedRows:
        seed = Random(f"{self.seed}/{number}").getrandbits(63)
        return pack(self._encode(chunk), self.seq_len, long=self._long, seed=seed, pad_id=self._pad_id)

    def _note(self, number: int, made: _Chunk) -> None:
        if number < len(self._noted):
            if made != self._noted[number]:
                raise DataError(
                    f"The texts are not what they were when the run began: chunk {number} had "
                    f"{self._noted[number].texts} texts in {self._noted[number].rows} rows, now {made.texts} in "
                    f"{made.rows}. Begin a new run in another folder."
                )
            return
        self._noted.append(made)
        if self._index is not None:
            with self._index.open("a" if number else "w", encoding="utf-8") as file:
                file.write(json.dumps(made) + "\n")


def _read(index: Path) -> list[_Chunk]:
    """The chunks that a file notes, as far as it can be read."""
    noted: list[_Chunk] = []
    with suppress(OSError, ValueError, TypeError):
        for line in index.read_text(encoding="utf-8").splitlines():
            noted.append(_Chunk(*json.loads(line)))
    return noted


def _take(texts: Iterator[Text]) -> list[Text]:
    """The next texts, of `CHUNK_CHARACTERS` or what is left."""
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text.text)
        if characters >= CHUNK_CHARACTERS:
            break
    return chunk
