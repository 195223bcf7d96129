"""The tool forms by name: ways to write a list of tools in a prompt.

| form | format |
|---|---|
| indent0, indent2, indent4 | each function as JSON over several lines, with that indentation |
| lines | each function as JSON on one line |
| list | one JSON list of the functions |
| openai | one JSON list, each function in its envelope `{"type": "function", "function": ...}` |
| xml | each tool as JSON on one line, with its envelope, between `<tools>` and `</tools>` |
| python | signatures with a docstring |
| typescript | type declarations with comments |

The JSON forms contain the tools unchanged. The other two write every name, description, type, list of values and
default, and which arguments are optional, in their own notation. If the notation cannot express a whole schema (bounds,
patterns, members with descriptions), the schema follows as JSON. Names that are not identifiers are in double quotes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from poe.calls.conversation import Tool
from poe.calls.forms.base import as_json
from poe.calls.forms.type_notation import PYTHON, TYPESCRIPT, Parameter, list_parameters, quote_name, remaining_schema
from poe.errors import DataError, suggest


def write_tools(tools: Sequence[Tool], form: str) -> str:
    """Return the tools as text in the named form. Raises `DataError` with a suggestion for an unknown name."""
    if form not in TOOL_FORMS:
        raise DataError(f"Unknown tool form {form!r}.{suggest(form, TOOL_FORMS)}")
    return TOOL_FORMS[form](tools)


def _functions(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [tool["function"] for tool in tools]


def _indented(width: int) -> Callable[[Sequence[Tool]], str]:
    def write(tools: Sequence[Tool]) -> str:
        return "\n\n".join(json.dumps(f, ensure_ascii=False, indent=width) for f in _functions(tools))

    return write


def _lines(tools: Sequence[Tool]) -> str:
    return "\n".join(map(as_json, _functions(tools)))


def _list(tools: Sequence[Tool]) -> str:
    return as_json(_functions(tools))


def _openai(tools: Sequence[Tool]) -> str:
    return as_json(list(tools))


def _xml(tools: Sequence[Tool]) -> str:
    # JSON allows \/ for a slash, so a tag inside a description does not end the list.
    return "\n".join(["<tools>", *(as_json(tool).replace("</", "<\\/") for tool in tools), "</tools>"])


def _python(tools: Sequence[Tool]) -> str:
    return "\n\n".join("\n".join(_definition(function)) for function in _functions(tools))


def _definition(function: dict[str, Any]) -> Iterator[str]:
    parameters = list(list_parameters(function, PYTHON))
    # Keyword-only arguments, because an optional argument may come before a required one.
    signature = ", ".join(["*", *map(_argument, parameters)]) if parameters else ""
    yield f"def {quote_name(function['name'])}({signature}):"
    body = _text_lines(function["description"])
    if parameters:
        body += ["", "Args:"] if body else ["Args:"]
    for parameter in parameters:
        first, *others = _text_lines(parameter.description) or [""]
        body.append(f"    {quote_name(parameter.name)} ({_facts(parameter)}): {first}".rstrip())
        body += [f"        {line}" for line in others]
        if parameter.rest is not None:
            body.append(f"        JSON Schema: {as_json(parameter.rest)}")
    if rest := remaining_schema(function):
        body.append(f"JSON Schema of all arguments: {as_json(rest)}")
    if body:
        body = [line.replace('"""', r"\"\"\"") for line in body]
        yield from (f"    {line}".rstrip() for line in ['"""' + body[0], *body[1:], '"""'])
    else:
        yield "    ..."


def _argument(parameter: Parameter) -> str:
    text = f"{quote_name(parameter.name)}: {parameter.type}"
    if parameter.required:
        return text
    return f"{text} = {parameter.default!r}" if parameter.has_default else f"{text} = ..."


def _facts(parameter: Parameter) -> str:
    facts = [parameter.type, "required" if parameter.required else "optional"]
    return ", ".join([*facts, f"default {parameter.default!r}"] if parameter.has_default else facts)


def _typescript(tools: Sequence[Tool]) -> str:
    return "\n\n".join("\n".join(_declaration(function)) for function in _functions(tools))


def _declaration(function: dict[str, Any]) -> Iterator[str]:
    yield from _comment(function["description"])
    if rest := remaining_schema(function):
        yield f"// JSON Schema of all arguments: {as_json(rest)}"
    parameters = list(list_parameters(function, TYPESCRIPT))
    yield f"type {quote_name(function['name'])} = (_: {{{'' if parameters else '}) => any;'}"
    for parameter in parameters:
        yield from (f"  {line}" for line in _comment(parameter.description))
        if parameter.rest is not None:
            yield f"  // JSON Schema: {as_json(parameter.rest)}"
        default = f" // default: {as_json(parameter.default)}" if parameter.has_default else ""
        yield f"  {quote_name(parameter.name)}{'' if parameter.required else '?'}: {parameter.type};{default}"
    if parameters:
        yield "}) => any;"


def _comment(text: str) -> list[str]:
    return [f"// {line}".rstrip() for line in _text_lines(text)]


def _text_lines(text: str) -> list[str]:
    return text.strip().splitlines()


TOOL_FORMS: dict[str, Callable[[Sequence[Tool]], str]] = {
    "indent0": _indented(0),
    "indent2": _indented(2),
    "indent4": _indented(4),
    "lines": _lines,
    "list": _list,
    "openai": _openai,
    "xml": _xml,
    "python": _python,
    "typescript": _typescript,
}
