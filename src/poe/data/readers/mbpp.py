"""MBPP: small Python tasks, each with a solution and tests.

Hub: `google-research-datasets/mbpp`, configuration `full` (374 training rows). License: CC-BY-4.0.

The task is in `text` on the Hub, and in `question` in files of the same rows.

Traps and how the reader handles them:

* The task does not name the function: the tests are added after it, so that the name is known.
* `code` has CRLF line ends: they become line feeds. The answer is the code without a fence.
* Some tests need a class that only the solution defines; those rows are kept.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, question_turns, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "mbpp"
HUB_ID = "google-research-datasets/mbpp"
HUB_CONFIGS = ("full",)
LICENSE = "CC-BY-4.0"

_FIELDS = ("question", "text", "test_list", "code")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of rows with a task, tests and code."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    match row.get("question", row.get("text")), row.get("test_list"), row.get("code"):
        case str() as task, [*tests], str() as code if tests and all(isinstance(test, str) for test in tests):
            pass
        case _:
            raise RowError("row of an unknown format")
    if "\r\n" in code:
        note("CRLF written as a line feed")
    task, code, *tests = (text.replace("\r\n", "\n") for text in [task, code, *tests])
    if not task.strip():
        raise RowError("empty turn")
    return question_turns("\n".join([task.strip(), "It must pass these tests:", *tests]), code, note)
