"""Describe Python functions, methods and callable objects as tools, from their signatures and docstrings.

| annotation | becomes |
|---|---|
| `str`, `int`, `float`, `bool`, `None`, `Any` | the type of JSON Schema |
| `Optional[X]`, `X \\| Y`, `Literal`, an `Enum` | a nullable type, a union, an enum of the values |
| `list`, `set`, `Sequence`, `tuple` of types | an array; `tuple[X, Y]` has two members |
| `dict[str, X]`, `Mapping` | an object with values of that type |
| a `TypedDict`, a dataclass, a class of Pydantic | an object with its fields |
| `datetime`, `date`, `time`, `UUID`, `Path`, `Decimal` | a string, with its format |
| `Annotated[X, "text"]`, `Annotated[X, Field(...)]` | X with that description and those limits |

What transformers' `get_json_schema` reads becomes the same tool. A docstring is in Google's, Sphinx's or NumPy's style.
"""

import collections.abc
import dataclasses
import datetime
import decimal
import enum
import functools
import inspect
import json
import pathlib
import re
import types
import typing
import uuid
from collections.abc import Callable
from typing import Any

from poe.calls.python_types import python_type
from poe.calls.schema import Note
from poe.errors import RowError

_SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    set: {"type": "array", "uniqueItems": True},
    frozenset: {"type": "array", "uniqueItems": True},
    dict: {"type": "object"},
    Any: {},
    object: {},
    inspect.Parameter.empty: {},
    datetime.datetime: {"type": "string", "format": "date-time"},
    datetime.date: {"type": "string", "format": "date"},
    datetime.time: {"type": "string", "format": "time"},
    uuid.UUID: {"type": "string", "format": "uuid"},
    pathlib.Path: {"type": "string"},
    decimal.Decimal: {"type": "string"},
}
_ARRAYS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_SETS = (set, frozenset, collections.abc.Set)
_MAPS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_LIMITS |= {"multiple_of": "multipleOf", "pattern": "pattern"}
_SPHINX = re.compile(r"^\s*:param\s+(?:[\w\[\], .|]+\s)?(\w+):\s*(.*(?:\n(?!\s*:|\s*$).*)*)", re.MULTILINE)
_NUMPY = re.compile(r"^Parameters\n-{3,}\n((?:.*\n?)*?)(?=^\w.*\n-{3,}\n|\Z)", re.MULTILINE)
_NUMPY_ARGUMENT = re.compile(r"^(\w+)(?: *:.*)?\n((?:[ \t]+.*\n?)*)", re.MULTILINE)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def describe_function(function: Callable[..., Any], note: Note) -> dict[str, Any]:
    """Return a function as a tool. Raises `RowError` for a function without a name, or a type without JSON values.

    A function without a docstring gets an empty description, an argument without a type hint takes any value, and
    `*args` is left out; each is noted.
    """
    name = _name_of(function)
    try:
        if name == "<lambda>":
            raise RowError("a lambda has no name")
        signature = inspect.signature(function)
    except (ValueError, TypeError) as error:  # a function of C without a signature
        raise RowError(f"Python function that does not describe a tool: {str(error)[:200]}") from None
    about, descriptions = _read_docstring(_docstring_of(function))
    if not about:
        note("function without a docstring")
    hints = find_type_hints(function)
    schemas = _Schemas()
    properties: dict[str, Any] = {}
    required = []
    rest: dict[str, Any] = {}
    for i, parameter in enumerate(signature.parameters.values()):
        if i == 0 and parameter.name in ("self", "cls") and parameter.annotation is parameter.empty:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            note("*args left out")
            continue
        if parameter.annotation is parameter.empty:
            note("argument without a type hint takes any value")
        try:
            schema = dict(schemas.read(hints.get(parameter.name, parameter.annotation)))
        except RowError as error:
            reason = f"argument {parameter.name!r} of {name}: {error.reason}"
            raise RowError(f"Python function that does not describe a tool: {reason[:300]}") from None
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = {"additionalProperties": schema or True}
            continue
        if text := descriptions.get(parameter.name):
            schema |= _read_choices(text)
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, **({"required": required} if required else {}), **rest}
    parameters |= {"$defs": schemas.definitions} if schemas.definitions else {}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or getattr(function, "name", None)
    return name if isinstance(name, str) else type(function).__name__


def _docstring_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function) and not isinstance(function, type):  # an object: its class describes it
        own = inspect.getdoc(type(function).__call__) if "__call__" in vars(type(function)) else None
        return (own or inspect.getdoc(type(function)) or "").strip()
    return (inspect.getdoc(function) or "").strip()


def find_type_hints(function: Any) -> dict[str, Any]:
    """Return the annotations of a function, method, class or callable object by argument; none if one is not found."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        function = function if dataclasses.is_dataclass(function) else vars(function).get("__init__", function)
    elif not inspect.isroutine(function):
        function = type(function).__call__
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # a name that is not defined: the annotations are read as text
        return {}


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description of a function and those of its arguments."""
    from transformers.utils.chat_template_utils import parse_google_format_docstring

    about, arguments, _ = parse_google_format_docstring(text)
    about, found = about or "", {**(arguments or {})}
    if match := _NUMPY.search(about):
        found |= {name: _one_line(described) for name, described in _NUMPY_ARGUMENT.findall(match[1])}
        about = about[: match.start()]
    if match := re.search(r"^\s*:\w+[^:\n]*:", about, re.MULTILINE):
        found |= {name: _one_line(described) for name, described in _SPHINX.findall(about)}
        about = about[: match.start()]
    return about.strip(), found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read_choices(text: str) -> dict[str, Any]:
    """Return the description of an argument, and the enum at its end: `(choices: ["a", "b"])`."""
    if match := _CHOICES.search(text):
        try:
            choices = json.loads(match[1])
            return {
                "enum": [c.strip() if isinstance(c, str) else c for c in choices],
                "description": text[: match.start()].strip(),
            }
        except (ValueError, TypeError):
            pass
    return {"description": text}


class _Schemas:
    """Writes annotations as JSON Schema. `definitions` are those of Pydantic's classes."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self._open: list[Any] = []

    def read(self, hint: Any) -> dict[str, Any]:
        """Return the schema of an annotation. Raises `RowError`."""
        if isinstance(hint, str):
            return python_type(hint)[0]
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
            return self._read_annotated(args[0], args[1:])
        if isinstance(hint, typing.TypeVar):
            return self.read(hint.__bound__ or Any)
        if hasattr(hint, "__supertype__"):  # a NewType
            return self.read(hint.__supertype__)
        if origin in (typing.Required, typing.NotRequired, typing.Final):
            return self.read(args[0])
        if origin in (typing.Union, types.UnionType):
            return self._read_union(args)
        if origin is typing.Literal:
            return _enum(args)
        if origin is tuple:
            if len(args) == 2 and args[1] is ...:
                return {"type": "array", "items": self.read(args[0])}
            return {"type": "array", "prefixItems": [self.read(part) for part in args]} if args else {"type": "array"}
        kind = origin or hint
        if kind in (*_ARRAYS, *_SETS) and (args or kind not in _SIMPLE):
            unique = {"uniqueItems": True} if kind in _SETS else {}
            return {"type": "array", **({"items": self.read(args[0])} if args else {}), **unique}
        if kind in _MAPS:
            return {"type": "object", **({"additionalProperties": self.read(args[1])} if len(args) == 2 else {})}
        try:
            return dict(_SIMPLE[hint])
        except (KeyError, TypeError):
            return self._read_class(hint)

    def _read_annotated(self, hint: Any, metadata: tuple[Any, ...]) -> dict[str, Any]:
        schema = dict(self.read(hint))
        for part in metadata:
            text = part if isinstance(part, str) else getattr(part, "description", None)
            if isinstance(text, str):
                schema["description"] = text
            for limit in (part, *(getattr(part, "metadata", None) or ())):
                for name, keyword in _LIMITS.items():
                    if isinstance(value := getattr(limit, name, None), int | float | str):
                        schema[keyword] = value
                for bound in ("min", "max"):
                    if isinstance(value := getattr(limit, f"{bound}_length", None), int):
                        schema[f"{bound}{'Items' if schema.get('type') == 'array' else 'Length'}"] = value
        return schema

    def _read_union(self, args: tuple[Any, ...]) -> dict[str, Any]:
        parts = [self.read(part) for part in args if part is not type(None)]
        if len(parts) == 1:
            schema = parts[0]
        elif all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
            names = sorted({part["type"] for part in parts})
            schema = {"type": names[0] if len(names) == 1 else names}
        else:
            schema = {"anyOf": parts}
        return {**schema, "nullable": True} if type(None) in args else schema

    def _read_class(self, hint: Any) -> dict[str, Any]:
        is_class: bool = isinstance(hint, type)
        if not is_class:
            raise RowError(f"{str(hint)[:80]} has no JSON value")
        if issubclass(hint, enum.Enum):
            return _enum([member.value for member in hint])
        if hasattr(hint, "model_json_schema"):
            schema = hint.model_json_schema()
            self.definitions |= schema.pop("$defs", {})
            return schema
        is_typed_dict = typing.is_typeddict(hint)
        if not is_typed_dict and not dataclasses.is_dataclass(hint):
            raise RowError(
                f"{hint.__name__} has no JSON value: expected a simple type, an Enum, a TypedDict, or a dataclass"
            )
        if hint in self._open:
            raise RowError(f"{hint.__name__} contains itself")
        self._open.append(hint)
        hints = typing.get_type_hints(hint, include_extras=True)
        if is_typed_dict:
            required = [name for name in hints if name in hint.__required_keys__]
        else:
            fields = [field for field in dataclasses.fields(hint) if field.init]
            hints = {field.name: hints[field.name] for field in fields}
            unset = dataclasses.MISSING
            required = [f.name for f in fields if f.default is unset and f.default_factory is unset]
        schema = {"type": "object", "properties": {name: self.read(part) for name, part in hints.items()}}
        self._open.pop()
        return {**schema, "required": required} if required else schema


def _enum(values: Any) -> dict[str, Any]:
    values = [value.value if isinstance(value, enum.Enum) else value for value in values]
    if not values or any(type(value) not in (str, int, float, bool, type(None)) for value in values):
        raise RowError("an Enum or Literal needs values that are text, numbers, true, false or null")
    kinds = list(dict.fromkeys(_SIMPLE[type(value)]["type"] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}
