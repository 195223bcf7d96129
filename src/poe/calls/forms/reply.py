"""Calls, replies, and what every call form shares: strict JSON read out of a text, and a guard on writing."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from poe.calls.schema import check_value
from poe.errors import RowError

_SPACE = re.compile(r"\s*")
_BESIDE = frozenset({"name", "type", "id"})  # what may stand in a call beside its arguments


@dataclass(frozen=True, slots=True)
class Call:
    """One function call. `arguments` is what the text said; whether it fits a schema is `tools.problems`' to say."""

    name: str
    arguments: Any

    def as_openai(self, index: int = 0) -> dict[str, Any]:
        """The OpenAI form, arguments as a JSON string."""
        function = {"name": self.name, "arguments": as_json(self.arguments)}
        return {"id": f"call_{index + 1}", "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply taken apart: prose, calls, and what looked like a call but could not be read."""

    content: str
    calls: list[Call] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)


class CallForm(ABC):
    """One way to write calls, and to read them.

    `request`: sentences that ask for the form in a prompt. The text of a reply is data: it is never run, and what is
    not certain is not guessed at. A call that is cut off, nests too deeply, names a key twice, or holds NaN, Infinity,
    a lone surrogate or a number too long for Python is `malformed`.
    """

    name: ClassVar[str]
    request: ClassVar[tuple[str, str, str]]

    def write(self, calls: Sequence[Call], text: str = "") -> str:
        """The assistant's text: `text`, then the calls. Without calls it is `text` itself.

        Raises `RowError` where reading would not give back the same: a text that itself looks like a call, or a call
        that the form cannot hold.
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
            raise RowError("a number too long to be written") from None
        if self.read(written) != Reply(text.strip(), list(calls)):
            raise RowError(f"call that the form {self.name} cannot hold")
        return written

    @abstractmethod
    def _write(self, calls: Sequence[Call], text: str) -> str: ...

    @abstractmethod
    def read(self, text: str) -> Reply:
        """Take a reply apart; never raises."""

    @abstractmethod
    def write_result(self, name: str, text: str) -> str:
        """What the tool `name` returned, as the text of a user's turn."""


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def below(text: str, calls: str) -> str:
    """Calls on the line after the text, if there is any."""
    return f"{text}\n{calls}" if text.strip() else calls


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("one key twice")
    return made


_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_unique)


def json_at(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `at` (white space aside), and where it ends.

    Raises ValueError, or RecursionError for endless nesting.
    """
    return _DECODER.raw_decode(text, _skip_space(text, at))


def whole_json(text: str) -> Any:
    """The JSON value that is all of a text. Raises as `json_at` does."""
    value, end = json_at(text)
    if _skip_space(text, end) < len(text):
        raise ValueError("text after JSON")
    return value


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def expect(text: str, mark: str, at: int) -> int:
    """Where `mark`, which must stand at `at` (white space aside), ends. Raises ValueError if it does not."""
    at = _skip_space(text, at)
    if not text.startswith(mark, at):
        raise ValueError(f"no {mark}")
    return at + len(mark)


def as_call(value: Any, key: str = "arguments") -> Call:
    """The call that an object `{"name": ..., key: ...}` is. Raises ValueError if it is none, or not to be passed on."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or key not in value:
        raise ValueError("not a call")
    if value.keys() - _BESIDE - {key}:
        raise ValueError("a call with unknown keys")
    if problem := check_value([value["name"], value[key]]):
        raise ValueError(problem)
    return Call(value["name"], value[key])
