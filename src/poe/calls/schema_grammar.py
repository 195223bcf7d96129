"""Write the values that a JSON Schema allows as rules of a grammar in the Lark notation of llguidance.

The rules write values as the call forms do: names in the order of the schema, `, ` and `: ` between them, and no other
white space. They allow no more than the schema, except for the keywords in `Rules.unconstrained`. They allow less where
more would serve no one: an object that lists properties has no others, numbers without limits are at most 10^18, and
values nest at most `MAX_DEPTH` levels deep. The checks of `poe.calls.validation` cover the rest.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword
from typing import Any

from llguidance import LLMatcher

from poe.calls.forms.base import as_json
from poe.calls.resolution import ANYTHING, Flat, Resolver, UnresolvableError, kinds_of
from poe.calls.validation import fits_schema
from poe.errors import RowError

MAX_DEPTH = 16
"""The most objects and arrays inside each other."""

_ANY_DEPTH = 4  # of a value without a schema
_LARGEST = 10**18  # of a number without limits
_KINDS = ("string", "integer", "number", "boolean", "null", "array", "object")
# Keywords that show the type of a schema that names none.
_HINTS = {
    "object": ("properties", "required", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_UNCONSTRAINED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "dependentRequired"),
    *("dependentSchemas", "propertyNames", "unevaluatedItems"),
)
_STRING_KEYWORDS = ("minLength", "maxLength", "pattern", "format")
_NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Escapes that mean the same in JSON and in Python. Without \u there is no lone surrogate.
_ENGINE_OPTIONS = {"whitespace_flexible": False, "json_allowed_escapes": 'nrbtf\\"'}


@dataclass(frozen=True)
class Notation:
    """How a call form writes values: `write` gives the text of a value, `strings` are the ways to write a string.

    Such a way is the quote and the pattern of a character. `has_json_strings`: a JSON string is a string of this
    notation as well.
    """

    write: Callable[[Any], str]
    strings: tuple[tuple[str, str], ...]
    has_json_strings: bool = True


JSON = Notation(as_json, (('"', r'([^"\\\x00-\x1f]|\\["\\bfnrt])'),))
PYTHON = Notation(repr, (("'", r"([^'\\\x00-\x1f]|\\['\\nrt])"), ('"', r'([^"\\\x00-\x1f]|\\["\\nrt])')))
ESCAPED_JSON = Notation(
    lambda value: as_json(as_json(value))[1:-1],
    ((r'\\"', r'([^"\\\x00-\x1f]|\\\\\\"|\\\\\\\\|\\\\[bfnrt])'),),
    has_json_strings=False,
)
"""JSON text inside a JSON string."""


@dataclass(frozen=True)
class Rule:
    """The name of a rule, an example with every optional part once, and about the shortest one."""

    name: str
    longest: str
    shortest: str


class Rules:
    """The rules of one grammar. `unconstrained` holds the keywords that they do not enforce."""

    def __init__(self, notation: Notation, prefix: str = "r") -> None:
        self._prefix = prefix
        self.unconstrained: dict[str, None] = {}
        self._notation = notation
        self._lines: dict[str, str] = {}  # the body of each rule -> its name
        self._known: dict[tuple[int, int], tuple[Any, Rule | None]] = {}
        self._resolver = Resolver({})

    def __str__(self) -> str:
        return "\n".join(f"{name}: {body}" for body, name in self._lines.items())

    def add(self, body: str, longest: str, shortest: str | None = None) -> Rule:
        """Add a rule, or return the one with the same body. There is one example if `shortest` is left out."""
        name = self._lines.setdefault(body, f"{self._prefix}{len(self._lines)}")
        return Rule(name, longest, longest if shortest is None else shortest)

    def add_document(self, schema: Any, resolver: Resolver, keywords: bool = False) -> Rule | None:
        """Add the rule for the values of a whole schema, None if no value fits.

        `keywords`: the values are objects, written as the keyword arguments of a call in Python, without brackets.
        """
        self._resolver = resolver
        return self._add_value(schema, MAX_DEPTH, True, keywords)

    def _add_value(self, schema: Any, depth: int, top: bool = False, keywords: bool = False) -> Rule | None:
        key = (id(schema), depth)
        if top or key not in self._known:
            try:
                flats = self._resolver.resolve(schema)
            except UnresolvableError as error:
                raise RowError(f"schema that {error}") from None
            rules = [self._add_flat(flat, depth, top, keywords) for flat in flats]
            if top:
                return self._join(rules)
            self._known[key] = schema, self._join(rules)  # the schema is kept, so that its id is not used again
        return self._known[key][1]

    def _join(self, rules: Iterable[Rule | None]) -> Rule | None:
        """Return the rule that is one of `rules`, None if there are none."""
        found = list(dict.fromkeys(rule for rule in rules if rule is not None))
        if len(found) < 2:
            return found[0] if found else None
        longest, shortest = (
            max((rule.longest for rule in found), key=len),
            min((rule.shortest for rule in found), key=len),
        )
        return self.add(" | ".join(rule.name for rule in found), longest, shortest)

    def _add_flat(self, flat: Flat, depth: int, top: bool, keywords: bool) -> Rule | None:
        self.unconstrained |= dict.fromkeys(key for key in _UNCONSTRAINED if key in flat)
        if "const" in flat or "enum" in flat:
            members = [flat["const"]] if "const" in flat else flat["enum"]
            return self._join(self._add_text(m) for m in members if _fits(flat, m, self._resolver))
        kinds = kinds_of(flat)
        if not kinds and flat == ANYTHING:
            kinds, depth = [*_KINDS], min(depth, _ANY_DEPTH)
        elif not kinds:
            kinds = [kind for kind, keys in _HINTS.items() if any(key in flat for key in keys)] or [*_KINDS]
            depth = depth if len(kinds) < len(_KINDS) else min(depth, _ANY_DEPTH)
        if "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        return self._join(self._add_kind(kind, flat, depth, top, keywords) for kind in kinds)

    def _add_kind(self, kind: str, flat: Flat, depth: int, top: bool, keywords: bool) -> Rule | None:
        match kind:
            case "string":
                return self._add_string(flat)
            case "integer" | "number":
                return self._add_number(kind, flat)
            case "boolean":
                return self._join(map(self._add_text, (True, False)))
            case "null":
                return self._add_text(None)
            case "array":
                return self._add_array(flat, depth)
        return self._add_object(flat, depth, top, keywords)

    def _add_text(self, value: Any) -> Rule:
        text = self._notation.write(value)
        return self.add(quote(text), text)

    def _add_string(self, flat: Flat) -> Rule:
        limits = {key: flat[key] for key in _STRING_KEYWORDS if key in flat}
        low, high = flat.get("minLength", 0), flat.get("maxLength", "")
        example = self._notation.write("x" * min(low, 1000))
        while ("pattern" in limits or "format" in limits) and not (
            self._notation.has_json_strings and _check_rule(_engine_rule("string", limits))
        ):
            if "format" in limits:
                del limits["format"]  # one that is unknown is a remark, not a limit
            else:
                self.unconstrained["pattern"] = None
                del limits["pattern"]
        if "pattern" in limits or "format" in limits:
            return self.add(_engine_rule("string", limits), example + "x" * 16, example)
        count = f"{{{low},{high}}}" if low or high != "" else "*"
        ways = (f"{mark}{character}{count}{mark}" for mark, character in self._notation.strings)
        return self.add(f"/{'|'.join(ways)}/", example)

    def _add_number(self, kind: str, flat: Flat) -> Rule:
        limits = {key: flat[key] for key in _NUMBER_KEYWORDS if key in flat}
        bounds = {"minimum": -_LARGEST, "maximum": _LARGEST}
        bounds = {key: bound for key, bound in bounds.items() if f"exclusive{key.title()}" not in limits}
        while limits and not _check_rule(_engine_rule(kind, {**bounds, **limits})):
            dropped = "multipleOf" if "multipleOf" in limits else next(iter(limits))
            self.unconstrained[dropped] = None
            del limits[dropped]
        bounds = {key: bound for key, bound in bounds.items() if f"exclusive{key.title()}" not in limits}
        return self.add(_engine_rule(kind, {**bounds, **limits}), "-1234.5", "1")

    def _add_array(self, flat: Flat, depth: int) -> Rule | None:
        low, high = flat.get("minItems", 0), flat.get("maxItems")
        first = [self._add_value(schema, depth - 1) for schema in flat.get("prefixItems") or ()] if depth else []
        rest = self._add_value(flat.get("items", True), depth - 1) if depth and high != len(first) else None
        if None in first:
            first, rest = first[: first.index(None)], None
        most = len(first) if rest is None else high
        if most is not None and (most := most if high is None else min(most, high)) < low:
            return None
        # From the last item to the first: what may follow `index` items.
        tail = self._repeat(rest, max(0, low - len(first)), None if most is None else most - len(first), bool(first))
        examples = [item.longest for item in first if item is not None] + ([] if rest is None else [rest.longest])
        needed = [item.shortest for item in (*first, *[rest] * max(0, low - len(first)))[:low] if item is not None]
        for index, item in reversed(list(enumerate(first if most is None else first[:most]))):
            separator = '", " ' if index else ""
            body = f"{separator}{item.name}{' ' + tail if tail else ''}"  # type: ignore[union-attr]
            tail = body if index < low else f"({body})?"
        return self.add(f'"[" {tail} "]"', f"[{', '.join(examples)}]", f"[{', '.join(needed)}]")

    def _repeat(self, item: Rule | None, low: int, high: int | None, follows: bool) -> str:
        """Return `low` to `high` items with separators. `follows`: there are items before them."""
        if item is None or high == 0:
            return ""
        if follows:
            return f'(", " {item.name}){{{low},{"" if high is None else high}}}'
        more = f'(", " {item.name}){{{max(0, low - 1)},{"" if high is None else high - 1}}}'
        return f"{item.name} {more}" if low else f"({item.name} {more})?"

    def _add_object(self, flat: Flat, depth: int, top: bool, keywords: bool = False) -> Rule | None:
        if not depth:
            return None
        properties, required = flat.get("properties") or {}, list(flat.get("required") or ())
        opening = flat.get("additionalProperties", flat.get("unevaluatedProperties", not (top or properties)))
        members = []
        for name, schema in {**properties, **{n: opening for n in required if n not in properties}}.items():
            member = self._add_value(schema, depth - 1)
            if member is None or (keywords and not _is_keyword(name)):
                if name in required:
                    return None
                continue
            key = f"{name}=" if keywords else f"{self._notation.write(name)}: "
            pair = self.add(f"{quote(key)} {member.name}", key + member.longest, key + member.shortest)
            members.append((pair, name in required))
        body = self._list_members(members)
        longest = ", ".join(rule.longest for rule, _ in members)
        shortest = ", ".join(rule.shortest for rule, is_required in members if is_required)
        if not properties and not members:
            body, longest = self._add_map(flat, opening, depth)
        elif "minProperties" in flat or "maxProperties" in flat:
            self.unconstrained |= dict.fromkeys(key for key in ("minProperties", "maxProperties") if key in flat)
        if keywords:
            return self.add(body or '""', longest, shortest)
        return self.add(f'"{{" {body} "}}"', f"{{{longest}}}", f"{{{shortest}}}")

    def _list_members(self, members: Sequence[tuple[Rule, bool]]) -> str:
        """Return the members of an object in order, each optional or required, with separators between them."""
        first = later = ""  # what may come from here on: before and after the first member that is written
        for rule, is_required in reversed(members):
            after = f" {later}" if later else ""
            written = self.add(f'", " {rule.name}{after}', "")
            starting = f"{rule.name}{after}"
            if is_required:
                first, later = starting, written.name
            else:
                first = f"({starting} | {first})" if first else f"({starting})?"
                later = self.add(f"{written.name} | {later}", "").name if later else f"{written.name}?"
            if len(first) > 100:
                first = self.add(first, "").name
        return first

    def _add_map(self, flat: Flat, opening: Any, depth: int) -> tuple[str, str]:
        """Return the members of an object that lists no properties."""
        patterns: dict[str, Any] = flat.get("patternProperties") or {}
        keys = [({"pattern": pattern}, schema) for pattern, schema in patterns.items()]
        if opening is not False and not (patterns and "additionalProperties" not in flat):
            keys.append(({}, opening))
        members = [(self._add_string(key), self._add_value(schema, depth - 1)) for key, schema in keys]
        pairs = [self.add(f'{k.name} ": " {v.name}', f"{k.longest}: {v.longest}") for k, v in members if k and v]
        pair = self._join(pairs)
        if pair is not None:
            self.unconstrained["unique names"] = None
        low, high = flat.get("minProperties", 0), flat.get("maxProperties")
        return self._repeat(pair, low, high, False), "" if pair is None else pair.longest


def quote(text: str) -> str:
    """Return a text as a literal of the grammar."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_keyword(name: str) -> bool:
    return name.isidentifier() and not iskeyword(name)


def _fits(flat: Flat, member: Any, resolver: Resolver) -> bool:
    """Return whether a member of an enum fits the other keywords of its schema."""
    others = {key: value for key, value in flat.items() if key not in ("enum", "$defs", "definitions")}
    try:
        return fits_schema(others, member)
    except Exception:  # a reference into the document: the check of the call decides
        return True


@lru_cache(maxsize=1024)
def _check_rule(body: str) -> bool:
    """Return whether the engine can enforce a rule, and a value fits it."""
    return not LLMatcher.validate_grammar(f"start: {body}")


def _engine_rule(kind: str, limits: dict[str, Any]) -> str:
    return "%json " + json.dumps({"x-guidance": _ENGINE_OPTIONS, "type": kind, **limits})
