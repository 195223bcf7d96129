"""Compare calls with acceptable answers, by the rules of BFCL's checker for Python.

An acceptable call is `{<tool>: {<argument>: [<acceptable value>, ...]}}`; the value `""` means that the argument may be
left out. The rules are BFCL's, its peculiarities included, so that scores can be compared:

- text is compared without case, spaces and the characters `,./-_*^`, and with one kind of quotes
- an integer counts as a number; any other value needs the type that the tool declares, or that of the acceptable values
- members of a list need the declared type of its items; the members of an object have acceptable values of their own
- calls match in any order: each acceptable call takes the first call that is left and fits
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from poe.calls.arguments import find_tool
from poe.calls.conversation import Call, Tool

AcceptableCall = Mapping[str, Mapping[str, Sequence[Any]]]

_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
_IGNORED = re.compile(r"[ ,./\-_*^]")


def match_acceptable(calls: Sequence[Call], acceptable: Sequence[AcceptableCall], tools: Sequence[Tool]) -> bool:
    """Return whether the calls are the acceptable ones, in any order."""
    if len(calls) != len(acceptable):
        return False
    left = list(calls)
    for answer in acceptable:
        match = next((i for i, call in enumerate(left) if _fits(call, answer, tools)), None)
        if match is None:
            return False
        del left[match]
    return True


def first_call(answer: AcceptableCall) -> Call:
    """Return the call with the first acceptable value of each argument; one that may only be left out is left out."""
    ((name, values),) = answer.items()
    given = {argument: options for argument, options in values.items() if any(option != "" for option in options)}
    return Call(name, {argument: _first_value(options) for argument, options in given.items()})


def _first_value(options: Sequence[Any]) -> Any:
    return _first_members(next(option for option in options if option != ""))


def _first_members(value: Any) -> Any:
    """Return a value with the first of the acceptable members of each object."""
    if isinstance(value, dict):
        members = {k: next((o for o in options if o != ""), "") for k, options in value.items()}
        return {k: v for k, v in members.items() if v != "" or value[k][0] == ""}
    return [_first_members(v) for v in value] if isinstance(value, list) else value


def _fits(call: Call, answer: AcceptableCall, tools: Sequence[Tool]) -> bool:
    ((name, values),) = answer.items()
    tool = find_tool(tools, name)
    if call.name != name or tool is None or not isinstance(call.arguments, dict):
        return False
    schema = tool["parameters"]
    properties = schema.get("properties", {})
    if any(required not in call.arguments for required in schema.get("required", ())):
        return False
    for argument, value in call.arguments.items():
        if argument not in properties or argument not in values:
            return False
        if not _is_acceptable(value, values[argument], properties[argument]):
            return False
    return all(argument in call.arguments or "" in options for argument, options in values.items())


def _is_acceptable(value: Any, options: Sequence[Any], schema: Any) -> bool:
    kind = schema.get("type") if isinstance(schema, dict) else None
    declared: Any = (
        _TYPES.get(kind, str) if isinstance(kind, str) else str
    )  # BFCL expects text where any type is declared
    if declared is float and type(value) is int:
        value = float(value)
    items = schema.get("items") if declared is list else None
    item: Any = _TYPES.get(items.get("type", ""), str) if isinstance(items, dict) else None
    named = _type_of(options)
    if type(value) is declared and item is not None:
        if not any(not isinstance(o, list) or all(_has_type(v, o, item) for v in value) for o in options):
            return False
    elif not _has_type(value, options, declared):
        return False
    is_variable = named is not None and named is not declared
    if is_variable or type(value) is not declared:
        return value in options
    if declared is dict:
        return any(option != "" and _fits_object(value, option) for option in options)
    if item is dict:
        return any(_fits_objects(value, option) for option in options)
    if declared is str:
        return _plain(value) in [_plain(option) for option in options if isinstance(option, str)]
    if declared is list:
        return list(map(_plain, value)) in [list(map(_plain, option)) for option in options]
    return value in options


def _type_of(options: Sequence[Any]) -> Any:
    return next((type(option) for option in options if option != ""), None)


def _has_type(value: Any, options: Sequence[Any], declared: Any) -> bool:
    return type(value) is declared or type(value) is _type_of(options)


def _plain(value: Any) -> Any:
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _fits_object(value: Mapping[str, Any], option: Mapping[str, Sequence[Any]]) -> bool:
    for key, member in value.items():
        if key not in option or _plain(member) not in list(map(_plain, option[key])):
            return False
    return all(key in value or "" in options for key, options in option.items())


def _fits_objects(value: Sequence[Any], option: Sequence[Any]) -> bool:
    return len(value) == len(option) and all(_fits_object(v, o) for v, o in zip(value, option, strict=True))
