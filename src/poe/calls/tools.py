"""Read tools in the spelling of any system as one canonical `Tool`, and check calls against them.

| system | a tool |
|---|---|
| OpenAI (chat), Mistral, Ollama | `{"type": "function", "function": {"name", "description", "parameters"}}` |
| OpenAI (responses, realtime, the older `functions`) | `{"type": "function", "name", "description", "parameters"}` |
| Anthropic | `{"name", "description", "input_schema"}` |
| MCP | `{"name", "description", "inputSchema"}`, and the whole result of `tools/list` |
| Gemini | `{"function_declarations": [{"name", "description", "parameters"}]}`, or `parameters_json_schema` |
| Amazon Bedrock | `{"toolSpec": {"name", "description", "inputSchema": {"json": ...}}}` |
| Cohere | `{"name", "description", "parameter_definitions": {<name>: {"description", "type", "required"}}}` |
| xLAM, smolagents, Qwen-Agent | flat `parameters` or `inputs`: a map or a list of names with Python or JSON types |
| Pydantic | a bare JSON Schema with a `title`, or the class |
| Python | functions, methods and callable objects (`poe.calls.python_functions`) |
| OpenAPI | a whole document: one tool for each operation (`poe.calls.openapi`) |
| BFCL | types such as `dict`, `float`, `tuple`, `any`, `ArrayList`, `HashMap` |

Keys are `snake_case` or `camelCase`. Every part may be JSON text. Each repair is passed to `note` by name. Input that
cannot be converted without loss raises `RowError` with the reason and the place.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from poe.calls.arguments import find_faults, find_tool, fit_value, list_changes
from poe.calls.conversation import Call, Tool
from poe.calls.json_text import parse_field
from poe.calls.openapi import describe_operations, is_openapi
from poe.calls.python_types import declared_type
from poe.calls.resolution import COMBINING, Resolver
from poe.calls.schema import Note, is_keyword, lint_schema, no_note, repair_schema
from poe.calls.values import check_value, fits_type
from poe.errors import RowError

_LISTS = ("tools", "functions", "function_declarations", "functionDeclarations")  # keys that hold several tools
_RESULTS = ("result", "toolConfig", "tool_config")  # keys that hold an object with such a list
_ENVELOPES = ("function", "toolSpec", "tool_spec")
_PARAMETERS = (
    *("parameters", "input_schema", "inputSchema", "parameters_json_schema", "parametersJsonSchema"),
    *("parameter_definitions", "parameterDefinitions", "input_parameters", "inputs", "args_schema"),
)
_OPTIONAL_UNLESS_MARKED = ("parameter_definitions", "parameterDefinitions")
_DEFINITIONS = ("$defs", "definitions", "components")
_HOLDS_TOOLS = {"openapi", "swagger", *_LISTS, *_RESULTS, *_ENVELOPES, *_PARAMETERS, "name", "title"}
_NO_PARAMETERS = ("properties", "required", "output_schema", "outputSchema", "response", "returns", "annotations")


def read_tools(value: Any, note: Note = no_note, *, flat: bool = False) -> list[Tool]:
    """Return the tools of a list, of an object that holds them, or of one tool, in any of the spellings above.

    `flat`: parameters are flat in this format, also when they are empty, so that this is no repair.
    """
    return unique_tools(list(_read_all(value, "", note, flat)), note)


def _read_all(value: Any, place: str, note: Note, flat: bool) -> Iterator[Tool]:
    """Yield the tools in a value. An empty place is that of all tools."""
    try:
        value = _as_json(value, "tool" if place else "tools", note)
        if not isinstance(value, dict | list):
            raise RowError("tool is not an object" if place else "tools are not a list")
        if isinstance(value, dict) and not place and value and not _HOLDS_TOOLS & value.keys():
            raise RowError("tools are not a list")
    except RowError as error:
        raise RowError(error.reason, place) from None
    if isinstance(value, dict) and is_openapi(value):
        yield from _read_operations(value, place, note)
        return
    if isinstance(value, list):
        for i, member in enumerate(value):
            if isinstance(member, list):
                raise RowError("tool is not an object", f"{place or 'tools'}[{i}]")
            yield from _read_all(member, f"{place or 'tools'}[{i}]", note, flat)
        return
    inner = next((key for key in (*_LISTS, *_RESULTS) if isinstance(value.get(key), dict | list | str)), "")
    if inner and "name" not in value:
        yield from _read_all(value[inner], f"{place}.{inner}" if place else inner, note, flat)
    elif value or place:
        try:
            yield read_tool(value, note, flat=flat)
        except RowError as error:
            function = next((value[key] for key in _ENVELOPES if isinstance(value.get(key), dict)), value)
            name = f" {str(function['name'])[:40]!r}" if function.get("name") else ""
            inner = f".{error.place} of" if error.place and name else error.place and f".{error.place}"
            raise RowError(error.reason, f"{place or 'tool'}{inner}{name}") from None


def _read_operations(document: dict[str, Any], place: str, note: Note) -> Iterator[Tool]:
    operation = ""
    try:
        for operation, function in describe_operations(document, note):
            yield read_tool(function, note)
            operation = ""
    except RowError as error:
        raise RowError(error.reason, ".".join(filter(None, [place, operation, error.place]))) from None


def _as_json(value: Any, name: str, note: Note) -> Any:
    """Return JSON text, a Python function or an object of an SDK as a JSON value, checked for depth and content."""
    value = describe_object(value, note)
    if isinstance(value, tuple):
        value = list(value)
    elif isinstance(value, str) and name == "tools" and not value.strip():
        return []
    value = parse_field(value, name)
    if not isinstance(value, list) and (problem := check_value(value)):  # the members of a list are checked one by one
        raise RowError(problem)
    return [] if value is None and name == "tools" else value


def describe_object(value: Any, note: Note = no_note) -> Any:
    """Return a Python function, a class of Pydantic or an object of an SDK as JSON values, other values unchanged.

    Raises `RowError` for a function that does not describe a tool.
    """
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return value.model_json_schema()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    if not callable(value):
        return value
    from poe.calls.python_functions import describe_function

    return describe_function(value, note)


def read_tool(tool: Any, note: Note = no_note, *, flat: bool = False) -> Tool:
    """Return one tool in any of the spellings above, without a place in its errors."""
    envelope = next((key for key in _ENVELOPES if isinstance(tool, dict) and key in tool), None)
    function = tool if envelope is None else parse_field(tool[envelope], "tool")
    if not isinstance(tool, dict) or not isinstance(function, dict):
        raise RowError("tool is not an object")
    name, description = function.get("name"), function.get("description")
    given = {key: parse_field(function[key], "parameters") for key in _PARAMETERS if function.get(key) is not None}
    kind = tool.get("type", "function")
    if not given and (kind == "object" or isinstance(function.get("properties"), dict | str)):
        texts = ("name", "description", *(() if name else ("title",)))
        bare = {key: value for key, value in function.items() if key not in texts}
        return as_tool(name or function.get("title"), description, _parse_properties(bare), note)
    if kind not in ("function", None) and not (kind == "custom" and given):
        raise RowError("tool that is not a function")
    parameters = next(iter(given.values()), None)
    if any(other != parameters for other in given.values()):
        raise RowError("tool with two parameter schemas")
    if not given and (key := _find_unknown_parameters(function)):
        raise RowError(f"tool with parameters under an unknown key ({key[:40]!r})")
    if isinstance(parameters, dict) and parameters.keys() == {"json"} and any("nput" in key for key in given):
        parameters = parse_field(parameters["json"], "parameters")
    required = function.get("required")
    if isinstance(parameters, list):
        parameters = _name_parameters(parameters)
    if flat and not parameters:
        parameters = object_schema({}, required, note)
    elif isinstance(parameters, dict) and _is_flat(parameters):
        if not flat:
            note("flat parameters written as an object schema")
        unmarked = not any(key in given for key in _OPTIONAL_UNLESS_MARKED)
        parameters = object_schema(parameters, required, note, unmarked_required=unmarked)
    elif isinstance(parameters, dict) and parameters:
        parameters = _parse_properties(parameters)
        if required and parameters.get("required") is None:
            note("required moved into parameters")
            parameters = {**parameters, "required": required}
        for key in _DEFINITIONS:
            if isinstance(function.get(key), dict) and parameters.get(key) is None:
                note("definitions moved into parameters")
                parameters = {**parameters, key: function[key]}
    return as_tool(name, description, parameters, note)


def _find_unknown_parameters(function: dict[str, Any]) -> str | None:
    """Return a key of a tool without known parameters that seems to hold them."""
    for key, value in function.items():
        members = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        described = [m for m in members if isinstance(m, dict) and ("type" in m or "name" in m)]
        is_schema = isinstance(value, dict) and isinstance(value.get("properties"), dict)
        if key not in _NO_PARAMETERS and (is_schema or (members and len(described) == len(members))):
            return key
    return None


def _parse_properties(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with its properties parsed if they are JSON text."""
    if not isinstance(schema.get("properties"), str):
        return schema
    return {**schema, "properties": parse_field(schema["properties"], "parameters")}


def _name_parameters(parameters: list[Any]) -> dict[str, Any]:
    """Return a list of parameters as a map from their names."""
    named = {}
    for parameter in parameters:
        name = parameter.get("name") if isinstance(parameter, dict) else None
        if not isinstance(name, str) or name in named:
            raise RowError("tool parameter without a name of its own")
        named[name] = {key: value for key, value in parameter.items() if key != "name"}
    return named


def _is_flat(parameters: dict[str, Any]) -> bool:
    """Return whether parameters map names to objects that describe them, unlike a JSON Schema."""
    if not parameters or "$defs" in parameters:
        return False
    properties = parameters.get("properties")
    if isinstance(properties, dict) and all(isinstance(sub, dict | bool) for sub in properties.values()):
        return False
    return all(isinstance(parameter, dict) for parameter in parameters.values())


def object_schema(
    flat: dict[str, Any], required_names: Any, note: Note, *, unmarked_required: bool = True
) -> dict[str, Any]:
    """Return the JSON Schema of flat parameters. `required_names` is the tool's list of required ones, if any.

    Without that list, a mark `required` of a parameter decides. A parameter without a mark is required if
    `unmarked_required`, unless its type or a default says that it is optional.
    """
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in flat.items():
        if not isinstance(parameter, dict):
            raise RowError("tool parameter is not an object")
        schema, optional, default = declared_type("Any" if parameter.get("type") is None else parameter["type"])
        if isinstance(parameter.get("description"), str):
            schema["description"] = parameter["description"]
        others = (key for key in parameter if key not in ("type", "description", "default"))
        schema |= {key: parameter[key] for key in others if is_keyword(key, parameter[key])}
        if parameter.get("default") is not None:
            default = parameter["default"]
        if default is not None:
            optional = True
            coerced = fit_value(schema, default)
            if coerced == "" and schema.get("type") != "string":
                pass
            elif "type" not in schema or fits_type(schema["type"], coerced):
                schema["default"] = coerced
            else:
                note("default of another type left out")
        mark = parameter.get("required")
        if mark if isinstance(mark, bool) else unmarked_required and not optional:
            required.append(name)
        properties[name] = schema
    return {
        "type": "object",
        "properties": properties,
        "required": required_names if isinstance(required_names, list) else required,
    }


def as_tool(name: Any, description: Any, parameters: Any, note: Note = no_note) -> Tool:
    """Build a `Tool` from its parts. Raises `RowError` if one of them cannot be converted without loss.

    Repairs: parameters that are absent or `{}` become an object without properties; a missing `type` or `properties` of
    an object is added; parameters that are only a reference, or a list of parts, are written out; and those of
    `repair_schema`.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > 256 or any(ord(c) < 32 for c in name):
        raise RowError("tool without a usable name")
    if description is None:
        description = ""
    if not isinstance(description, str):
        raise RowError("tool description is not text")
    if parameters is None or parameters == {}:
        note("empty parameters written as an object schema")
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise RowError("tool parameters are not an object schema")
    if problem := check_value(parameters):
        raise RowError(problem)
    parameters = _write_out(repair_schema(parameters, note), note)
    if isinstance(parameters.get("type"), list) and "object" in parameters["type"]:
        note("one type written for parameters")
        parameters = {**parameters, "type": "object"}
    if "type" not in parameters and "properties" in parameters:
        note("missing type of parameters filled in")
        parameters = {"type": "object", **parameters}
    if parameters.get("type") != "object":
        raise RowError("tool parameters are not an object schema")
    if "properties" not in parameters:
        note("missing properties filled in")
        parameters = {**parameters, "properties": {}}
    if found := lint_schema(parameters):
        raise RowError(*found)
    return {
        "type": "function",
        "function": {"name": name.strip(), "description": description, "parameters": parameters},
    }


def _write_out(parameters: dict[str, Any], note: Note) -> dict[str, Any]:
    """Return parameters in which the top level is an object schema, not a reference, a list of parts or a union."""
    if not any(key in parameters for key in COMBINING):
        return parameters
    if problem := lint_schema(parameters):
        raise RowError(*problem)
    alternatives = Resolver(parameters).resolve(parameters)
    if len(alternatives) == 1:
        note("parameters behind a reference written out")
        return alternatives[0]
    if "type" not in parameters and alternatives and all(flat.get("type") == "object" for flat in alternatives):
        note("missing type of parameters filled in")
        return {"type": "object", **parameters}
    return parameters


def unique_tools(tools: list[Tool], note: Note = no_note) -> list[Tool]:
    """Return the tools without exact repetitions. Raises `RowError` if one name has two definitions."""
    by_name: dict[str, Tool] = {}
    for tool in tools:
        name = tool["function"]["name"]
        if name not in by_name:
            by_name[name] = tool
        elif by_name[name] == tool:
            note("repeated tool removed")
        else:
            raise RowError("one tool name, two definitions")
    return list(by_name.values())


def check_calls(calls: Sequence[Call], tools: Any) -> list[str]:
    """Return what is wrong with the calls, one sentence each: an undeclared tool, or an argument that does not fit.

    `tools` are in any spelling of this module. Raises `RowError` for tools that cannot be read.
    """
    offered = read_tools(tools)
    return [str(fault) for call in calls for fault in find_faults(call, offered)]


def fit_calls(calls: Sequence[Call], tools: Any) -> tuple[list[Call], list[str]]:
    """Return the calls with the conversions of `fit_value`, and one sentence for each value that was converted.

    Arguments that are JSON text become an object. A value without an exact conversion stays, and a call to an
    undeclared tool stays as it is: `check_calls` names them. Raises `RowError` for tools that cannot be read.
    """
    offered = read_tools(tools)
    fitted, notes = [], []
    for call in calls:
        tool, arguments = find_tool(offered, call.name), call.arguments
        if tool is not None and isinstance(arguments, str):
            with contextlib.suppress(RowError):
                arguments = parse_field(arguments, "arguments")
        if tool is not None and isinstance(arguments, dict):
            with contextlib.suppress(RowError):  # a schema that takes too long
                arguments = fit_value(tool["parameters"], arguments, top=True)
            changes = list_changes(call.arguments, arguments)
            notes += [f"{call.name[:80]}: {change}" for change in changes]
            call = Call(call.name, arguments)
        fitted.append(call)
    return fitted, notes
