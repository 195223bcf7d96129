"""Tools that are declared as Python signatures, and calls in Python notation matched with them.

A parameter is required when it has no default. Annotations become JSON Schema as in `xlam`; dates and times are text,
since JSON has nothing else for them; an annotation that names no type of JSON (`ENUM`) is left out of the schema.
"""

import ast
from collections.abc import Mapping
from typing import Any

from poe.calls.conversation import Tool
from poe.calls.literals import PythonCall, Variable, parse_calls, parse_definition, parse_literal
from poe.calls.schema import Note, as_tool, coerce, find_tool, fits_type
from poe.data.readers.flat import python_type
from poe.errors import RowError

Call = tuple[str, Any, None]
"""Name, arguments and no id, as `Turns.calls` takes them."""

_TIMES = frozenset({"datetime", "date", "time", "datetime.datetime", "datetime.date", "datetime.time"})


def type_schema(text: str, note: Note) -> dict[str, Any]:
    """The JSON Schema of a type in Python's notation; `{}` for one that JSON has no name for."""
    if text in _TIMES:
        return {"type": "string"}
    try:
        return python_type(text)[0]
    except RowError:
        note("type that names none of JSON's left out")
        return {}


def read_definition(source: str, note: Note, about: str | None = None, details: Mapping[str, str] = {}) -> Tool:
    """The tool that a `def` declares; `about` and `details` (by parameter) describe it where its docstring does not."""
    try:
        definition = parse_definition(source)
    except ValueError:
        raise RowError("tool declaration is not a Python function") from None
    signature = definition.args
    if signature.vararg or signature.kwarg or signature.posonlyargs:
        raise RowError("tool parameter without a name")
    missing: list[ast.expr | None] = [None] * (len(signature.args) - len(signature.defaults))
    defaults = [*missing, *signature.defaults, *signature.kw_defaults]
    properties: dict[str, Any] = {}
    required = []
    for parameter, default in zip([*signature.args, *signature.kwonlyargs], defaults, strict=True):
        schema = type_schema(ast.unparse(parameter.annotation), note) if parameter.annotation else {}
        if parameter.arg in details:
            schema["description"] = details[parameter.arg]
        if default is None:
            required.append(parameter.arg)
        else:
            _add_default(schema, default, note)
        properties[parameter.arg] = schema
    about = ast.get_docstring(definition) or "" if about is None else about
    parameters = {"type": "object", "properties": properties, "required": required}
    return as_tool(definition.name, about, parameters, note)


def _add_default(schema: dict[str, Any], node: ast.expr, note: Note) -> None:
    """Defaults that JSON Schema can hold; None only says that the parameter is optional."""
    try:
        default = coerce(schema, parse_literal(ast.unparse(node)))
    except ValueError:
        note("default that is no literal left out")
        return
    if default is None:
        return
    if "type" in schema and not fits_type(schema["type"], default):
        note("default of another type left out")
        return
    schema["default"] = default


def read_calls(text: str, tools: list[Tool]) -> list[Call]:
    """The calls of a text in Python notation, positional arguments given the names of the tool's parameters."""
    try:
        return [bind(call, tools) for call in parse_calls(text)]
    except ValueError as error:
        if isinstance(error, RowError):
            raise
        raise RowError("call that is not Python notation") from None


def bind(call: PythonCall, tools: list[Tool]) -> Call:
    """Name and arguments of a parsed call."""
    tool = find_tool(tools, call.name)
    if tool is None:
        raise RowError("call to a tool that is not offered")
    names = list(tool["parameters"]["properties"])
    if len(call.positional) > len(names):
        raise RowError("more arguments than parameters")
    arguments = dict(zip(names, call.positional, strict=False))
    if arguments.keys() & call.named.keys():
        raise RowError("one argument twice")
    arguments |= call.named
    for value in arguments.values():
        _plain(value)
    return call.name, arguments, None


def _plain(value: Any) -> None:
    if isinstance(value, Variable):
        raise RowError("argument that is a bare word")
    if isinstance(value, PythonCall):
        raise RowError("argument that is a call")
    if isinstance(value, list | dict):
        for member in value.values() if isinstance(value, dict) else value:
            _plain(member)
