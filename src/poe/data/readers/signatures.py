"""Read tools that are declared as Python signatures, and match calls in Python notation with them.

A parameter without a default is required. Annotations become JSON Schema types as in `xlam`. Dates and times become
text, because JSON has no type for them. An annotation without a JSON type (`ENUM`) is left out of the schema.
"""

import ast
from collections.abc import Mapping
from typing import Any

from poe.calls.arguments import find_tool, fit_value
from poe.calls.conversation import Tool
from poe.calls.literals import PythonCall, Variable, parse_calls, parse_definition, parse_literal
from poe.calls.python_types import python_type
from poe.calls.schema import Note
from poe.calls.tools import as_tool
from poe.calls.values import fits_type
from poe.errors import RowError

Call = tuple[str, Any, None]
"""Name, arguments and no id, as `Turns.add_calls` takes them."""

_TIMES = frozenset({"datetime", "date", "time", "datetime.datetime", "datetime.date", "datetime.time"})


def type_schema(text: str, note: Note) -> dict[str, Any]:
    """Return the JSON Schema of a Python type; `{}` for a type without a JSON equivalent."""
    if text in _TIMES:
        return {"type": "string"}
    try:
        return python_type(text)[0]
    except RowError:
        note("type without a JSON equivalent left out")
        return {}


def read_definition(
    source: str, note: Note, description: str | None = None, parameter_descriptions: Mapping[str, str] = {}
) -> Tool:
    """Return the tool that a `def` declares. Without `description`, its docstring is the description."""
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
        if parameter.arg in parameter_descriptions:
            schema["description"] = parameter_descriptions[parameter.arg]
        if default is None:
            required.append(parameter.arg)
        else:
            _add_default(schema, default, note)
        properties[parameter.arg] = schema
    if description is None:
        description = ast.get_docstring(definition) or ""
    parameters = {"type": "object", "properties": properties, "required": required}
    return as_tool(definition.name, description, parameters, note)


def _add_default(schema: dict[str, Any], node: ast.expr, note: Note) -> None:
    """Add a default that JSON Schema can hold. The default None only makes a parameter optional."""
    try:
        default = fit_value(schema, parse_literal(ast.unparse(node)))
    except ValueError:
        note("default that is not a literal left out")
        return
    if default is None:
        return
    if "type" in schema and not fits_type(schema["type"], default):
        note("default of another type left out")
        return
    schema["default"] = default


def read_calls(text: str, tools: list[Tool]) -> list[Call]:
    """Return the calls of a text in Python notation. Positional arguments get the names of the parameters."""
    try:
        return [bind_call(call, tools) for call in parse_calls(text)]
    except ValueError as error:
        if isinstance(error, RowError):
            raise
        raise RowError("call that is not Python notation") from None


def bind_call(call: PythonCall, tools: list[Tool]) -> Call:
    """Return the name and the arguments of a parsed call."""
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
        _check_plain(value)
    return call.name, arguments, None


def _check_plain(value: Any) -> None:
    if isinstance(value, Variable):
        raise RowError("argument that is a bare word")
    if isinstance(value, PythonCall):
        raise RowError("argument that is a call")
    if isinstance(value, list | dict):
        for member in value.values() if isinstance(value, dict) else value:
            _check_plain(member)
