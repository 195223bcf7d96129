"""Alpaca: instructions, some with an input, and their answers.

Hub: `tatsu-lab/alpaca` (52,002 rows). License: CC-BY-NC-4.0; the answers come from an OpenAI model.

A row is `{"instruction", "input", "output"}`. Sets in the same form with another license have readers of their own
(`codealpaca`). Traps, and what is done about each:

* `input` is empty in most rows; where it is not, it follows the instruction after a blank line.
* GPTeacher calls the answer `response`.
* The seed tasks hold their inputs and outputs in a list, `instances`: each instance is a conversation.
* A few answers are empty: dropped.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note
from poe.data.drops import DropReport
from poe.data.readers.question import answered
from poe.data.readers.turns import Turns, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "alpaca"
HUB_ID = "tatsu-lab/alpaca"
LICENSE = "CC-BY-NC-4.0"

_FIELDS = ("instruction", "input", "output", "response")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows with `instruction`."""
    return read_as(NAME, LICENSE, rows, report)


def read_as(name: str, license: str, rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """The same for a set of another name and license."""
    return read_rows(name, license, _FIELDS, _single(rows), report, _convert)


def _single(rows: Iterable[Row]) -> Iterator[Row]:
    """Each instance of a seed task as a row of its own."""
    for row_id, row in rows:
        instances = row.get("instances") if isinstance(row, dict) else None
        if not isinstance(instances, list) or not instances:
            yield row_id, row
            continue
        for number, instance in enumerate(instances):
            whole = {"instruction": row.get("instruction"), **instance} if isinstance(instance, dict) else instance
            yield f"{row_id}.instances[{number}]", whole


def _convert(row: dict[str, Any], note: Note) -> Turns:
    return answered(instruction(row), row.get("output", row.get("response")), note)


def instruction(row: dict[str, Any]) -> str:
    """The user's text: the instruction and, where there is one, the input."""
    parts = [row.get("instruction"), row.get("input", "")]
    if not all(isinstance(part, str) for part in parts):
        raise RowError("row is of no known format")
    return "\n\n".join(part.strip() for part in parts if part.strip())
