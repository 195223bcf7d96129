"""Tool forms contain everything that a caller needs: names, types, values, defaults, and optional arguments."""

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poe.calls.forms.tool_forms import TOOL_FORMS, write_tools
from poe.calls.tools import as_tool
from poe.errors import DataError

HOTEL = as_tool(
    "book_hotel",
    "Book a room.\nNothing is paid.",
    {
        "type": "object",
        "properties": {
            "nights": {"type": "integer", "description": "How long?", "default": 1},
            "city": {"type": "string", "description": "Where,\nin words"},
            "board": {"enum": ["none", "half", "full"], "type": "string"},
            "guests": {"type": "array", "items": {"type": "string"}},
            "price": {"type": "number", "minimum": 10},
            "room": {
                "type": "object",
                "properties": {"beds": {"type": "integer"}, "view": {"type": "boolean"}},
                "required": ["beds"],
            },
            "note": {"type": ["string", "null"], "default": None},
        },
        "required": ["city", "nights"],
        "additionalProperties": False,
    },
)
PING = as_tool("net-ping", "", {})


def test_signatures() -> None:
    assert write_tools([HOTEL, PING], "python") == (
        "def book_hotel(*, nights: int, city: str, board: Literal['none', 'half', 'full'] = ..., "
        "guests: list[str] = ..., price: float = ..., room: dict[str, Any] = ..., note: str | None = None):\n"
        '    """Book a room.\n'
        "    Nothing is paid.\n"
        "\n"
        "    Args:\n"
        "        nights (int, required, default 1): How long?\n"
        "        city (str, required): Where,\n"
        "            in words\n"
        "        board (Literal['none', 'half', 'full'], optional):\n"
        "        guests (list[str], optional):\n"
        "        price (float, optional):\n"
        '            JSON Schema: {"type": "number", "minimum": 10}\n'
        "        room (dict[str, Any], optional):\n"
        '            JSON Schema: {"type": "object", "properties": {"beds": {"type": "integer"}, '
        '"view": {"type": "boolean"}}, "required": ["beds"]}\n'
        "        note (str | None, optional, default None):\n"
        '    JSON Schema of all arguments: {"additionalProperties": false}\n'
        '    """\n'
        "\n"
        'def "net-ping"():\n'
        "    ..."
    )


def test_type_declarations() -> None:
    assert write_tools([HOTEL, PING], "typescript") == (
        "// Book a room.\n"
        "// Nothing is paid.\n"
        '// JSON Schema of all arguments: {"additionalProperties": false}\n'
        "type book_hotel = (_: {\n"
        "  // How long?\n"
        "  nights: integer; // default: 1\n"
        "  // Where,\n"
        "  // in words\n"
        "  city: string;\n"
        '  board?: "none" | "half" | "full";\n'
        "  guests?: Array<string>;\n"
        '  // JSON Schema: {"type": "number", "minimum": 10}\n'
        "  price?: number;\n"
        "  room?: { beds: integer; view?: boolean };\n"
        "  note?: string | null; // default: null\n"
        "}) => any;\n"
        "\n"
        'type "net-ping" = (_: {}) => any;'
    )


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = texts.filter(lambda name: name.strip() == name != "" and all(ord(c) >= 32 for c in name)) | st.sampled_from(
    ["</tools>", '"""', "größe", "日本語 tool", "a-b", "class", "get weather", "f(x):", "*/", "x; y"]
)
simple = st.sampled_from(["string", "integer", "number", "boolean", "null"]).map(lambda kind: {"type": kind})
leaves = (
    simple
    | st.just({})
    | st.lists(texts | st.integers() | st.none(), min_size=1, max_size=3, unique=True).map(lambda v: {"enum": v})
    | st.builds(lambda pattern: {"type": "string", "minLength": 1, "title": pattern}, texts)
)
schemas = st.recursive(
    leaves,
    lambda s: (
        s.map(lambda items: {"type": "array", "items": items})
        | st.lists(s, min_size=1, max_size=3).map(lambda members: {"anyOf": members})
        | st.dictionaries(texts, s, min_size=1, max_size=3).map(
            lambda p: {"type": "object", "properties": p, "required": list(p)[:1]}
        )
        | s.map(lambda v: {"type": "object", "additionalProperties": v})
    ),
    max_leaves=5,
)


@st.composite
def tools(draw):
    made = []
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        properties = draw(st.dictionaries(texts, schemas, max_size=4))
        for schema in properties.values():
            if draw(st.booleans()):
                schema["description"] = draw(texts)
            if draw(st.booleans()):
                schema["default"] = draw(texts | st.integers() | st.none() | st.lists(texts, max_size=2))
        required = [key for key in properties if draw(st.booleans())]
        made.append(as_tool(name, draw(texts), {"type": "object", "properties": properties, "required": required}))
    return made


def json_values(text: str) -> list:
    found, at, decoder = [], 0, json.JSONDecoder()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        found.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return found


@given(tools())
@settings(max_examples=60, deadline=None)
def test_json_forms_contain_the_tools_unchanged(tools) -> None:
    functions = [tool["function"] for tool in tools]
    for form in ("indent0", "indent2", "indent4", "lines"):
        assert json_values(write_tools(tools, form)) == functions
    assert len(write_tools(tools, "lines").split("\n")) == len(tools)
    assert json.loads(write_tools(tools, "list")) == functions
    assert json.loads(write_tools(tools, "openai")) == tools
    first, *lines, last = write_tools(tools, "xml").split("\n")
    assert [first, *map(json.loads, lines), last] == ["<tools>", *tools, "</tools>"]
    assert write_tools(tools, "xml").count("</tools>") == 1


def leaves_of(schema) -> list[str]:
    """Return the parts of a schema that must be written, in both possible notations."""
    if isinstance(schema, dict):
        return [leaf for key, value in schema.items() if key not in ("type", "title") for leaf in leaves_of(value)]
    return [leaf for value in schema for leaf in leaves_of(value)] if isinstance(schema, list) else [schema]


@given(tools())
@settings(max_examples=60, deadline=None)
def test_other_forms_contain_every_name_value_and_default(tools) -> None:
    python, typescript = write_tools(tools, "python"), write_tools(tools, "typescript")
    for function in (tool["function"] for tool in tools):
        parameters = function["parameters"]
        for text in (python, typescript):
            assert function["name"] in text or json.dumps(function["name"], ensure_ascii=False) in text
            flat = text.replace(r"\"\"\"", '"""')
            for name, schema in parameters["properties"].items():
                assert name in flat or json.dumps(name, ensure_ascii=False) in flat
                for line in schema.get("description", "").strip().splitlines():
                    assert line.rstrip() in flat
                for leaf in leaves_of({k: v for k, v in schema.items() if k != "description"}):
                    assert json.dumps(leaf, ensure_ascii=False) in flat or repr(leaf) in flat or leaf in flat
        lines = typescript.split("\n")
        for name in parameters["properties"]:
            word = (
                name if all(part.isidentifier() for part in name.split(".")) else json.dumps(name, ensure_ascii=False)
            )
            mark = "" if name in parameters["required"] else "?"
            assert any(line.startswith(f"  {word}{mark}: ") for line in lines)


words = st.from_regex(r"x[a-z]{1,6}", fullmatch=True)


@given(words, st.dictionaries(words, st.tuples(schemas, st.booleans(), st.none() | st.integers()), max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_signature_is_valid_python_and_shows_optional_arguments(name, drawn) -> None:
    properties = {key: {**schema, **({} if d is None else {"default": d})} for key, (schema, _, d) in drawn.items()}
    required = [key for key, (_, needed, _) in drawn.items() if needed]
    tool = as_tool(name, "Does it.", {"type": "object", "properties": properties, "required": required})
    text = write_tools([tool], "python").replace("\0", " ")  # no source has a zero byte
    (found,) = ast.parse(text).body
    assert isinstance(found, ast.FunctionDef)
    assert (found.name, ast.get_docstring(found).splitlines()[0]) == (name, "Does it.")
    assert [a.arg for a in found.args.kwonlyargs] == list(properties)
    without = [a.arg for a, default in zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True) if not default]
    assert without == [key for key in properties if key in required]


def test_unknown_forms_raise_an_error_with_a_suggestion() -> None:
    with pytest.raises(DataError, match="Did you mean 'typescript'"):
        write_tools([PING], "typscript")
    assert all(write_tools([PING], form) for form in TOOL_FORMS)
