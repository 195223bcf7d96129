"""metrics.jsonl: one line for every step and every validation. The report is drawn from it."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from poe.errors import OutputError

METRICS = "metrics.jsonl"
Record = dict[str, Any]


class Metrics:
    """The open file of a run.

    The file starts with `records`, the history in the checkpoint of a resumed run, so that it has one line for every
    step and every validation, in order. `listener` receives every new record. Without a folder nothing is written.
    Raises `OutputError` when a write fails.
    """

    def __init__(
        self, run: Path | None, records: Iterable[Record] = (), listener: Callable[[Record], None] | None = None
    ):
        self.path = Path(os.devnull) if run is None else run / METRICS
        self._listener = listener
        # the validation after a step follows the line of that step
        ordered = sorted(records, key=lambda record: (record["step"], "val_bpb" in record))
        try:
            if run is not None:
                new = self.path.with_name(METRICS + ".new")
                new.write_text("".join(json.dumps(record) + "\n" for record in ordered), encoding="utf-8")
                new.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._output_error(error) from error

    def write(self, record: Record) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._output_error(error) from error
        if self._listener is not None:
            self._listener(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _output_error(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path} could not be written: {error.strerror}. Free some space, then use --resume.")


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
