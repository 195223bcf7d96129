"""MathInstruct: mathematics with answers in prose (chain of thought) or as a Python program (program of thought).

Hub: `TIGER-Lab/MathInstruct` (262,040 rows). License: MIT as its card says; it is put together from 13 sets, each with
terms of its own, named in `source`.

A row is `{"source", "instruction", "output"}`. Trap: rows made from the training parts of GSM8K, MATH and others are in
it, so a split by question is needed when it is mixed with them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note
from poe.data.drops import DropReport
from poe.data.readers.question import answered
from poe.data.readers.turns import Turns, read_rows
from poe.data.sources import Row

NAME = "mathinstruct"
HUB_ID = "TIGER-Lab/MathInstruct"
LICENSE = "MIT"


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows with `instruction` and `output`."""
    return read_rows(NAME, LICENSE, ("instruction", "output"), rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    return answered(row.get("instruction"), row.get("output"), note)
