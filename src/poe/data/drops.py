"""Count the rows that are not used by reason, and write them to a file. No row is dropped silently."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from poe.calls.conversation import Conversation
from poe.files.output import convert_os_errors, write_error


class DropReport:
    """Counts the rows of each source that were read, kept and dropped, and writes dropped rows to `path`.

    A dropped row is one JSON line `{"source", "reason", "id", "row"}`. `repaired` counts the repairs of kept rows by
    rule. Use the report as a context manager, or call `close()`. Raises `OutputError` if `path` cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.read: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = {}
        self.repaired: dict[str, Counter[str]] = {}
        self._file = None
        self._path = path
        if path is not None:
            with convert_os_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w", encoding="utf-8")

    def drop(self, source: str, reason: str, row: Any, id: str = "") -> None:
        """Count a dropped row and write it to the file."""
        self.dropped.setdefault(source, Counter())[reason] += 1
        if self._file is not None:
            line = {"source": source, "reason": reason, "id": id, "row": row}
            try:
                text = json.dumps(line, ensure_ascii=False, default=str)
                text.encode("utf-8")
            except UnicodeEncodeError:  # a lone surrogate can only be written as a JSON escape
                text = json.dumps(line, default=str)
            except (ValueError, RecursionError):  # nested too deeply
                text = json.dumps({**line, "row": f"a {type(row).__name__} that is nested too deeply to be written"})
            try:
                self._file.write(text + "\n")
            except OSError as error:
                assert self._path is not None
                raise write_error(self._path, error) from error

    def drop_kept(self, row: Conversation, reason: str, **notes: Any) -> None:
        """Count a conversation that was kept when it was read as dropped after all. `notes` are written beside it."""
        self.drop(row.source, reason, {"messages": row.messages, "tools": row.tools, **notes}, row.id)
        self.kept[row.source] -= 1

    def repair(self, source: str, rule: str, count: int = 1) -> None:
        """Count a repair of a kept row under the name of its rule."""
        self.repaired.setdefault(source, Counter())[rule] += count

    def add(self, counts: dict[str, Any], path: Path | None) -> None:
        """Add the counts of another report (its `as_dict()`) and the rows in its file."""
        for source, other in counts.items():
            self.read[source] += other["read"]
            self.kept[source] += other["kept"]
            self.dropped.setdefault(source, Counter()).update(other["dropped"])
            if "repaired" in other:
                self.repaired.setdefault(source, Counter()).update(other["repaired"])
        if self._file is not None and self._path is not None and path is not None:
            with convert_os_errors(self._path), path.open(encoding="utf-8") as lines:
                shutil.copyfileobj(lines, self._file)

    def as_dict(self) -> dict[str, Any]:
        """Return `{source: {"read": n, "kept": n, "dropped": {reason: n}}}`, the most frequent reason first.

        A source with repaired rows also has `"repaired": {rule: n}`.
        """
        report: dict[str, Any] = {}
        for source in sorted({*self.read, *self.kept, *self.dropped, *self.repaired}):
            report[source] = {
                "read": self.read[source],
                "kept": self.kept[source],
                "dropped": dict(self.dropped.get(source, Counter()).most_common()),
            }
            if self.repaired.get(source):
                report[source]["repaired"] = dict(self.repaired[source].most_common())
        return report

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None and self._path is not None:
            with convert_os_errors(self._path):
                file.close()

    def __enter__(self) -> "DropReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
