"""Numbered rows to documents, in any process, and the account of what became of each."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from poe.data.conversation import Conversation
from poe.data.corpus import Corpus
from poe.data.drops import DropReport, Unfaithful
from poe.data.render import Renderer
from poe.data.store import RowStore
from poe.errors import DataError, TemplateError

REFUSED, HIDDEN = "the chat template refuses it", "the chat template hides the assistant's tokens"

Document = tuple[np.ndarray, np.ndarray]  # token ids int32, loss mask bool


class Rendered(NamedTuple):
    """What became of a row in one of its passes: its documents, or why there are none."""

    row: int
    epoch: int
    documents: list[Document]
    dropped: str | None = None
    failure: str | None = None  # the message of a `TemplateError`


class RenderRows:
    """Renders numbered rows of a store; this is what a worker process is handed."""

    def __init__(self, folder: Path, renderer: Renderer, seq_len: int) -> None:
        self.renderer, self.seq_len = renderer, seq_len
        self._folder = folder
        self._rows: RowStore | None = None

    def __call__(self, items: np.ndarray) -> list[Rendered]:
        """Render items, int64 (n, 2): the row's number and its pass."""
        self._rows = self._rows or RowStore(self._folder)
        return [self._render(self._rows[row], row, epoch) for row, epoch in items.tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None}  # every process maps the file itself

    def _render(self, conversation: Conversation, row: int, epoch: int) -> Rendered:
        try:
            parts = self.renderer.render_all(conversation)
        except Unfaithful as error:
            return Rendered(row, epoch, [], error.reason)
        except DataError:
            return Rendered(row, epoch, [], REFUSED)
        except TemplateError as error:
            return Rendered(row, epoch, [], HIDDEN, str(error))
        if any(len(part.input_ids) > self.seq_len for part in parts):
            return Rendered(row, epoch, [], f"longer than {self.seq_len} tokens")
        if not any(any(part.loss_mask) for part in parts):
            return Rendered(row, epoch, [], "nothing of the assistant's to train on")
        return Rendered(
            row, epoch, [(np.array(p.input_ids, dtype=np.int32), np.array(p.loss_mask, dtype=bool)) for p in parts]
        )


class Tally:
    """Passes documents on, and counts: documents and tokens of each source's first pass, and every row that is lost."""

    def __init__(self, corpus: Corpus, report: DropReport) -> None:
        self._corpus, self._report = corpus, report
        self._lost: set[int] = set()
        self._failure: str | None = None
        self._shown = False
        self.sources = [{"documents": 0, "tokens": 0} for _ in corpus.sources]

    def documents(self, results: Iterable[list[Rendered]]) -> Iterator[Document]:
        """Yield the documents of all results in order."""
        for result in (one for chunk in results for one in chunk):
            self._failure = self._failure or result.failure
            self._shown = self._shown or result.dropped not in (REFUSED, HIDDEN)
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
