"""Function masking: the names of tools and parameters become random identifiers; descriptions say what they are for.

A caller that has learned names (`get_weather(city)`) fails on a tool that has another name. With masked names only
the descriptions are left to go by. The idea is that of Hammer (arXiv 2410.04587). Its paper masks 0.33 of the data, its
released script makes three copies of the data and masks 0.67 of them; here the ratio is explicit: the share of the rows
that are masked in each epoch.

* One name has one mask in a row, wherever it stands: `mask` is a bijection, and `unmask` gives back every byte.
* Renamed: tools, properties at every depth, `required`, the arguments of calls, the `name` of results, and the keys of
  objects in `default`, `enum`, `const` and `examples`.
* A name that can only be an identifier (`get_weather`, `maxPrice`, `maps.search`) is also replaced in every text of the
  row, as a whole word: descriptions, what was said, results, and values alike, so that a user who names a tool names
  one that exists, and a value that is copied from a text still stands in it.
* A name that may be an ordinary word (`city`) stays in texts: "the city to use" is English, not a mention. Keys of
  free-form objects and `enum` texts are data and stay, save for such identifiers.
* Left alone, with an empty mapping: rows without tools; rows where a tool or a parameter has no description, since
  nothing would say what it is for; schemas that speak of names otherwise than by listing them (`$ref`,
  `patternProperties`, `dependentRequired` and their like).
"""

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from poe.calls.conversation import Conversation, Message, Tool
from poe.data.augment.rows import map_arguments

Mapping = dict[str, str]  # a name of the row -> the name that stands for it

_IN_PLACE_LISTS = ("anyOf", "oneOf", "allOf")
_IN_PLACE = ("not", "if", "then", "else")  # schemas of the same value
_PARTS = ("items", "additionalProperties", "contains")  # schemas of its members
_VALUES = ("default", "const")
_VALUE_LISTS = ("enum", "examples")
_UNFOLLOWED = frozenset(
    "$ref $dynamicRef $defs definitions patternProperties propertyNames unevaluatedProperties dependentRequired "
    "dependentSchemas dependencies".split()
)
_IDENTIFIER = re.compile(r".*\w_\w|[a-z]+[A-Z]|.*\w\.\w", re.DOTALL)


def is_identifier(name: str) -> bool:
    """Whether a name cannot be taken for an ordinary word."""
    return " " not in name and _IDENTIFIER.match(name) is not None


def mask(conversation: Conversation, rng: Random) -> tuple[Conversation, Mapping]:
    """The row with random names, and the mapping from old names to new; the row itself and `{}` if it cannot be."""
    if not conversation.tools or not all(map(_is_told, conversation.tools)):
        return conversation, {}
    text = conversation.key()
    mapping: Mapping = {}
    for name in _names(conversation.tools):
        if name not in mapping:
            mapping[name] = _fresh_name(rng, text, mapping)
    return rename(conversation, mapping), mapping


def rename(conversation: Conversation, mapping: Mapping) -> Conversation:
    """The row under the names of a mapping that has all of its own; under those it has if the mapping is empty."""
    if not mapping:
        return conversation
    mentions = {old: new for old, new in mapping.items() if is_identifier(old)}
    return _Renamer(mapping, mentions).row(conversation)


def unmask(conversation: Conversation, mapping: Mapping) -> Conversation:
    """The row that `mask` was given."""
    if not mapping:
        return conversation
    back = {new: old for old, new in mapping.items()}
    return _Renamer(back, {new: old for new, old in back.items() if is_identifier(old)}).row(conversation)


def _is_told(tool: Tool) -> bool:
    """Whether descriptions say what the tool and each of its parameters is for, in a schema that can be followed."""
    function = tool["function"]
    parameters = _properties([function["parameters"]])
    return (
        bool(function["description"].strip())
        and not any(_UNFOLLOWED & schema.keys() for schema in _schemas([function["parameters"]]))
        and all(isinstance(sub, dict) and str(sub.get("description") or "").strip() for _, sub in parameters)
    )


def _names(tools: list[Tool]) -> Iterator[str]:
    for tool in tools:
        yield tool["function"]["name"]
        yield from (name for name, _ in _properties([tool["function"]["parameters"]]))


def _schemas(place: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Every schema in these, at every depth."""
    for schema in _same_place(place):
        yield schema
        parts = [schema.get(key) for key in _PARTS]
        parts += [*(schema.get("properties") or {}).values(), *(schema.get("prefixItems") or [])]
        yield from _schemas(parts)


def _properties(place: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for schema in _schemas(place):
        yield from (schema.get("properties") or {}).items()


def _same_place(place: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """These schemas and those combined in them: all that speak of one value."""
    for schema in place:
        if isinstance(schema, dict):
            yield schema
            inner = [schema.get(key) for key in _IN_PLACE]
            for key in _IN_PLACE_LISTS:
                inner += schema.get(key) or []
            yield from _same_place(inner)


def random_name(rng: Random) -> str:
    """Four to nine letters, small or of both cases, some with digits among them or a second part behind `_`."""
    style = rng.randrange(4)
    letters = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(4, 9)))
    if style == 1:
        letters = f"{letters}_{''.join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 5)))}"
    elif style == 2:
        letters = "".join(rng.choice((c, c.upper())) for c in letters)
    elif style == 3:
        letters = letters[0] + "".join(rng.choice((c, c.upper(), rng.choice(string.digits))) for c in letters[1:])
    return letters


def _fresh_name(rng: Random, text: str, mapping: Mapping) -> str:
    """A name that stands nowhere in the row: only so can a mention be told from a chance likeness."""
    while True:
        name = random_name(rng)
        if name not in text and name not in mapping.values():
            return name


class _Renamer:
    """Applies `names` where the schema declares a name, and `mentions` to whole words of every text."""

    def __init__(self, names: Mapping, mentions: Mapping) -> None:
        self.names = names
        self.mentions = mentions
        longest_first = sorted(mentions, key=len, reverse=True)
        self._mention = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)") if mentions else None

    def row(self, conversation: Conversation) -> Conversation:
        messages = [self._message(message, conversation.tools) for message in conversation.messages]
        return replace(conversation, messages=messages, tools=[self._tool(tool) for tool in conversation.tools])

    def _text(self, text: str) -> str:
        return self._mention.sub(lambda found: self.mentions[found[0]], text) if self._mention else text

    def _message(self, message: Message, tools: list[Tool]) -> Message:
        made = {**message, "content": self._value(message["content"], ())}
        if "name" in message:
            made["name"] = self.names.get(message["name"], message["name"])
        if message.get("tool_calls"):
            made = map_arguments(made, lambda f, value: self._value(value, [f["parameters"]] if f else ()), tools)
            for call in made["tool_calls"]:
                call["function"]["name"] = self.names.get(call["function"]["name"], call["function"]["name"])
        return made

    def _tool(self, tool: Tool) -> Tool:
        made = {key: self._value(value, ()) for key, value in tool["function"].items() if key != "parameters"}
        made = {**made, "name": self.names[tool["function"]["name"]]}
        function = {k: made[k] if k in made else self._schema(tool["function"][k], ()) for k in tool["function"]}
        return {**tool, "function": function}

    def _schema(self, schema: Any, enclosing: Sequence[Any]) -> Any:
        """`enclosing`: the schemas around it that speak of the same value, whose names its `required` may use."""
        if not isinstance(schema, dict):
            return self._value(schema, ())
        place = [*enclosing, schema]
        made: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "properties":
                made[key] = {self.names[name]: self._schema(sub, ()) for name, sub in value.items()}
            elif key == "required":
                made[key] = [self._key(name, place) for name in value]
            elif key in _IN_PLACE_LISTS:
                made[key] = [self._schema(sub, place) for sub in value]
            elif key in _IN_PLACE:
                made[key] = self._schema(value, place)
            elif key in _PARTS:
                made[key] = self._schema(value, ())
            elif key == "prefixItems":
                made[key] = [self._schema(sub, ()) for sub in value]
            elif key in _VALUES:
                made[key] = self._value(value, place)
            elif key in _VALUE_LISTS:
                made[key] = [self._value(member, place) for member in value]
            else:
                made[key] = self._value(value, ())
        return made

    def _key(self, name: str, place: Sequence[Any]) -> str:
        declared = any(name in (schema.get("properties") or {}) for schema in _same_place(place))
        return self.names[name] if declared else self._text(name)

    def _value(self, value: Any, place: Sequence[Any]) -> Any:
        """A value that the schemas of `place` speak of; with none, only mentions are replaced."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {self._key(key, place): self._value(member, _of(place, key)) for key, member in value.items()}
        if isinstance(value, list):
            return [self._value(member, _at(place, index)) for index, member in enumerate(value)]
        return value


def _of(place: Sequence[Any], name: str) -> list[Any]:
    """The schemas of the member `name` of an object."""
    schemas = list(_same_place(place))
    declared = [s["properties"][name] for s in schemas if name in (s.get("properties") or {})]
    return declared or [s["additionalProperties"] for s in schemas if "additionalProperties" in s]


def _at(place: Sequence[Any], index: int) -> list[Any]:
    """The schemas of the member `index` of an array."""
    found: list[Any] = []
    for schema in _same_place(place):
        first = schema.get("prefixItems") or []
        found += [first[index]] if index < len(first) else [schema.get("items")]
        found.append(schema.get("contains"))
    return found
