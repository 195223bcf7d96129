"""Resolve a schema once: follow its references, merge its parts, and list the alternatives of its unions.

Coercion, ordering and checks then see flat schemas, without `$ref`, `allOf`, `anyOf` and `oneOf`. Only one level is
resolved at a time, along a value, so a schema that contains itself ends where the value ends.
"""

from functools import reduce
from itertools import product
from typing import Any
from urllib.parse import unquote

MAX_ALTERNATIVES = 256
"""The maximum number of alternatives of one schema. A schema with more of them allows any value here."""

MAX_REFERENCES = 100
"""The maximum number of references and parts inside each other at one level of a schema."""

Flat = dict[str, Any]
"""A schema without references, parts and unions at its top level."""

ANYTHING: Flat = {"additionalProperties": True}

_REFERENCES = ("$ref", "$dynamicRef")
_UNIONS = ("anyOf", "oneOf")
COMBINING = (*_REFERENCES, "allOf", *_UNIONS)
_SCHEMA_MAPS = ("properties", "patternProperties", "dependentSchemas")
_SCHEMAS = ("items", "additionalProperties", "contains", "propertyNames", "unevaluatedProperties")


class UnresolvableError(ValueError):
    """A reference leads to another document, to no schema, or back to itself."""


class Resolver:
    """Resolves the schemas inside the document `root`, which must not change."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._resolved: dict[int, tuple[Any, list[Flat]]] = {}

    def resolve(self, schema: Any) -> list[Flat]:
        """Return the flat schemas of which a value must fit one. No value fits an empty list.

        Raises `UnresolvableError`.
        """
        return self._resolve(schema, ())

    def _resolve(self, schema: Any, path: tuple[int, ...]) -> list[Flat]:
        if not isinstance(schema, dict):
            return [] if schema is False else [ANYTHING]
        if not any(key in schema for key in COMBINING):
            return [schema]
        if id(schema) not in self._resolved:
            if id(schema) in path or len(path) == MAX_REFERENCES:
                raise UnresolvableError("refers back to itself")
            self._resolved[id(schema)] = schema, self._list_alternatives(schema, (*path, id(schema)))
        return self._resolved[id(schema)][1]

    def _list_alternatives(self, schema: dict[str, Any], path: tuple[int, ...]) -> list[Flat]:
        parts: list[list[Flat]] = [[{key: value for key, value in schema.items() if key not in COMBINING}]]
        parts += [self._resolve(self.follow(schema[key]), path) for key in _REFERENCES if key in schema]
        parts += [self._resolve(part, path) for part in _as_list(schema.get("allOf"))]
        for key in _UNIONS:
            if branches := _as_list(schema.get(key)):
                parts.append([flat for branch in branches for flat in self._resolve(branch, path)])
        count = 1
        for part in parts:
            count *= len(part)
            if count > MAX_ALTERNATIVES:
                return [ANYTHING]
        merged = (reduce(_merge, combination) for combination in product(*parts))
        return [flat for flat in merged if flat.get("type") != []]

    def follow(self, reference: Any) -> Any:
        """Return the schema that a reference names: `#`, a JSON pointer or an anchor. Raises `UnresolvableError`."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise UnresolvableError("refers to another document")
        name = unquote(reference[1:])
        target = self._root if not name or name.startswith("/") else self._find_anchor(name)
        for key in name.split("/")[1:] if name.startswith("/") else ():
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isascii() and key.isdigit():
                target = dict(enumerate(target)).get(int(key[:9]))
            else:
                target = target.get(key) if isinstance(target, dict) else None
        if not isinstance(target, dict | bool):
            raise UnresolvableError("refers to a schema that does not exist")
        return target

    def _find_anchor(self, name: str) -> Any:
        stack = [self._root]
        while stack:
            item = stack.pop()
            if isinstance(item, dict):
                if name in (item.get("$anchor"), item.get("$dynamicAnchor")):
                    return item
                stack.extend(item.values())
            elif isinstance(item, list):
                stack.extend(item)
        return None


def kinds_of(schema: Flat) -> list[str]:
    """Return the types that a flat schema names; an empty list if it names none."""
    kind = schema.get("type")
    return [kind] if isinstance(kind, str) else [k for k in _as_list(kind) if isinstance(k, str)]


def _merge(first: Flat, second: Flat) -> Flat:
    """Return the schema of the values that fit both. The type `[]` means that no value does."""
    merged = dict(first)
    for key, value in second.items():
        old: Any = merged.get(key, value)
        if old == value:
            merged[key] = value
        elif key == "type":
            merged[key] = _common_kinds(kinds_of(first), kinds_of(second))
        elif key in _SCHEMA_MAPS:
            both = {name: {"allOf": [old[name], part]} if name in old else part for name, part in value.items()}
            merged[key] = {**old, **both}
        elif key == "required":
            merged[key] = list(dict.fromkeys([*old, *value]))
        elif key == "enum":
            merged[key] = [member for member in old if member in value]
        elif key in _SCHEMAS:
            merged[key] = {"allOf": [old, value]}
        elif key in ("$defs", "definitions"):
            merged[key] = {**value, **old}
    return merged


def _common_kinds(first: list[str], second: list[str]) -> list[str]:
    common = [kind for kind in first if kind in second or (kind == "integer" and "number" in second)]
    return common + [kind for kind in second if kind == "integer" and "number" in first and kind not in common]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
