"""Read types in Python notation as JSON Schema: `int`, `List[int]`, `"str, optional"`, `Literal["a", "b"]`."""

import json
import re
from typing import Any

from poe.calls.values import TYPES
from poe.errors import RowError

_TOKEN = re.compile(r"""\s*(?:([A-Za-z_][\w.]*)|("[^"]*"|'[^']*'|-?\d+(?:\.\d+)?)|(\.\.\.)|([\[\],|]))""")
_DEFAULT = re.compile(r",\s*default\b[\s=:]*", re.IGNORECASE)
_MAX_TYPE = 300
_SIMPLE = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "none": "null",
    "nonetype": "null",
    "object": "object",
    "array": "array",
}
_ARRAYS = frozenset({"list", "set", "frozenset", "sequence", "iterable", "array"})
_OBJECTS = frozenset({"dict", "mapping", "object"})


def declared_type(kind: Any) -> tuple[dict[str, Any], bool, Any]:
    """Parse a type, or a list of JSON Schema's type names, to the same three parts as `python_type`."""
    if isinstance(kind, str):
        return python_type(kind)
    if not isinstance(kind, list) or not kind or not all(isinstance(name, str) and name in TYPES for name in kind):
        raise RowError("type without a JSON equivalent")
    schema, nullable = _without_null(_any_of([{"type": name} for name in kind]))
    return schema, nullable, None


def python_type(text: str) -> tuple[dict[str, Any], bool, Any]:
    """Parse `"List[int], optional, default=[]"` to (JSON Schema, whether optional, default or None)."""
    if len(text) > _MAX_TYPE:
        raise RowError("type without a JSON equivalent")
    match = _DEFAULT.search(text)
    kind, *extras = _top_level_parts(text[: match.start()] if match else text)
    optional, default = match is not None, _literal_value(text[match.end() :].strip()) if match else None
    for extra in extras:
        if extra.lower() in ("optional", "required", ""):
            optional = optional or extra.lower() == "optional"
        else:
            raise RowError("type without a JSON equivalent")
    schema, nullable = _TypeParser(kind).parse()
    return schema, optional or nullable, default


def _top_level_parts(text: str) -> list[str]:
    depth, start, parts = 0, 0, []
    for i, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _literal_value(text: str) -> Any:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text in ("None", ""):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


class _TypeParser:
    """A recursive-descent parser of Python type notation: `name`, `name[type, ...]`, `type | type`."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position, text = 0, text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise RowError("type without a JSON equivalent")
            self.tokens.append(match[0].strip())
            position = match.end()
        self.next_token = 0

    def parse(self) -> tuple[dict[str, Any], bool]:
        """Return the schema, and whether None is one of the top-level types."""
        schema = self._parse_union()
        if self.next_token < len(self.tokens):
            raise RowError("type without a JSON equivalent")
        return _without_null(schema)

    def _peek(self) -> str:
        return self.tokens[self.next_token] if self.next_token < len(self.tokens) else ""

    def _next(self) -> str:
        self.next_token += 1
        return self.tokens[self.next_token - 1] if self.next_token <= len(self.tokens) else ""

    def _parse_union(self) -> dict[str, Any]:
        kinds = [self._parse_single()]
        while self._peek() == "|":
            self._next()
            kinds.append(self._parse_single())
        return _any_of(kinds)

    def _parse_single(self) -> dict[str, Any]:
        name = self._next().removeprefix("typing.")
        lower = name.lower()
        if lower == "literal":
            return self._parse_literals()
        inner: list[Any] = []
        if self._peek() == "[":
            self._next()
            while self._peek() != "]":
                if self._peek() == "...":
                    inner.append(self._next())
                else:
                    inner.append(self._parse_union())
                if self._peek() == ",":
                    self._next()
                elif self._peek() != "]":
                    raise RowError("type without a JSON equivalent")
            self._next()
        if lower == "tuple":
            return _tuple_schema(inner)
        if "..." in inner:
            raise RowError("type without a JSON equivalent")
        if lower == "any" and not inner:
            return {}
        if lower in _ARRAYS and len(inner) < 2:
            return {"type": "array", **({"items": inner[0]} if inner else {})}
        if lower in _OBJECTS and len(inner) in (0, 2):
            return {"type": "object", **({"additionalProperties": inner[1]} if inner and inner[1] else {})}
        if lower == "optional" and len(inner) == 1:
            return _any_of([inner[0], {"type": "null"}])
        if lower == "union" and inner:
            return _any_of(inner)
        if lower in _SIMPLE and not inner:
            return {"type": _SIMPLE[lower]}
        raise RowError("type without a JSON equivalent")

    def _parse_literals(self) -> dict[str, Any]:
        values: list[Any] = []
        if self._next() != "[":
            raise RowError("type without a JSON equivalent")
        while (token := self._next()) != "]":
            if not token or token in ("[", "|"):
                raise RowError("type without a JSON equivalent")
            if token != ",":
                values.append(_literal_value(token))
        kinds = {type(value) for value in values}
        kind = {str: "string", int: "integer"}.get(*kinds) if len(kinds) == 1 else None
        return {**({"type": kind} if kind else {}), "enum": values}


def _tuple_schema(inner: list[Any]) -> dict[str, Any]:
    if not inner:
        return {"type": "array"}
    if inner[-1] == "..." and len(inner) == 2:
        return {"type": "array", "items": inner[0]}
    if "..." in inner:
        raise RowError("type without a JSON equivalent")
    fixed = {"minItems": len(inner), "maxItems": len(inner)}
    if all(kind == inner[0] for kind in inner):
        return {"type": "array", "items": inner[0], **fixed}
    return {"type": "array", "prefixItems": inner, **fixed}


def _any_of(kinds: list[dict[str, Any]]) -> dict[str, Any]:
    flat: list[dict[str, Any]] = []
    for kind in kinds:
        flat.extend(k for k in kind.get("anyOf", [kind]) if k not in flat)
    if {"type": "number"} in flat:
        flat = [k for k in flat if k != {"type": "integer"}]
    if {} in flat:
        return {}
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _without_null(schema: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    kinds = schema.get("anyOf", [schema])
    rest = [kind for kind in kinds if kind != {"type": "null"}]
    if not rest or len(rest) == len(kinds):
        return dict(schema), False
    return dict(_any_of(rest)), True
