"""Documents of tokens on disk, between rendering and packing: the longest of them decides the length of the rows."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from poe.data.packing import Document


class SpooledDocuments:
    """The documents in a file of token ids and a file of loss masks, in the order in which they were written."""

    def __init__(self, folder: Path, lengths: list[int]) -> None:
        self._folder, self._lengths = folder, lengths

    @property
    def longest(self) -> int:
        """The number of tokens of the longest document."""
        return max(self._lengths, default=0)

    def __iter__(self) -> Iterator[Document]:
        with (self._folder / "ids").open("rb") as ids, (self._folder / "mask").open("rb") as mask:
            for length in self._lengths:
                yield np.fromfile(ids, np.int32, length), np.fromfile(mask, np.bool_, length)


@contextmanager
def spool_documents(folder: Path, documents: Iterable[Document]) -> Iterator[SpooledDocuments]:
    """Write documents to files in a new `folder`, yield them for reading, and remove the files after the block."""
    folder.mkdir()
    lengths = []
    with (folder / "ids").open("wb") as ids_file, (folder / "mask").open("wb") as mask_file:
        for ids, mask in documents:
            lengths.append(len(ids))
            ids_file.write(np.asarray(ids, np.int32).tobytes())
            mask_file.write(np.asarray(mask, np.bool_).tobytes())
    yield SpooledDocuments(folder, lengths)
    for name in ("ids", "mask"):
        (folder / name).unlink()
    folder.rmdir()
