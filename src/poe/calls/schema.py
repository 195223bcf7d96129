"""Bring tools and calls into one canonical format: lint schemas, check calls against them, and make safe repairs.

Every repair is passed to `note` by name, so that a report can count it. Input that cannot be converted without loss
raises `RowError` with the reason.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from poe.calls.conversation import Call, Message, Tool
from poe.errors import RowError

try:
    import jsonschema
    import referencing
except ImportError:  # part of the extra `train`; without it, only the structural checks below run
    jsonschema = None  # type: ignore[assignment]

Note = Callable[[str], None]

MAX_DEPTH = 64
"""The maximum nesting depth of a row; real rows have less than ten levels."""

TYPES = frozenset({"string", "integer", "number", "boolean", "array", "object", "null"})
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
    "any": None,
}
"""Type names that are often used in place of JSON Schema's; None removes the keyword."""

_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "contains", "if", "then", "else")


def no_note(rule: str) -> None:
    """Ignore a repair: the `note` of callers that do not count repairs."""


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
                return "nested too deeply"
            if isinstance(item, dict):
                stack.extend((key, depth + 1) for key in item)
                stack.extend((member, depth + 1) for member in item.values())
            else:
                stack.extend((member, depth + 1) for member in item)
        elif item is not None and not isinstance(item, bool | int):
            return "a value that is not JSON"
    return None


def as_tool(name: Any, description: Any, parameters: Any, note: Note = no_note) -> Tool:
    """Build a `Tool`. Raises `RowError` if the name, description or parameters cannot be converted without loss.

    Repairs: parameters that are absent or `{}` become an object without properties; a missing `type` or `properties` of
    an object is added; Python type names become JSON Schema's; `required: true` inside a property moves to the object's
    list; names in `required` that are not properties are removed.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > 256 or any(ord(c) < 32 for c in name):
        raise RowError("tool without a usable name")
    if description is None:
        description = ""
    if not isinstance(description, str):
        raise RowError("tool description is not text")
    if parameters is None or parameters == {}:
        note("empty parameters written as an object schema")
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise RowError("tool parameters are not an object schema")
    if problem := check_value(parameters):
        raise RowError(problem)
    parameters = _repair(parameters, note)
    if "type" not in parameters and "properties" in parameters:
        note("missing type of parameters filled in")
        parameters = {"type": "object", **parameters}
    if parameters.get("type") != "object":
        raise RowError("tool parameters are not an object schema")
    if "properties" not in parameters:
        note("missing properties filled in")
        parameters = {**parameters, "properties": {}}
    if problem := lint_schema(parameters):
        raise RowError(problem)
    return {
        "type": "function",
        "function": {"name": name.strip(), "description": description, "parameters": parameters},
    }


def move_required(function: dict[str, Any], note: Note = no_note) -> Any:
    """Return the `parameters` of a function, including a `required` list that the function has beside them."""
    parameters, required = function.get("parameters"), function.get("required")
    if parameters and isinstance(parameters, dict) and required and "required" not in parameters:
        note("required moved into parameters")
        return {**parameters, "required": required}
    return parameters


def unique_tools(tools: list[Tool], note: Note = no_note) -> list[Tool]:
    """Return the tools without exact repetitions. Raises `RowError` if one name has two definitions."""
    by_name: dict[str, Tool] = {}
    for tool in tools:
        name = tool["function"]["name"]
        if name not in by_name:
            by_name[name] = tool
        elif by_name[name] == tool:
            note("repeated tool removed")
        else:
            raise RowError("one tool name, two definitions")
    return list(by_name.values())


def _repair(schema: dict[str, Any], note: Note) -> dict[str, Any]:
    """Return a copy of the schema with the repairs of `as_tool` at every level."""
    fixed: dict[str, Any] = {}
    hoisted: list[str] = []
    for key, value in schema.items():
        if key == "type" and isinstance(value, str) and value not in TYPES:
            name = value if value.lower() in TYPES else PYTHON_TYPES.get(value.lower(), value)
            name = name.lower() if isinstance(name, str) and name.lower() in TYPES else name
            note("type name written as JSON Schema's")
            if name is not None:
                fixed[key] = name
        elif key in _SCHEMA_MAPS and isinstance(value, dict):
            fixed[key] = {}
            for child, sub in value.items():
                if key == "properties" and isinstance(sub, dict) and isinstance(sub.get("required"), bool):
                    if sub["required"]:
                        hoisted.append(child)
                    sub = {k: v for k, v in sub.items() if k != "required"}
                fixed[key][child] = _repair(sub, note) if isinstance(sub, dict) else sub
        elif key in _SCHEMAS and isinstance(value, dict):
            fixed[key] = _repair(value, note)
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            fixed[key] = [_repair(sub, note) if isinstance(sub, dict) else sub for sub in value]
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
    return fixed


def lint_schema(schema: dict[str, Any]) -> str | None:
    """Return why a schema is not valid JSON Schema (Draft 2020-12 if jsonschema is installed), or None."""
    for sub in _subschemas(schema):
        kinds = sub.get("type", "object")
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if not isinstance(kind, str) or kind not in TYPES:
                return f"tool schema with an unknown type ({str(kind)[:40]!r})"
        reference = sub.get("$ref")
        if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
            return "tool schema that refers to another document"
        properties = sub.get("properties", {})
        if not isinstance(properties, dict) or not all(isinstance(p, dict | bool) for p in properties.values()):
            return "tool schema is not valid JSON Schema"
        required = sub.get("required", [])
        if not isinstance(required, list) or not all(isinstance(n, str) for n in required):
            return "tool schema is not valid JSON Schema"
    if jsonschema is not None and not _is_valid_schema(json.dumps(schema)):
        return "tool schema is not valid JSON Schema"
    return None


@lru_cache(maxsize=4096)
def _is_valid_schema(text: str) -> bool:
    """Return whether a schema, as JSON text, is valid Draft 2020-12. Cached: the check is slow and tools recur."""
    try:
        jsonschema.Draft202012Validator.check_schema(json.loads(text))
    except (jsonschema.SchemaError, RecursionError):
        return False
    return True


def _subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    children: list[Any] = [schema.get(key) for key in _SCHEMAS]
    for key in _SCHEMA_MAPS:
        if isinstance(schema.get(key), dict):
            children.extend(schema[key].values())
    for key in _SCHEMA_LISTS:
        if isinstance(schema.get(key), list):
            children.extend(schema[key])
    for child in children:
        if isinstance(child, dict):
            yield from _subschemas(child)


def find_tool(tools: list[Tool], name: str) -> dict[str, Any] | None:
    """Return the `function` part of the tool of that name, or None."""
    return next((tool["function"] for tool in tools if tool["function"]["name"] == name), None)


def map_arguments(message: Message, change: Callable[[dict[str, Any] | None, Any], Any], tools: list[Tool]) -> Message:
    """Return a copy of an assistant message with `change(function or None, arguments)` as arguments of each call.

    `function` is the `function` part of the called tool, None if the tool is not declared.
    """
    changed = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = change(find_tool(tools, function["name"]), function["arguments"])
        changed.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": changed}


def check_call(tools: list[Tool], name: str, arguments: Any) -> str | None:
    """Return why a call does not fit the offered tools, or None. Arguments are not coerced."""
    tool = find_tool(tools, name)
    if tool is None:
        return "call to a tool that is not offered"
    if not isinstance(arguments, dict):
        return "arguments are not an object"
    return _find_mismatch(tool["parameters"], arguments, tool["parameters"])


def check_calls(calls: Sequence[Call], tools: list[Tool]) -> list[str]:
    """Return what is wrong with the calls, one sentence each: an undeclared tool, or arguments that do not fit."""
    problems = []
    for call in calls:
        reason = check_call(tools, call.name, call.arguments)
        if reason is not None:
            problems.append(f"{call.name}: {reason}")
    return problems


def fit_call(tools: list[Tool], name: str, arguments: Any, note: Note = no_note) -> dict[str, Any]:
    """Return the arguments after safe coercion, in schema order. Raises `RowError` if the call does not fit."""
    tool = find_tool(tools, name)
    if tool is None:
        raise RowError("call to a tool that is not offered")
    if not isinstance(arguments, dict):
        raise RowError("arguments are not an object")
    if problem := check_value(arguments):
        raise RowError(problem)
    fitted = coerce(tool["parameters"], arguments, note)
    if reason := check_call(tools, name, fitted):
        raise RowError(reason)
    return order_arguments(tool["parameters"], fitted)


def coerce(schema: Any, value: Any, note: Note = no_note) -> Any:
    """Convert a value to the declared type where that loses nothing; return any other value unchanged.

    A string that spells an integer, number or boolean exactly becomes that value. `5.0` becomes an integer where one is
    declared. An integer becomes its digits where a string is declared. A null argument that is optional and not
    nullable is left out.
    """
    if not isinstance(schema, dict):
        return value
    kind = schema.get("type")
    if isinstance(value, dict) and isinstance(schema.get("properties"), dict):
        required = schema.get("required", [])
        fitted = {}
        for key, member in value.items():
            sub = schema["properties"].get(key)
            if member is None and key not in required and isinstance(sub, dict) and not _allows_null(sub):
                note("null for an optional argument left out")
                continue
            fitted[key] = coerce(sub, member, note)
        return fitted
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [coerce(schema["items"], member, note) for member in value]
    if not isinstance(kind, str) or fits_type(kind, value):
        if kind == "integer" and isinstance(value, float):
            note("whole number written as an integer")
            return int(value)
        return value
    converted = _convert_exactly(kind, value)
    if converted is None:
        return value
    note(f"{type(value).__name__} coerced to {kind}")
    return converted


def _convert_exactly(kind: str, value: Any) -> Any:
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


def _is_open(schema: dict[str, Any]) -> bool:
    """Return whether the schema of an object allows names that its `properties` do not list."""
    if schema.get("additionalProperties", False) is not False:
        return True
    return any(key in schema for key in ("patternProperties", "$ref", "allOf", "anyOf", "oneOf"))


def _allows_null(schema: dict[str, Any]) -> bool:
    kind = schema.get("type")
    if isinstance(kind, str):
        return kind == "null"
    return "null" in kind if isinstance(kind, list) else True


def _find_mismatch(schema: Any, value: Any, root: dict[str, Any]) -> str | None:
    reason = _check_structure(schema, value, top=True)
    if reason is None and jsonschema is not None:
        registry: Any = referencing.Registry()  # empty, so that no reference is fetched
        try:
            if not jsonschema.Draft202012Validator(root, registry=registry).is_valid(value):
                return "arguments do not fit the tool's schema"
        except Exception:  # an unresolvable $ref, an invalid pattern, a cycle
            return "tool schema cannot be applied"
    return reason


def _check_structure(schema: Any, value: Any, top: bool = False) -> str | None:
    """Check type, enum, required and undeclared names, each with its own reason. jsonschema checks the rest."""
    if not isinstance(schema, dict):
        return None
    kind = schema.get("type")
    kinds = [kind] if isinstance(kind, str) else kind if isinstance(kind, list) else []
    if kinds and not any(fits_type(k, value) for k in kinds):
        return "argument of another type than declared"
    if isinstance(schema.get("enum"), list) and value not in schema["enum"]:
        return "argument outside its enum"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if any(name not in value for name in schema.get("required", [])):
            return "required argument missing"
        if (top or properties) and not _is_open(schema) and any(name not in properties for name in value):
            return "argument that the tool does not declare"
        for name, member in value.items():
            if name in properties and (reason := _check_structure(properties[name], member)):
                return reason
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for member in value:
            if reason := _check_structure(schema["items"], member):
                return reason
    return None


def order_arguments(schema: Any, arguments: Any) -> Any:
    """Return the value with the members of every object in the order of its schema's properties.

    Training rows use this order because constrained decoding emits arguments in it. Names that the schema does not list
    come last, in their original order.
    """
    if isinstance(schema, dict) and isinstance(arguments, dict):
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        names = [n for n in properties if n in arguments] + [n for n in arguments if n not in properties]
        return {n: order_arguments(properties.get(n), arguments[n]) for n in names}
    if isinstance(schema, dict) and isinstance(arguments, list):
        return [order_arguments(schema.get("items"), member) for member in arguments]
    return arguments
