"""The statistics of data as one page to read in a browser, or as Markdown and a picture."""

import base64
import io
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from poe.data.drops import DropReport
from poe.data.samples import Sample
from poe.data.statistics import SourceStatistics
from poe.errors import DataError, MissingExtraError, escape_controls, escape_markdown, printable
from poe.files.output import atomic_file, write_file

_LARGEST_SAMPLE = 20_000  # characters


@dataclass(frozen=True)
class Section:
    """A table of the page. The first `text_columns` columns are text, the others numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    text_columns: int

    def is_number(self, column: int) -> bool:
        return column >= self.text_columns


def write_page(path: Path, statistics: list[SourceStatistics], report: DropReport, samples: list[Sample]) -> None:
    """Write an HTML page, or a Markdown page and its plot without the samples, depending on the suffix of the path.

    Raises `DataError` for another suffix, `MissingExtraError` without matplotlib.
    """
    if path.suffix not in (".html", ".md"):
        raise DataError(f"{path}: expected a page that ends in .html or .md.")
    picture = _plot(statistics)
    title, summary = ", ".join(_name_source(s) for s in statistics), _summarize(statistics, report)
    sections = [_list_sources(statistics)]
    sections += [s for s in (_list_unused_rows(report), _list_repairs(report)) if s.rows]
    if path.suffix == ".html":
        write_file(path, _write_html(title, summary, sections, picture, samples))
        return
    image = path.with_suffix(".png")
    tables = "\n".join(f"## {section.title}\n\n{_write_markdown_table(section)}" for section in sections)
    text = f"# {escape_markdown(title)}\n\n{escape_markdown(summary)}\n\n{tables}\n![Distributions]({image.name})\n"
    with atomic_file(path) as page, atomic_file(image) as plot:  # both or none
        plot.write_bytes(picture)
        page.write_text(text, encoding="utf-8")


def _name_source(statistics: SourceStatistics) -> str:
    """Return the SPEC item with the last part of its path alone."""
    name, equals, path = statistics.source.partition("=")
    return name + equals + re.split(r"[/\\]", path)[-1]


def _summarize(statistics: list[SourceStatistics], report: DropReport) -> str:
    read = sum(counts["read"] for counts in report.as_dict().values())
    used = sum(s.used for s in statistics)
    tokens, trained = sum(sum(s.tokens) for s in statistics), sum(s.trained_tokens for s in statistics)
    text = f"{read:,} rows read, {used:,} used."
    return text + (f" {tokens:,} tokens, {trained:,} of them trained." if tokens else "")


def _list_sources(statistics: list[SourceStatistics]) -> Section:
    head = ["source", "license", "training rows", "held out", "evaluation", "with calls", "abstentions"]
    head += ["tokens", "trained"]
    rows = []
    for s in statistics:
        tokens, with_calls = sum(s.tokens), sum(1 for n in s.calls if n)
        numbers = [s.sides.get(side, 0) for side in ("train", "held out", "evaluation")]
        trained = f"{s.trained_tokens:,} ({s.trained_tokens / tokens:.0%})" if tokens else "0"
        row = [
            _name_source(s),
            s.license or "not stated",
            *(f"{n:,}" for n in (*numbers, with_calls, s.abstentions, tokens)),
        ]
        rows.append([*row, trained])
    return Section("Rows that are used", head, rows, text_columns=2)


def _list_unused_rows(report: DropReport) -> Section:
    rows = [(name, reason, n) for name, counts in report.as_dict().items() for reason, n in counts["dropped"].items()]
    lines = [[name, reason, f"{n:,}"] for name, reason, n in sorted(rows, key=lambda row: -row[2])]
    return Section("Rows that are not used", ["reader", "reason", "rows"], lines, text_columns=2)


def _list_repairs(report: DropReport) -> Section:
    counts = report.as_dict().items()
    rows = [[source, rule, f"{n:,}"] for source, c in counts for rule, n in c.get("repaired", {}).items()]
    return Section("Repairs in rows that are used", ["reader", "repair", "times"], rows, text_columns=2)


def _write_markdown_table(section: Section) -> str:
    rule = ["---:" if section.is_number(column) else "---" for column in range(len(section.head))]
    lines = [list(map(escape_markdown, section.head)), rule, *([*map(escape_markdown, row)] for row in section.rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _write_html(title: str, summary: str, sections: list[Section], picture: bytes, samples: list[Sample]) -> str:
    """Fill the page's template. Every text is escaped: for HTML, and for characters that browsers do not show."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("poe").joinpath("assets", "data_page.html.jinja").read_text(encoding="utf-8")
    shown = [
        Section(s.title, s.head, [[printable(cell) for cell in row] for row in s.rows], s.text_columns)
        for s in sections
    ]
    return environment.from_string(template).render(
        title=printable(title, 200),
        summary=summary,
        sections=shown,
        picture=base64.b64encode(picture).decode(),
        samples=[
            Sample(
                printable(sample.title, 200),
                sample.tokens,
                sample.trained,
                [(_shorten(escape_controls(text)), is_trained) for text, is_trained in sample.parts],
            )
            for sample in samples
        ],
    )


def _shorten(text: str) -> str:
    half = _LARGEST_SAMPLE // 2
    return text if len(text) <= _LARGEST_SAMPLE else f"{text[:half]}\n... ({len(text):,} characters)\n{text[-half:]}"


def _plot(statistics: list[SourceStatistics]) -> bytes:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
    except ImportError:
        raise MissingExtraError('The page has plots: pip install "poe-cascade[train]"') from None
    names = [name for name in ("calls", "tools", "tokens") if any(getattr(s, name) for s in statistics)]
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    labels = [printable(_name_source(s), 40) for s in statistics]
    for number, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), number + 1)
        series = [getattr(s, name) for s in statistics]
        top = max(max(numbers) for numbers in series if numbers)
        bins: Any = _divide_lengths(series) if name == "tokens" else np.arange(min(top, 30) + 2) - 0.5
        if name == "tokens" and bins[1] - bins[0] < 0.99 * (bins[2] - bins[1]):  # a few rows are far longer than most
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.hist(series, bins=bins, stacked=True, label=labels, rwidth=None if name == "tokens" else 0.85)
        axes.set_xlabel(f"{name} in a row")
        axes.set_ylabel("rows" if not number else "")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if name != "tokens":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    if len(labels) > 1:
        figure.legend(labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _divide_lengths(series: list[list[int]]) -> np.ndarray:
    """Return the edges of 40 bins for numbers of tokens, of equal ratio if the longest row is ten times the median."""
    lengths = np.concatenate([np.asarray(numbers) for numbers in series])
    low, top = max(int(lengths.min()), 1), int(lengths.max()) + 1
    return np.geomspace(low, top, 41) if top > 10 * np.median(lengths) else np.linspace(lengths.min(), top, 41)
