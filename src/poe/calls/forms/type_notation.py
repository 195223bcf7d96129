"""Write JSON Schema types in the notation of a programming language."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from poe.calls.forms.base import as_json

_SIMPLE = ("string", "integer", "number", "boolean", "null")
_WRITTEN_SEPARATELY = ("description", "default", "title")


@dataclass(frozen=True, slots=True)
class Dialect:
    """The notation of a language. `names` are its names for `_SIMPLE`; `fields`: whether types can list members."""

    names: tuple[str, str, str, str, str]
    anything: str
    array: str
    mapping: str
    constants: Callable[[list[Any]], str]
    fields: bool


PYTHON = Dialect(
    ("str", "int", "float", "bool", "None"),
    "Any",
    "list[{}]",
    "dict[str, {}]",
    lambda values: f"Literal[{', '.join(map(repr, values))}]",
    fields=False,
)
TYPESCRIPT = Dialect(
    ("string", "integer", "number", "boolean", "null"),
    "any",
    "Array<{}>",
    "Record<string, {}>",
    lambda values: " | ".join(map(as_json, values)),
    fields=True,
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a tool. If `rest` is None, `type` is its whole schema; if not, `rest` is that schema."""

    name: str
    description: str
    required: bool
    has_default: bool
    default: Any
    type: str
    rest: Any


def list_parameters(function: dict[str, Any], dialect: Dialect) -> Iterator[Parameter]:
    """Yield the arguments of a tool in the order of its schema."""
    schema = function["parameters"]
    for name, sub in schema.get("properties", {}).items():
        known = sub if isinstance(sub, dict) else {}
        bare = {key: value for key, value in known.items() if key not in _WRITTEN_SEPARATELY} if known else sub
        text, exact = type_text(bare, dialect)
        yield Parameter(
            name,
            _text(known.get("description")),
            name in schema.get("required", []),
            "default" in known,
            known.get("default"),
            text,
            None if exact else bare,
        )


def remaining_schema(function: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a tool's schema that is not in its list of arguments."""
    schema = function["parameters"]
    rest = {key: value for key, value in schema.items() if key not in ("type", "properties", "required", "title")}
    unlisted = [name for name in schema.get("required", []) if name not in schema.get("properties", {})]
    return {**rest, **({"required": unlisted} if unlisted else {})}


def type_text(schema: Any, dialect: Dialect) -> tuple[str, bool]:
    """Return the type that a schema describes, and whether it expresses the whole schema."""
    if not isinstance(schema, dict):
        return dialect.anything, schema is True
    keys = schema.keys() - {"title"}
    kind, constants = schema.get("type"), schema.get("enum")
    if (
        isinstance(constants, list)
        and constants
        and keys <= {"enum", "type"}
        and all(v is None or isinstance(v, str | int | float) for v in constants)
    ):
        return dialect.constants(constants), True
    if keys == {"anyOf"} and schema["anyOf"]:
        return _union([type_text(member, dialect) for member in schema["anyOf"]])
    if isinstance(kind, list) and kind:
        return _union([type_text({**schema, "type": member}, dialect) for member in kind])
    if kind == "array":
        member, exact = type_text(schema.get("items", True), dialect)
        return dialect.array.format(member), exact and keys <= {"type", "items"}
    if kind == "object":
        return _object(schema, dialect)
    if kind in _SIMPLE:
        return dialect.names[_SIMPLE.index(kind)], keys == {"type"}
    return dialect.anything, not keys


def _union(members: list[tuple[str, bool]]) -> tuple[str, bool]:
    return " | ".join(dict.fromkeys(text for text, _ in members)), all(exact for _, exact in members)


def _object(schema: dict[str, Any], dialect: Dialect) -> tuple[str, bool]:
    keys, properties = schema.keys() - {"title"}, schema.get("properties")
    if properties and dialect.fields:
        required = schema.get("required", [])
        members = {name: type_text(member, dialect) for name, member in properties.items()}
        fields = "; ".join(
            f"{quote_name(name)}{'' if name in required else '?'}: {text}" for name, (text, _) in members.items()
        )
        exact = all(ok for _, ok in members.values()) and all(name in properties for name in required)
        return f"{{ {fields} }}", exact and keys <= {"type", "properties", "required"}
    member, exact = type_text(schema.get("additionalProperties", True), dialect)
    exact = exact and not properties and not schema.get("required")
    return dialect.mapping.format(member), exact and keys <= {"type", "properties", "required", "additionalProperties"}


def _text(description: Any) -> str:
    return description if isinstance(description, str) else ""


def quote_name(name: str) -> str:
    """Return a name unchanged if it is an identifier, or as a JSON string if it is not."""
    return name if all(part.isidentifier() for part in name.split(".")) else as_json(name)
