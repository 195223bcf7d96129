"""Conversations on disk: written once, then read by number, in any order and by any process."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from poe.calls.conversation import Conversation

_ROWS, _OFFSETS = "rows.jsonl", "offsets.npy"


class RowWriter:
    """Appends conversations to a new store in `folder`. The store can be read after `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / _ROWS).open("wb")
        self._offsets = [0]

    def append(self, conversation: Conversation) -> None:
        """Write one row. Rows are numbered from 0."""
        c = conversation
        line = json.dumps([c.messages, c.tools, c.source, c.license, c.id], ensure_ascii=False, separators=(",", ":"))
        self._offsets.append(self._offsets[-1] + self._file.write(line.encode("utf-8") + b"\n"))

    def close(self) -> None:
        """Finish the store."""
        self._file.close()
        np.save(self._folder / _OFFSETS, np.array(self._offsets, dtype=np.int64))


class RowStore(Sequence[Conversation]):
    """The conversations of a finished store, by number. Every access reads the row from disk.

    There is no memory map, because the memory of a process would include every page that was ever read. Processes must
    not share a `RowStore`.
    """

    def __init__(self, folder: Path) -> None:
        self._offsets = np.load(folder / _OFFSETS)
        self._file = (folder / _ROWS).open("rb")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        self._file.seek(start)
        return Conversation(*json.loads(self._file.read(end - start)))

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))
