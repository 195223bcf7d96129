"""Plain text of the demo world, for pretraining the embedded base: copying, looking up, and filling forms.

The base never sees a chat turn or a tool call. It learns what a caller needs underneath: repeating words that mean
nothing, finding the line that a question is about, and writing down what a note says in the words of a form. Tools
about held-out nouns (`words.HELD_OUT_NOUNS`) do not occur.
"""

import json
from random import Random
from typing import Any

from poe.data.demo import words as w
from poe.data.demo.conversations import capitalize, frame, pick_tools
from poe.data.demo.world import DemoTool, Request, draw_value, make_request, make_tool


def _token(rng: Random, hard: bool = False) -> str:
    """Something to copy: an invented word, a name, a number or a code; if `hard`, often letters in any order."""
    if hard and rng.random() < 0.6:
        return rng.choice((w.odd_word, lambda r: r.choice(w.NOUNS)))(rng)
    return rng.choice(
        (
            lambda: w.invented_word(rng),
            lambda: w.invented_name(rng),
            lambda: str(rng.randint(2, 9999)),
            lambda: f"{rng.choice('ABCDEFGHKLMNPRSTUVWXZ')}{rng.randint(10, 9999)}",
            lambda: rng.choice(w.THINGS),
        )
    )()


def copying(rng: Random, hard: bool = False) -> str:
    """A list, said twice or more."""
    items = [_token(rng, hard) for _ in range(rng.randint(3, 12))]
    separator = rng.choice((" ", ", ", "\n", " / "))
    return rng.choice((": ", " = ", "\n")).join(
        [separator.join(items)] + [separator.join(items) for _ in range(rng.randint(1, 2))]
    )


def lookup(rng: Random, hard: bool = False) -> str:
    """Lines of keys and values, then questions about some of them, in another notation."""
    keys = list(dict.fromkeys(_token(rng, hard) for _ in range(rng.randint(3, 8))))
    table = {key: _token(rng, hard) for key in keys}
    asked = [rng.choice(keys) for _ in range(rng.randint(2, 5))]
    style = rng.randrange(4)
    if style == 0:
        lines = [f"{k}: {v}" for k, v in table.items()] + [f'What is {k}? "{table[k]}"' for k in asked]
    elif style == 1:
        lines = [json.dumps(table)] + [f"{k} = {table[k]}" for k in asked]
    elif style == 2:
        lines = [", ".join(f"{k} is {v}" for k, v in table.items()) + "."]
        lines.append(json.dumps({k: table[k] for k in asked}))
    else:
        lines = [f"{v} belongs to {k}." for k, v in table.items()] + [f'{{"{k}": "{table[k]}"}}' for k in asked]
    return "\n".join(lines)


def _listing(tools: list[DemoTool], style: int) -> str:
    """The forms on offer, in one of four notations."""
    if style == 0:
        return "\n".join(json.dumps(tool.schema()["function"]) for tool in tools)
    if style == 1:
        rows = []
        for tool in tools:
            fields = ", ".join(f"{p.name}{'' if p.required else '?'}: {p.kind.type}" for p in tool.parameters)
            rows.append(f"{tool.name}({fields}) - {tool.description}")
        return "\n".join(rows)
    if style == 2:
        rows = []
        for tool in tools:
            rows.append(f"{tool.name}: {tool.description}.")
            rows.extend(f"  {p.name} ({p.kind.type}): {p.description}" for p in tool.parameters)
        return "\n".join(rows)
    return json.dumps([{tool.name: {p.name: p.kind.type for p in tool.parameters}} for tool in tools])


def _value(value: Any) -> str:
    return json.dumps(value)


def _filled(request: Request, style: int) -> str:
    """One form, filled in, in one of four notations."""
    name, arguments = request.tool.name, request.arguments
    if style == 0:
        return json.dumps({"form": name, "fields": arguments})
    if style == 1:
        return f"{name}: " + "; ".join(f"{k} = {_value(v)}" for k, v in arguments.items())
    if style == 2:
        return "\n".join([f"form: {name}", *(f"{k}: {_value(v)}" for k, v in arguments.items())])
    return json.dumps({name: arguments})


def forms(rng: Random, hard: bool = False) -> str:
    """Forms on offer, then notes, each followed by the form that it asks for (or by the word that none fits).

    `hard`: forms that resemble each other, names of any letters, and more notes for two forms or for none.
    """
    near, odd, rare = (0.7, 0.6, 0.35) if hard else (0.4, 0.0, 0.2)
    tools = pick_tools(rng, "train", rng.choice((1, 1, 2)), near, odd)
    offered, style = _listing(tools, rng.choice((0, 0, 1, 2, 3))), rng.choice((0, 0, 1, 2, 3))
    notes = []
    for _ in range(rng.randint(1, 3)):
        if rng.random() < rare:
            absent = _absent(tools, rng, hard)
            notes.append(f"Note: {frame(rng, make_request(absent, rng, False).clause)}\nno form fits")
        elif rng.random() < rare and len(tools) > 1:
            first, second = (make_request(tool, rng, False) for tool in rng.sample(tools, 2))
            clauses = frame(rng, first.clause, second.clause)
            notes.append(f"Note: {clauses}\n{_filled(first, style)}\n{_filled(second, style)}")
        else:
            request = make_request(rng.choice(tools), rng, False)
            notes.append(f"Note: {frame(rng, request.clause)}\n{_filled(request, style)}")
    rng.shuffle(tools)
    return "\n".join(["Forms:", offered, *notes])


def _absent(tools: list[DemoTool], rng: Random, hard: bool) -> DemoTool:
    """A tool that is not among `tools`; if `hard`, one with a verb or a noun of theirs."""
    names = {tool.name for tool in tools}
    while True:
        other = pick_tools(rng, "train", 1)[0]
        if hard:
            one = rng.choice(tools)
            other = make_tool(*rng.choice(((other.verb, one.noun), (one.verb, other.noun))))
        if other.name not in names:
            return other


def records(rng: Random) -> str:
    """Short notes and what they say, field by field, without a choice of forms."""
    lines = []
    for _ in range(rng.randint(1, 4)):
        request = make_request(pick_tools(rng, "train", 1)[0], rng, False)
        lines.append(f"{capitalize(request.clause)}.")
        lines.append(json.dumps({"do": request.tool.name, **request.arguments}))
    parameter = rng.choice(pick_tools(rng, "train", 1)[0].parameters)
    lines.append(f"{parameter.name}: {_value(draw_value(parameter.kind, rng, False))}")
    return "\n".join(lines)


def make_text(index: int, seed: int = 0, easy: float = 0.0, hard: bool = False) -> str:
    """Document number `index`. `easy` (0 to 1) is the share of documents that only copy and look up.

    `hard` texts are for the second part of a base's training: odd words, look-alike forms. Held-out nouns occur in
    them as words to copy, as they would in any text; never as forms.
    """
    rng = Random(f"{seed}/text/{index}")
    if rng.random() < easy:
        return rng.choice((copying, lookup))(rng, hard)
    kind = rng.choices(("copying", "lookup", "records", "forms"), (8, 12, 5, 75) if hard else (4, 8, 18, 70))[0]
    if kind == "records":
        return records(rng)
    return {"copying": copying, "lookup": lookup, "forms": forms}[kind](rng, hard)
