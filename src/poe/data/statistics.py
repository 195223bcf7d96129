"""Statistics of a SPEC: counts, distributions, licenses, and the rows that are not used, also as one page."""

import base64
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from poe.data.corpus import EVALUATION, HELD_OUT, LEAK, NEAR, TRAIN, Corpus
from poe.data.drops import DropReport
from poe.data.readers import READERS
from poe.data.render import Renderer
from poe.data.render_worker import RenderWorker
from poe.data.workers import default_workers, ordered_map
from poe.errors import DataError, MissingExtraError, escape_markdown, printable
from poe.files.output import atomic_file, write_file

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


def compute_statistics(corpus: Corpus, renderer: Renderer | None = None) -> list[SourceStatistics]:
    """Count the rows of every source, and their tokens if there is a renderer.

    A row that the chat template rejects, or of more than `MAX_CHARACTERS`, has 0 tokens.
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
        for index, tokens, trained in _count_tokens(corpus, renderer, used):
            statistics[int(corpus.source[index])].tokens.append(tokens)
            statistics[int(corpus.source[index])].trained_tokens += trained
    return statistics


def _count_tokens(corpus: Corpus, renderer: Renderer, used: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (row, tokens, trained tokens) of the used rows."""
    items = np.stack([used, np.zeros_like(used)], axis=1)
    tasks = (items[i : i + _ROWS_PER_TASK] for i in range(0, len(items), _ROWS_PER_TASK))
    worker = RenderWorker(corpus.folder, renderer, seq_len=2**31)
    workers = default_workers() if len(items) > _MIN_ROWS_FOR_WORKERS else 1
    for results in ordered_map(worker, tasks, workers):
        for result in results:
            lengths = [(len(ids), int(mask.sum())) for ids, mask in result.documents]
            yield result.row, sum(n for n, _ in lengths), sum(n for _, n in lengths)


def _summarize(numbers: list[int]) -> dict[str, float]:
    if not numbers:
        return {}
    return {"mean": round(float(np.mean(numbers)), 2), "median": float(np.median(numbers)), "max": max(numbers)}


def write_page(path: Path, statistics: list[SourceStatistics], report: DropReport) -> None:
    """Write an HTML page, or a Markdown page and its plot, depending on the suffix of the path.

    Raises `DataError` for another suffix, `MissingExtraError` without matplotlib.
    """
    if path.suffix not in (".html", ".md"):
        raise DataError(f"{path}: expected a page that ends in .html or .md.")
    picture = _plot(statistics)
    sections = [("Sources", *_source_table(statistics)), ("Rows that are not used", *_drop_table(report))]
    repairs = _repair_table(report)
    sections += [("Repairs of rows that are", *repairs)] if repairs[1] else []
    if path.suffix == ".md":
        image = path.with_suffix(".png")
        text = "# Data\n\n" + "\n".join(f"## {title}\n\n{_markdown(head, rows)}" for title, head, rows in sections)
        with atomic_file(path) as page, atomic_file(image) as plot:  # both or none
            plot.write_bytes(picture)
            page.write_text(f"{text}\n![Distributions]({image.name})\n", encoding="utf-8")
        return
    body = "".join(f"<h2>{escape(title)}</h2>{_html(head, rows)}" for title, head, rows in sections)
    image64 = base64.b64encode(picture).decode()
    style = "body{font:15px sans-serif;max-width:72em;margin:2em auto}td,th{padding:.2em .7em;text-align:left}"
    write_file(
        path,
        f"<!doctype html><meta charset=utf-8><title>Data</title><style>{style}</style><h1>Data</h1>{body}"
        f'<img src="data:image/png;base64,{image64}" alt="distributions">\n',
    )


Table = tuple[list[str], list[list[str]]]


def _source_table(statistics: list[SourceStatistics]) -> Table:
    head = ["source", "license", *_SIDES, "rows with calls", "abstentions", "tokens", "of them trained"]
    rows = []
    for s in statistics:
        with_calls = sum(1 for n in s.calls if n)
        numbers = [*s.sides.values(), with_calls, s.abstentions, sum(s.tokens), s.trained_tokens]
        rows.append([s.source, s.license or "not stated", *(f"{n:,}" for n in numbers)])
    return head, rows


def _drop_table(report: DropReport) -> Table:
    rows = []
    for source, counts in report.as_dict().items():
        rows.append([source, "read", f"{counts['read']:,}"])
        rows += [[source, reason, f"{n:,}"] for reason, n in counts["dropped"].items()]
    return ["reader", "reason", "rows"], rows


def _repair_table(report: DropReport) -> Table:
    counts = report.as_dict().items()
    rows = [[source, rule, f"{n:,}"] for source, c in counts for rule, n in c.get("repaired", {}).items()]
    return ["reader", "repair", "times"], rows


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(escape_markdown, line)) + " |\n" for line in lines)


def _html(head: list[str], rows: list[list[str]]) -> str:
    titles = "".join(f"<th>{escape(printable(cell))}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(printable(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"


def _plot(statistics: list[SourceStatistics]) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError('The page has plots: pip install "poe-cascade[train]"') from None
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, name, title in zip(
        panels, ("calls", "tools", "tokens"), ("calls in a row", "tools in a row", "tokens in a row"), strict=True
    ):
        series = [getattr(s, name) for s in statistics]
        top = max((max(numbers) for numbers in series if numbers), default=1)
        bins: Any = 40 if name == "tokens" else np.arange(min(top, 30) + 2) - 0.5
        axes.hist(series, bins=bins, stacked=True, label=[s.source[:40] for s in statistics])
        axes.set_title(title)
        axes.set_ylabel("rows")
    panels[0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
