"""xLAM function-calling 60k: one question, one or more calls at once, no results.

Hub: `Salesforce/xlam-function-calling-60k` (gated: accept its terms, then `hf auth login`). Licence: CC-BY-4.0.

Two formats are read.

* The original, `{"id", "query", "answers", "tools"}`; `answers` and `tools` are JSON text.
* The ms-swift form, `{"tools", "messages"}`: `tools` in OpenAI's envelope (parameters as flat as in the original), and
  one `tool_call` message per call. `tool_response` or `tool` and `assistant` messages may follow.

All calls of one turn become one assistant message.

Traps, and what is done about each:

* `parameters` is flat, name to `{description, type, default}`, with types in Python's notation. `int`, `List[int]`,
  `Tuple[float, float]`, `Dict[str, int]`, `Optional[str]`, `Union[int, float]`, `Literal["a", "b"]` become JSON Schema.
  A set becomes an array, a tuple an array of fixed length. `Callable[...]` and anything else that JSON cannot write:
  the row is dropped.
* Optionality stands in the type ("str, optional"), defaults beside or inside it ("str, default='x'"). A parameter is
  *required* when it is neither optional nor has a default: rows leave out parameters that have one, in 6 % of the
  places where they could. The empty default counts as one, since such parameters are left out as often.
* `default` is text for other types: coerced when that is exact, else left out of the schema (as `""` for a number is).
* Arguments of another type than declared: `"5"` for an integer is coerced; `"movie"`, or 139.69 for an integer, is not,
  and the row is dropped. Null for an optional argument is left out.
* Two tools under one name with two definitions: dropped.
* Rows are a fine mix only from the Hub: excerpts are often selected by the number of calls.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from poe.data.conversation import Conversation, Tool
from poe.data.drops import DropReport, Unfaithful
from poe.data.readers.messages import content_text
from poe.data.readers.turns import Turns, parse_field, read_rows
from poe.data.schema import Note, as_tool, coerce, fits_type, unique_tools
from poe.data.sources import Row

NAME = "xlam"
HUB_ID = "Salesforce/xlam-function-calling-60k"
LICENCE = "CC-BY-4.0"

_FIELDS = ("query", "answers", "tools", "messages")
_TOKEN = re.compile(r"""\s*(?:([A-Za-z_][\w.]*)|("[^"]*"|'[^']*'|-?\d+(?:\.\d+)?)|(\.\.\.)|([\[\],|]))""")
_DEFAULT = re.compile(r",\s*default\b[\s=:]*", re.IGNORECASE)
_MAX_TYPE = 300
_SIMPLE = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "none": "null",
    "nonetype": "null",
    "object": "object",
    "array": "array",
}
_ARRAYS = frozenset({"list", "set", "frozenset", "sequence", "iterable", "array"})
_OBJECTS = frozenset({"dict", "mapping", "object"})


def read(rows: Iterable[Row], report: DropReport) -> Iterator[Conversation]:
    """Conversations of rows in either format; what cannot be read faithfully is dropped and counted."""
    return read_rows(NAME, LICENCE, _FIELDS, rows, report, _convert)


def _convert(row: dict[str, Any], note: Note) -> Turns:
    declared = parse_field(row.get("tools"), "tools")
    if not isinstance(declared, list):
        raise Unfaithful("tools are not a list")
    tools = unique_tools([read_tool(tool, note) for tool in declared], note)
    turns = Turns(tools, note)
    if "messages" in row:
        _messages(row["messages"], turns)
        return turns
    query = row.get("query")
    answers = parse_field(row.get("answers"), "answers")
    if not isinstance(query, str) or not isinstance(answers, list):
        raise Unfaithful("row is of no known format")
    turns.user(query.strip())
    turns.calls([_call(answer) for answer in answers])
    return turns


def _call(value: Any) -> tuple[Any, Any, None]:
    if not isinstance(value, dict) or "name" not in value:
        raise Unfaithful("call without a name or arguments")
    return value["name"], parse_field(value.get("arguments", {}), "arguments"), None


def _messages(messages: Any, turns: Turns) -> None:
    """The ms-swift form: adjacent `tool_call` messages are one turn."""
    if not isinstance(messages, list):
        raise Unfaithful("row is of no known format")
    waiting: list[tuple[Any, Any, None]] = []
    for message in [*messages, {"role": ""}]:
        if not isinstance(message, dict):
            raise Unfaithful("message is not an object")
        role, text = message.get("role"), content_text(message.get("content"))
        if role == "tool_call":
            parsed = parse_field(text, "call")
            waiting.extend(_call(call) for call in (parsed if isinstance(parsed, list) else [parsed]))
            continue
        if waiting:
            turns.calls(waiting)
            waiting = []
        if role == "user":
            turns.user(text.strip())
        elif role == "assistant":
            turns.assistant(text.strip())
        elif role in ("tool", "tool_response"):
            turns.response(text)
        elif role == "system":
            turns.system(text)
        elif role != "":
            raise Unfaithful(f"message of an unknown role ({str(role)[:40]!r})")


def read_tool(tool: Any, note: Note) -> Tool:
    """A `Tool` from one with flat, Python-typed parameters (one with JSON Schema parameters is passed on)."""
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        tool = tool["function"]
    if not isinstance(tool, dict):
        raise Unfaithful("tool is not an object")
    flat = tool.get("parameters") or {}
    if not isinstance(flat, dict):
        raise Unfaithful("tool parameters are not an object schema")
    if flat.get("type") != "object":
        flat = _object_schema(flat, note)
    return as_tool(tool.get("name"), tool.get("description"), flat, note)


def _object_schema(flat: dict[str, Any], note: Note) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in flat.items():
        if not isinstance(parameter, dict) or not isinstance(parameter.get("type", ""), str):
            raise Unfaithful("tool parameter is not an object")
        schema, optional, default = python_type(parameter.get("type", "Any"))
        if isinstance(parameter.get("description"), str):
            schema["description"] = parameter["description"]
        if parameter.get("default") is not None:
            default = parameter["default"]
        if default is not None:
            optional = True
            exact = coerce(schema, default)
            if exact == "" and schema.get("type") != "string":
                pass
            elif "type" not in schema or fits_type(schema["type"], exact):
                schema["default"] = exact
            else:
                note("default of another type left out")
        if not optional:
            required.append(name)
        properties[name] = schema
    return {"type": "object", "properties": properties, "required": required}


def python_type(text: str) -> tuple[dict[str, Any], bool, Any]:
    """`"List[int], optional, default=[]"` -> (JSON Schema, whether optional, default or None)."""
    if len(text) > _MAX_TYPE:
        raise Unfaithful("type that JSON cannot write")
    found = _DEFAULT.search(text)
    kind, *extras = _top_level_parts(text[: found.start()] if found else text)
    optional, default = found is not None, _literal(text[found.end() :].strip()) if found else None
    for extra in extras:
        if extra.lower() in ("optional", "required", ""):
            optional = optional or extra.lower() == "optional"
        else:
            raise Unfaithful("type that JSON cannot write")
    schema, nullable = _Type(kind).parse()
    return schema, optional or nullable, default


def _top_level_parts(text: str) -> list[str]:
    depth, start, parts = 0, 0, []
    for at, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def _literal(text: str) -> Any:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text in ("None", ""):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Type:
    """A recursive-descent parser of Python type notation: `name`, `name[type, ...]`, `type | type`."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        at, text = 0, text.strip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise Unfaithful("type that JSON cannot write")
            self.tokens.append(found[0].strip())
            at = found.end()
        self.at = 0

    def parse(self) -> tuple[dict[str, Any], bool]:
        """The schema, and whether None is among the types of the top level."""
        schema = self._union()
        if self.at < len(self.tokens):
            raise Unfaithful("type that JSON cannot write")
        return _without_null(schema)

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def _union(self) -> dict[str, Any]:
        kinds = [self._single()]
        while self._peek() == "|":
            self._next()
            kinds.append(self._single())
        return _any_of(kinds)

    def _single(self) -> dict[str, Any]:
        name = self._next().removeprefix("typing.")
        lower = name.lower()
        if lower == "literal":
            return self._literals()
        inner: list[Any] = []
        if self._peek() == "[":
            self._next()
            while self._peek() != "]":
                if self._peek() == "...":
                    inner.append(self._next())
                else:
                    inner.append(self._union())
                if self._peek() == ",":
                    self._next()
                elif self._peek() != "]":
                    raise Unfaithful("type that JSON cannot write")
            self._next()
        if lower == "tuple":
            return _tuple(inner)
        if "..." in inner:
            raise Unfaithful("type that JSON cannot write")
        if lower == "any" and not inner:
            return {}
        if lower in _ARRAYS and len(inner) < 2:
            return {"type": "array", **({"items": inner[0]} if inner else {})}
        if lower in _OBJECTS and len(inner) in (0, 2):
            return {"type": "object", **({"additionalProperties": inner[1]} if inner and inner[1] else {})}
        if lower == "optional" and len(inner) == 1:
            return _any_of([inner[0], {"type": "null"}])
        if lower == "union" and inner:
            return _any_of(inner)
        if lower in _SIMPLE and not inner:
            return {"type": _SIMPLE[lower]}
        raise Unfaithful("type that JSON cannot write")

    def _literals(self) -> dict[str, Any]:
        values: list[Any] = []
        if self._next() != "[":
            raise Unfaithful("type that JSON cannot write")
        while (token := self._next()) != "]":
            if not token or token in ("[", "|"):
                raise Unfaithful("type that JSON cannot write")
            if token != ",":
                values.append(_literal(token))
        kinds = {type(value) for value in values}
        kind = {str: "string", int: "integer"}.get(*kinds) if len(kinds) == 1 else None
        return {**({"type": kind} if kind else {}), "enum": values}


def _tuple(inner: list[Any]) -> dict[str, Any]:
    if not inner:
        return {"type": "array"}
    if inner[-1] == "..." and len(inner) == 2:
        return {"type": "array", "items": inner[0]}
    if "..." in inner:
        raise Unfaithful("type that JSON cannot write")
    fixed = {"minItems": len(inner), "maxItems": len(inner)}
    if all(kind == inner[0] for kind in inner):
        return {"type": "array", "items": inner[0], **fixed}
    return {"type": "array", "prefixItems": inner, **fixed}


def _any_of(kinds: list[dict[str, Any]]) -> dict[str, Any]:
    flat: list[dict[str, Any]] = []
    for kind in kinds:
        flat.extend(k for k in kind.get("anyOf", [kind]) if k not in flat)
    if {"type": "number"} in flat:
        flat = [k for k in flat if k != {"type": "integer"}]
    if {} in flat:
        return {}
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _without_null(schema: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    kinds = schema.get("anyOf", [schema])
    rest = [kind for kind in kinds if kind != {"type": "null"}]
    if not rest or len(rest) == len(kinds):
        return dict(schema), False
    return dict(_any_of(rest)), True
