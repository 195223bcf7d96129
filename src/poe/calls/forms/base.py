"""What every call form shares: its reply, strict JSON parsing, and a check that written text reads back."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from poe.calls.conversation import Call
from poe.calls.json_text import skip_space
from poe.calls.values import check_value
from poe.errors import RowError

_OTHER_KEYS = frozenset({"name", "type", "id"})  # keys that a call may have besides its arguments


@dataclass(frozen=True, slots=True)
class Reply:
    """A parsed reply: its prose, its calls, and the parts that look like a call but cannot be parsed."""

    content: str
    calls: list[Call] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)


class CallForm(ABC):
    """One notation for calls, with its writer and its parser.

    `request` holds sentences that ask for the form in a prompt. The text of a reply is data: it is never executed, and
    ambiguous text is never guessed at. A call is `malformed` if it is cut off, nests too deeply, has a key twice, or
    contains NaN, Infinity, a lone surrogate or a number too long for Python.
    """

    name: ClassVar[str]
    request: ClassVar[tuple[str, str, str]]
    mark: ClassVar[str] = ""  # what stands before every call, or may stand there

    def write(self, calls: Sequence[Call], text: str = "") -> str:
        """Return the assistant's text: `text`, then the calls. Without calls, return `text` unchanged.

        Raises `RowError` where `read` would not return the same content: the text looks like a call, or the form cannot
        hold a call.
        """
        if self.read(text) != Reply(text.strip()):
            raise RowError(f"text that looks like a call in the form {self.name}")
        if not calls:
            return text
        for call in calls:
            if problem := check_value([call.name, call.arguments]):
                raise RowError(problem)
        try:
            written = self._write(calls, text)
        except ValueError as error:
            if isinstance(error, RowError):
                raise
            raise RowError("number too long to be written") from None
        if self.read(written) != Reply(text.strip(), list(calls)):
            raise RowError(f"call that the form {self.name} cannot hold")
        return written

    @abstractmethod
    def _write(self, calls: Sequence[Call], text: str) -> str: ...

    @abstractmethod
    def read(self, text: str) -> Reply:
        """Parse a reply. Never raises."""

    @abstractmethod
    def write_result(self, name: str, text: str) -> str:
        """Return the result `text` of the tool `name` as the text of a user message."""


def as_json(value: Any) -> str:
    """Return a value as JSON text with non-ASCII characters unchanged."""
    return json.dumps(value, ensure_ascii=False)


def join_lines(text: str, calls: str) -> str:
    """Return the text and the calls on separate lines; only the calls if the text is blank."""
    return f"{text}\n{calls}" if text.strip() else calls


def expect(text: str, mark: str, start: int) -> int:
    """Return the end of `mark`, which must follow `start` after optional white space, or raise `ValueError`."""
    start = skip_space(text, start)
    if not text.startswith(mark, start):
        raise ValueError(f"no {mark}")
    return start + len(mark)


def as_call(value: Any, key: str = "arguments") -> Call:
    """Convert an object `{"name": ..., key: ...}` to a call. Raises `ValueError` for any other value."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or key not in value:
        raise ValueError("not a call")
    if value.keys() - _OTHER_KEYS - {key}:
        raise ValueError("a call with unknown keys")
    if problem := check_value([value["name"], value[key]]):
        raise ValueError(problem)
    return Call(value["name"], value[key])
