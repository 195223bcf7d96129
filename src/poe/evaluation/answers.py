"""The answers of an evaluation in a file that only grows, so that one that was killed goes on where it was.

The first line says what was asked: models, suites, prompt, settings and versions, by fingerprint. Every other line is
one answer. The hash of a line covers the line before it, so a file with an edited, removed or added line is refused. A
line that was cut off while it was written is removed.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poe.errors import EvaluationError, printable
from poe.files.output import convert_os_errors

Key = tuple[str, str, str, int]
"""Which answer: the label of the model, the name of the suite, the fingerprint of the question, and the sample."""

_ADVICE = "Choose another --out, or delete the file to answer again"
_WORDS = {"models": "model", "suites": "suite", "prompt": "prompt format", "settings": "setting", "versions": "version"}


class AnswersFile:
    """The answers in a file, by `Key`. Raises `EvaluationError` for a file of another evaluation, or an edited one."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path, self._last = path, ""
        self.answers: dict[Key, dict[str, Any]] = {}
        with convert_os_errors(path):
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
        lines = whole.decode("utf-8", "replace").splitlines()
        if not lines:
            self._append([dict(header)])
        for number, line in enumerate(lines, 1):
            record = self._read(line, number)
            if number == 1:
                _compare(record, dict(header), path)
            else:
                self.answers[_key(record, f"{path}:{number}")] = record

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append answers that are not there yet, and wait until they are on the disk."""
        new = {_key(record, str(self._path)): dict(record) for record in records}
        new = {key: record for key, record in new.items() if key not in self.answers}
        self._append(list(new.values()))
        self.answers |= new

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        text = ""
        for record in records:
            self._last = _hash(self._last, record)
            text += json.dumps({**record, "hash": self._last}) + "\n"
        with convert_os_errors(self._path), self._path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            written = record.pop("hash")
            self._last = _hash(self._last, record)
        except (ValueError, KeyError, AttributeError, RecursionError):
            record, written = {}, ""
        if not written or written != self._last:
            raise EvaluationError(
                f"{self._path}, line {number}: expected a line that an evaluation wrote, after the line before it, got "
                f"an edited, moved or damaged one ({printable(line, 60)}). {_ADVICE}."
            )
        return dict(record)


def _hash(before: str, record: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{before}\n{json.dumps(record)}".encode()).hexdigest()[:32]


def _key(record: Mapping[str, Any], place: str) -> Key:
    try:
        return record["model"], record["suite"], record["question"], record["sample"]
    except KeyError as error:
        raise EvaluationError(f"{place}: the answer has no {error}. {_ADVICE}.") from None


def _compare(known: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    """Raise `EvaluationError` that names the first difference of two headers."""
    header = json.loads(json.dumps(header))
    for part in dict.fromkeys([*header, *known]):
        old, new = known.get(part), header.get(part)
        if old == new:
            continue
        detail = ""
        if isinstance(old, dict) and isinstance(new, dict):
            name = next(name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name))
            old, new, detail = old.get(name), new.get(name), f" ({name})"
        raise EvaluationError(
            f"{path} has the answers of another {_WORDS.get(part, part)}{detail}: it has {_short(old)}, and this "
            f"evaluation has {_short(new)}. {_ADVICE}."
        )


def _short(value: Any) -> str:
    return printable("none" if value is None else value if isinstance(value, str) else json.dumps(value), 60)
