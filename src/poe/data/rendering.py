"""Numbered rows to documents, in any process, and the account of what became of each."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from poe.calls.conversation import Conversation
from poe.data.augment import ToolPool, augment
from poe.data.corpus import Corpus
from poe.data.drops import DropReport
from poe.data.render import Renderer
from poe.data.store import RowStore
from poe.errors import DataError, RowError, TemplateError
from poe.stages.augmentation import Augmentation

REFUSED, HIDDEN = "the chat template refuses it", "the chat template hides the assistant's tokens"

Document = tuple[np.ndarray, np.ndarray]  # token ids int32, loss mask bool


class Rendered(NamedTuple):
    """What became of a row in one of its passes: its documents, or why there are none."""

    row: int
    epoch: int
    documents: list[Document]
    dropped: str | None = None
    failure: str | None = None  # the message of a `TemplateError`
    left_plain: str | None = None  # why the augmented row could not be used, so that the row was taken as it is


class _Unusable(Exception):
    """A conversation gives no document; `hidden` is the message of a `TemplateError`."""

    def __init__(self, reason: str, hidden: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.hidden = reason, hidden


class RenderRows:
    """Augments and renders numbered rows of a store; this is what a worker process is handed."""

    def __init__(
        self,
        folder: Path,
        renderer: Renderer,
        seq_len: int,
        augmentation: Augmentation | None = None,
        pool: ToolPool | None = None,
        seed: int = 0,
    ) -> None:
        self.renderer, self.seq_len = renderer, seq_len
        self._augmentation = augmentation or Augmentation()
        self._pool, self.seed = pool or ToolPool(), seed
        self._folder = folder
        self._rows: RowStore | None = None

    def __call__(self, items: np.ndarray) -> list[Rendered]:
        """Render items, int64 (n, 2): the row's number and its pass."""
        self._rows = self._rows or RowStore(self._folder)
        return [self._one(self._rows[row], row, epoch) for row, epoch in items.tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None}  # every process maps the file itself

    def _one(self, conversation: Conversation, row: int, epoch: int) -> Rendered:
        left_plain = None
        rows = augment(conversation, self._augmentation, epoch=epoch, seed=self.seed, pool=self._pool)
        if rows != [conversation]:
            try:
                return Rendered(row, epoch, [document for one in rows for document in self._documents(one)])
            except _Unusable as why:
                left_plain = why.reason
        try:
            return Rendered(row, epoch, self._documents(conversation), left_plain=left_plain)
        except _Unusable as why:
            return Rendered(row, epoch, [], why.reason, why.hidden)

    def _documents(self, conversation: Conversation) -> list[Document]:
        try:
            parts = self.renderer.render_all(conversation)
        except RowError as error:
            raise _Unusable(error.reason) from error
        except DataError as error:
            raise _Unusable(REFUSED) from error
        except TemplateError as error:
            raise _Unusable(HIDDEN, str(error)) from error
        if any(len(part.input_ids) > self.seq_len for part in parts):
            raise _Unusable(f"longer than {self.seq_len} tokens")
        if not any(any(part.loss_mask) for part in parts):
            raise _Unusable("nothing of the assistant's to train on")
        return [(np.array(p.input_ids, dtype=np.int32), np.array(p.loss_mask, dtype=bool)) for p in parts]


class Tally:
    """Passes documents on, and counts.

    `sources`: documents and tokens of each source's first pass. `left_plain`: augmented rows that could not be used,
    by reason. Every row that is lost goes to the report.
    """

    def __init__(self, corpus: Corpus, report: DropReport) -> None:
        self._corpus, self._report = corpus, report
        self._lost: set[int] = set()
        self._failure: str | None = None
        self._shown = False
        self.sources = [{"documents": 0, "tokens": 0} for _ in corpus.sources]
        self.left_plain: Counter[str] = Counter()

    def documents(self, results: Iterable[list[Rendered]]) -> Iterator[Document]:
        """Yield the documents of all results in order."""
        for result in (one for chunk in results for one in chunk):
            self._failure = self._failure or result.failure
            self._shown = self._shown or result.dropped not in (REFUSED, HIDDEN)
            if result.left_plain is not None:
                self.left_plain[result.left_plain] += 1
            if result.dropped is not None:
                self._lose(result.row, result.dropped)
            elif result.epoch == 0:
                counts = self.sources[int(self._corpus.source[result.row])]
                counts["documents"] += 1
                counts["tokens"] += sum(len(ids) for ids, _ in result.documents)
            yield from result.documents

    def raise_if_hidden(self) -> None:
        """Raise `TemplateError` if no row at all could be rendered and the template hid the assistant's tokens."""
        if self._failure is not None and not self._shown:
            raise TemplateError(self._failure)

    def _lose(self, number: int, reason: str) -> None:
        if number not in self._lost:
            self._lost.add(number)
            row = self._corpus.rows[number]
            self._report.drop(row.source, reason, {"messages": row.messages, "tools": row.tools}, row.id)
            self._report.kept[row.source] -= 1
