"""GSM8K: grade-school mathematics in words, with worked answers.

Hub: `openai/gsm8k`, configuration `main` (7,473 rows to train on, 1,319 to test). License: MIT.

A row is `{"question", "answer"}`. Traps, and what is done about each:

* Nearly every answer carries notes for a calculator, `<<48/2=24>>`, before the number they give: removed, since the
  text reads the same without them and nobody will answer them.
* The last line is `#### 72`. It is kept as it stands, thousands separators too: it is what answers are compared by.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note
from poe.data.drops import DropReport
from poe.data.readers.question import answered
from poe.data.readers.turns import Turns, read_rows
from poe.data.sources import Row

NAME = "gsm8k"
HUB_ID = "openai/gsm8k"
HUB_CONFIGS = ("main",)
LICENSE = "MIT"

_CALCULATOR = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows with `question` and `answer`."""
    return read_rows(NAME, LICENSE, ("question", "answer"), rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    answer = row.get("answer")
    if isinstance(answer, str) and _CALCULATOR.search(answer):
        note("calculator notes removed")
        answer = _CALCULATOR.sub("", answer)
    return answered(row.get("question"), answer, note)
