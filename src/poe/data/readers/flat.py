"""Tools with flat parameters in Python's notation, as xLAM and the sets made after it write them.

`parameters` is name to `{description, type, default}`; a type is `int`, `List[int]`, `"str, optional"` and the like.
"""

import json
import re
from typing import Any

from poe.calls.conversation import Tool
from poe.calls.schema import PYTHON_TYPES, TYPES, Note, as_tool, coerce, fits_type
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


def read_tool(tool: Any, note: Note) -> Tool:
    """A `Tool` from one with flat, Python-typed parameters (one with JSON Schema parameters is passed on).

    Where a list `required` stands beside them, as other sets write it, it says which are.
    """
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        tool = tool["function"]
    if not isinstance(tool, dict):
        raise RowError("tool is not an object")
    flat = tool.get("parameters") or {}
    if not isinstance(flat, dict):
        raise RowError("tool parameters are not an object schema")
    if flat.get("type") != "object":
        flat = object_schema(flat, tool.get("required"), note)
    return as_tool(tool.get("name"), tool.get("description"), flat, note)


def is_flat(parameters: Any) -> bool:
    """Whether parameters are a map of names to descriptions with a type, not a JSON Schema."""
    if not isinstance(parameters, dict) or not parameters or "properties" in parameters:
        return False
    return all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in parameters.values())


def with_json_types(schema: Any, note: Note) -> Any:
    """An object schema, types in Python's notation ("int, optional", "List[str]") among its properties rewritten."""
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        return schema
    properties = {}
    for name, sub in schema["properties"].items():
        kind = sub.get("type") if isinstance(sub, dict) else None
        if isinstance(kind, str) and kind.lower() not in {*TYPES, *PYTHON_TYPES}:
            note("type in Python notation written as JSON Schema's")
            sub = {**python_type(kind)[0], **{key: value for key, value in sub.items() if key != "type"}}
        properties[name] = sub
    return {**schema, "properties": properties}


def object_schema(flat: dict[str, Any], stated: Any, note: Note) -> dict[str, Any]:
    """The JSON Schema of flat parameters; `stated` is a list of the required ones, where the tool has it."""
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in flat.items():
        if not isinstance(parameter, dict):
            raise RowError("tool parameter is not an object")
        schema, optional, default = _declared_type(parameter.get("type", "Any"))
        if isinstance(parameter.get("description"), str):
            schema["description"] = parameter["description"]
        if parameter.get("default") is not None:
            default = parameter["default"]
        if default is not None:
            optional = True
            exact = coerce(schema, default)
            if exact == "" and schema.get("type") != "string":
                pass
            elif "type" not in schema or fits_type(schema["type"], exact):
                schema["default"] = exact
            else:
                note("default of another type left out")
        if not optional:
            required.append(name)
        properties[name] = schema
    return {"type": "object", "properties": properties, "required": stated if isinstance(stated, list) else required}


def _declared_type(kind: Any) -> tuple[dict[str, Any], bool, Any]:
    if isinstance(kind, str):
        return python_type(kind)
    if not isinstance(kind, list) or not kind or not all(isinstance(name, str) and name in TYPES for name in kind):
        raise RowError("type that JSON cannot write")
    schema, nullable = _without_null(_any_of([{"type": name} for name in kind]))
    return schema, nullable, None


def python_type(text: str) -> tuple[dict[str, Any], bool, Any]:
    """`"List[int], optional, default=[]"` -> (JSON Schema, whether optional, default or None)."""
    if len(text) > _MAX_TYPE:
        raise RowError("type that JSON cannot write")
    found = _DEFAULT.search(text)
    kind, *extras = _top_level_parts(text[: found.start()] if found else text)
    optional, default = found is not None, _literal(text[found.end() :].strip()) if found else None
    for extra in extras:
        if extra.lower() in ("optional", "required", ""):
            optional = optional or extra.lower() == "optional"
        else:
            raise RowError("type that JSON cannot write")
    schema, nullable = _Type(kind).parse()
    return schema, optional or nullable, default


def _top_level_parts(text: str) -> list[str]:
    depth, start, parts = 0, 0, []
    for at, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def _literal(text: str) -> Any:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text in ("None", ""):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Type:
    """A recursive-descent parser of Python type notation: `name`, `name[type, ...]`, `type | type`."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        at, text = 0, text.strip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise RowError("type that JSON cannot write")
            self.tokens.append(found[0].strip())
            at = found.end()
        self.at = 0

    def parse(self) -> tuple[dict[str, Any], bool]:
        """The schema, and whether None is among the types of the top level."""
        schema = self._union()
        if self.at < len(self.tokens):
            raise RowError("type that JSON cannot write")
        return _without_null(schema)

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def _union(self) -> dict[str, Any]:
        kinds = [self._single()]
        while self._peek() == "|":
            self._next()
            kinds.append(self._single())
        return _any_of(kinds)

    def _single(self) -> dict[str, Any]:
        name = self._next().removeprefix("typing.")
        lower = name.lower()
        if lower == "literal":
            return self._literals()
        inner: list[Any] = []
        if self._peek() == "[":
            self._next()
            while self._peek() != "]":
                if self._peek() == "...":
                    inner.append(self._next())
                else:
                    inner.append(self._union())
                if self._peek() == ",":
                    self._next()
                elif self._peek() != "]":
                    raise RowError("type that JSON cannot write")
            self._next()
        if lower == "tuple":
            return _tuple(inner)
        if "..." in inner:
            raise RowError("type that JSON cannot write")
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
        raise RowError("type that JSON cannot write")

    def _literals(self) -> dict[str, Any]:
        values: list[Any] = []
        if self._next() != "[":
            raise RowError("type that JSON cannot write")
        while (token := self._next()) != "]":
            if not token or token in ("[", "|"):
                raise RowError("type that JSON cannot write")
            if token != ",":
                values.append(_literal(token))
        kinds = {type(value) for value in values}
        kind = {str: "string", int: "integer"}.get(*kinds) if len(kinds) == 1 else None
        return {**({"type": kind} if kind else {}), "enum": values}


def _tuple(inner: list[Any]) -> dict[str, Any]:
    if not inner:
        return {"type": "array"}
    if inner[-1] == "..." and len(inner) == 2:
        return {"type": "array", "items": inner[0]}
    if "..." in inner:
        raise RowError("type that JSON cannot write")
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
