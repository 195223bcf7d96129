"""What the sets of questions and answers share: one user turn, one assistant turn."""

from typing import Any

from poe.calls.schema import Note
from poe.data.readers.turns import Turns
from poe.errors import RowError


def answered(question: Any, answer: Any, note: Note) -> Turns:
    """The conversation of a question and its answer, both text; indentation at the start of an answer is kept."""
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RowError("row is of no known format")
    turns = Turns([], note)
    turns.user(question.strip())
    turns.assistant(answer.rstrip().lstrip("\r\n"))
    return turns
