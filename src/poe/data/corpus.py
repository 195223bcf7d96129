"""The rows of a SPEC as one numbered set on disk, without repetitions and leaks, split into sides.

Each row has a side. `TRAIN` or `HELD_OUT`: chosen by a hash of its query. `NEAR`: a near-duplicate of an earlier row.
`LEAK`: a training row that shares its query, or a call with the same tool and arguments, with a held-out or evaluation
row. `EVALUATION`: a row of `eval_data`. Rows with the side `NEAR` or `LEAK` are not used; they are counted as dropped.
"""

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poe.calls.conversation import Conversation
from poe.data.cache import cached_folder, file_hash, fingerprint
from poe.data.drops import DropReport
from poe.data.near import NearDuplicates
from poe.data.readers import READERS, read_source
from poe.data.readers.guess import find_reader
from poe.data.sizes import choose_validation_ratio
from poe.data.sources import hub_fingerprint
from poe.data.spec import DataSource, parse_spec
from poe.data.split import find_held_out, find_repetition, short_hash, split_number
from poe.data.store import RowStore, RowWriter
from poe.errors import DataError
from poe.stages.recipe import Recipe

TRAIN, HELD_OUT, NEAR, LEAK, EVALUATION = range(5)
DROPPED_FILE = "dropped.jsonl"
_QUERY_LEAK, _CALL_LEAK = "query of an evaluation row", "call of an evaluation row"


@dataclass(frozen=True)
class Corpus:
    """Numbered rows. Row i comes from `sources[source[i]]` and has the side `side[i]`.

    `sources` are the items of the SPEC, followed by the `num_evaluation_sources` items of `eval_data`. `key` is a
    fingerprint of the whole set. `validation_ratio` is the share of queries that are held out.
    """

    rows: RowStore
    sources: list[DataSource]
    source: np.ndarray  # int16 (N,)
    side: np.ndarray  # int8 (N,)
    folder: Path
    key: str
    num_evaluation_sources: int
    validation_ratio: float

    def row_numbers(self, source: int, side: int) -> np.ndarray:
        """Return the numbers of a source's rows on one side, in reading order."""
        return np.flatnonzero((self.source == source) & (self.side == side))


def read_corpus(recipe: Recipe, report: DropReport) -> Corpus:
    """Read `recipe.data` and `recipe.eval_data`, or open the result of an earlier call with the same input.

    `recipe.validation_ratio` is the share of queries that are held out, `recipe.near_duplicates` the Jaccard similarity
    (0 to 1) from which a row is a near-duplicate (None: only exact repetitions count). No training row shares a query
    or a call with a row of `eval_data`. `report` counts the rows that are read, kept and dropped. Raises `DataError`
    for a source without usable rows.
    """
    sources = parse_spec(recipe.data, READERS, find_reader)
    evaluation = parse_spec(recipe.eval_data, READERS, find_reader) if recipe.eval_data else []
    states = _file_states([*sources, *evaluation])
    identities = [[_source_identity(s) for s in sources], [_source_identity(s) for s in evaluation]]
    key = fingerprint("rows", *identities, recipe.validation_ratio, recipe.near_duplicates, recipe.seed)

    def build(folder: Path) -> dict[str, Any]:
        folder_report = DropReport(folder / DROPPED_FILE)
        try:
            ratio = _build(folder, sources, evaluation, recipe, folder_report)
            _check_unchanged([*sources, *evaluation], states, [*identities[0], *identities[1]])
        except DataError:
            folder_report.close()
            report.add(folder_report.as_dict(), folder / DROPPED_FILE)
            raise
        finally:
            folder_report.close()
        return {"counts": folder_report.as_dict(), "validation_ratio": ratio}

    folder, result = cached_folder("rows", key, build)
    report.add(result["counts"], folder / DROPPED_FILE)
    numbers = np.load(folder / "numbers.npz")
    all_sources = [*sources, *evaluation]
    return Corpus(
        *(RowStore(folder), all_sources, numbers["source"], numbers["side"], folder, key, len(evaluation)),
        result["validation_ratio"],
    )


def _source_identity(source: DataSource) -> list[Any]:
    """Return everything that decides which rows a source has."""
    reader = READERS[source.name]
    if source.path is not None and not reader.generated:
        return [source.name, [(file.name, file_hash(file)) for file in reader.files(source.path)]]
    if reader.hub_id is not None and source.path is None:
        fingerprints = [hub_fingerprint(reader.hub_id, source.name, config=config) for config in reader.hub_configs]
        return [source.name, reader.hub_id, *fingerprints]
    return [source.name, source.path]


def _file_states(sources: list[DataSource]) -> list[dict[str, Any]]:
    """Return what changes whenever a file of a source is written or replaced, by the file's path."""
    states = []
    for source in sources:
        reader = READERS[source.name]
        files = reader.files(source.path) if source.path is not None and not reader.generated else []
        stats = {str(file): file.stat() for file in files}
        states.append({f: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f, s in stats.items()})
    return states


def _check_unchanged(sources: list[DataSource], states: list[Any], identities: list[Any]) -> None:
    """Raise `DataError` unless the sources are still those that were read; the rows are stored under their digest."""
    for source, before, now, identity in zip(sources, states, _file_states(sources), identities, strict=True):
        # The times of a file can be too coarse to show a change, so its content is compared as well.
        if now == before and _source_identity(source) == identity:
            continue
        changed = [path for path in {**before, **now} if before.get(path) != now.get(path)]
        raise DataError(
            f"{', '.join(changed[:3]) or source} changed while it was being read, and nothing was stored: start again "
            "when no program writes to it."
        )


def _build(
    folder: Path, sources: list[DataSource], evaluation: list[DataSource], recipe: Recipe, report: DropReport
) -> float:
    """Write the rows and their sides, and return the share of queries that are held out."""
    writer, index = RowWriter(folder), _RowIndex()
    near = None if recipe.near_duplicates is None else NearDuplicates(recipe.near_duplicates)
    # Evaluation rows come first, so that the training row is dropped when it is a near-duplicate of one.
    numbered = [*enumerate(evaluation, len(sources)), *enumerate(sources)]
    seen: dict[bool, set[bytes]] = {True: set(), False: set()}
    for number, source in numbered:
        is_evaluation = number >= len(sources)
        for conversation in read_source(source, report):
            if reason := find_repetition(conversation, seen[is_evaluation]):
                report.drop_kept(conversation, reason)
                continue
            index.add(conversation, number, EVALUATION if is_evaluation else TRAIN, recipe.seed)
            writer.append(conversation)
            if near is not None:
                near.add(conversation)
    writer.close()
    rows = RowStore(folder)
    row_source, row_side = index.arrays()
    if near is not None:
        reason = f"almost the same as an earlier row (similarity {near.threshold:g} or more)"
        for later, earlier in near.find():
            if row_side[later] == TRAIN:
                row_side[later] = NEAR
                report.drop_kept(rows[later], reason, like=earlier)
    used = np.flatnonzero(row_side == TRAIN)
    numbers = index.split_numbers()[used]
    ratio = choose_validation_ratio(recipe, numbers)
    row_side[used[find_held_out(numbers, ratio)]] = HELD_OUT
    for row, reason in index.find_leaks(row_side):
        row_side[row] = LEAK
        report.drop_kept(rows[row], reason)
    np.savez(folder / "numbers.npz", source=row_source, side=row_side)
    return ratio


class _RowIndex:
    """The part of each row that stays in memory while a corpus is read, about 50 bytes."""

    def __init__(self) -> None:
        self._source, self._side = array("h"), array("b")
        self._query, self._split = array("Q"), array("Q")
        self._call, self._call_row = array("Q"), array("L")

    def add(self, conversation: Conversation, source: int, side: int, seed: int) -> None:
        row = len(self._source)
        self._source.append(source)
        self._side.append(side)
        self._query.append(short_hash(conversation.query or conversation.key()))
        self._split.append(split_number(conversation, seed))
        for call in _calls_as_text(conversation):
            self._call.append(short_hash(call))
            self._call_row.append(row)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self._source, dtype=np.int16), np.array(self._side, dtype=np.int8)

    def split_numbers(self) -> np.ndarray:
        return np.array(self._split, dtype=np.uint64)

    def find_leaks(self, side: np.ndarray) -> Iterator[tuple[int, str]]:
        """Yield the training rows that share a query or a call with a held-out or evaluation row, with the reason."""
        evaluated, training = (side == HELD_OUT) | (side == EVALUATION), side == TRAIN
        query, call = np.array(self._query), np.array(self._call)
        call_row = np.array(self._call_row, dtype=np.int64)
        by_query = training & np.isin(query, query[evaluated])
        by_call = np.zeros_like(training)
        by_call[call_row[np.isin(call, call[evaluated[call_row]])]] = True
        for row in np.flatnonzero(by_query | (by_call & training)).tolist():
            yield row, _QUERY_LEAK if by_query[row] else _CALL_LEAK


def _calls_as_text(conversation: Conversation) -> Iterator[str]:
    """Yield each call that has arguments as text. A call without arguments does not distinguish rows."""
    for message in conversation.messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if function["arguments"]:
                yield json.dumps([function["name"], function["arguments"]], sort_keys=True)
