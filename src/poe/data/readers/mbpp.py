"""MBPP: small Python tasks, each with a solution and tests.

Hub: `google-research-datasets/mbpp`, configuration `full` (374 rows to train on). License: CC-BY-4.0.

The task is `text` on the Hub, `question` in files of the same rows. Traps, and what is done about each:

* The task alone does not name the function: the tests follow it, so that the answer can be known.
* `code` has CRLF line ends: written as line feeds. It is the answer as it stands, without a fence.
* Some tests need a class that only the solution defines; those rows are kept.
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

NAME = "mbpp"
HUB_ID = "google-research-datasets/mbpp"
HUB_CONFIGS = ("full",)
LICENSE = "CC-BY-4.0"

_FIELDS = ("question", "text", "test_list", "code")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows with a task, tests and code."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    match row.get("question", row.get("text")), row.get("test_list"), row.get("code"):
        case str() as task, [*tests], str() as code if tests and all(isinstance(test, str) for test in tests):
            pass
        case _:
            raise RowError("row is of no known format")
    if "\r\n" in code:
        note("CRLF written as a line feed")
    task, code, *tests = (text.replace("\r\n", "\n") for text in [task, code, *tests])
    if not task.strip():
        raise RowError("empty turn")
    return answered("\n".join([task.strip(), "It must pass these tests:", *tests]), code, note)
