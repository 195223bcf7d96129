"""Rename tools and parameters in a conversation, everywhere that their names occur.

* Renamed: tools, properties at every depth, `required`, the arguments of calls, the `name` of results, and the keys of
  objects in `default`, `enum`, `const` and `examples`.
* A name that can only be an identifier (`get_weather`, `maxPrice`, `maps.search`) is also replaced as a whole word in
  every text of the row: descriptions, messages, results and values. So a user who names a tool still names one that
  exists, and a value copied from a text still occurs in it.
* A name that may be an ordinary word (`city`) stays in texts: "the city to use" is English, not a mention. The keys of
  free-form objects and the texts of an `enum` are data and stay, except for identifiers.
"""

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from poe.calls.arguments import map_arguments
from poe.calls.conversation import Conversation, Message, Tool

NameMap = dict[str, str]  # old name -> new name

_COMBINED_LISTS = ("anyOf", "oneOf", "allOf")
_COMBINED = ("not", "if", "then", "else")  # schemas of the same value
_MEMBERS = ("items", "additionalProperties", "contains")  # schemas of the value's members
_VALUES = ("default", "const")
_VALUE_LISTS = ("enum", "examples")
_UNSUPPORTED = frozenset(
    "$ref $dynamicRef $defs definitions patternProperties propertyNames unevaluatedProperties dependentRequired "
    "dependentSchemas dependencies".split()
)
_IDENTIFIER = re.compile(r".*\w_\w|[a-z]+[A-Z]|.*\w\.\w", re.DOTALL)


def is_identifier(name: str) -> bool:
    """Return whether a name cannot be mistaken for an ordinary word."""
    return " " not in name and _IDENTIFIER.match(name) is not None


def random_name(rng: Random) -> str:
    """Return four to nine letters, in lower or mixed case, some with digits or a second part after `_`."""
    style = rng.randrange(4)
    letters = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(4, 9)))
    if style == 1:
        letters = f"{letters}_{''.join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 5)))}"
    elif style == 2:
        letters = "".join(rng.choice((c, c.upper())) for c in letters)
    elif style == 3:
        letters = letters[0] + "".join(rng.choice((c, c.upper(), rng.choice(string.digits))) for c in letters[1:])
    return letters


def rename_tools(conversation: Conversation, names: NameMap) -> Conversation:
    """Return the row with every name replaced. `names` must hold all of its names; an empty map changes nothing."""
    if not names:
        return conversation
    return ToolRenamer(names, {old: new for old, new in names.items() if is_identifier(old)}).rename(conversation)


def declared_names(tools: Sequence[Tool]) -> Iterator[str]:
    """Yield the name of each tool, followed by the names of its parameters at every depth."""
    for tool in tools:
        yield tool["function"]["name"]
        yield from (name for name, _ in declared_properties(tool))


def declared_properties(tool: Tool) -> Iterator[tuple[str, Any]]:
    """Yield the name and schema of each parameter, at every depth."""
    for schema in _all_schemas([tool["function"]["parameters"]]):
        yield from (schema.get("properties") or {}).items()


def can_rename(tool: Tool) -> bool:
    """Return whether the tool's schema uses names only where it declares them (no `$ref` or `patternProperties`)."""
    return not any(_UNSUPPORTED & schema.keys() for schema in _all_schemas([tool["function"]["parameters"]]))


def _all_schemas(schemas: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield these schemas and all schemas inside them."""
    for schema in _with_combined(schemas):
        yield schema
        inner = [schema.get(key) for key in _MEMBERS]
        inner += [*(schema.get("properties") or {}).values(), *(schema.get("prefixItems") or [])]
        yield from _all_schemas(inner)


def _with_combined(schemas: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield these schemas and the schemas combined in them (`anyOf`, `not`, ...), which describe the same value."""
    for schema in schemas:
        if isinstance(schema, dict):
            yield schema
            inner = [schema.get(key) for key in _COMBINED]
            for key in _COMBINED_LISTS:
                inner += schema.get(key) or []
            yield from _with_combined(inner)


class ToolRenamer:
    """Replaces `names` where a schema declares them, and `mentions` as whole words of every text."""

    def __init__(self, names: NameMap, mentions: NameMap) -> None:
        self.names = names
        self.mentions = mentions
        longest_first = sorted(mentions, key=len, reverse=True)
        self._mention = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)") if mentions else None

    def rename(self, conversation: Conversation) -> Conversation:
        """Return the row with every name replaced."""
        messages = [self._rename_message(message, conversation.tools) for message in conversation.messages]
        return replace(conversation, messages=messages, tools=[self._rename_tool(tool) for tool in conversation.tools])

    def _rename_text(self, text: str) -> str:
        return self._mention.sub(lambda match: self.mentions[match[0]], text) if self._mention else text

    def _rename_message(self, message: Message, tools: list[Tool]) -> Message:
        renamed = {**message, "content": self._rename_value(message["content"], ())}
        if "name" in message:
            renamed["name"] = self.names.get(message["name"], message["name"])
        if message.get("tool_calls"):
            renamed = map_arguments(
                renamed, lambda f, value: self._rename_value(value, [f["parameters"]] if f else ()), tools
            )
            for call in renamed["tool_calls"]:
                call["function"]["name"] = self.names.get(call["function"]["name"], call["function"]["name"])
        return renamed

    def _rename_tool(self, tool: Tool) -> Tool:
        texts = {key: self._rename_value(value, ()) for key, value in tool["function"].items() if key != "parameters"}
        texts = {**texts, "name": self.names[tool["function"]["name"]]}
        function = {
            key: texts[key] if key in texts else self._rename_schema(value, ())
            for key, value in tool["function"].items()
        }
        return {**tool, "function": function}

    def _rename_schema(self, schema: Any, enclosing: Sequence[Any]) -> Any:
        """Rename a schema. `enclosing` are the schemas of the same value around it; `required` may use their names."""
        if not isinstance(schema, dict):
            return self._rename_value(schema, ())
        schemas = [*enclosing, schema]
        renamed: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "properties":
                renamed[key] = {self.names[name]: self._rename_schema(sub, ()) for name, sub in value.items()}
            elif key == "required":
                renamed[key] = [self._rename_key(name, schemas) for name in value]
            elif key in _COMBINED_LISTS:
                renamed[key] = [self._rename_schema(sub, schemas) for sub in value]
            elif key in _COMBINED:
                renamed[key] = self._rename_schema(value, schemas)
            elif key in _MEMBERS:
                renamed[key] = self._rename_schema(value, ())
            elif key == "prefixItems":
                renamed[key] = [self._rename_schema(sub, ()) for sub in value]
            elif key in _VALUES:
                renamed[key] = self._rename_value(value, schemas)
            elif key in _VALUE_LISTS:
                renamed[key] = [self._rename_value(member, schemas) for member in value]
            else:
                renamed[key] = self._rename_value(value, ())
        return renamed

    def _rename_key(self, name: str, schemas: Sequence[Any]) -> str:
        declared = any(name in (schema.get("properties") or {}) for schema in _with_combined(schemas))
        return self.names[name] if declared else self._rename_text(name)

    def _rename_value(self, value: Any, schemas: Sequence[Any]) -> Any:
        """Rename the keys that `schemas` declare in a value. Without schemas, replace only mentions."""
        if isinstance(value, str):
            return self._rename_text(value)
        if isinstance(value, dict):
            return {
                self._rename_key(key, schemas): self._rename_value(member, _schemas_of_key(schemas, key))
                for key, member in value.items()
            }
        if isinstance(value, list):
            return [self._rename_value(member, _schemas_of_item(schemas, i)) for i, member in enumerate(value)]
        return value


def _schemas_of_key(schemas: Sequence[Any], name: str) -> list[Any]:
    """Return the schemas of the member `name` of an object."""
    combined = list(_with_combined(schemas))
    declared = [s["properties"][name] for s in combined if name in (s.get("properties") or {})]
    return declared or [s["additionalProperties"] for s in combined if "additionalProperties" in s]


def _schemas_of_item(schemas: Sequence[Any], index: int) -> list[Any]:
    """Return the schemas of the member `index` of an array."""
    members: list[Any] = []
    for schema in _with_combined(schemas):
        first = schema.get("prefixItems") or []
        members += [first[index]] if index < len(first) else [schema.get("items")]
        members.append(schema.get("contains"))
    return members
