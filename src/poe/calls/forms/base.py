"""What every call form shares: its reply, strict JSON parsing, and a check that written text reads back."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from poe.calls.conversation import Call
from poe.calls.faults import FaultKind, UnreadableError
from poe.calls.json_text import DuplicateKeyError, parse_json
from poe.calls.reading import Parts, Reply, Source, Wait, read_reply
from poe.calls.values import NESTED_TOO_DEEPLY, check_value
from poe.errors import RowError

_OTHER_KEYS = frozenset({"name", "type", "id"})  # keys that a call may have besides its arguments


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

    def read(self, text: str) -> Reply:
        """Parse a reply. Never raises."""
        return read_reply(self.scan, text)

    @abstractmethod
    def scan(self, source: Source) -> Parts:
        """Yield the parts of a reply that arrives in pieces, and None where more text is needed. Never raises."""

    @abstractmethod
    def write_result(self, name: str, text: str) -> str:
        """Return the result `text` of the tool `name` as the text of a user message."""


def as_json(value: Any) -> str:
    """Return a value as JSON text with non-ASCII characters unchanged."""
    return json.dumps(value, ensure_ascii=False)


def join_lines(text: str, calls: str) -> str:
    """Return the text and the calls on separate lines; only the calls if the text is blank."""
    return f"{text}\n{calls}" if text.strip() else calls


_SPACE = re.compile(r"\s*")
_BEFORE_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*\Z')


def expect(source: Source, mark: str) -> Wait:
    """Go past `mark`, which must follow after optional white space. Raises `UnreadableError`."""
    character = yield from source.run(_SPACE)
    if not (yield from source.skip(mark)):
        rest = source.window[source.position : source.position + len(mark)]
        if mark.startswith(rest):
            raise UnreadableError(FaultKind.UNCLOSED)
        raise UnreadableError(FaultKind.BRACE_LOOP if character in "]}" else FaultKind.TEXT_IN_CALL)


def name_fault(error: UnreadableError, source: Source) -> FaultKind:
    """Return the kind of an error, where it was found in the source."""
    if error.kind is FaultKind.NOT_JSON and source.window[source.position : source.position + 1] == "'":
        return FaultKind.QUOTED_ARGUMENTS if _BEFORE_ARGUMENTS.search(source.held()[-40:]) else error.kind
    return error.kind


def parse_value(text: str) -> Any:
    """Return the value of JSON text. Raises `UnreadableError`."""
    try:
        return parse_json(text.strip())
    except DuplicateKeyError:
        raise UnreadableError(FaultKind.DUPLICATE_KEY) from None
    except json.JSONDecodeError:
        raise UnreadableError(FaultKind.NOT_JSON) from None
    except ValueError:  # NaN, or a number with too many digits
        raise UnreadableError(FaultKind.INVALID_VALUE) from None


def as_call(value: Any, key: str = "arguments") -> Call:
    """Convert an object `{"name": ..., key: ...}` to a call. Raises `UnreadableError` for any other value."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or key not in value:
        raise UnreadableError(FaultKind.NOT_A_CALL)
    if value.keys() - _OTHER_KEYS - {key}:
        raise UnreadableError(FaultKind.NOT_A_CALL)
    check_values([value["name"], value[key]])
    return Call(value["name"], value[key])


def check_values(value: Any) -> None:
    """Raise `UnreadableError` for values that cannot be used."""
    if problem := check_value(value):
        raise UnreadableError(FaultKind.TOO_DEEP if problem == NESTED_TOO_DEEPLY else FaultKind.INVALID_VALUE)
