"""Teacher-forced exactness: whether a model gives its largest score to every token of the reference answer.

It is the share of answers that greedy decoding would write token by token like the reference, from one forward pass for
each row. Calls that are equal and written differently do not count. Only the positions of the answers go through the
head, in chunks, so memory does not grow with the prompt times the vocabulary.
"""

from collections.abc import Sequence

import torch

from poe.calls.conversation import Conversation
from poe.cascade import Cascade
from poe.data.packing import IGNORED, Batch
from poe.data.render import Renderer
from poe.data.templates import complete_template
from poe.decoding.branches import BranchedModel
from poe.errors import DataError, TemplateError
from poe.evaluation.answer_suite import render_answer
from poe.evaluation.call_metrics import Counts, Metric, summarize
from poe.modeling.families import logits_of
from poe.modeling.placement import device_of
from poe.training.hidden_states.sources import HiddenSource, make_source
from poe.training.loss import match_likeliest

Answer = tuple[list[int], list[bool]]
"""The tokens of a row up to the end of its first answer, and which of them are the answer."""


def measure_teacher_forced(
    cascade: Cascade, stage: str | None, conversations: Sequence[Conversation], *, batch_size: int = 8, seed: int = 0
) -> dict[str, Metric]:
    """Return the shares of first answers whose every token is the model's first choice, and of such tokens.

    The first answer of a row is the first assistant message that is trained on; a row whose answer cannot be written,
    or does not fit into the base, does not count. `stage=None`: the base alone.
    """
    complete_template(cascade.tokenizer)  # of a base without a stage; a stage's is complete
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    forcing = AnswerForcing(cascade, renderer, batch_size)
    return summarize([count_forced(right) for right in forcing.count_right_tokens(stage, conversations)], seed=seed)


def count_forced(right: Sequence[int]) -> Counts:
    """Return what a row with so many right tokens, of all tokens of its answer, adds to each metric."""
    hits, tokens = right
    return {
        "teacher_forced_exact": (float(0 < tokens == hits), float(tokens > 0)),
        "teacher_forced_tokens": (float(hits), float(tokens)),
    }


class AnswerForcing:
    """Reads conversations with their first answers, and counts the tokens that a model would have chosen itself."""

    def __init__(self, cascade: Cascade, renderer: Renderer, batch_size: int = 8) -> None:
        self._cascade, self._renderer, self._batch_size = cascade, renderer, batch_size
        self._longest = getattr(cascade.config, "max_position_embeddings", None)
        self._sources: dict[str | None, HiddenSource] = {}

    @torch.no_grad()
    def count_right_tokens(self, stage: str | None, conversations: Sequence[Conversation]) -> list[tuple[int, int]]:
        """Return for each row how many tokens of its answer are the first choice of a stage, and their number.

        The number is 0 for a row whose answer cannot be written, or does not fit into the base, and for every row of a
        product, which has no head of its own.
        """
        if isinstance(self._cascade.model(stage), BranchedModel):
            return [(0, 0)] * len(conversations)
        if stage not in self._sources:
            self._sources[stage] = make_source(self._cascade, stage)
        rows = [self._render(conversation) for conversation in conversations]
        counts = [(0, 0)] * len(rows)
        order = sorted((i for i, row in enumerate(rows) if row[0]), key=lambda i: len(rows[i][0]))
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            batch = _make_batch([rows[i] for i in part])
            for i, row in zip(part, self._match(self._sources[stage], batch), strict=True):
                counts[i] = int(row.sum()), len(row)
        return counts

    def _match(self, source: HiddenSource, batch: Batch) -> Sequence[torch.Tensor]:
        """Return whether each label of each row is the first choice."""
        device = device_of(self._cascade.base.get_input_embeddings())
        moved = Batch(*(tensor.to(device) for tensor in batch))
        *_, (hidden, weight, bias) = source.predictions(moved)
        right = match_likeliest(hidden, weight, moved.labels, logits_of(self._cascade.config), bias).cpu()
        return right.split((batch.labels != IGNORED).sum(1).tolist())

    def _render(self, conversation: Conversation) -> Answer:
        """Return a row with its first answer, and an empty one if the answer cannot be written or does not fit."""
        try:
            row = render_answer(self._renderer, conversation)
        except (DataError, TemplateError, StopIteration):  # StopIteration: no token of the answer is labeled
            return [], []
        if len(row.input_ids) > (self._longest or len(row.input_ids)):
            return [], []
        return row.input_ids, row.loss_mask


def _make_batch(rows: Sequence[Answer]) -> Batch:
    """Return rows as a batch, padded on the right. A label is the next token, where that is a token of the answer."""
    width = max(len(ids) for ids, _ in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED)
    for line, (tokens, is_answer) in enumerate(rows):
        ids[line, : len(tokens)] = torch.tensor(tokens)
        following = torch.where(torch.tensor(is_answer[1:]), ids[line, 1 : len(tokens)], IGNORED)
        labels[line, : len(tokens) - 1] = following
    return Batch(ids, labels, torch.arange(width).expand(len(rows), -1))
