"""Suites: named lists of items that a model answers, with a reference for each. They are read from a SPEC."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.readers import READERS, demo, read_source
from poe.data.readers.guess import find_reader
from poe.data.spec import DataSource, parse_spec
from poe.data.split import text_hash
from poe.data.text import NAME as TEXT
from poe.data.text import documents
from poe.errors import DataError
from poe.evaluation.call_metrics import Counts
from poe.evaluation.calls import split_question

DEMO_ROWS = 100  # of each split of the demo world


@dataclass(frozen=True)
class Item:
    """One question or text. `fingerprint` is that of its content, `tokens` are what the model reads."""

    id: str
    fingerprint: str
    content: Any
    tokens: list[int]


@dataclass
class Rows:
    """The rows of one source, in order, as (id, fingerprint, content), and the counts of those that were dropped."""

    name: str
    source: str
    license: str
    rows: list[tuple[str, str, Any]] = field(default_factory=list)
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def choose(
        self, encode: Callable[[Any], list[int] | str], rows: int | None, seed: int
    ) -> tuple[list[Item], Counter[str]]:
        """Return all items, or a random sample of `rows` items, and how many rows were dropped by reason.

        `encode` returns the tokens of a row, or a reason to drop it.
        """
        dropped = self.dropped.copy()
        order = list(range(len(self.rows)))
        if rows is not None:
            random.Random(seed).shuffle(order)
        chosen: dict[int, Item] = {}
        for position in order:
            if len(chosen) == rows:
                break
            row_id, fingerprint, content = self.rows[position]
            tokens = encode(content)
            if isinstance(tokens, str):
                dropped[tokens] += 1
            else:
                chosen[position] = Item(row_id, fingerprint, content, tokens)
        if not chosen:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in dropped.most_common(3))
            raise DataError(f"No row of the suite {self.name!r} can be asked; dropped: {reasons or 'nothing'}.")
        return [chosen[position] for position in sorted(chosen)], dropped


class Suite(Protocol):
    """What a suite does: answer a batch of its items with a model, and count what each answer adds to its metrics."""

    batch_size: int
    rows: Rows
    items: list[Item]
    dropped: Counter[str]

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the answer of a stage (None: the base) to each item as JSON values."""

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each answer adds to each metric."""


def fingerprint_items(items: Sequence[Item]) -> str:
    """Return the fingerprint of a suite: that of its items in order."""
    return hashlib.sha256("\n".join(item.fingerprint for item in items).encode()).hexdigest()


def read_sources(spec: str) -> list[Rows]:
    """Read the rows of a SPEC: readers of `--data`, and `text=FILES`.

    `demo=N` are N held-out questions of each split of the demo world. Raises `DataError` for a SPEC or a source that
    cannot be used.
    """
    sources = parse_spec(spec, [*READERS, TEXT], find_reader)
    names = Counter(source.name for source in sources)
    read: list[Rows] = []
    for source in sources:
        if source.epochs is not None or source.weight != 1:
            raise DataError(
                f"The suite {str(source)!r} has epochs or a weight: expected name=path. Each row counts once."
            )
        name = source.name if names[source.name] == 1 else str(source)
        read += _read_demo(source) if source.name == demo.NAME else [_read_one(source, name)]
    if twice := [name for name, count in Counter(rows.name for rows in read).items() if count > 1]:
        raise DataError(f"The suite {twice[0]!r} is given twice.")
    return read


def _read_one(source: DataSource, name: str) -> Rows:
    report = DropReport()
    found: Iterator[tuple[str, str, Any]]
    if source.name == TEXT:
        rows = Rows(name, str(source), "")
        found = ((text.source or "", _hash(text.text), text.text) for text in documents(str(source), report=report))
    else:
        rows = Rows(name, str(source), READERS[source.name].license)
        found = _questions(read_source(source, report), rows)
    _add_unrepeated(rows, found)
    rows.read = sum(report.read.values())
    for reasons in report.dropped.values():
        rows.dropped.update(reasons)
    return rows


def _read_demo(source: DataSource) -> list[Rows]:
    if source.path is not None and not (source.path.isdigit() and int(source.path)):
        raise DataError(f"The suite 'demo' generates its questions: expected demo or demo=NUMBER, got {source}.")
    count = int(source.path or DEMO_ROWS)
    splits = []
    for split, conversations in demo.evaluation_splits(count).items():
        rows = Rows(f"{demo.NAME}: {split}", str(source), demo.LICENSE, read=len(conversations))
        _add_unrepeated(rows, _questions(iter(conversations), rows))
        splits.append(rows)
    return splits


def _questions(conversations: Iterator[Conversation], rows: Rows) -> Iterator[tuple[str, str, Conversation]]:
    for number, conversation in enumerate(conversations, 1):
        try:
            question, calls = split_question(conversation)
        except StopIteration:
            question, calls = [], []
        if not question:
            rows.dropped["no answer to a question"] += 1
            continue
        form = conversation.form
        content = [question, conversation.tools, calls, form and [form.tools, form.calls, form.place, form.phrasing]]
        yield conversation.id or str(number), _hash(json.dumps(content, sort_keys=True)), conversation


def _add_unrepeated(rows: Rows, found: Iterator[tuple[str, str, Any]]) -> None:
    seen: set[str] = set()
    for row in found:
        if row[1] in seen:
            rows.dropped["repeated row"] += 1
            continue
        seen.add(row[1])
        rows.rows.append(row)


def _hash(text: str) -> str:
    return text_hash(text, 16).hex()
