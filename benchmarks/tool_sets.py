"""Random tool sets: nested objects, enums of mixed types, arrays, optional arguments, patterns, references, unions.

`make_tools(seed)` gives the same tools for the same seed. The tests use a sample of them, `constrained_calls.py` all.
"""

import random
from typing import Any

from poe.calls.conversation import Tool
from poe.calls.tools import read_tools

WORDS = (
    *("city", "days", "unit", "customer", "größe", "都市", "prénom", "q", "max_results", "filter", "note-text", "день"),
    *("from", "to", "is_open", "price", "naïve", "id", "tags", "where", "level", "a b", "x.y", "emoji😀", 'quo"ted'),
)
PATTERNS = (
    *("^[A-Z]{2}\\d{1,6}$", "^#[0-9a-f]{6}$", "^\\d{4}-\\d{2}-\\d{2}$", "^(low|medium|high)$", "^[a-z]+@[a-z]+\\.com$"),
    *("^\\+?[0-9]{3,14}$", "^[A-Za-z0-9_]{1,20}$", "^v\\d+\\.\\d+$"),
)
FORMATS = ("date", "date-time", "time", "email", "uuid", "ipv4")


def make_tools(seed: int) -> list[Tool]:
    """Return one to six tools with random schemas."""
    draw = random.Random(f"tools {seed}")
    count = draw.choice((1, 1, 2, 3, 6))
    names = draw.sample([f"{word.replace(' ', '_')}_{i}" for i, word in enumerate(WORDS)], count)
    return read_tools([{"name": name, "parameters": _make_parameters(draw)} for name in names])


def _make_parameters(draw: random.Random) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    parameters = _make_object(draw, 0, definitions)
    if definitions:
        parameters["$defs"] = definitions
    return parameters


def _make_object(draw: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    names = draw.sample(WORDS, draw.randint(0 if depth == 0 else 1, 5 - depth))
    required = [name for name in names if draw.random() < 0.5]
    properties = {name: _make_schema(draw, depth + 1, definitions) for name in names}
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _make_schema(draw: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    simple = [_make_string, _make_number, _make_enum, _make_text, _make_boolean]
    if depth >= 3 or draw.random() < 0.6:
        return draw.choice(simple)(draw)
    match draw.choice(("array", "object", "union", "reference", "tree", "parts", "nullable")):
        case "array":
            limits = {"minItems": draw.randint(0, 2)} if draw.random() < 0.3 else {}
            limits |= {"maxItems": draw.randint(2, 5)} if draw.random() < 0.5 else {}
            return {"type": "array", "items": _make_schema(draw, depth + 1, definitions), **limits}
        case "object":
            return _make_object(draw, depth, definitions)
        case "union":
            key = draw.choice(("anyOf", "oneOf"))
            return {key: [{"type": "null"}, {"type": "boolean"}, _make_string(draw)][: draw.randint(2, 3)]}
        case "reference":
            name = f"part{len(definitions)}"
            definitions[name] = True  # so that a reference inside has another name
            definitions[name] = _make_schema(draw, depth + 1, definitions)
            return {"$ref": f"#/$defs/{name}"}
        case "tree":
            name = f"tree{len(definitions)}"
            children = {"type": "array", "items": {"$ref": f"#/$defs/{name}"}}
            properties = {"value": _make_number(draw), "children": children}
            definitions[name] = {"type": "object", "properties": properties, "required": ["value"]}
            return {"$ref": f"#/$defs/{name}"}
        case "parts":
            first = {"type": "object", "properties": {"a": _make_string(draw)}, "required": ["a"]}
            return {"allOf": [first, {"type": "object", "properties": {"b": _make_number(draw)}}]}
    return {"type": [draw.choice(("string", "integer", "number")), "null"]}


def _make_string(draw: random.Random) -> dict[str, Any]:
    match draw.randint(0, 3):
        case 0:
            return {"type": "string", "pattern": draw.choice(PATTERNS)}
        case 1:
            return {"type": "string", "format": draw.choice(FORMATS)}
        case 2:
            low = draw.randint(0, 5)
            return {"type": "string", "minLength": low, "maxLength": low + draw.randint(0, 20)}
    return _make_text(draw)


def _make_text(draw: random.Random) -> dict[str, Any]:
    return {"type": "string", "description": f"Any text {draw.randint(0, 9)}."}


def _make_number(draw: random.Random) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": draw.choice(("integer", "number"))}
    if draw.random() < 0.4:
        schema |= {"minimum": draw.choice((-10, 0, 1))}
    if draw.random() < 0.4:
        schema |= {"maximum": draw.choice((10, 100, 10**6))}
    if schema["type"] == "integer" and draw.random() < 0.1:
        schema |= {"multipleOf": 5}
    return schema


def _make_enum(draw: random.Random) -> dict[str, Any]:
    choices = ["red", "grün", "it's", 'a "b"', 1, 2.5, True, None, "x\\y", "line\nbreak"]
    return {"enum": draw.sample(choices, draw.randint(1, 4))}


def _make_boolean(draw: random.Random) -> dict[str, Any]:
    return {"type": "boolean"}
