"""What the readers share: fields read, a row's turns put together into a `Conversation`, and the loop that counts."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from poe.calls.conversation import Conversation, Message, Tool
from poe.calls.literals import parse_literal
from poe.calls.schema import Note, check_value, fit_call, no_note
from poe.data.drops import DropReport
from poe.data.sources import Row, parse_json
from poe.errors import RowError

Convert = Callable[[Any, Note], "Turns"]


def read_rows(
    name: str, license: str, fields: tuple[str, ...], rows: Iterable[Row], report: DropReport, convert: Convert
) -> Iterator[Conversation]:
    """Convert every row, of which only `fields` count; count what was read, kept, repaired, dropped and why."""
    for row_id, row in rows:
        report.read[name] += 1
        repairs: Counter[str] = Counter()
        try:
            if not isinstance(row, dict):
                raise RowError("row is not an object")
            wanted = {key: row[key] for key in fields if row.get(key) is not None}
            if problem := check_value(wanted):
                raise RowError(problem)
            messages, tools = convert(wanted, lambda rule, seen=repairs: seen.update([rule])).finish()  # type: ignore[misc]
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


def parse_field(text: Any, what: str) -> Any:
    """A field that may be JSON text or already parsed; depth and values of the text are checked."""
    if not isinstance(text, str):
        return text
    try:
        value = parse_json(text)
    except ValueError:
        raise RowError(f"{what} not JSON") from None
    if problem := check_value(value):
        raise RowError(problem)
    return value


def parse_notation(text: Any, what: str, note: Note) -> Any:
    """A field that may be JSON text, text in Python notation (single quotes, True, None) or already parsed."""
    try:
        return parse_field(text, what)
    except RowError as error:
        try:
            value = parse_literal(text)
        except ValueError:
            raise error from None
    if problem := check_value(value):
        raise RowError(problem)
    note(f"{what} read in Python notation")
    return value


def parse_values(text: str, what: str) -> list[Any]:
    """JSON values that stand one after another, one per line or not."""
    values, decoder, at = [], json.JSONDecoder(), 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise RowError(f"{what} not JSON") from None
        values.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    if problem := check_value(values):
        raise RowError(problem)
    return values


def sections(text: str, start: str, end: str) -> tuple[list[str], str]:
    """What stands between the marks, and the text without it: of `a(b)c` with round brackets, `["b"]` and `a()c`."""
    inside: list[str] = []
    outside: list[str] = []
    at = 0
    while (opened := text.find(start, at)) >= 0 and (closed := text.find(end, opened + len(start))) >= 0:
        outside += [text[at:opened], start, end]
        inside.append(text[opened + len(start) : closed])
        at = closed + len(end)
    return inside, "".join([*outside, text[at:]])


def named_call(value: Any, name: str = "name", arguments: str = "arguments") -> tuple[Any, Any, None]:
    """A call written as an object, whatever its two keys are called; as `Turns.calls` takes it."""
    if not isinstance(value, dict):
        raise RowError("call is not an object")
    if name not in value or arguments not in value:
        raise RowError("call without a name or arguments")
    return value[name], parse_field(value[arguments], "arguments"), None


class Turns:
    """A conversation under construction. Each method adds one turn, or raises `RowError`.

    Rules: the first turn is the user's (after at most one system text); an assistant's text and the call that follows
    it are one message; calls of one message are answered in order, each once, before anyone else speaks; turns after
    the assistant's last one are trimmed, since nothing is learned from them. Ids are made anew (`call_1`, ...), so that
    equal rows are equal whatever their source called them.
    """

    def __init__(self, tools: list[Tool], note: Note) -> None:
        self.tools = tools
        self.note = note
        self.messages: list[Message] = []
        self._calls = 0
        self._open: list[tuple[str, str, str | None]] = []  # id, name and the source's own id of unanswered calls

    def _last(self) -> str:
        return self.messages[-1]["role"] if self.messages else ""

    def _answered(self) -> None:
        if self._open:
            raise RowError("call without a response")

    def system(self, text: str) -> None:
        if self.messages:
            raise RowError("system turn that is not the first")
        if text.strip():
            self.messages.append({"role": "system", "content": text})

    def user(self, text: str) -> None:
        self._answered()
        if not text.strip():
            raise RowError("empty turn")
        if self._last() == "user":
            raise RowError("two user turns in a row")
        self.messages.append({"role": "user", "content": text})

    def assistant(self, text: str) -> None:
        self._answered()
        if not text.strip():
            raise RowError("empty turn")
        if self._last() == "assistant":
            raise RowError("two assistant turns in a row")
        self._spoken_to()
        self.messages.append({"role": "assistant", "content": text})

    def calls(self, calls: Iterable[tuple[Any, Any, str | None]], text: str = "") -> None:
        """One assistant message with these `(name, arguments, id)` calls, and the text before them."""
        self._answered()
        made = []
        for name, arguments, own_id in calls:
            if not isinstance(name, str) or not name.strip():
                raise RowError("call without a name")
            name = name.strip()
            fitted = fit_call(self.tools, name, arguments, self.note)
            self._calls += 1
            call_id = f"call_{self._calls}"
            made.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": fitted}})
            self._open.append((call_id, name, own_id))
        if not made:
            raise RowError("empty list of calls")
        if self._last() == "assistant":
            self.note("text turn joined with the call that follows it")
            before = self.messages.pop()["content"]
            text = f"{before}\n{text}" if text.strip() else before
        self._spoken_to()
        self.messages.append({"role": "assistant", "content": text if text.strip() else None, "tool_calls": made})

    def response(self, text: str, own_id: str | None = None, name: str | None = None) -> None:
        """The result of an open call: the one of that id or, without an id, of that name or the oldest."""
        if not self._open:
            raise RowError("response without a call")
        at = 0
        if own_id is not None and any(o is not None for _, _, o in self._open):
            at = next((i for i, (_, _, o) in enumerate(self._open) if o == own_id), -1)
        elif name:
            at = next((i for i, (_, n, _) in enumerate(self._open) if n == name), -1)
        if at < 0:
            raise RowError("response to another call")
        call_id, called, _ = self._open.pop(at)
        self.messages.append({"role": "tool", "tool_call_id": call_id, "name": called, "content": text})

    def results(self, texts: list[str]) -> None:
        """The results of the open calls: one text each, or one text with a list of objects that name their calls.

        `{"name": <call>, "content": ...}` (or `results`) is read as the result of that call, its envelope taken off.
        """
        values = [_parsed(text) for text in texts]
        listed = values[0] if len(values) == 1 and isinstance(values[0], list) else []
        if listed and all(self._named(value) for value in listed):
            values, texts = listed, [as_text(value) for value in listed]
        for text, value in zip(texts, values, strict=True):
            if named := self._named(value):
                self.response(named[1], name=named[0])
            else:
                self.response(text)

    def _named(self, value: Any) -> tuple[str, str] | None:
        """The name of an open call and its result, if the value is an object that says so."""
        if not isinstance(value, dict) or not any(value.get("name") == called for _, called, _ in self._open):
            return None
        keys = [key for key in value if key not in ("name", "tool_call_id")]
        return (value["name"], as_text(value[keys[0]])) if keys in (["content"], ["results"]) else None

    def _spoken_to(self) -> None:
        if self._last() in ("", "system"):
            raise RowError("conversation that the assistant begins")

    def finish(self) -> tuple[list[Message], list[Tool]]:
        last = max((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), default=-1)
        if last < 0:
            raise RowError("no assistant turn")
        if last + 1 < len(self.messages):
            self.note("turns after the last assistant turn trimmed")
            del self.messages[last + 1 :]
        return self.messages, self.tools


def _parsed(text: str) -> Any:
    """The value of a result, or None if it is only text."""
    try:
        return parse_notation(text, "result", no_note)
    except RowError:
        return None


def as_text(value: Any) -> str:
    """A tool's result as text: text as it stands, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
