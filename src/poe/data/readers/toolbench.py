"""ToolBench: questions to real web APIs, answered step by step by a depth-first search.

Hub: none; the training data is distributed elsewhere (`toolllama_G123_dfs_train.json`), so give a file. License:
Apache-2.0.

A row is `{"id", "conversations": [{"from", "value"}]}` with the speakers system, user, assistant and function. A row is
one step of a trace: the same question is in several rows, each one step longer. The query files (`G1_query.json` and
others) have `query` and `api_list` and no answer: all their rows are dropped.

Traps and how the reader handles them:

* The tools are in the system prompt as a Python literal. The rest of the prompt describes the answer format (Thought,
  Action, Action Input) and is not used. `optional`, a list beside `required`, adds no information.
* A thought is the assistant's text before its call; an empty thought is no text.
* `Finish` is a function of the protocol that is listed among the tools. Its `final_answer` becomes the assistant's last
  turn, the thought before it is left out, and `Finish` is not offered. A trace that gives up is dropped.
* Calls to functions that are not listed (traces contain invented ones) and arguments that are not JSON: dropped.
* In some traces a second user turn tells the model to try something different: dropped.
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

NAME = "toolbench"
HUB_ID = None
LICENSE = "Apache-2.0"

_FINISH = "Finish"


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of traces; queries without an answer are dropped and counted."""
    return read_rows(NAME, LICENSE, ("conversations", "query", "api_list"), rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    if "conversations" not in row and "query" in row:
        raise RowError("query without an answer")
    turns = Turns([], note)
    finished = False
    for speaker, text in read_turns(row):
        if not isinstance(text, str):
            raise RowError("turn is not text")
        if finished:
            raise RowError("turn after the final answer")
        if speaker == "system":
            tools = read_prompt_tools(text, "you have access to the following APIs:", note)
            turns.tools.extend(tool for tool in tools if tool["function"]["name"] != _FINISH)
        elif speaker == "user":
            if any(message["role"] == "user" for message in turns.messages):
                raise RowError("second user turn")
            turns.add_user(read_question(text))
        elif speaker == "assistant":
            finished = _add_step(turns, text)
        elif speaker == "function":
            turns.add_response(text)
        else:
            raise RowError(f"turn of an unknown speaker ({speaker[:40]!r})")
    return turns


def _add_step(turns: Turns, text: str) -> bool:
    """Add one step. Return whether it was the last one."""
    step = read_step(text)
    if step.name != _FINISH:
        turns.add_calls([(step.name, step.arguments, None)], step.thought)
        return False
    answer = step.arguments.get("final_answer") if isinstance(step.arguments, dict) else None
    if not isinstance(answer, str) or step.arguments.get("return_type") != "give_answer":
        raise RowError("trace without a final answer")
    if step.thought:
        turns.note("thought before the final answer left out")
    turns.add_assistant(answer.strip())
    return True
