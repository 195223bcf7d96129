"""xLAM function-calling 60k: one question, one or more calls at once, no results.

Hub: `Salesforce/xlam-function-calling-60k` (gated: accept its terms, then `hf auth login`). License: CC-BY-4.0.

Two formats are read.

* The original, `{"id", "query", "answers", "tools"}`; `answers` and `tools` are JSON text.
* The ms-swift format, `{"tools", "messages"}`: `tools` in OpenAI's envelope (with flat parameters as in the original),
  and one `tool_call` message per call. `tool_response` or `tool` and `assistant` messages may follow.

All calls of one turn become one assistant message.

Traps and how the reader handles them:

* `parameters` is flat and maps a name to `{description, type, default}`, with Python types. `int`, `List[int]`,
  `Tuple[float, float]`, `Dict[str, int]`, `Optional[str]`, `Union[int, float]`, `Literal["a", "b"]` become JSON Schema.
  A set becomes an array, a tuple an array of fixed length. For `Callable[...]` and other types without a JSON
  equivalent, the row is dropped.
* The type says whether a parameter is optional ("str, optional"). A default is beside the type or inside it ("str,
  default='x'"). A parameter is *required* if it is not optional and has no default: rows leave out parameters with a
  default in 6 % of the possible places. An empty default counts as a default, because such parameters are left out as
  often.
* `default` is text for other types: it is coerced if that is exact, and otherwise left out of the schema (such as `""`
  for a number).
* Arguments of another type than declared: `"5"` for an integer is coerced; for `"movie"`, or 139.69 for an integer, the
  row is dropped. A null for an optional argument is left out.
* Two tools with one name and two definitions: dropped.
* Only the rows of the Hub are a representative mix: excerpts are often selected by the number of calls.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from poe.calls.content import content_text
from poe.calls.conversation import Conversation
from poe.calls.json_text import parse_field
from poe.calls.schema import Note
from poe.calls.tools import read_tools
from poe.data.drops import DropReport
from poe.data.readers.turns import Turns, is_trained, read_rows
from poe.data.sources import Row
from poe.errors import RowError

NAME = "xlam"
HUB_ID = "Salesforce/xlam-function-calling-60k"
LICENSE = "CC-BY-4.0"

_FIELDS = ("query", "answers", "tools", "messages")


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Yield the conversations of rows in either format; rows that lose content are dropped and counted."""
    return read_rows(NAME, LICENSE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    declared = parse_field(row.get("tools"), "tools")
    if not isinstance(declared, list):
        raise RowError("tools are not a list")
    turns = Turns(read_tools(declared, note, flat=True), note)
    if "messages" in row:
        _add_messages(row["messages"], turns)
        return turns
    query = row.get("query")
    answers = parse_field(row.get("answers"), "answers")
    if not isinstance(query, str) or not isinstance(answers, list):
        raise RowError("row of an unknown format")
    turns.add_user(query.strip())
    turns.add_calls([_read_call(answer) for answer in answers])
    return turns


def _read_call(value: Any) -> tuple[Any, Any, None]:
    if not isinstance(value, dict) or "name" not in value:
        raise RowError("call without a name or arguments")
    return value["name"], parse_field(value.get("arguments", {}), "arguments"), None


def _add_messages(messages: Any, turns: Turns) -> None:
    """Add messages of the ms-swift format. Adjacent `tool_call` messages are one turn."""
    if not isinstance(messages, list):
        raise RowError("row of an unknown format")
    pending: list[tuple[Any, Any, None]] = []
    trained: set[bool] = set()  # of the pending calls
    for message in [*messages, {"role": ""}]:
        if not isinstance(message, dict):
            raise RowError("message is not an object")
        role, text = message.get("role"), content_text(message.get("content"))
        if role == "tool_call":
            parsed = parse_field(text, "call")
            pending.extend(_read_call(call) for call in (parsed if isinstance(parsed, list) else [parsed]))
            trained.add(is_trained(message))
            continue
        if pending:
            if len(trained) > 1:
                raise RowError("calls of one turn with different weights")
            turns.add_calls(pending, trained=trained.pop())
            pending = []
        if role == "user":
            turns.add_user(text.strip())
        elif role == "assistant":
            turns.add_assistant(text.strip(), trained=is_trained(message))
        elif role in ("tool", "tool_response"):
            turns.add_response(text)
        elif role == "system":
            turns.add_system(text)
        elif role != "":
            raise RowError(f"message of an unknown role ({str(role)[:40]!r})")
