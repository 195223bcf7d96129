"""xLAM function-calling 60k: one question, one or more calls at once, no results.

Hub: `Salesforce/xlam-function-calling-60k` (gated: accept its terms, then `hf auth login`). License: CC-BY-4.0.

Two formats are read.

* The original, `{"id", "query", "answers", "tools"}`; `answers` and `tools` are JSON text.
* The ms-swift form, `{"tools", "messages"}`: `tools` in OpenAI's envelope (parameters as flat as in the original), and
  one `tool_call` message per call. `tool_response` or `tool` and `assistant` messages may follow.

All calls of one turn become one assistant message.

Traps, and what is done about each:

* `parameters` is flat, name to `{description, type, default}`, with types in Python's notation. `int`, `List[int]`,
  `Tuple[float, float]`, `Dict[str, int]`, `Optional[str]`, `Union[int, float]`, `Literal["a", "b"]` become JSON Schema.
  A set becomes an array, a tuple an array of fixed length. `Callable[...]` and anything else that JSON cannot write:
  the row is dropped.
* Optionality stands in the type ("str, optional"), defaults beside or inside it ("str, default='x'"). A parameter is
  *required* when it is neither optional nor has a default: rows leave out parameters that have one, in 6 % of the
  places where they could. The empty default counts as one, since such parameters are left out as often.
* `default` is text for other types: coerced when that is exact, else left out of the schema (as `""` for a number is).
* Arguments of another type than declared: `"5"` for an integer is coerced; `"movie"`, or 139.69 for an integer, is not,
  and the row is dropped. Null for an optional argument is left out.
* Two tools under one name with two definitions: dropped.
* Rows are a fine mix only from the Hub: excerpts are often selected by the number of calls.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation
from poe.calls.schema import Note, unique_tools
from poe.data.drops import DropReport
from poe.data.readers.flat import read_tool
from poe.data.readers.messages import content_text
from poe.data.readers.turns import Turns, parse_field, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "xlam"
HUB_ID = "Salesforce/xlam-function-calling-60k"
LICENSE = "CC-BY-4.0"

_FIELDS = ("query", "answers", "tools", "messages")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows in either format; what cannot be read faithfully is dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    declared = parse_field(row.get("tools"), "tools")
    if not isinstance(declared, list):
        raise RowError("tools are not a list")
    tools = unique_tools([read_tool(tool, note) for tool in declared], note)
    turns = Turns(tools, note)
    if "messages" in row:
        _messages(row["messages"], turns)
        return turns
    query = row.get("query")
    answers = parse_field(row.get("answers"), "answers")
    if not isinstance(query, str) or not isinstance(answers, list):
        raise RowError("row is of no known format")
    turns.user(query.strip())
    turns.calls([_call(answer) for answer in answers])
    return turns


def _call(value: Any) -> tuple[Any, Any, None]:
    if not isinstance(value, dict) or "name" not in value:
        raise RowError("call without a name or arguments")
    return value["name"], parse_field(value.get("arguments", {}), "arguments"), None


def _messages(messages: Any, turns: Turns) -> None:
    """The ms-swift form: adjacent `tool_call` messages are one turn."""
    if not isinstance(messages, list):
        raise RowError("row is of no known format")
    waiting: list[tuple[Any, Any, None]] = []
    for message in [*messages, {"role": ""}]:
        if not isinstance(message, dict):
            raise RowError("message is not an object")
        role, text = message.get("role"), content_text(message.get("content"))
        if role == "tool_call":
            parsed = parse_field(text, "call")
            waiting.extend(_call(call) for call in (parsed if isinstance(parsed, list) else [parsed]))
            continue
        if waiting:
            turns.calls(waiting)
            waiting = []
        if role == "user":
            turns.user(text.strip())
        elif role == "assistant":
            turns.assistant(text.strip())
        elif role in ("tool", "tool_response"):
            turns.response(text)
        elif role == "system":
            turns.system(text)
        elif role != "":
            raise RowError(f"message of an unknown role ({str(role)[:40]!r})")
