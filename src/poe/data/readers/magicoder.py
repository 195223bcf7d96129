"""Magicoder OSS-Instruct: programming problems inspired by open-source snippets, with solutions.

Hub: `ise-uiuc/Magicoder-OSS-Instruct-75K` (75,197 rows). License: MIT; the texts come from an OpenAI model.

A row is `{"problem", "solution"}` among other fields (`lang`, `seed`, ...), which are not read. Solutions are prose
with fenced code, kept as they stand.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note
from poe.data.drops import DropReport
from poe.data.readers.question import answered
from poe.data.readers.turns import Turns, read_rows
from poe.data.sources import Row

NAME = "magicoder"
HUB_ID = "ise-uiuc/Magicoder-OSS-Instruct-75K"
LICENSE = "MIT"


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows with `problem` and `solution`."""
    return read_rows(NAME, LICENSE, ("problem", "solution"), rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    return answered(row.get("problem"), row.get("solution"), note)
