"""JSON values: whether they can be used, which types they have, and which conversions lose nothing."""

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
"""The maximum nesting depth of a row; real rows have less than ten levels."""

NESTED_TOO_DEEPLY = "nested too deeply"

TYPES = frozenset({"string", "integer", "number", "boolean", "array", "object", "null"})


def check_value(value: Any) -> str | None:
    """Return why a parsed value is unusable (not finite, lone surrogate, nested too deeply, not JSON), or None."""
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                return "text with a lone surrogate"
        elif isinstance(item, float):
            if not math.isfinite(item):
                return "NaN or Infinity"
        elif isinstance(item, dict | list | tuple):
            if depth >= MAX_DEPTH:
                return NESTED_TOO_DEEPLY
            if isinstance(item, dict):
                stack.extend((key, depth + 1) for key in item)
                stack.extend((member, depth + 1) for member in item.values())
            else:
                stack.extend((member, depth + 1) for member in item)
        elif item is not None and not isinstance(item, bool | int):
            return "a value that is not JSON"
    return None


_IDENTIFIER = re.compile(r"[^\W\d][\w-]*")


def join_place(place: str, key: str | int) -> str:
    """Return the place of a member of an object or an array: `arguments.days[0]`, `arguments["two words"]`."""
    if isinstance(key, str) and _IDENTIFIER.fullmatch(key) and len(key) <= 80:
        return f"{place}.{key}"
    return f"{place}[{show_value(key)}]"


def show_value(value: Any) -> str:
    """Return a value as JSON text of at most 63 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def count_values(value: Any) -> int:
    """Return the number of values in a JSON value, itself included."""
    count, stack = 0, [value]
    while stack:
        item = stack.pop()
        count += 1
        if isinstance(item, dict | list):
            stack.extend(item.values() if isinstance(item, dict) else item)
    return count


def without_nulls(value: Any) -> Any:
    """Return the value without the null members of its objects. Null members of lists stay."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def fits_type(kind: str, value: Any) -> bool:
    """Return whether a JSON value has a JSON Schema type (True is not an integer; 5.0 is)."""
    if kind == "integer":
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    python = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}.get(kind)
    return python is None or isinstance(value, python)


def convert_exactly(kind: str, value: Any) -> Any:
    """Return the value of the type `kind` that `value` spells exactly, or None."""
    if kind == "string" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or len(value) > 40:
        return None
    text = value.strip()
    if kind == "boolean":
        return {"true": True, "false": False}.get(text.lower())
    if kind in ("integer", "number"):
        digits = text.removeprefix("-")
        if digits.isascii() and digits.isdigit() and (digits == "0" or not digits.startswith("0")):
            return int(text)
        if kind == "number" and set(text) <= set("0123456789.-+eE"):
            try:
                number = float(text)
            except ValueError:
                return None
            return number if math.isfinite(number) else None
    return None
