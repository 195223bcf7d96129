"""RoTBench: which tool to call first, when the names of tools and parameters are misspelt, swapped or meaningless.

Hub: none of its own; files of the repository (`Data/First_Turn/{clean,slight,medium,heavy,union}.json`) are given.
License: Apache-2.0. A test set: 105 questions, each under five degrees of noise.

A row is `{"id", "conversations", "scenario"}` with system, user and assistant. Traps, and what is done about each:

* The tools are JSON inside the system prompt; the rest of the prompt describes the form of the answer (Thought, Action,
  Action Input) and is not carried over.
* The assistant's value is a list of answers, each of them right. The first is taken: a conversation has one answer.
  A score by the first alone is too low where there are several.
* Under "heavy" the real names change places, so `ask_to_user` may translate and `finish` may search. Descriptions
  and parameters tell what a tool does; names are kept as they are, and neither of the two is special here.
* Absent optional values are written as the text "None" in places: kept, since the answers count on it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note
from poe.data.drops import DropReport
from poe.data.readers.react import read_question, read_step, read_tools, speeches
from poe.data.readers.turns import Turns, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "rotbench"
HUB_ID = None
LICENSE = "Apache-2.0"


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of one question and the first of its right answers."""
    return read_rows(NAME, LICENSE, ("conversations",), rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    match speeches(row):
        case [("system", str() as system), ("user", str() as question), ("assistant", [str() as answer, *others])]:
            pass
        case _:
            raise RowError("row is of no known format")
    if others:
        note("other right answers left out")
    turns = Turns(read_tools(system, "you have access of the following tools:", note), note)
    turns.user(read_question(question))
    step = read_step(answer)
    turns.calls([(step.name, step.arguments, None)], step.thought)
    return turns
