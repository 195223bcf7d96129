"""RoTBench: choose the first tool when the names of tools and parameters are misspelled, swapped or meaningless.

Hub: none; give files of the repository (`Data/First_Turn/{clean,slight,medium,heavy,union}.json`). License: Apache-2.0.
A test set: 105 questions, each with five levels of noise.

A row is `{"id", "conversations", "scenario"}` with system, user and assistant.

Traps and how the reader handles them:

* The tools are JSON inside the system prompt. The rest of the prompt describes the answer format (Thought, Action,
  Action Input) and is not used.
* The assistant's value is a list of correct answers. The first one is used, because a conversation has one answer. A
  score by the first answer alone is too low for rows with several answers.
* At the level "heavy" the real names are swapped, so `ask_to_user` may translate and `finish` may search. Descriptions
  and parameters define what a tool does. The names stay, and neither of these two tools is special here.
* Absent optional values are sometimes written as the text "None": kept, because the answers contain it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note
from poe.data.drops import DropReport
from poe.data.readers.react import read_prompt_tools, read_question, read_step, read_turns
from poe.data.readers.turns import Turns, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "rotbench"
HUB_ID = None
LICENSE = "Apache-2.0"


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of one question and its first correct answer."""
    return read_rows(NAME, LICENSE, ("conversations",), rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    match read_turns(row):
        case [("system", str() as system), ("user", str() as question), ("assistant", [str() as answer, *others])]:
            pass
        case _:
            raise RowError("row of an unknown format")
    if others:
        note("other correct answers left out")
    turns = Turns(read_prompt_tools(system, "you have access of the following tools:", note), note)
    turns.add_user(read_question(question))
    step = read_step(answer)
    turns.add_calls([(step.name, step.arguments, None)], step.thought)
    return turns
