"""Rows as the model reads them: their text in parts, each with whether the loss counts it."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from poe.data.corpus import TRAIN, Corpus
from poe.data.render import Renderer
from poe.errors import DataError


@dataclass(frozen=True)
class Sample:
    """A rendered row. `parts` are (text, is trained) in order."""

    title: str
    tokens: int
    trained: int
    parts: list[tuple[str, bool]]


def split_by_mask(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], loss_mask: Sequence[bool]
) -> list[tuple[str, bool]]:
    """Return the text of a row in parts, each of tokens that are all trained or all not: (text, is trained)."""
    parts, start = [], 0
    for end in range(1, len(input_ids) + 1):
        if end == len(input_ids) or loss_mask[end] != loss_mask[start]:
            parts.append((str(tokenizer.decode(list(input_ids[start:end]))), bool(loss_mask[start])))
            start = end
    return parts


def sample_rows(corpus: Corpus, renderer: Renderer, count: int = 2) -> list[Sample]:
    """Render the first `count` training rows of every source that the template takes."""
    samples = []
    for number, source in enumerate(corpus.sources):
        left = count
        for index in corpus.row_numbers(number, TRAIN)[: 50 * count].tolist():
            row = corpus.rows[index]
            try:
                part = renderer.render(row)[-1]
            except DataError:  # counted where rows are packed
                continue
            parts = split_by_mask(renderer.tokenizer, part.input_ids, part.loss_mask)
            title = row.id if row.id.startswith(source.name) else f"{source.name} · {row.id or count - left + 1}"
            samples.append(Sample(title, len(part.input_ids), sum(part.loss_mask), parts))
            left -= 1
            if not left:
                break
    return samples
