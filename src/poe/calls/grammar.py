"""Write the replies that a model may give as a grammar of llguidance: calls of the tools at hand, text, or JSON.

Every reply of the grammar is one that the call form reads, with calls that name a tool and fit its schema, written as
the form writes them; white space beside a mark is optional. A reply is text, or calls; a form with a mark has text
before its calls as well.

| form | what it cannot constrain |
|---|---|
| python | a tool or an argument with a name that is no identifier: it is never written |
| openai | length, pattern and format of strings, which stand in a string |

`poe.calls.schema_grammar` lists the keywords that no form constrains.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from poe.calls.conversation import Tool
from poe.calls.forms.call_forms import call_form
from poe.calls.resolution import Resolver
from poe.calls.schema_grammar import ESCAPED_JSON, JSON, PYTHON, Rules, quote
from poe.errors import DataError, RowError

MODES = ("auto", "none", "required")

_ANY = "(?s:.*)"
# What a text may not contain in each form, so that it is read as text.
_LOOKS_LIKE_A_CALL = {
    **dict.fromkeys(("xlam", "openai"), r"\{\s*\""),
    "llama": r"(\{\s*\"|<\|python_tag\|>)",
    "python": r"\[\s*[^\s\[\]()]*\(",
}
_LEAD = '" "?'  # some templates write a space before an answer


@dataclass(frozen=True)
class Grammar:
    """A grammar in the Lark notation of llguidance.

    `longest` is about as long as what can remain to be written before a reply can end, `shortest` about the shortest
    reply, and `opening` the text that begins every call. `unconstrained` names the keywords of the schemas that the
    grammar does not enforce, and `notes` has other remarks, one sentence each.
    """

    lark: str
    longest: str
    shortest: str = ""
    opening: str = ""
    unconstrained: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToolChoice:
    """Whether a reply has calls: "auto" leaves it to the model. `tools` are those that may be called."""

    mode: str
    tools: tuple[Tool, ...]
    is_parallel: bool = True


def read_tool_choice(value: Any, tools: Sequence[Tool], is_parallel: bool = True) -> ToolChoice:
    """Return what `tool_choice` means in OpenAI's API: "auto", "none", "required" or the function to call.

    Raises `DataError` for any other value, and for a tool that is not there.
    """
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(value, Mapping):
        inner = value.get("function", value)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if value.get("type", "function") != "function" or not isinstance(name, str):
            raise DataError(f"Expected {_EXPECTED_CHOICE}, got {str(dict(value))[:80]}.")
        if name not in names:
            raise DataError(
                f"tool_choice names the tool {name[:80]!r}, which is not offered: expected one of "
                f"{', '.join(names)[:200] or 'no tools'}."
            )
        return ToolChoice("required", tuple(tool for tool in tools if tool["function"]["name"] == name), is_parallel)
    if value not in MODES:
        raise DataError(f"Expected {_EXPECTED_CHOICE}, got {str(value)[:80]!r}.")
    if value == "required" and not tools:
        raise DataError("tool_choice='required' needs tools: expected at least one.")
    return ToolChoice(value, tuple(tools), is_parallel)


_EXPECTED_CHOICE = "tool_choice to be 'auto', 'none', 'required' or {'type': 'function', 'function': {'name': '...'}}"


def write_call_grammar(
    form: str,
    choice: ToolChoice,
    special: Mapping[str, int] | None = None,
    schema: Any = None,
    text_tokens: Sequence[int] = (),
) -> Grammar:
    """Return the grammar of replies in a call form. `special` has the id of each mark that is one special token.

    `text_tokens` are ids of special tokens that may stand in text, such as those of thinking.

    With `schema` a reply without calls is a JSON value of it. Raises `DataError` if no tool can be called in the form,
    or a schema cannot be resolved.
    """
    rules = Rules({"python": PYTHON, "openai": ESCAPED_JSON}.get(form, JSON))
    calls: list[_Call] = []
    notes = []
    for tool in choice.tools if choice.mode != "none" else ():
        function = tool["function"]
        call = _add_call(rules, form, function["name"], function["parameters"])
        if call is None:
            notes.append(f"{function['name'][:80]}: no call in the form {form} fits this tool, so it is never called")
        else:
            calls.append(call)
    if choice.mode == "required" and not calls:
        raise DataError("No tool can be called: " + "; ".join(notes) + ".")
    mark = call_form(form).mark
    forbidden = _LOOKS_LIKE_A_CALL.get(form) or _escape_pattern(mark)
    lines = [f"TEXT: /{_ANY.replace('*', '+')}/ & ~/{_ANY}{forbidden}{_ANY}/"]
    between = " | ".join(f"<[{number}]>" for number in text_tokens)
    text = f"TEXT? (({between}) TEXT?)*" if between else "TEXT?"  # never two TEXT side by side: they could make a mark
    answer = None if schema is None else write_json_grammar(schema)
    if answer is not None:
        if not calls:
            return answer
        lines = [answer.lark.replace("start:", "json:", 1)]
        text = "json"
    elif not calls:
        return Grammar(
            "\n".join(["start: TEXT?", *lines]), "", unconstrained=tuple(rules.unconstrained), notes=tuple(notes)
        )
    parts = _FORMS[form]
    more = f"({_literal(parts.between, special)} call)*" if choice.is_parallel else ""
    rest = f"{more} {_literal(parts.after, special)}"
    lines.append(f"call: {' | '.join(f'{quote(call.before)} {call.rest}' for call in calls)}")
    if parts.before.startswith(mark) and mark:
        number = (special or {}).get(mark)
        begin = quote(mark) if number is None else f"<[{number}]>"
        lines.append(f"calls: {_literal(parts.before.removeprefix(mark), special, follows_mark=True)} call {rest}")
        if choice.mode == "required":
            start = f"{_LEAD} {begin} calls"
        elif number is None:
            before = _ANY if answer is None else ""
            lines.append(f"head[lazy]: /{before}{_escape_pattern(mark)}/")
            start = f"{text} | {f'(TEXT? ({between}))*' if between and answer is None else ''} head calls"
        else:
            start = f"{text} | {text if answer is None else ''} {begin} calls"
    else:  # one literal up to where the reply can no longer be text
        first = [f"{quote(lead + parts.before + call.before)} {call.rest}" for call in calls for lead in ("", " ")]
        lines += [f"first: {' | '.join(first)}", f"calls: first {rest}"]
        start = "calls" if choice.mode == "required" else f"{text} | calls"
    longest = f"{parts.before}{max((call.longest for call in calls), key=len)}{parts.between}{parts.after}"
    if answer is not None:
        longest = max(longest, answer.longest, key=len)
        rules.unconstrained |= dict.fromkeys(answer.unconstrained)
    shortest = f"{parts.before}{min((call.shortest for call in calls), key=len)}{parts.after}"
    lark = "\n".join([f"start: {start}", *lines, str(rules)])
    shortest = shortest if choice.mode == "required" else ""
    opening = parts.before.rstrip() or '{"name"'
    return Grammar(lark, longest, shortest, opening, tuple(rules.unconstrained), tuple(notes))


def write_json_grammar(schema: Any) -> Grammar:
    """Return the grammar of replies that are one JSON value of a schema. Raises `DataError` if no value fits."""
    rules = Rules(JSON, "j")
    try:
        rule = rules.add_document(schema, Resolver(schema))
    except RowError as error:
        raise DataError(f"The schema of response_format cannot be used: {error}.") from None
    if rule is None:
        raise DataError("No value fits the schema of response_format.")
    return Grammar(
        f"start: {_LEAD} {rule.name}\n{rules}", rule.longest, rule.shortest, unconstrained=tuple(rules.unconstrained)
    )


@dataclass(frozen=True)
class _Form:
    """What stands before, between and after the calls of a form."""

    before: str
    between: str
    after: str


_FORMS = {
    "hermes": _Form("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    "glaive": _Form("<functioncall> ", "\n<functioncall> ", ""),
    "mistral": _Form("[TOOL_CALLS] [", ", ", "]"),
    "xlam": _Form("[", ", ", "]"),
    "llama": _Form("", "; ", ""),
    "openai": _Form('{"tool_calls": [', ", ", "]}"),
    "python": _Form("[", ", ", "]"),
}


@dataclass(frozen=True)
class _Call:
    """The calls of one tool: the text before their arguments, and the rest of the rule."""

    before: str
    rest: str
    longest: str
    shortest: str


def _add_call(rules: Rules, form: str, name: str, parameters: Any) -> _Call | None:
    """Add the rules for the calls of one tool, and return how they are written. None if the form cannot write one."""
    if form == "python" and not all(part.isidentifier() and not iskeyword(part) for part in name.split(".")):
        return None
    try:
        arguments = rules.add_document(parameters, Resolver(parameters), form == "python")
    except RowError as error:
        raise DataError(
            f"The tool {name[:80]!r} cannot be constrained: {error}. Correct it, or pass constrain=False."
        ) from None
    if arguments is None:
        return None
    written = JSON.write(name)
    before, between, after = f'{{"name": {written}, "arguments": ', "", "}"
    match form:
        case "glaive":
            before, after = f"{before}'", "'}"
        case "llama":
            before = f'{{"name": {written}, "parameters": '
        case "python":
            before, after = f"{name}(", ")"
        case "openai":
            function = f'", "type": "function", "function": {{"name": {written}, "arguments": "'
            before, between, after = '{"id": "call_', f"/[1-9][0-9]?/ {quote(function)} ", '"}}'
    longest, shortest = (f"{before}{between}{text}{after}" for text in (arguments.longest, arguments.shortest))
    return _Call(before, f"{between}{arguments.name} {quote(after)}", longest, shortest)


def _literal(text: str, special: Mapping[str, int] | None, *, follows_mark: bool = False) -> str:
    """Return a text as a sequence of literals and special tokens. White space beside a mark is optional.

    Chat templates differ in it. `follows_mark`: there is a mark before the text.
    """
    parts = re.split(f"({'|'.join(map(re.escape, MARKS))})", text)
    if len(parts) == 1 and not follows_mark:
        return quote(text) if text else ""
    written = []
    for part in parts:
        if part in MARKS:
            number = (special or {}).get(part)
            written.append(quote(part) if number is None else f"<[{number}]>")
            continue
        middle = part.strip()
        before, after = (part, "") if not middle else part.split(middle)
        written += [f"{quote(space)}?" for space in before]
        written += [quote(middle)] if middle else []
        written += [f"{quote(space)}?" for space in after]
    return " ".join(written)


def _escape_pattern(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


MARKS = ("<tool_call>", "</tool_call>", "<functioncall>", "[TOOL_CALLS]")
"""The texts of call forms that a tokenizer may hold as one special token."""
