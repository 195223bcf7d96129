"""What the baseline kit measures of a trained method.

Replies are generated and compared by `poe.evaluation`. In addition the reference answers are predicted token by token
(teacher forcing): nats per label, and the shares of labels, of whole calls and of whole answers whose every token is
the first choice.
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from baseline_methods import TrainedMethod
from baseline_rows import ASKED
from torch.nn import functional

from poe.calls.conversation import Conversation
from poe.data.packing import IGNORED, Batch, PackedRows, pack
from poe.data.render import RenderedRow, Renderer
from poe.errors import DataError
from poe.evaluation.call_metrics import Counts, summarize
from poe.evaluation.results import BASE
from poe.evaluation.run import Evaluation
from poe.evaluation.suites import TEXT, Item, Rows, Settings
from poe.modeling.placement import device_of
from poe.training.reporting.progress import Progress

FORCED = "{}, teacher-forced"
BLOCK = 64  # tokens: oneDNN prepares a kernel for every new shape


class ForcedSuite:
    """Predicts every token of the reference answers, and counts what is right. A suite of `poe.evaluation`."""

    batch_size = 1
    success = None  # it asks for no replies

    def __init__(
        self, rows: Rows, method: TrainedMethod, renderer: Renderer, longest: int, most: int, seed: int
    ) -> None:
        self.rows, self._method, self._renderer, self._longest = rows, method, renderer, longest
        self.items, self.dropped = rows.choose(self._encode, most, seed)

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return what `score_labels` counts in each row."""
        answers = []
        for item in items:
            row = self._render(item.content)
            document = np.asarray(row.input_ids, dtype=np.int32), np.asarray(row.loss_mask, dtype=bool)
            length = len(row.input_ids) + -len(row.input_ids) % BLOCK
            batch = pack([document], length).batch(0, 1)
            answers.append({**score_labels(self._method, batch), "tokens": len(row.input_ids), "seconds": 0.0})
        return answers

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each row adds to each metric."""
        names = ("forced_nats", "forced_labels", "forced_calls", "forced_answers")
        return [{name: (float(answer[name][0]), float(answer[name][1])) for name in names} for answer in answers]

    def _render(self, conversation: Conversation) -> RenderedRow:
        return next(row for row in self._renderer.render(conversation) if any(row.loss_mask))

    def _encode(self, conversation: Conversation) -> list[int] | str:
        try:
            ids = self._render(conversation).input_ids
        except DataError as error:
            return getattr(error, "reason", "refused by the chat template")
        return ids if len(ids) <= self._longest else f"longer than {self._longest} tokens"


def score_labels(method: TrainedMethod, batch: Batch) -> dict[str, tuple[float, int]]:
    """Return nats, and right labels, calls and answers with teacher forcing, each with its number, of packed rows."""
    batch = Batch(*(t.to(device_of(method.base.get_input_embeddings())) for t in batch))
    labeled = batch.labels != IGNORED
    labels, logits = batch.labels[labeled], method.logits(batch)
    nats = float(functional.cross_entropy(logits, labels, reduction="sum"))
    right = logits.argmax(-1) == labels
    calls = find_right_calls(labels.tolist(), right.tolist(), method.tokenizer)
    documents = (batch.position_ids == 0).flatten().cumsum(0)[labeled.flatten()]
    answers = [bool(right[documents == number].all()) for number in documents.unique()]
    return {
        "forced_nats": (nats, len(labels)),
        "forced_labels": (int(right.sum()), len(labels)),
        "forced_calls": (sum(calls), len(calls)),
        "forced_answers": (sum(answers), len(answers)),
    }


def find_right_calls(labels: list[int], right: list[bool], tokenizer: Any) -> list[bool]:
    """Return for each call `<tool_call>...</tool_call>` in the labels whether all of its tokens are right."""
    pieces = [tokenizer.decode([token]) for token in labels]
    ends = list(accumulate(map(len, pieces)))
    tokens = [(end - len(piece), end, is_right) for end, piece, is_right in zip(ends, pieces, right, strict=True)]
    spans = [match.span() for match in re.finditer(r"<tool_call>.*?</tool_call>", "".join(pieces), re.S)]
    return [all(is_right for start, end, is_right in tokens if start < stop and begin < end) for begin, stop in spans]


def validate(method: TrainedMethod, rows: PackedRows, most: int) -> dict[str, float | None]:
    """Return the teacher-forced metrics of at most `most` packed rows."""
    counts = [dict(score_labels(method, rows.batch(row, 1))) for row in range(min(most, rows.num_rows))]
    return {name: metric.value for name, metric in summarize(counts, resamples=1).items()}


def measure(method: TrainedMethod, sources: Sequence[Rows], folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Measure a method on suites; return the results of the evaluation. One that was killed continues.

    Replies are not constrained: a method has to have learned the form of a call. A product predicts no texts here.
    """
    texts = [rows for rows in sources if rows.kind == TEXT]
    questions = [rows for rows in sources if rows.kind != TEXT and options["rows"]]
    referenced = [rows for rows in sources if rows.kind in ASKED]
    settings = Settings(constrain=False, max_new_tokens=options["max_new_tokens"], rows=options["rows"] or None)
    asked = [*questions, *([] if method.is_product else texts)]
    evaluation = Evaluation(method, asked, folder, settings=settings)  # type: ignore[arg-type]
    renderer = Renderer(method.tokenizer, vocab_size=method.config.vocab_size)
    limits = {"longest": options["seq_len"], "most": options["forced_rows"], "seed": settings.seed}
    forced = {FORCED.format(rows.name): ForcedSuite(rows, method, renderer, **limits) for rows in referenced}
    evaluation.suites = {**forced, **evaluation.suites}
    evaluation.models = {BASE: method.stage}
    return evaluation.run(progress=Progress("measure"))
