"""Check a value against a whole JSON Schema with `jsonschema`, in bounded time.

Patterns are those of `regex`, which has the notation of other languages that Python's `re` lacks (`\\p{L}`). A pattern
that cannot be compiled, or that takes too long, is not checked: the value may be right.
"""

import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import jsonschema
import referencing
import regex

MAX_STEPS = 100_000
"""The maximum number of comparisons of one check, about half a second."""

MAX_PATTERN = 10_000
MATCH_SECONDS = 0.1
_SLOW_MATCH = MAX_STEPS // 4  # what a match that takes too long counts

_steps: ContextVar[int] = ContextVar("steps", default=MAX_STEPS)


class TooComplexError(ValueError):
    """A check needs more than `MAX_STEPS` comparisons."""


def start_counting() -> None:
    """Allow the next check `MAX_STEPS` comparisons."""
    _steps.set(MAX_STEPS)


def count_steps(number: int = 1) -> None:
    """Count comparisons. Raises `TooComplexError` when there were too many."""
    left = _steps.get() - number
    _steps.set(left)
    if left < 0:
        raise TooComplexError("too many comparisons")


def matches(pattern: Any, text: str) -> bool | None:
    """Return whether a text contains a match of a pattern. None: the pattern cannot be applied."""
    compiled = _compile(pattern) if isinstance(pattern, str) and len(pattern) <= MAX_PATTERN else None
    if compiled is None:
        return None
    try:
        return compiled.search(text, timeout=MATCH_SECONDS) is not None
    except TimeoutError:
        count_steps(_SLOW_MATCH)
        return None


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError):
        return None


def fits_schema(root: dict[str, Any], value: Any) -> bool:
    """Return whether a value fits a schema (Draft 2020-12).

    Raises `TooComplexError`, and any other exception for a reference that leads nowhere or back to itself.
    """
    start_counting()
    try:
        return bool(_validator(root).is_valid(value))
    except re.error:  # `unevaluatedProperties` matches with `re`
        return True


def list_errors(root: dict[str, Any], value: Any) -> Iterator[tuple[list[str | int], str]]:
    """Yield the path and the message of each error of a value; of a union, those of the member that fits best.

    Raises what `fits_schema` raises.
    """
    start_counting()
    for error in _validator(root).iter_errors(value):
        best = jsonschema.exceptions.best_match([error])
        yield list(best.absolute_path), best.message


def _validator(root: dict[str, Any]) -> Any:
    registry: Any = referencing.Registry()  # empty, so that no reference is fetched
    return _validator_class()(root, registry=registry)


@lru_cache(maxsize=1)
def _validator_class() -> Any:
    draft = jsonschema.Draft202012Validator
    keywords: dict[str, Any] = {name: _counted(check) for name, check in draft.VALIDATORS.items()}
    ours = {"pattern": _pattern, "patternProperties": _pattern_properties, "uniqueItems": _unique_items}
    ours |= {"additionalProperties": _additional_properties}
    return jsonschema.validators.extend(draft, {**keywords, **{name: _counted(ours[name]) for name in ours}})


def _counted(check: Callable[..., Any]) -> Callable[..., Any]:
    def keyword(validator: Any, expected: Any, instance: Any, schema: Any) -> Any:
        count_steps(1 + len(expected) if isinstance(expected, list | dict) else 1)
        return check(validator, expected, instance, schema)

    return keyword


def _error(message: str) -> Any:
    return jsonschema.ValidationError(message)


def _pattern(validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, str) and matches(pattern, instance) is False:
        yield _error("the text does not match the pattern")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[Any]:
    for pattern, sub in patterns.items() if isinstance(instance, dict) else ():
        for name, member in instance.items():
            if matches(pattern, name):
                yield from validator.descend(member, sub, path=name, schema_path=pattern)


def _additional_properties(validator: Any, additional: Any, instance: Any, schema: Any) -> Iterator[Any]:
    properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, member in instance.items() if isinstance(instance, dict) else ():
        if name in properties or any(matches(pattern, name) is not False for pattern in patterns):
            continue
        if additional is False:
            yield _error("a name that is not declared")
        elif isinstance(additional, dict):
            yield from validator.descend(member, additional, path=name)


def _unique_items(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if unique and isinstance(instance, list) and len({canonical_value(member) for member in instance}) < len(instance):
        yield _error("the items are not unique")


def canonical_value(value: Any) -> Any:
    """Return a hashable value that is equal for equal JSON values: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return frozenset((key, canonical_value(member)) for key, member in value.items())
    if isinstance(value, list):
        return tuple(map(canonical_value, value))
    return (isinstance(value, bool), value)
