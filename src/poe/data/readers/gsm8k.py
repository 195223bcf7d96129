"""GSM8K: grade-school mathematics in words, with worked answers.

Hub: `openai/gsm8k`, configuration `main` (7,473 training rows, 1,319 test rows). License: MIT.

A row is `{"question", "answer"}`.

Traps and how the reader handles them:

* Nearly every answer has calculator annotations, `<<48/2=24>>`, before the number that they compute: removed, because
  the text is the same without them and no calculator evaluates them.
* The last line is `#### 72`. It stays unchanged, with thousands separators, because answers are compared by it.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, question_turns, read_rows
from poe.data.sources import Row

NAME = "gsm8k"
HUB_ID = "openai/gsm8k"
HUB_CONFIGS = ("main",)
LICENSE = "MIT"

_CALCULATOR = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of rows with `question` and `answer`."""
    return read_rows(NAME, LICENSE, ("question", "answer"), rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    answer = row.get("answer")
    if isinstance(answer, str) and _CALCULATOR.search(answer):
        note("calculator notes removed")
        answer = _CALCULATOR.sub("", answer)
    return question_turns(row.get("question"), answer, note)
