"""NexusRaven evaluation queries: one question, answered by calls in Python notation.

Hub: none in this format; give files of the repository (`raven/data/resources/*_queries.json`). License: CC-BY-NC-4.0
(no commercial use). A test set, derived in part from ToolAlpaca and ToolBench.

The files have three formats.

* `toolllm`: `{"Input", "Output", "context", ...}`; `context` is the Python source of the offered tools.
* `toolalpaca`: `turns_1` to `turns_5`, each `{"instruction", "golden_answer", "docstring", "backup"}`, or a slot with
  only null values. Each filled slot is a conversation; an empty slot is not a row. `docstring` is the prompt that
  declares the tools.
* `cve_cpe`, `emailrep`, `virustotal`: `{"query", "reference"}`. The file declares no tools, so nothing can be offered
  or checked: dropped.

Traps and how the reader handles them:

* Tools become JSON Schema as in `signatures`. In `toolllm` every parameter has an example as its default, so all are
  optional there. Function bodies are not read.
* An example may have another type than its parameter (25.3 for `int`): the default is removed. A call with such a value
  is dropped.
* `golden_answer` is a JSON list of calls: one turn of parallel calls.
* In `toolalpaca` every parameter is labeled required, and golden calls pass `None` for the optional ones. The word
  `Required.` before a description is reliable: all other parameters are optional here, and their nulls are left out.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Tool
from poe.calls.json_text import parse_field
from poe.calls.schema import Note
from poe.calls.tools import unique_tools
from poe.data.drops import DropReport
from poe.data.readers.signatures import read_calls, read_definition
from poe.data.readers.turns import Turns, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "nexusraven"
HUB_ID = None
LICENSE = "CC-BY-NC-4.0"

_FIELDS = ("Input", "Output", "context", "query", "reference", "instruction", "golden_answer", "docstring")
_SLOT = re.compile(r"turns_\d+")
_OPTION = re.compile(
    r'<func_start>(?P<signature>def .*?)<func_end>\s*<docstring_start>\s*"""(?P<about>.*?)"""\s*<docstring_end>',
    re.DOTALL,
)
_PARAMETER = re.compile(r"^\s+(\w+) \([^)\n]*\)(?: required)?:[ \t]*(.*)$", re.MULTILINE)


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of a question and its calls, for the formats that declare their tools."""
    return read_rows(NAME, LICENSE, _FIELDS, _split_slots(rows), report, _convert)


def _split_slots(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield each filled slot (`turns_1`, ...) of a row as a separate row, and a row without slots unchanged."""
    for row_id, row in rows:
        slots = {key: row[key] for key in row if _SLOT.fullmatch(str(key))} if isinstance(row, dict) else {}
        filled = {key: slot for key, slot in slots.items() if not isinstance(slot, dict) or any(slot.values())}
        if not filled:
            yield row_id, row
        for key, slot in filled.items():
            yield f"{row_id}.{key}", slot


def _convert(row: dict[str, Any], note: Note) -> Turns:
    if "context" in row:
        question, answer, sources = row.get("Input"), row.get("Output"), row["context"]
        if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
            raise RowError("row of an unknown format")
        tools = [read_definition(source, note) for source in sources]
    elif "docstring" in row:
        question, answer = row.get("instruction"), _join_calls(parse_field(row.get("golden_answer"), "golden answer"))
        tools = read_options(row["docstring"], note)
    elif "reference" in row:
        raise RowError("no declaration of tools")
    else:
        raise RowError("row of an unknown format")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RowError("row of an unknown format")
    turns = Turns(unique_tools(tools, note), note)
    turns.add_user(question.strip())
    turns.add_calls(read_calls(answer, turns.tools))
    return turns


def _join_calls(calls: Any) -> Any:
    return "\n".join(calls) if isinstance(calls, list) and all(isinstance(call, str) for call in calls) else None


def read_options(prompt: Any, note: Note) -> list[Tool]:
    """Return the tools of a prompt that lists signatures and docstrings."""
    if not isinstance(prompt, str) or prompt.count("<func_start>") != len(options := list(_OPTION.finditer(prompt))):
        raise RowError("tool declaration is not a signature")
    return [_read_option(option["signature"], option["about"], note) for option in options]


def _read_option(signature: str, text: str, note: Note) -> Tool:
    description, _, parameters = text.partition("Parameters:\n")
    descriptions = {name: detail.strip() for name, detail in _PARAMETER.findall(parameters) if detail.strip()}
    tool = read_definition(f"{signature.strip()}: ...", note, description.strip(), descriptions)
    schema = tool["function"]["parameters"]
    schema["required"] = [name for name in schema["required"] if descriptions.get(name, "").startswith("Required.")]
    return tool
