"""Accounting for rows that are not used: counted by reason, kept in a file, never silently skipped."""

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any


class DropReport:
    """Counts read, kept and dropped rows per source, and writes each dropped row to `path` as one JSON line.

    A row is `{"source", "reason", "id", "row"}`. Use as a context manager, or call `close()`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.read: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = {}
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

    def drop(self, source: str, reason: str, row: Any, id: str = "") -> None:
        self.dropped.setdefault(source, Counter())[reason] += 1
        if self._file is not None:
            line = {"source": source, "reason": reason, "id": id, "row": row}
            self._file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """`{source: {"read": n, "kept": n, "dropped": {reason: n}}}`, reasons by falling count."""
        sources = sorted({*self.read, *self.kept, *self.dropped})
        return {
            s: {
                "read": self.read[s],
                "kept": self.kept[s],
                "dropped": dict(self.dropped.get(s, Counter()).most_common()),
            }
            for s in sources
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "DropReport":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
