"""Render numbered rows to documents, in any process, and count the result of each row."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from poe.calls.conversation import Conversation
from poe.data.augment import ToolPool, augment
from poe.data.corpus import Corpus
from poe.data.drops import DropReport
from poe.data.render import RenderedRow, Renderer
from poe.data.store import RowStore
from poe.errors import DataError, RowError, TemplateError
from poe.stages.augmentation import Augmentation

REFUSED, HIDDEN = "the chat template rejects it", "the chat template hides the assistant's tokens"
CONTROL_TOKENS = "control tokens in the text read as text"

MAX_CHARACTERS = 1 << 21
"""The maximum number of characters of a row: half a million tokens, which take a gigabyte while they are made."""

Document = tuple[np.ndarray, np.ndarray]  # token ids int32, loss mask bool


class RenderedItem(NamedTuple):
    """The result of one row in one epoch: its documents, or the reason why there are none."""

    row: int
    epoch: int
    documents: list[Document]
    dropped: str | None = None
    template_error: str | None = None  # the message of a `TemplateError`
    left_plain: str | None = None  # why the original row was used instead of the augmented one
    has_control_tokens: bool = False  # in its content, where they are text


class _UnusableError(Exception):
    """A conversation gives no document. `template_error` is the message of a `TemplateError`."""

    def __init__(self, reason: str, template_error: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.template_error = reason, template_error


class RenderWorker:
    """Augments and renders numbered rows of a store. `ordered_map` sends it to the worker processes."""

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
        # A longer row cannot fit, so it is dropped before it is augmented, rendered and tokenized.
        self._max_characters = min(MAX_CHARACTERS, seq_len * max(map(len, renderer.tokenizer.get_vocab()), default=1))
        self._rows: RowStore | None = None

    def __call__(self, items: np.ndarray) -> list[RenderedItem]:
        """Render items, int64 (n, 2): row number and epoch."""
        self._rows = self._rows or RowStore(self._folder)
        return [self._render(self._rows[row], row, epoch) for row, epoch in items.tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None}  # every process opens the file itself

    def _render(self, conversation: Conversation, row: int, epoch: int) -> RenderedItem:
        if _count_characters(conversation) > self._max_characters:
            is_largest = self._max_characters == MAX_CHARACTERS
            limit = f"{MAX_CHARACTERS:,} characters" if is_largest else f"{self.seq_len} tokens"
            return RenderedItem(row, epoch, [], f"longer than {limit}")
        left_plain = None
        augmented = augment(conversation, self._augmentation, epoch=epoch, seed=self.seed, pool=self._pool)
        if augmented != [conversation]:
            try:
                return self._item(row, epoch, [part for version in augmented for part in self._parts(version)])
            except _UnusableError as error:
                left_plain = error.reason
        try:
            return self._item(row, epoch, self._parts(conversation), left_plain)
        except _UnusableError as error:
            return RenderedItem(row, epoch, [], error.reason, error.template_error)

    @staticmethod
    def _item(row: int, epoch: int, parts: list[RenderedRow], left_plain: str | None = None) -> RenderedItem:
        documents = [(np.array(p.input_ids, dtype=np.int32), np.array(p.loss_mask, dtype=bool)) for p in parts]
        has_control_tokens = any(part.control_tokens for part in parts)
        return RenderedItem(row, epoch, documents, left_plain=left_plain, has_control_tokens=has_control_tokens)

    def _parts(self, conversation: Conversation) -> list[RenderedRow]:
        try:
            parts = self.renderer.render(conversation)
        except RowError as error:
            raise _UnusableError(error.reason) from error
        except DataError as error:
            raise _UnusableError(REFUSED) from error
        except TemplateError as error:
            raise _UnusableError(HIDDEN, str(error)) from error
        if any(len(part.input_ids) > self.seq_len for part in parts):
            raise _UnusableError(f"longer than {self.seq_len} tokens")
        if not any(any(part.loss_mask[1:]) for part in parts):  # nothing predicts the first token
            raise _UnusableError("no assistant tokens to train on")
        return parts


def find_refusal(conversation: Conversation, renderer: Renderer) -> str | None:
    """Return why the question of a held-out row cannot be asked, None if it can."""
    try:
        renderer.prompt_ids(conversation.question, conversation.tools, conversation.form)
    except RowError as error:
        return error.reason
    except DataError:
        return REFUSED
    return None


def _count_characters(conversation: Conversation) -> int:
    """Return the number of characters in all texts of a row."""
    count, stack = 0, [conversation.messages, conversation.tools]
    while stack:
        item: Any = stack.pop()
        if isinstance(item, str):
            count += len(item)
        elif isinstance(item, dict | list):
            stack.extend(item.values() if isinstance(item, dict) else item)
    return count


class RenderTally:
    """Counts rendered rows while it passes their documents on.

    `sources`: documents and tokens of each source's first epoch. `left_plain`: reasons why augmented rows were not
    used. Every dropped row is added to the report, and to `dropped` by its number.
    """

    def __init__(self, corpus: Corpus, report: DropReport) -> None:
        self._corpus, self._report = corpus, report
        self.dropped: set[int] = set()
        self._template_error: str | None = None
        self._any_rendered = False
        self.sources = [{"documents": 0, "tokens": 0} for _ in corpus.sources]
        self.left_plain: Counter[str] = Counter()

    def count(self, results: Iterable[list[RenderedItem]]) -> Iterator[Document]:
        """Count all results and yield their documents in order."""
        for item in (item for items in results for item in items):
            self._template_error = self._template_error or item.template_error
            self._any_rendered = self._any_rendered or item.dropped not in (REFUSED, HIDDEN)
            if item.left_plain is not None:
                self.left_plain[item.left_plain] += 1
            if item.dropped is not None:
                self.drop(item.row, item.dropped)
            elif item.epoch == 0:
                counts = self.sources[int(self._corpus.source[item.row])]
                counts["documents"] += 1
                counts["tokens"] += sum(len(ids) for ids, _ in item.documents)
                if item.has_control_tokens:
                    self._report.repair(self._corpus.rows[item.row].source, CONTROL_TOKENS)
            yield from item.documents

    def raise_if_hidden(self) -> None:
        """Raise `TemplateError` if no row was rendered because the template hides the assistant's tokens."""
        if self._template_error is not None and not self._any_rendered:
            raise TemplateError(self._template_error)

    def drop(self, number: int, reason: str) -> None:
        """Count a row as dropped, once for all epochs."""
        if number not in self.dropped:
            self.dropped.add(number)
            self._report.drop_kept(self._corpus.rows[number], reason)
