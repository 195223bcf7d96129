"""Write values as JSON text, and parse it strictly: no NaN, Infinity, object with one key twice or nesting too deep."""

import json
import re
from typing import Any

from poe.calls.values import check_value
from poe.errors import RowError

_SPACE = re.compile(r"\s*")


class DuplicateKeyError(ValueError):
    """An object has one key twice, so readers disagree about its value."""


def parse_json(text: str, *, strict: bool = True) -> Any:
    """Return the JSON value that fills the text. `strict=False` allows control characters inside strings.

    Raises `ValueError`, also for nesting that is too deep.
    """
    try:
        return json.loads(text, parse_constant=_reject_constant, object_pairs_hook=_unique, strict=strict)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def as_text(value: Any) -> str:
    """Return a value as text: text unchanged, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parse_field(text: Any, name: str) -> Any:
    """Return a field that is JSON text or already parsed. Checks the depth and the values of JSON text."""
    if not isinstance(text, str):
        return text
    try:
        value = parse_json(text)
    except DuplicateKeyError:
        raise RowError(f"{name} with one key twice") from None
    except ValueError:
        raise RowError(f"{name} not JSON") from None
    if problem := check_value(value):
        raise RowError(problem)
    return value


def parse_json_at(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value at `start`, after optional white space, and the position of its end.

    Raises `ValueError`, or `RecursionError` if it nests too deeply.
    """
    return _DECODER.raw_decode(text, skip_space(text, start))


def skip_space(text: str, start: int) -> int:
    """Return the position of the first character from `start` on that is not white space."""
    match = _SPACE.match(text, start)
    return match.end() if match else start


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise DuplicateKeyError("one key twice in an object")
    return members


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_unique)
