"""Suites: named lists of items that a model answers, with a reference for each."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.readers import READERS, demo, read_source
from poe.data.render_worker import REFUSED
from poe.data.spec import DataSource
from poe.data.split import text_hash
from poe.data.text import documents
from poe.errors import DataError, EvaluationError, RowError
from poe.evaluation.call_metrics import Counts, split_question

DEMO_ROWS = 100  # of each split of the demo world
CALLS, ANSWERS, NUMBERS, CODE, TEXT = "calls", "answers", "numbers", "code", "text"  # kinds of rows


@dataclass(frozen=True)
class Settings:
    """What decides the answers, beside the model and the suites.

    constrain       replies are text, or calls that name a given tool and fit its schema
    max_new_tokens  the most tokens of a reply
    temperature     0: each token is the most likely one; else replies are sampled at this temperature
    samples         how many replies each question gets
    rows            the most rows of each suite, a random sample; None: all
    seed            of the sample of rows, of sampled replies, and of the bootstrap
    formats         in how many prompt formats each question is asked
    """

    constrain: bool = True
    max_new_tokens: int = 256
    temperature: float = 0.0
    samples: int = 1
    rows: int | None = None
    seed: int = 0
    formats: int = 1

    def __post_init__(self) -> None:
        if self.samples > 1 and not self.temperature:
            raise EvaluationError(
                f"{self.samples} samples of each reply would be equal at temperature 0: give a temperature, such as "
                "0.7, or one sample."
            )


@dataclass(frozen=True)
class Item:
    """One question or text. `fingerprint` is that of its content, `tokens` are what the model reads.

    `row` is the id of the row that it belongs to: a conversation has a question for each answer. The bootstrap draws
    rows, because the questions of one row are not independent.
    `sample` counts the replies that one question gets.
    """

    id: str
    row: str
    fingerprint: str
    content: Any
    tokens: list[int]
    sample: int = 0


@dataclass
class Rows:
    """What the rows of one source ask, in order, as (id, row, fingerprint, content), and what was dropped by reason.

    `read` is the number of rows that were read. `kind` decides which suite asks them (`poe.evaluation.kinds`).
    """

    kind: str
    name: str
    source: str
    license: str
    rows: list[tuple[str, str, str, Any]] = field(default_factory=list)
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    _known: dict[str, str] = field(default_factory=dict, init=False, repr=False)  # the row of each question
    _joined: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def add(self, id: str, row: str, fingerprint: str, content: Any) -> None:
        """Add a question or text of a row, unless there is an equal one.

        A row that repeats a question of an earlier one joins it: some sets have a dialogue several times, each time one
        step longer.
        """
        if (known := self._known.get(fingerprint)) is not None:
            self.dropped["repeated"] += 1
            self._joined.setdefault(row, known)
        else:
            row = self._joined.get(row, row)
            self._known[fingerprint] = row
            self.rows.append((id, row, fingerprint, content))

    def choose(
        self, encode: Callable[[Any], list[int] | str], rows: int | None, seed: int
    ) -> tuple[list[Item], Counter[str]]:
        """Return the items of all rows, or of a random sample of `rows` rows, and how many were dropped by reason.

        `encode` returns the tokens of a content, or a reason to drop it. A content that it refuses with a `DataError`
        is dropped too.
        """
        dropped = self.dropped.copy()
        members: dict[str, list[int]] = {}
        for position, (_, row, _, _) in enumerate(self.rows):
            members.setdefault(row, []).append(position)
        order = list(members)
        if rows is not None:
            random.Random(seed).shuffle(order)
        chosen: dict[int, Item] = {}
        num_rows = 0
        for row in order:
            if num_rows == rows:
                break
            before = len(chosen)
            for position in members[row]:
                item_id, _, fingerprint, content = self.rows[position]
                tokens = _encode_or_drop(encode, content)
                if isinstance(tokens, str):
                    dropped[tokens] += 1
                else:
                    chosen[position] = Item(item_id, row, fingerprint, content, tokens)
            num_rows += len(chosen) > before
        if not chosen:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in dropped.most_common(3))
            raise DataError(f"No row of the suite {self.name!r} can be asked; dropped: {reasons or 'nothing'}.")
        return [chosen[position] for position in sorted(chosen)], dropped


def _encode_or_drop(encode: Callable[[Any], list[int] | str], content: Any) -> list[int] | str:
    """Return the tokens of a content, or the reason to drop it."""
    try:
        return encode(content)
    except RowError as error:
        return error.reason
    except DataError:
        return REFUSED


class Suite(Protocol):
    """What a suite does: answer a batch of its items with a model, and count what each answer adds to its metrics."""

    batch_size: int
    items: list[Item]
    dropped: Counter[str]

    @property
    def rows(self) -> Rows:
        """The rows from which the items were chosen."""

    @property
    def success(self) -> str | None:
        """The metric that tells whether a reply is right.

        A suite that asks for no replies has None: constraint, temperature and samples do not apply to it.
        """

    def answer(self, stage: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the answer of a stage (None: the base) to each item as JSON values."""

    def count(self, items: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[Counts]:
        """Return what each answer adds to each metric."""


@dataclass(frozen=True)
class OfficialScores:
    """The scores of answers by a tool of others: what each answer adds to its metrics.

    `agreed` of the `compared` answers are right by its rules and by ours, or wrong by both.
    """

    tool: str
    counts: list[Counts]
    compared: int
    agreed: int


@runtime_checkable
class OfficialSuite(Suite, Protocol):
    """A suite that a tool of others scores as well. The tool's files are kept in a folder for each model."""

    def score_officially(
        self, items: Sequence[Item], answers: Sequence[dict[str, Any]], folder: Path
    ) -> OfficialScores:
        """Return the tool's scores of the answers of one model."""


def fingerprint_items(items: Sequence[Item]) -> str:
    """Return the fingerprint of a suite: that of its items in order."""
    return hashlib.sha256("\n".join(item.fingerprint for item in items).encode()).hexdigest()


def read_questions(source: DataSource, name: str, kind: str = "") -> list[Rows]:
    """Read the conversations of a reader of `--data`. Each trained answer is the reference of a question.

    Without a `kind` their references are calls, or answers in text if no row has a tool.
    """
    report = DropReport()
    rows = Rows(kind, name, str(source), READERS[source.name].license)
    rows = add_questions(rows, read_source(source, report), report)
    rows.kind = kind or (CALLS if any(conversation.tools for *_, conversation in rows.rows) else ANSWERS)
    return [rows]


def read_texts(source: DataSource, name: str) -> list[Rows]:
    """Read texts."""
    report, rows = DropReport(), Rows(TEXT, name, str(source), "")
    for text in documents(str(source), report=report):
        fingerprint = hash_text(text.text)
        rows.add(text.source or "", fingerprint, fingerprint, text.text)
    return [_add_dropped(rows, report)]


def read_demo(source: DataSource, name: str) -> list[Rows]:
    """Generate held-out questions of each split of the demo world: `demo=N` are N of each."""
    if source.path is not None and not (source.path.isdigit() and int(source.path)):
        raise DataError(f"The suite 'demo' generates its questions: expected demo or demo=NUMBER, got {source}.")
    splits = []
    for split, conversations in demo.evaluation_splits(int(source.path or DEMO_ROWS)).items():
        rows = Rows(CALLS, f"{name}: {split}", str(source), demo.LICENSE)
        rows = add_questions(rows, conversations, DropReport())
        rows.read = len(conversations)
        splits.append(rows)
    return splits


def add_questions(rows: Rows, conversations: Iterable[Conversation], report: DropReport) -> Rows:
    """Add a question for each trained answer of a row; the turns before it, earlier answers included, are the question.

    `report` has counted the rows that were read and dropped.
    """
    for number, conversation in enumerate(conversations, 1):
        row, turns = conversation.id or str(number), conversation.cut_at_answers()
        if not turns or not split_question(turns[0])[0]:
            rows.dropped["no answer to a question"] += 1
        for turn, asked in enumerate(turns, 1):
            question, calls = split_question(asked)
            form = asked.form
            content = [question, asked.tools, calls, form and [form.tools, form.calls, form.place, form.phrasing]]
            if not asked.tools:
                content.append(asked.messages[-1]["content"])
            if question:
                rows.add(f"{row}#{turn}", row, hash_text(json.dumps(content, sort_keys=True)), asked)
    return _add_dropped(rows, report)


def _add_dropped(rows: Rows, report: DropReport) -> Rows:
    rows.read = sum(report.read.values())
    for reasons in report.dropped.values():
        rows.dropped.update(reasons)
    return rows


def hash_text(text: str) -> str:
    """Return the fingerprint of a row from its content as text."""
    return text_hash(text, 16).hex()
