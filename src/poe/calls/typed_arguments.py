"""Turn the JSON arguments of a call into what a Python function declares: the way back of `poe.calls.python_functions`.

A value stays as it is where the annotation is a type of JSON, or none.
"""

import collections.abc
import dataclasses
import datetime
import decimal
import enum
import pathlib
import types
import typing
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from poe.calls.python_functions import find_type_hints

_PLAIN: dict[Any, Any] = {str: str, int: int, float: (int, float), bool: bool, type(None): type(None)}
_FROM_TEXT: dict[Any, Callable[[str], Any]] = {
    **{kind: kind.fromisoformat for kind in (datetime.datetime, datetime.date, datetime.time)},
    **{kind: kind for kind in (uuid.UUID, pathlib.Path, decimal.Decimal)},
}
_CONTAINERS = {set: set, frozenset: frozenset, tuple: tuple, collections.abc.Set: set}
_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def convert_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with the types that the function declares.

    An Enum, a dataclass, a date or a set is made from its JSON value. Raises `ValueError` or `TypeError` for a value
    that the type refuses, such as a text that is no date.
    """
    hints = find_type_hints(function)
    return {name: _convert(hints.get(name, Any), value) for name, value in arguments.items()}


def _convert(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Annotated, typing.Required, typing.NotRequired, typing.Final):
        return _convert(args[0], value)
    if isinstance(hint, typing.TypeVar):
        return _convert(hint.__bound__ or Any, value)
    if hasattr(hint, "__supertype__"):  # a NewType
        return _convert(hint.__supertype__, value)
    if origin in (typing.Union, types.UnionType):
        return _convert_to_one_of(args, value)
    if origin is typing.Literal:
        return next((each for each in args if isinstance(each, enum.Enum) and each.value == value), value)
    kind = origin or hint
    if isinstance(value, list) and (kind in _CONTAINERS or kind in _LISTS):
        parts = args if kind is tuple and args[1:] != (...,) else args[:1] * len(value)
        items = [_convert(part, item) for part, item in zip(parts, value, strict=True)] if args else value
        return _CONTAINERS.get(kind, list)(items)
    if isinstance(value, dict) and kind in _MAPS:
        return {key: _convert(args[1], item) for key, item in value.items()} if len(args) == 2 else value
    if isinstance(value, str) and kind in _FROM_TEXT:
        return _FROM_TEXT[kind](value)
    return _convert_to_class(hint, value) if isinstance(hint, type) else value


def _convert_to_one_of(hints: tuple[Any, ...], value: Any) -> Any:
    """Return the value as the first type of a union that takes it; types of JSON come first."""
    if any(isinstance(value, _PLAIN[hint]) for hint in hints if hint in _PLAIN and not _is_other(hint, value)):
        return value
    errors: list[Exception] = []
    for hint in hints:
        if hint not in _PLAIN:
            try:
                return _convert(hint, value)
            except (ValueError, TypeError, KeyError) as error:
                errors.append(error)
    if errors:
        raise errors[0]
    return value


def _is_other(hint: Any, value: Any) -> bool:
    return isinstance(value, bool) and hint is not bool  # a bool is an int in Python, and not in JSON


def _convert_to_class(hint: Any, value: Any) -> Any:
    if issubclass(hint, enum.Enum):
        return hint(value)
    if hasattr(hint, "model_validate"):  # of Pydantic
        return hint.model_validate(value)
    if isinstance(value, dict) and (dataclasses.is_dataclass(hint) or typing.is_typeddict(hint)):
        hints = typing.get_type_hints(hint, include_extras=True)
        members = {name: _convert(hints.get(name, Any), member) for name, member in value.items()}
        return members if typing.is_typeddict(hint) else hint(**members)
    return value
