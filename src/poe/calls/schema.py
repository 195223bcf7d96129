"""Bring tool schemas into one canonical format: repair what other systems write differently, and lint the result.

Every repair is passed to `note` by name, so that a report can count it.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from typing import Any

from poe.calls.python_types import python_type
from poe.calls.resolution import COMBINING, Resolver, UnresolvableError
from poe.calls.values import TYPES, count_values, fits_type, join_place
from poe.errors import RowError

Note = Callable[[str], None]

MAX_SCHEMA_VALUES = 20_000
"""The maximum number of values in the parameters of one tool; the largest public tools have a few thousand."""

PYTHON_TYPES = {
    "str": "string",
    "text": "string",
    "int": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "dict": "object",
    "arraylist": "array",
    "hashmap": "object",
    "char": "string",
    "long": "integer",
    "short": "integer",
    "byte": "integer",
    "bigint": "integer",
    "any": None,
    "type_unspecified": None,
}
"""Type names that are often used in place of JSON Schema's; None removes the keyword."""

_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = (
    *("items", "additionalProperties", "not", "contains", "if", "then", "else", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)
_NULL_VALUES = ("default", "const")  # keywords whose value may be null
_LIMITS = ("maximum", "minimum", "exclusiveMaximum", "exclusiveMinimum", "multipleOf")
_COUNTS = tuple(f"{bound}{what}" for bound in ("min", "max") for what in ("Length", "Items", "Properties", "Contains"))
_TEXTS = (
    *("title", "description", "format", "pattern", "contentEncoding", "contentMediaType"),
    *("$id", "$schema", "$anchor", "$comment", "$ref", "$dynamicRef", "$dynamicAnchor"),
)
_SWITCHES = ("uniqueItems", "deprecated", "readOnly", "writeOnly")


def no_note(rule: str) -> None:
    """Ignore a repair: the `note` of callers that do not count repairs."""


def repair_schema(schema: dict[str, Any], note: Note) -> dict[str, Any]:
    """Return a copy of a schema in which these spellings, at every level, are those of JSON Schema.

    Type names of Python and Gemini; `nullable`; `required: true` inside a property; a list as `items`; limits that are
    exclusive by a second keyword, or text; keywords that are null; names in `required` that are not properties.
    """
    fixed: dict[str, Any] = {}
    hoisted: list[str] = []
    for key, value in schema.items():
        if value is None and key not in _NULL_VALUES:
            note("null in a schema left out")
        elif key == "type" and isinstance(value, str) and value not in TYPES:
            fixed |= _read_type(value, note)
        elif key == "type" and isinstance(value, list):
            names = [_read_type(name, no_note).get("type", name) if isinstance(name, str) else name for name in value]
            fixed[key] = list(dict.fromkeys(map(str, names)))
        elif key in _SCHEMA_MAPS and isinstance(value, dict):
            fixed[key] = {}
            for child, sub in value.items():
                if key == "properties" and isinstance(sub, dict) and isinstance(sub.get("required"), bool):
                    if sub["required"]:
                        hoisted.append(child)
                    sub = {k: v for k, v in sub.items() if k != "required"}
                if sub is not None:
                    fixed[key][child] = repair_schema(sub, note) if isinstance(sub, dict) else sub
        elif key in _SCHEMAS and isinstance(value, dict):
            fixed[key] = repair_schema(value, note)
        elif key in (*_SCHEMA_LISTS, "items") and isinstance(value, list):
            fixed[key] = [repair_schema(sub, note) if isinstance(sub, dict) else sub for sub in value]
        elif key in (*_COUNTS, *_LIMITS) and isinstance(value, str) and value.isdecimal():
            note("number in a schema written as text")
            fixed[key] = int(value)
        else:
            fixed[key] = value
    required = fixed.get("required")
    if hoisted and (required is None or isinstance(required, list)):
        note("required moved out of a property")
        fixed["required"] = [*(required or []), *(name for name in hoisted if name not in (required or []))]
    properties, required = fixed.get("properties"), fixed.get("required")
    if isinstance(properties, dict) and isinstance(required, list) and not _is_open(fixed):
        names = list(dict.fromkeys(n for n in required if n in tuple(properties)))
        if names != required:
            note("required narrowed to the properties that exist")
            fixed["required"] = names
    return _modernize(fixed, note)


def _read_type(name: str, note: Note) -> dict[str, Any]:
    """Return the keywords for a type name of another notation; the name itself if it is unknown."""
    known = PYTHON_TYPES.get(name.lower(), name.lower() if name.lower() in TYPES else "")
    if known != "":
        note("type name written as JSON Schema's")
        return {} if known is None else {"type": known}
    try:
        schema = python_type(name)[0]
    except RowError:
        return {"type": name}
    note("type in Python notation written as JSON Schema's")
    return schema


def _modernize(schema: dict[str, Any], note: Note) -> dict[str, Any]:
    """Return a schema of an earlier draft, or of OpenAPI 3.0, in the spelling of Draft 2020-12."""
    fixed = dict(schema)
    if isinstance(fixed.get("items"), list):
        note("items of a tuple written as prefixItems")
        rest = {"items": fixed["additionalItems"]} if "additionalItems" in fixed else {}
        fixed = {k: v for k, v in fixed.items() if k not in ("items", "additionalItems")}
        fixed |= {"prefixItems": schema["items"], **rest} if schema["items"] else rest
    for limit, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(fixed.get(exclusive), bool):
            note("exclusive limit written as a number")
            if fixed.pop(exclusive) and limit in fixed:
                fixed[exclusive] = fixed.pop(limit)
    if isinstance(fixed.get("nullable"), bool) and fixed.pop("nullable"):
        note("nullable written as a type")
        fixed = _allow_null(fixed)
    return fixed


def _allow_null(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema.get("type")
    if any(key in schema for key in COMBINING) or "const" in schema:
        texts: dict[str, Any] = {key: schema[key] for key in ("title", "description", "default") if key in schema}
        return {**texts, "anyOf": [{k: v for k, v in schema.items() if k not in texts}, {"type": "null"}]}
    kinds = [kind] if isinstance(kind, str) else kind
    if isinstance(kinds, list) and "null" not in kinds:
        schema = {**schema, "type": [*kinds, "null"]}
    if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
        schema = {**schema, "enum": [*schema["enum"], None]}
    return schema


def _is_open(schema: dict[str, Any]) -> bool:
    """Return whether the schema of an object allows names that its `properties` do not list."""
    if schema.get("additionalProperties", False) is not False:
        return True
    return any(key in schema for key in ("patternProperties", *COMBINING))


def lint_schema(schema: dict[str, Any], place: str = "parameters") -> tuple[str, str] | None:
    """Return why a schema cannot be used and where, or None.

    The reasons: it is not JSON Schema, too large, or has a reference that leads nowhere. `place` is that of the schema.
    """
    if count_values(schema) > MAX_SCHEMA_VALUES:
        return f"tool schema with more than {MAX_SCHEMA_VALUES:,} values", place
    problem = _lint(json.dumps(schema))
    return problem and (problem[0], reduce(join_place, problem[1], place))


@lru_cache(maxsize=1024)
def _lint(text: str) -> tuple[str, tuple[str | int, ...]] | None:
    """Return why a schema, as JSON text, cannot be used, and the path to it. Cached, because tools recur."""
    schema = json.loads(text)
    resolver = Resolver(schema)
    for path, sub in _subschemas(schema):
        kinds = sub.get("type", "object")
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if not isinstance(kind, str) or kind not in TYPES:
                return f"tool schema with an unknown type ({str(kind)[:40]!r})", (*path, "type")
        for key, value in sub.items():
            if key in _SHAPES and not _SHAPES[key](value):
                return "tool schema is not valid JSON Schema", (*path, key)
    for path, sub in _subschemas(schema):
        try:
            resolver.resolve(sub)
        except UnresolvableError as error:
            return f"tool schema that {error}", path
    return None


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, str) for n in value) and len(set(value)) == len(value)


def _is_count(value: Any) -> bool:
    return fits_type("integer", value) and value >= 0


# What each keyword of Draft 2020-12 must hold. jsonschema's own check of a schema takes a millisecond per property.
_SHAPES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_SCHEMA_MAPS, _is_map),
    **dict.fromkeys(_SCHEMA_LISTS, lambda value: isinstance(value, list) and value and all(map(_is_schema, value))),
    **dict.fromkeys(_SCHEMAS, _is_schema),
    **dict.fromkeys(_LIMITS, lambda value: fits_type("number", value)),
    **dict.fromkeys(_COUNTS, _is_count),
    **dict.fromkeys(_TEXTS, lambda value: isinstance(value, str)),
    **dict.fromkeys(_SWITCHES, lambda value: isinstance(value, bool)),
    **dict.fromkeys(("enum", "examples"), lambda value: isinstance(value, list)),
    "type": lambda value: isinstance(value, str) or (bool(value) and _is_list_of_names(value)),
    "multipleOf": lambda value: fits_type("number", value) and value > 0,
    "required": _is_list_of_names,
    "dependentRequired": lambda value: isinstance(value, dict) and all(map(_is_list_of_names, value.values())),
}


def is_keyword(key: str, value: Any) -> bool:
    """Return whether a member of an object is a keyword of JSON Schema with a value that it may have."""
    return key == "const" or bool(key in _SHAPES and _SHAPES[key](value))


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """Yield a schema and all schemas inside it, each with its path."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), schema)]
    while stack:
        path, sub = stack.pop()
        if not isinstance(sub, dict):
            continue
        yield path, sub
        stack.extend(((*path, key), sub.get(key)) for key in _SCHEMAS)
        maps = ((key, sub[key]) for key in _SCHEMA_MAPS if isinstance(sub.get(key), dict))
        stack.extend(((*path, key, name), member) for key, members in maps for name, member in members.items())
        lists = ((key, sub[key]) for key in _SCHEMA_LISTS if isinstance(sub.get(key), list))
        stack.extend(((*path, key, i), member) for key, members in lists for i, member in enumerate(members))
