"""A SPEC's rows as one numbered set on disk: read, freed of repetitions and leaks, and divided.

Every row has a side: `TRAIN` or `HELD_OUT`, by a hash of its query; `NEAR` for what almost repeats an earlier row;
`LEAK` for a training row with the query, or with a call of the same tool with the same arguments, of a row that the
evaluation asks. Rows of `NEAR` and `LEAK` are not used, and counted.
"""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poe.calls.conversation import Conversation
from poe.data.cache import file_digest, fingerprint, made_once
from poe.data.digest import short_hash
from poe.data.drops import DropReport
from poe.data.near import NearDuplicates
from poe.data.readers import READERS, read_source
from poe.data.sources import hub_fingerprint
from poe.data.spec import DataSource, parse_spec
from poe.data.split import is_held_out, repetition
from poe.data.store import RowStore, RowWriter
from poe.errors import DataError

TRAIN, HELD_OUT, NEAR, LEAK, EVALUATION = range(5)
DROPPED = "dropped.jsonl"
_LEAKS = ("query of an evaluation row", "call of an evaluation row")


@dataclass(frozen=True)
class Corpus:
    """Rows by number. `source[i]`, `side[i]`: which of `sources` row i came from, and where it belongs.

    `sources` are the SPEC's items, then the `asked` ones of the evaluation. `key` is a fingerprint of all of it.
    """

    rows: RowStore
    sources: list[DataSource]
    source: np.ndarray  # int16 (N,)
    side: np.ndarray  # int8 (N,)
    folder: Path
    key: str
    asked: int

    def numbers(self, source: int, side: int) -> np.ndarray:
        """The numbers of a source's rows on a side, in the order in which they were read."""
        return np.flatnonzero((self.source == source) & (self.side == side))


def read_corpus(
    spec: str,
    report: DropReport,
    *,
    held_out: float = 0.02,
    near: float | None = None,
    evaluation: str = "",
    seed: int = 0,
) -> Corpus:
    """Read the SPEC, or find what an earlier call with the same files, options and code made.

    `held_out` is the share of queries that are kept apart. `near` is the similarity (0 to 1, Jaccard) from which a row
    counts as a near-duplicate, None for exact repetitions alone. `evaluation` is a SPEC of rows to be asked afterwards,
    with which no training row may share a query or a call. `report` gets what was read, kept and dropped. Raises
    `DataError` for a source of which nothing is left.
    """
    sources = parse_spec(spec, READERS)
    asked = parse_spec(evaluation, READERS) if evaluation else []
    key = fingerprint("rows", [_identity(s) for s in sources], [_identity(s) for s in asked], held_out, near, seed)

    def make(folder: Path) -> dict[str, Any]:
        own = DropReport(folder / DROPPED)
        try:
            _build(folder, sources, asked, held_out, near, seed, own)
        except DataError:
            own.close()
            report.absorb(own.as_dict(), folder / DROPPED)
            raise
        finally:
            own.close()
        return own.as_dict()

    folder, counts = made_once("rows", key, make)
    report.absorb(counts, folder / DROPPED)
    numbers = np.load(folder / "numbers.npz")
    return Corpus(RowStore(folder), [*sources, *asked], numbers["source"], numbers["side"], folder, key, len(asked))


def _identity(source: DataSource) -> list[Any]:
    """What decides which rows a source has."""
    reader = READERS[source.name]
    if source.path is not None and not reader.generated:
        return [source.name, [(file.name, file_digest(file)) for file in reader.files(source.path)]]
    if reader.hub_id is not None and source.path is None:
        prints = [hub_fingerprint(reader.hub_id, source.name, config=config) for config in reader.hub_configs]
        return [source.name, reader.hub_id, *prints]
    return [source.name, source.path]


def _build(
    folder: Path,
    sources: list[DataSource],
    asked: list[DataSource],
    held_out: float,
    near: float | None,
    seed: int,
    report: DropReport,
) -> None:
    writer, marks = RowWriter(folder), _Marks()
    alike = None if near is None else NearDuplicates(near)
    # What is asked comes first, so that of two near rows it is the other that goes.
    numbered = [*enumerate(asked, len(sources)), *enumerate(sources)]
    seen: dict[bool, set[bytes]] = {True: set(), False: set()}
    for number, source in numbered:
        is_asked = number >= len(sources)
        for conversation in read_source(source, report):
            if why := repetition(conversation, seen[is_asked]):
                _drop(report, conversation, why)
                continue
            side = EVALUATION if is_asked else HELD_OUT if is_held_out(conversation, held_out, seed) else TRAIN
            marks.add(conversation, number, side)
            writer.append(conversation)
            if alike is not None:
                alike.add(conversation)
    writer.close()
    rows = RowStore(folder)
    source_of, side_of = marks.arrays()
    for later, earlier in alike.find() if alike is not None else ():
        if side_of[later] in (TRAIN, HELD_OUT):
            side_of[later] = NEAR
            _drop(report, rows[later], f"almost the same as an earlier row (similarity {near:g} or more)", earlier)
    for index, reason in marks.leaks(side_of):
        side_of[index] = LEAK
        _drop(report, rows[index], reason)
    np.savez(folder / "numbers.npz", source=source_of, side=side_of)


def _drop(report: DropReport, conversation: Conversation, reason: str, like: int | None = None) -> None:
    row = {"messages": conversation.messages, "tools": conversation.tools}
    report.drop(conversation.source, reason, row if like is None else {**row, "like": like}, conversation.id)
    report.kept[conversation.source] -= 1


class _Marks:
    """What of each row is kept in memory while a corpus is read: about 40 bytes."""

    def __init__(self) -> None:
        self._source, self._side = array("h"), array("b")
        self._query = array("Q")
        self._call, self._call_row = array("Q"), array("L")

    def add(self, conversation: Conversation, source: int, side: int) -> None:
        row = len(self._source)
        self._source.append(source)
        self._side.append(side)
        self._query.append(short_hash(conversation.query or conversation.key()))
        for call in _calls(conversation):
            self._call.append(short_hash(call))
            self._call_row.append(row)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self._source, dtype=np.int16), np.array(self._side, dtype=np.int8)

    def leaks(self, side: np.ndarray) -> Iterator[tuple[int, str]]:
        """Training rows that share a query or a call with a row that is asked, and why."""
        asked, training = (side == HELD_OUT) | (side == EVALUATION), side == TRAIN
        query, call = np.array(self._query), np.array(self._call)
        rows = np.array(self._call_row, dtype=np.int64)
        by_query = training & np.isin(query, query[asked])
        by_call = np.zeros_like(training)
        by_call[rows[np.isin(call, call[asked[rows]])]] = True
        for index in np.flatnonzero(by_query | (by_call & training)).tolist():
            yield index, _LEAKS[0] if by_query[index] else _LEAKS[1]


def _calls(conversation: Conversation) -> Iterator[str]:
    """Each call with arguments, as one text; a call without any says too little to tell rows apart."""
    for message in conversation.messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if function["arguments"]:
                yield json.dumps([function["name"], function["arguments"]], sort_keys=True)
