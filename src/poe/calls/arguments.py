"""Fit the arguments of calls to the schemas of their tools: convert values exactly, order names, and check the result.

All of it walks along the value and sees resolved schemas (`poe.calls.resolution`): a value behind a reference or in a
union is treated as one whose schema is written in its place. Every conversion is passed to `note` by name, so that a
report can count it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

from poe.calls.conversation import Call, Message, Tool
from poe.calls.faults import Fault, FaultKind
from poe.calls.resolution import ANYTHING, Flat, Resolver, UnresolvableError, kinds_of
from poe.calls.schema import Note, no_note
from poe.calls.validation import TooComplexError, count_steps, fits_schema, list_errors, matches, start_counting
from poe.calls.values import check_value, convert_exactly, fits_type, join_place, show_value
from poe.errors import RowError

OTHER_TYPE = "argument of another type than declared"
UNDECLARED = "argument that the tool does not declare"
CANNOT_APPLY = "tool schema cannot be applied"
MAX_FAULTS = 20
"""The maximum number of faults of one call."""
TOO_COMPLEX = "tool schema that takes too long to check"


def find_tool(tools: Sequence[Tool], name: str) -> dict[str, Any] | None:
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


def check_call(tools: Sequence[Tool], name: str, arguments: Any) -> str | None:
    """Return why a call does not fit the offered tools, or None. Arguments are not converted."""
    tool = find_tool(tools, name)
    if tool is None:
        return "call to a tool that is not offered"
    if not isinstance(arguments, dict):
        return "arguments are not an object"
    try:
        start_counting()
        if reason := _Fitting(tool["parameters"]).find_mismatch(tool["parameters"], arguments, top=True):
            return reason
        return None if fits_schema(tool["parameters"], arguments) else "arguments do not fit the tool's schema"
    except TooComplexError:
        return TOO_COMPLEX
    except Exception:  # a reference that leads nowhere or back to itself
        return CANNOT_APPLY


def find_faults(call: Call, tools: Sequence[Tool]) -> list[Fault]:
    """Return everything that is wrong with a call, each with its place. Empty: `check_call` accepts it."""
    reason = check_call(tools, call.name, call.arguments)
    tool, name = find_tool(tools, call.name), call.name[:80]
    if reason is None:
        return []
    if tool is None:
        names = ", ".join(tool["function"]["name"][:80] for tool in tools[:20])
        return [Fault(FaultKind.UNKNOWN_TOOL, f"{reason} (offered: {names})" if names else reason, name)]
    if not isinstance(call.arguments, dict):
        kind = FaultKind.QUOTED_ARGUMENTS if isinstance(call.arguments, str) else FaultKind.INVALID_ARGUMENTS
        return [Fault(kind, _expected(["object"], call.arguments), f"{name}: arguments")]
    schema = tool["parameters"]
    found: dict[str, str] = {}
    if reason not in (TOO_COMPLEX, CANNOT_APPLY):
        start_counting()
        with contextlib.suppress(TooComplexError):
            found |= _Fitting(schema).list_mismatches(schema, call.arguments, "arguments", top=True)
        with contextlib.suppress(Exception):  # as in `check_call`
            for path, message in list_errors(schema, call.arguments):
                place = reduce(join_place, path, "arguments")
                if not any(other == place or other.startswith((f"{place}.", f"{place}[")) for other in found):
                    found[place] = message[:MAX_REASON]
    places = list(found.items()) or [("arguments", reason)]
    return [Fault(FaultKind.INVALID_ARGUMENTS, text, f"{name}: {place}") for place, text in places[:MAX_FAULTS]]


def fit_call(tools: Sequence[Tool], name: str, arguments: Any, note: Note = no_note) -> dict[str, Any]:
    """Return the arguments after `fit_value`. Raises `RowError` if the call does not fit its tool."""
    tool = find_tool(tools, name)
    if tool is None:
        raise RowError("call to a tool that is not offered")
    if not isinstance(arguments, dict):
        raise RowError("arguments are not an object")
    if problem := check_value(arguments):
        raise RowError(problem)
    fitted: dict[str, Any] = fit_value(tool["parameters"], arguments, note, top=True)
    if reason := check_call(tools, name, fitted):
        raise RowError(reason)
    return fitted


def fit_value(schema: Any, value: Any, note: Note = no_note, *, top: bool = False) -> Any:
    """Return a value with the types and the order of names that its schema declares, where that loses nothing.

    A string that spells an integer, number or boolean exactly becomes that value. `5.0` becomes an integer where one is
    declared. An integer becomes its digits where a string is declared. A null is left out if it is optional and not
    nullable, or not declared. In a union, the first schema that the value fits decides, and if it fits none, the first
    that it fits after conversion. Names come in the order of the schema, because constrained decoding emits them so;
    names that the schema does not list come last. Any other value is returned unchanged.

    `top`: the schema is that of all arguments of a call. Raises `RowError` for a schema that takes too long.
    """
    start_counting()
    try:
        return _Fitting(schema).fit(schema, value, note, top)
    except TooComplexError:
        raise RowError(TOO_COMPLEX) from None


def list_changes(before: Any, after: Any, place: str = "arguments") -> Iterator[str]:
    """Yield a sentence for each place where two JSON values differ. The order of names is no difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, member in before.items():
            here = join_place(place, name)
            if name in after:
                yield from list_changes(member, after[name], here)
            else:
                yield f"{here}: {show_value(member)} left out"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from list_changes(old, new, join_place(place, i))
    elif type(before) is not type(after) or before != after:
        yield f"{place}: {show_value(before)} became {show_value(after)}"


def restore_nulls(schema: Any, value: Any) -> Any:
    """Return a value with null for each required and nullable member that is absent.

    A columnar file stores an absent member as null. If all nulls were removed, those of required members were real.
    """
    start_counting()
    try:
        return _Fitting(schema).restore_nulls(schema, value)
    except TooComplexError:
        raise RowError(TOO_COMPLEX) from None


class _Object:
    """A flat schema, seen as that of an object or an array. `names`: more names that it may have."""

    def __init__(self, flat: Flat, names: dict[str, Any] | None = None) -> None:
        self.flat = flat
        self.required = flat.get("required", ())
        self.declared: dict[str, Any] = {**flat.get("properties", {})}
        conditional = [flat.get("then"), flat.get("else"), *(flat.get("dependentSchemas") or {}).values()]
        for part in conditional:
            for name in part.get("properties", {}) if isinstance(part, dict) else ():
                self.declared.setdefault(name, True)
        for name, sub in (names or {}).items():
            self.declared.setdefault(name, sub)

    def member(self, name: str) -> Any:
        """Return the schema of the member `name` of an object."""
        if name in self.declared:
            return self.declared[name]
        for pattern, schema in (self.flat.get("patternProperties") or {}).items():
            if matches(pattern, name):
                return schema
        return self.flat.get("additionalProperties", True)

    def item(self, index: int) -> Any:
        """Return the schema of the member `index` of an array."""
        first = self.flat.get("prefixItems") or []
        return first[index] if index < len(first) else self.flat.get("items", True)

    def undeclared(self, value: dict[str, Any], top: bool) -> list[str]:
        """Return the names that an object may not have.

        JSON Schema allows other names by default. The parameters of a tool (`top`), and objects that list
        properties, are meant as complete.
        """
        opening = [self.flat.get(key, False) for key in ("additionalProperties", "unevaluatedProperties")]
        if opening != [False, False] or not (top or self.declared):
            return []
        patterns = self.flat.get("patternProperties")
        if patterns and "additionalProperties" not in self.flat:
            return []
        names = [name for name in value if name not in self.declared]
        return [name for name in names if not any(matches(pattern, name) is not False for pattern in patterns or ())]


class _Fitting:
    """Walks along a value with the schemas of one document."""

    def __init__(self, root: Any) -> None:
        self._resolver = Resolver(root)

    def _list_alternatives(self, schema: Any) -> list[_Object]:
        """Return the flat schemas of which a value must fit one, the best first.

        JSON Schema allows an object to fit several members of a union at once, with the names of all of them.
        """
        try:
            alternatives = self._resolver.resolve(schema)
        except UnresolvableError:  # `fits_schema` reports it
            return [_Object(ANYTHING)]
        if len(alternatives) == 1:
            return [_Object(alternatives[0])]
        names = {name: sub for flat in alternatives for name, sub in (flat.get("properties") or {}).items()}
        exact = [_Object(flat) for flat in alternatives]
        return [*exact, *(_Object(one.flat, names) for one in exact if one.declared and len(names) > len(one.declared))]

    def fit(self, schema: Any, value: Any, note: Note, top: bool = False) -> Any:
        alternatives = self._list_alternatives(schema)
        if len(alternatives) == 1:
            return self._fit(alternatives[0], value, note, top)
        for one in alternatives:
            if self._find_mismatch(one, value, top) is None:
                return self._fit(one, value, note, top)
        for one in alternatives:
            notes: list[str] = []
            fitted = self._fit(one, value, notes.append, top)
            if self._find_mismatch(one, fitted, top) is None:
                for rule in notes:
                    note(rule)
                return fitted
        return value

    def _fit(self, one: _Object, value: Any, note: Note, top: bool) -> Any:
        count_steps()
        if isinstance(value, list):
            return [self.fit(one.item(i), member, note) for i, member in enumerate(value)]
        if not isinstance(value, dict):
            return _fit_scalar(one.flat, value, note)
        fitted = {}
        undeclared = one.undeclared(value, top)
        names = [name for name in one.declared if name in value]
        for name in [*names, *(name for name in value if name not in one.declared)]:
            sub, member = one.member(name), value[name]
            if member is None and name not in one.required:
                if name in undeclared:
                    note("null for an argument that is not declared left out")
                    continue
                if name in one.declared and self.find_mismatch(sub, None) is not None:
                    note("null for an optional argument left out")
                    continue
            fitted[name] = self.fit(sub, member, note)
        return fitted

    def find_mismatch(self, schema: Any, value: Any, top: bool = False) -> str | None:
        """Return why type, enum, required or declared names do not fit, or None. `fits_schema` checks the rest."""
        reasons = []
        for one in self._list_alternatives(schema):
            reason = self._find_mismatch(one, value, top)
            if reason is None:
                return None
            reasons.append(reason)
        # The reason of an alternative of the right type helps more.
        return next((reason for reason in reasons if reason != OTHER_TYPE), OTHER_TYPE)

    def _find_mismatch(self, one: _Object, value: Any, top: bool) -> str | None:
        kinds, choices = kinds_of(one.flat), one.flat.get("enum")
        count_steps(1 + (len(choices) if isinstance(choices, list) else 0))
        if kinds and not any(fits_type(kind, value) for kind in kinds):
            return OTHER_TYPE
        if (isinstance(choices, list) and value not in choices) or value != one.flat.get("const", value):
            return "argument outside its enum"
        if isinstance(value, dict):
            if any(name not in value for name in one.required):
                return "required argument missing"
            if one.undeclared(value, top):
                return UNDECLARED
            members = ((one.member(name), member) for name, member in value.items())
        elif isinstance(value, list):
            members = ((one.item(i), member) for i, member in enumerate(value))
        else:
            return None
        return next(filter(None, (self.find_mismatch(sub, member) for sub, member in members)), None)

    def list_mismatches(self, schema: Any, value: Any, place: str, top: bool = False) -> Iterator[tuple[str, str]]:
        """Yield the place and the reason of each mismatch that `find_mismatch` looks for.

        In a union that no member fits, the mismatches are those of the member with the fewest, of the right type.
        """
        alternatives = self._list_alternatives(schema)
        if len(alternatives) == 1:
            yield from self._list_mismatches(alternatives[0], value, place, top)
        elif all(self._find_mismatch(one, value, top) for one in alternatives):
            found = [list(self._list_mismatches(one, value, place, top)) for one in alternatives]
            deeper = [mismatches for mismatches in found if mismatches[0][0] != place]
            kinds = dict.fromkeys(kind for one in alternatives for kind in kinds_of(one.flat))
            here = [(place, _expected(kinds, value))] if kinds else found[0] if found else [(place, "no value fits")]
            yield from min(deeper, key=len) if deeper else here

    def _list_mismatches(self, one: _Object, value: Any, place: str, top: bool) -> Iterator[tuple[str, str]]:
        kinds, choices = kinds_of(one.flat), one.flat.get("enum")
        count_steps(1 + (len(choices) if isinstance(choices, list) else 0))
        if kinds and not any(fits_type(kind, value) for kind in kinds):
            yield place, _expected(kinds, value)
        elif isinstance(choices, list) and value not in choices:
            yield (
                place,
                f"expected one of {', '.join(map(show_value, choices))}, found {show_value(value)}"[:MAX_REASON],
            )
        elif value != one.flat.get("const", value):
            yield place, f"expected {show_value(one.flat['const'])}, found {show_value(value)}"
        elif isinstance(value, dict):
            yield from (
                (join_place(place, name), "required argument missing") for name in one.required if name not in value
            )
            undeclared = one.undeclared(value, top)
            yield from ((join_place(place, name), UNDECLARED) for name in undeclared)
            for name, member in value.items():
                if name not in undeclared:
                    yield from self.list_mismatches(one.member(name), member, join_place(place, name))
        elif isinstance(value, list):
            for i, member in enumerate(value):
                yield from self.list_mismatches(one.item(i), member, join_place(place, i))

    def restore_nulls(self, schema: Any, value: Any) -> Any:
        for one in self._list_alternatives(schema) if isinstance(value, dict | list) else ():
            count_steps()
            if isinstance(value, list):
                restored: Any = [self.restore_nulls(one.item(i), member) for i, member in enumerate(value)]
            else:
                restored = {name: self.restore_nulls(one.member(name), member) for name, member in value.items()}
                absent = [name for name in one.required if name not in value]
                restored |= {name: None for name in absent if self.find_mismatch(one.member(name), None) is None}
            if self._find_mismatch(one, restored, top=False) is None:
                return restored
        return value


MAX_REASON = 200


def _expected(kinds: Iterable[str], value: Any) -> str:
    return f"expected {' or '.join(kinds)}, found {show_value(value)}"


def _fit_scalar(flat: Flat, value: Any, note: Note) -> Any:
    kinds = kinds_of(flat)
    if not kinds or any(fits_type(kind, value) for kind in kinds):
        if isinstance(value, float) and "integer" in kinds and "number" not in kinds:
            note("whole number written as an integer")
            return int(value)
        return value
    for kind in kinds:
        converted = convert_exactly(kind, value)
        if converted is not None:
            note(f"{type(value).__name__} coerced to {kind}")
            return converted
    return value
