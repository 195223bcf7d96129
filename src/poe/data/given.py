"""Rows that are given in Python: written to a file in the cache, which is then a source like any other.

So they pass the same reader, checks and counts as a file's rows. The file is named by its content, so equal rows are
found again, and a run that was stopped continues with the same rows in another process.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from poe.calls.tools import describe_object
from poe.data.cache import cached_folder, file_hash, make_private_folder
from poe.data.readers import messages
from poe.data.sources import KEPT_TEXT
from poe.data.spec import DataSource
from poe.errors import DataError, RowError
from poe.files.output import convert_os_errors, scratch_folder

Data = str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any]
"""A SPEC, a file, rows, or rows by split. Rows are a `datasets.Dataset` or dicts in the format of `messages`."""

TRAIN = "train"
_EXPECTED = (
    "expected a SPEC, or rows with `messages` (and `tools`) or with `prompt` and `completion`: a list, an iterable, a "
    "datasets.Dataset, or a dict of them with the split 'train'"
)


def write_given(data: Data | None, eval_data: Data | None) -> tuple[str | None, str | None]:
    """Return the SPECs of the training and the evaluation rows; rows are written to the cache.

    Of several splits, "train" is for training, and the others are evaluation rows unless `eval_data` is given. Raises
    `DataError` for data of another kind, or without any row that could be read.
    """
    splits = dict(_find_splits(data)) if isinstance(data, Mapping) else {TRAIN: data}
    if TRAIN not in splits:
        raise DataError(f"data has no split 'train', but {', '.join(map(repr, splits))}: give data=splits[...].")
    others: Mapping[str, Any] = {name: rows for name, rows in splits.items() if name != TRAIN}
    if eval_data is not None:
        others = _find_splits(eval_data) if isinstance(eval_data, Mapping) else {"evaluation": eval_data}
    specs = [_as_spec(rows, name) for name, rows in others.items()]
    return None if data is None else _as_spec(splits[TRAIN], TRAIN), ",".join(specs) or None


def _find_splits(data: Mapping[str, Any]) -> Mapping[str, Any]:
    if not data or messages.holds_conversation(data):
        raise DataError(f"data is one row, or empty: {_EXPECTED}.")
    return data


def _as_spec(data: Any, name: str) -> str:
    if isinstance(data, str):
        return data
    if isinstance(data, os.PathLike):
        return str(DataSource(messages.NAME, os.fspath(data)))
    if not isinstance(data, Iterable) or isinstance(data, Mapping | bytes):
        raise DataError(f"data cannot be {type(data).__name__}: {_EXPECTED}.")
    parent = make_private_folder("given")
    with scratch_folder(parent) as scratch:
        written = _write_rows(data, name, scratch)
        digest = file_hash(written)
        file_name = f"{name}-{digest[:12]}{written.suffix}"
        key = hashlib.sha256(f"{digest} {file_name}".encode()).hexdigest()[:32]

        def keep(folder: Path) -> dict[str, Any]:
            written.rename(folder / file_name)
            return {}

        folder, _ = cached_folder("given", key, keep)
    return str(DataSource(messages.NAME, str(folder / file_name)))


def _write_rows(data: Any, split: str, folder: Path) -> Path:
    """Write rows to a new file: a data set of `datasets` as parquet, because its nulls mean absent members."""
    if type(data).__module__.partition(".")[0] == "datasets":
        return _write_parquet(data, split, folder / "rows.parquet")
    path, seen = folder / "rows.jsonl", _Seen(split)
    with convert_os_errors(path):
        file = path.open("w", encoding="utf-8")
    with file:
        for number, row in enumerate(data):  # an error of the caller's iterable is the caller's
            seen.add(row)
            with convert_os_errors(path):
                file.write(_as_line(row, number) + "\n")
    seen.check()
    return path


def _write_parquet(data: Any, split: str, path: Path) -> Path:
    import datasets

    if not hasattr(data, "num_rows"):  # it is streamed
        data = datasets.Dataset.from_list(list(data))
    seen = _Seen(split)
    seen.add(dict.fromkeys(data.column_names, ""))
    if data.num_rows:
        seen.check()
    data.select_columns([name for name in data.column_names if name in messages.FIELDS]).to_parquet(path)
    return path


class _Seen:
    """Which fields the rows of a split have."""

    def __init__(self, split: str) -> None:
        self._label = "data" if split == TRAIN else f"The split {split!r}"
        self._rows, self._has_fields = 0, False
        self._keys: dict[str, None] = {}

    def add(self, row: Any) -> None:
        self._rows += 1
        if isinstance(row, Mapping):
            self._has_fields |= messages.holds_conversation(row)
            self._keys |= dict.fromkeys(map(str, list(row)[:20])) if len(self._keys) < 20 else {}

    def check(self) -> None:
        """Raise `DataError` if no row can be read."""
        if not self._rows:
            raise DataError(f"{self._label} has no rows: {_EXPECTED}.")
        if not self._has_fields:
            found = f"rows with {', '.join(self._keys)}" if self._keys else f"{self._rows} rows that are no dicts"
            hint = " Plain texts train a base, not a stage: poe-train base." if "text" in self._keys else ""
            raise DataError(f"{self._label} has {found}: {_EXPECTED}.{hint}")


def _as_line(row: Any, number: int) -> str:
    """Return a row as one line of JSON. The reader drops a row that JSON cannot hold, and reports its text."""
    if isinstance(row, Mapping):
        row = {key: value for key, value in row.items() if key in messages.FIELDS}
    try:
        return json.dumps(row, default=_as_json)
    except RowError as error:  # a tool that is a Python function: the program should be changed, not the row left out
        raise DataError(f"Row {number} of data: {error}.") from error
    except (TypeError, ValueError, RecursionError) as error:
        return f"<{error}> {_as_text(row)}".replace("\n", " ").replace("\r", " ")[:KEPT_TEXT]


def _as_text(row: Any) -> str:
    try:
        return repr(row).encode("utf-8", "replace").decode()
    except RecursionError:
        return f"a {type(row).__name__} that is nested too deeply"


def _as_json(value: Any) -> Any:
    """Return an object of an SDK, a numpy array, a Python function or a class of Pydantic as JSON values."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    described = describe_object(value)
    if described is value:
        raise TypeError(f"{type(value).__name__} is no JSON value")
    return described
