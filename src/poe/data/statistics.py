"""Statistics of a SPEC: counts, distributions, and licenses."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from poe.data.corpus import EVALUATION, HELD_OUT, LEAK, NEAR, TRAIN, Corpus
from poe.data.drops import DropReport
from poe.data.readers import READERS
from poe.data.render import Renderer
from poe.data.render_worker import RenderedItem, RenderWorker
from poe.data.workers import default_workers, ordered_map

_SIDES = {
    "train": TRAIN,
    "held out": HELD_OUT,
    "near-duplicates": NEAR,
    "evaluation leaks": LEAK,
    "evaluation": EVALUATION,
}
_ROWS_PER_TASK = 128
_MIN_ROWS_FOR_WORKERS = 2000


@dataclass
class SourceStatistics:
    """The statistics of one SPEC item. The lists have one number per used row; a renderer counts the tokens."""

    source: str
    license: str
    hub_id: str | None
    sides: dict[str, int]
    calls: list[int] = field(default_factory=list)
    tools: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)  # user messages
    tokens: list[int] = field(default_factory=list)
    trained_tokens: int = 0
    abstentions: int = 0  # rows that offer tools and call none

    @property
    def used(self) -> int:
        """The number of rows that are trained on, held out, or asked in the evaluation."""
        return len(self.calls)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, and the mean, median and maximum of each list."""
        summaries = {name: _summarize(getattr(self, name)) for name in ("calls", "tools", "turns", "tokens")}
        return {
            "source": self.source,
            "license": self.license,
            "hub_id": self.hub_id,
            "rows": self.sides,
            "abstentions": self.abstentions,
            "calls_per_row": {str(n): count for n, count in sorted(Counter(self.calls).items())},
            "trained_tokens": self.trained_tokens,
            "total_tokens": sum(self.tokens),
            **summaries,
        }


def compute_statistics(
    corpus: Corpus, renderer: Renderer | None = None, report: DropReport | None = None
) -> list[SourceStatistics]:
    """Count the rows of every source, and their tokens if there is a renderer.

    A row that cannot be rendered has no tokens, and is counted as dropped in `report`.
    """
    statistics = []
    for number, source in enumerate(corpus.sources):
        sides = {name: len(corpus.row_numbers(number, side)) for name, side in _SIDES.items()}
        license, hub_id = READERS[source.name].license, READERS[source.name].hub_id
        statistics.append(SourceStatistics(str(source), license, None if source.path else hub_id, sides))
    used = np.flatnonzero(np.isin(corpus.side, (TRAIN, HELD_OUT, EVALUATION)))
    for index in used.tolist():
        row, counts = corpus.rows[index], statistics[int(corpus.source[index])]
        calls = sum(len(m.get("tool_calls", ())) for m in row.messages)
        counts.calls.append(calls)
        counts.tools.append(len(row.tools))
        counts.turns.append(sum(m["role"] == "user" for m in row.messages))
        counts.abstentions += bool(row.tools) and not calls
    if renderer is not None:
        for item in _render(corpus, renderer, used):
            if item.dropped is not None:
                if report is not None:
                    report.drop_kept(corpus.rows[item.row], item.dropped)
                continue
            counts = statistics[int(corpus.source[item.row])]
            counts.tokens.append(sum(len(ids) for ids, _ in item.documents))
            counts.trained_tokens += sum(int(mask.sum()) for _, mask in item.documents)
    return statistics


def _render(corpus: Corpus, renderer: Renderer, used: np.ndarray) -> Iterator[RenderedItem]:
    """Render the used rows."""
    items = np.stack([used, np.zeros_like(used)], axis=1)
    tasks = (items[i : i + _ROWS_PER_TASK] for i in range(0, len(items), _ROWS_PER_TASK))
    worker = RenderWorker(corpus.folder, renderer, seq_len=2**31)
    workers = default_workers() if len(items) > _MIN_ROWS_FOR_WORKERS else 1
    for results in ordered_map(worker, tasks, workers):
        yield from results


def _summarize(numbers: list[int]) -> dict[str, float]:
    if not numbers:
        return {}
    return {"mean": round(float(np.mean(numbers)), 2), "median": float(np.median(numbers)), "max": max(numbers)}
