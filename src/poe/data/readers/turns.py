"""Functions that the readers share: read rows and count them, parse fields, and build conversations from turns."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from poe.calls.arguments import fit_call
from poe.calls.conversation import Conversation, Message, Tool
from poe.calls.json_text import DuplicateKeyError, as_text, parse_field, parse_json_at
from poe.calls.literals import parse_literal
from poe.calls.schema import Note, no_note
from poe.calls.values import check_value, without_nulls
from poe.data.drops import DropReport
from poe.data.sources import ColumnRow, Row
from poe.errors import RowError

Convert = Callable[[Any, Note], "Turns"]


def read_rows(
    name: str, license: str, fields: tuple[str, ...], rows: Iterable[Row], report: DropReport, convert: Convert
) -> Iterator[Conversation]:
    """Convert the `fields` of every row; count the rows that are read, kept, repaired and dropped, with reasons."""
    for row_id, row in rows:
        report.read[name] += 1
        repairs: Counter[str] = Counter()
        try:
            if not isinstance(row, dict):
                raise RowError("row is not an object")
            content = {key: row[key] for key in fields if row.get(key) is not None}
            if problem := check_value(content):
                raise RowError(problem)
            if isinstance(row, ColumnRow):
                content = ColumnRow(without_nulls(content))
            messages, tools = convert(content, lambda rule, seen=repairs: seen.update([rule])).finish()  # type: ignore[misc]
        except RowError as error:
            report.drop(name, error.reason, row, row_id)
            continue
        except RecursionError:
            report.drop(name, "nested too deeply", row, row_id)
            continue
        report.kept[name] += 1
        for rule, count in repairs.items():
            report.repair(name, rule, count)
        yield Conversation(messages, tools, source=name, license=license, id=row_id)


def is_trained(message: dict[str, Any]) -> bool:
    """Return whether a message of the assistant is trained on, by the marks of other trainers.

    `weight` (OpenAI, Mistral, Together, Axolotl), `loss_weight` (LLaMA-Factory), `loss` (ms-swift, XTuner), `train`,
    `training` and `trainable` (Axolotl and others), and `masked` (torchtune), which means the opposite.
    """
    for key in ("train_detail", "training_detail"):
        if any(not part.get("train", True) for part in message.get(key) or () if isinstance(part, dict)):
            raise RowError("message that is trained in part")
    for key in ("weight", "loss_weight"):
        if message.get(key) not in (None, 0, 1, "0", "1"):
            raise RowError("message with a weight other than 0 or 1")
    marks = [message.get(key) for key in ("weight", "loss_weight", "loss", "train", "training", "trainable")]
    return not any(mark in (0, "0") for mark in marks) and message.get("masked") not in (1, "1")


def parse_notation(text: Any, name: str, note: Note) -> Any:
    """Return a field that is JSON text, a Python literal (single quotes, True, None), or already parsed."""
    try:
        return parse_field(text, name)
    except RowError as error:
        try:
            value = parse_literal(text)
        except ValueError:
            raise error from None
    if problem := check_value(value):
        raise RowError(problem)
    note(f"{name} read in Python notation")
    return value


def parse_values(text: str, name: str) -> list[Any]:
    """Return the JSON values of a text that contains several, with or without line breaks between them."""
    values, position = [], 0
    text = text.strip()
    while position < len(text):
        try:
            value, position = parse_json_at(text, position)
        except DuplicateKeyError:
            raise RowError(f"{name} with one key twice") from None
        except (ValueError, RecursionError):
            raise RowError(f"{name} not JSON") from None
        values.append(value)
    if problem := check_value(values):
        raise RowError(problem)
    return values


def split_sections(text: str, start: str, end: str) -> tuple[list[str], str]:
    """Return the texts between the marks, and the text without them: for `a(b)c` and brackets, `["b"]` and `a()c`."""
    inside: list[str] = []
    outside: list[str] = []
    position = 0
    while (opened := text.find(start, position)) >= 0 and (closed := text.find(end, opened + len(start))) >= 0:
        outside += [text[position:opened], start, end]
        inside.append(text[opened + len(start) : closed])
        position = closed + len(end)
    return inside, "".join([*outside, text[position:]])


def parse_call_object(value: Any, name: str = "name", arguments: str = "arguments") -> tuple[Any, Any, None]:
    """Convert an object with these two keys to `(name, arguments, id)`, as `Turns.add_calls` takes it."""
    if not isinstance(value, dict):
        raise RowError("call is not an object")
    if name not in value or arguments not in value:
        raise RowError("call without a name or arguments")
    return value[name], parse_field(value[arguments], "arguments"), None


class Turns:
    """A conversation that is built turn by turn. Each method adds one turn, or raises `RowError`.

    The first turn is the user's, after at most one system text. An assistant's text and the call after it are one
    message. Every call is answered once before the next turn. A turn that is not `trained` gets the weight 0; turns
    after the last one that is trained on are removed. Call ids are replaced by `call_1`, `call_2`, ..., so that equal
    rows from different sources are equal.
    """

    def __init__(self, tools: list[Tool], note: Note) -> None:
        self.tools = tools
        self.note = note
        self.messages: list[Message] = []
        self._calls = 0
        self._open: list[tuple[str, str, str | None]] = []  # (id, name, id in the source) of each open call

    def _last_role(self) -> str:
        return self.messages[-1]["role"] if self.messages else ""

    def _check_no_open_call(self) -> None:
        if self._open:
            raise RowError("call without a response")

    def add_system(self, text: str) -> None:
        if self.messages:
            raise RowError("system turn that is not the first")
        if text.strip():
            self.messages.append({"role": "system", "content": text})

    def add_user(self, text: str) -> None:
        self._check_no_open_call()
        if not text.strip():
            raise RowError("empty turn")
        if self._last_role() == "user":
            raise RowError("two user turns in a row")
        self.messages.append({"role": "user", "content": text})

    def add_assistant(self, text: str, *, trained: bool = True) -> None:
        self._check_no_open_call()
        if not text.strip():
            raise RowError("empty turn")
        if self._last_role() == "assistant":
            raise RowError("two assistant turns in a row")
        self._check_user_spoke()
        self.messages.append({"role": "assistant", "content": text} | ({} if trained else {"weight": 0}))

    def add_calls(self, calls: Iterable[tuple[Any, Any, str | None]], text: str = "", *, trained: bool = True) -> None:
        """Add one assistant message with a text and `(name, arguments, id)` calls."""
        self._check_no_open_call()
        message_calls = []
        for name, arguments, source_id in calls:
            if not isinstance(name, str) or not name.strip():
                raise RowError("call without a name")
            name = name.strip()
            fitted = fit_call(self.tools, name, arguments, self.note)
            self._calls += 1
            call_id = f"call_{self._calls}"
            message_calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": fitted}})
            self._open.append((call_id, name, source_id))
        if not message_calls:
            raise RowError("empty list of calls")
        if self._last_role() == "assistant":
            self.note("text turn joined with the call that follows it")
            previous = self.messages.pop()
            if ("weight" not in previous) != trained:
                raise RowError("text turn and its call with different weights")
            text = f"{previous['content']}\n{text}" if text.strip() else previous["content"]
        self._check_user_spoke()
        message = {"role": "assistant", "content": text if text.strip() else None, "tool_calls": message_calls}
        self.messages.append(message | ({} if trained else {"weight": 0}))

    def add_response(self, text: str, source_id: str | None = None, name: str | None = None) -> None:
        """Add the result of an open call: the one with that id; without an id, with that name, or the oldest."""
        if not self._open:
            raise RowError("response without a call")
        index = 0
        if source_id is not None and any(other is not None for _, _, other in self._open):
            index = next((i for i, (_, _, other) in enumerate(self._open) if other == source_id), -1)
        elif name:
            index = next((i for i, (_, other, _) in enumerate(self._open) if other == name), -1)
        if index < 0:
            raise RowError("response to another call")
        call_id, called, _ = self._open.pop(index)
        self.messages.append({"role": "tool", "tool_call_id": call_id, "name": called, "content": text})

    def add_results(self, texts: list[str]) -> None:
        """Add the results of the open calls: one text per call, or one text with a list of objects with call names.

        The envelope `{"name": <call>, "content": ...}` (or `results`) is removed from the result of that call.
        """
        values = [_parse_result(text) for text in texts]
        members = values[0] if len(values) == 1 and isinstance(values[0], list) else []
        if members and all(self._named_result(value) for value in members):
            values, texts = members, [as_text(value) for value in members]
        for text, value in zip(texts, values, strict=True):
            if named := self._named_result(value):
                self.add_response(named[1], name=named[0])
            else:
                self.add_response(text)

    def _named_result(self, value: Any) -> tuple[str, str] | None:
        """Return the name and the result of an open call if the value is an object with both."""
        if not isinstance(value, dict) or not any(value.get("name") == called for _, called, _ in self._open):
            return None
        keys = [key for key in value if key not in ("name", "tool_call_id")]
        return (value["name"], as_text(value[keys[0]])) if keys in (["content"], ["results"]) else None

    def _check_user_spoke(self) -> None:
        if self._last_role() in ("", "system"):
            raise RowError("conversation that begins with the assistant")

    def finish(self) -> tuple[list[Message], list[Tool]]:
        """Return the messages and the tools, without turns after the last assistant turn that is trained on."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not answers:
            raise RowError("no assistant turn")
        last = max((i for i in answers if "weight" not in self.messages[i]), default=-1)
        if last < 0:
            raise RowError("no assistant turn that is trained on")
        if last + 1 < len(self.messages):
            self.note("turns after the last assistant turn trimmed")
            del self.messages[last + 1 :]
        return self.messages, self.tools


def _parse_result(text: str) -> Any:
    """Return the value of a result, or None if it is plain text."""
    try:
        return parse_notation(text, "result", no_note)
    except RowError:
        return None


def question_turns(question: Any, answer: Any, note: Note) -> Turns:
    """Return the turns of a question and its answer, both text. Indentation at the start of the answer stays."""
    if not isinstance(question, str) or not isinstance(answer, str):
        raise RowError("row of an unknown format")
    turns = Turns([], note)
    turns.add_user(question.strip())
    turns.add_assistant(answer.rstrip().lstrip("\r\n"))
    return turns
