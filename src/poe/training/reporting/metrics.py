"""metrics.jsonl: one line for every step and every validation. The report is drawn from it."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from poe.errors import OutputError
from poe.files.output import write_error, write_file

METRICS = "metrics.jsonl"
Record = dict[str, Any]


class Metrics:
    """The open file of a run.

    The file starts with `records`, the history in the checkpoint of a resumed run, so that it has one line for every
    step and every validation, in order. `listener` receives every new record. Without a folder nothing is written.
    `failure` is the `OutputError` of the first write that failed; the run saves a checkpoint before it raises it.
    """

    def __init__(
        self, run: Path | None, records: Iterable[Record] = (), listener: Callable[[Record], None] | None = None
    ):
        self.path = Path(os.devnull) if run is None else run / METRICS
        self._listener = listener
        # the validation after a step follows the line of that step
        ordered = sorted(records, key=lambda record: (record["step"], "val_bpb" in record))
        self.failure: OutputError | None = None
        if run is not None:
            write_file(self.path, "".join(json.dumps(record) + "\n" for record in ordered))
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise write_error(self.path, error) from error

    def write(self, record: Record) -> None:
        """Write a record. After a failure no more is written."""
        if self.failure is None:
            try:
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
            except OSError as error:
                self.failure = OutputError(
                    f"{self.path} could not be written: {error.strerror}. The run was saved: free some space, then "
                    "continue with --resume."
                )
        if self._listener is not None:
            self._listener(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # what a failed write left in the buffer
            self._file.close()


def read_metrics(run: Path) -> tuple[list[Record], list[Record]]:
    """Return the records of the steps and those of the validations in a run's metrics.jsonl.

    An unfinished last line of a killed run is skipped. Raises `OutputError` when there is no such file.
    """
    try:
        lines = (run / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise OutputError(f"There is no {METRICS} in {run} to read: {error.strerror}.") from error
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [r for r in records if "loss" in r], [r for r in records if "val_bpb" in r]
