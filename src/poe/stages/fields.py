"""Documented fields of a dataclass: a type with a range, and a sentence under the field.

    warmup_ratio: Ratio = 0.05
    \"\"\"Share of the steps over which the learning rates rise to their full values.\"\"\"

`check_fields` enforces types and ranges. `describe_fields` returns what `--help` and the reference print.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml

from poe.errors import RecipeError
from poe.modeling.stage_config import MOST_LAYERS


@dataclass(frozen=True)
class Range:
    """The numbers that a field accepts, as text and as a check."""

    text: str
    accepts: Callable[[float], bool]


class UpTo(int):
    """A limit, written `at most 2048` in a recipe: a run uses less where its data needs less."""

    def __str__(self) -> str:
        return f"at most {int(self)}"


Ratio = Annotated[float, Range("0 to 1", lambda x: 0 <= x <= 1)]
Momentum = Annotated[float, Range("0 to below 1", lambda x: 0 <= x < 1)]
Positive = Annotated[float, Range("above 0", lambda x: x > 0)]
NonNegative = Annotated[float, Range("0 or more", lambda x: x >= 0)]
LayerCount = Annotated[int, Range(f"1 to {MOST_LAYERS}", lambda x: 1 <= x <= MOST_LAYERS)]
VocabularySize = Annotated[int, Range("1 to 10000000", lambda x: 1 <= x <= 10_000_000)]  # more aborts the process
PositiveInt = Annotated[int, Range("1 or more", lambda x: x >= 1)]
NonNegativeInt = Annotated[int, Range("0 or more", lambda x: x >= 0)]
Limit = Annotated[int, Range("1 or more, or such a number after 'at most'", lambda x: x >= 1)]


@dataclass(frozen=True)
class FieldInfo:
    """A field for printing. `hint` is its type without ranges, `type` the name of the type, `default` YAML text."""

    name: str
    hint: Any
    type: str
    default: str
    sentence: str


def check_fields(instance: Any, title: str) -> None:
    """Raise `RecipeError` unless every field of a dataclass has a value of its type and in its range.

    `title` comes before the name of the field in the message: `Recipe 'tool': ` or `augment.`.
    """
    for name, hint in typing.get_type_hints(type(instance), include_extras=True).items():
        value = getattr(instance, name)
        if not _accepts(hint, value):
            close = difflib.get_close_matches(str(value), _choices(hint), n=1, cutoff=0.6)
            guess = f" Did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{title}{name} should be {_expected(hint)}, got {value!r}.{guess}")


def parse_limit(value: Any) -> Any:
    """Return the `UpTo` that a text such as `at most 2048` stands for, and any other value as it is."""
    match = re.fullmatch(r"at most (\d+)", value) if isinstance(value, str) else None
    return UpTo(match[1]) if match else value


def describe_fields(kind: type) -> dict[str, FieldInfo]:
    """Return the fields of a dataclass by name, in the order of the class."""
    sentences = _sentences(kind)
    ranged, plain = (typing.get_type_hints(kind, include_extras=extras) for extras in (True, False))
    return {
        field.name: FieldInfo(
            field.name,
            plain[field.name],
            _type_name(plain[field.name]),
            format_value(_default(field)),
            _with_range(sentences.get(field.name, ""), ranged[field.name]),
        )
        for field in dataclasses.fields(kind)
    }


def format_value(value: Any) -> str:
    """Return the value of a field as one line of YAML, the text for a recipe file or an option."""
    if dataclasses.is_dataclass(value):
        value = value.as_dict()  # type: ignore[union-attr]
    value = str(value) if isinstance(value, UpTo) else value
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _sentences(kind: type) -> dict[str, str]:
    """Return the sentence under each field. A class overrides the sentences of the class that it extends."""
    sentences: dict[str, str] = {}
    for owner in reversed([each for each in kind.__mro__ if dataclasses.is_dataclass(each)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match following:
                    case ast.Expr(ast.Constant(str(text))):
                        sentences[statement.target.id] = " ".join(text.split())
    return sentences


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "" if field.default is dataclasses.MISSING else field.default


def _with_range(sentence: str, hint: Any) -> str:
    ranges = dict.fromkeys(part.text for part in _ranges(hint))
    return f"{sentence} Range: {', '.join(ranges)}." if ranges and sentence else sentence


def _ranges(hint: Any) -> list[Range]:
    if typing.get_origin(hint) is Annotated:
        return [part for part in hint.__metadata__ if isinstance(part, Range)]
    return [part for argument in typing.get_args(hint) for part in _ranges(argument)]


def _accepts(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _accepts(arguments[0], value) and all(part.accepts(value) for part in _ranges(hint))
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(part, value) for part in arguments)
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_accepts(arguments[0], part) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _accepts(arguments[0], name) and _accepts(arguments[1], part) for name, part in value.items()
        )
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


_NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false", types.NoneType: "null"}


def _choices(hint: Any) -> list[str]:
    """Return the texts that a field accepts by name."""
    if typing.get_origin(hint) is Literal:
        return [choice for choice in typing.get_args(hint) if isinstance(choice, str)]
    return [choice for argument in typing.get_args(hint) for choice in _choices(argument)]


def _expected(hint: Any) -> str:
    """Return the values that a field accepts, in words for an error message."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{_expected(arguments[0])} ({', '.join(part.text for part in _ranges(hint))})"
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(_expected, arguments))
    if origin in (list, tuple):
        return f"a list with {_expected(arguments[0])} in each place"
    if origin is dict:
        return f"a mapping of names to values, each {_expected(arguments[1])}"
    return _NAMES.get(hint, "any value" if hint is Any else "a mapping")


def _type_name(hint: Any) -> str:
    """Return the name of a type in `--help`: `int`, `float|null`, `dense|low_rank|none`, `mapping`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return "|".join(map(_type_name, arguments))
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {float: "float", int: "int", str: "text", bool: "bool", types.NoneType: "null"}.get(hint, "mapping")
