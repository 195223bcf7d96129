"""MathInstruct: mathematics with answers in prose (chain of thought) or as a Python program (program of thought).

Hub: `TIGER-Lab/MathInstruct` (262,040 rows). License: MIT according to its card. It combines 13 sets, named in
`source`, each with its own terms.

A row is `{"source", "instruction", "output"}`. Trap: it contains rows made from the training splits of GSM8K, MATH and
others, so a mixture with them needs a split by question.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, question_turns, read_rows
from poe.data.sources import Row

NAME = "mathinstruct"
HUB_ID = "TIGER-Lab/MathInstruct"
LICENSE = "MIT"


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of rows with `instruction` and `output`."""
    return read_rows(NAME, LICENSE, ("instruction", "output"), rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    return question_turns(row.get("instruction"), row.get("output"), note)
