"""CodeAlpaca: programming tasks in the form of Alpaca.

Hub: `sahil2801/CodeAlpaca-20k` (20,022 rows). License: CC-BY-4.0; the answers come from an OpenAI model.

The code instructions of GPTeacher (MIT), whose answer is called `response`, are read by this reader too, from a file.
Form and traps are those of `alpaca`. Indentation inside answers is kept.
"""

from collections.abc import Iterable, Iterator

from poe.calls.conversation import Conversation
from poe.data.drops import DropReport
from poe.data.readers.alpaca import read_as
from poe.data.sources import Row

NAME = "codealpaca"
HUB_ID = "sahil2801/CodeAlpaca-20k"
LICENSE = "CC-BY-4.0"


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows with `instruction`."""
    return read_as(NAME, LICENSE, rows, report)
