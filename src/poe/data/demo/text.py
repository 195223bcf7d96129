"""Plain text of the demo world, for pretraining the embedded base: copying, looking up, and filling forms.

The base never sees a chat turn or a tool call. It learns what a caller needs underneath: repeating words that mean
nothing, finding the line that a question is about, and writing down what a note says in the words of a form. Held-out
nouns (`words.HELD_OUT_NOUNS`) occur as words to copy, as they would in any text, but there are no forms about them.

Most of such a text is drawn at random and cannot be predicted. A document therefore marks its answers, what follows
from the text before them, and only those are learnt.
"""

import json
from random import Random
from typing import Any

from poe.data.conversation import Text
from poe.data.demo import words as w
from poe.data.demo.conversations import capitalize, frame, pick_tools
from poe.data.demo.world import DemoTool, Request, make_request, make_tool

FORM_CHARACTERS = 1100  # a document of forms takes no further note beyond this, so that it fits in a row


class _Writer:
    """Builds a `Text` from what is given and what is asked."""

    def __init__(self) -> None:
        self.text = ""
        self.answers: list[tuple[int, int]] = []

    def given(self, text: str) -> None:
        self.text += text

    def answer(self, text: str) -> None:
        self.answers.append((len(self.text), len(self.text) + len(text)))
        self.text += text

    def done(self) -> Text:
        return Text(self.text, self.answers)


def _token(rng: Random) -> str:
    """Something to copy: an invented word, a name, a number, a code, a noun, or letters in any order."""
    return rng.choice(
        (
            lambda: w.invented_word(rng),
            lambda: w.odd_word(rng),
            lambda: w.odd_word(rng),
            lambda: w.invented_name(rng),
            lambda: str(rng.randint(2, 9999)),
            lambda: f"{rng.choice('ABCDEFGHKLMNPRSTUVWXZ')}{rng.randint(10, 9999)}",
            lambda: rng.choice(w.NOUNS),
            lambda: rng.choice(w.THINGS),
        )
    )()


def copying(rng: Random) -> Text:
    """A list, said twice or more."""
    items = [_token(rng) for _ in range(rng.randint(3, 12))]
    line = rng.choice((" ", ", ", " / ", "_")).join(items) + "\n"
    page = _Writer()
    page.given(line)
    for _ in range(rng.randint(1, 2)):
        page.answer(line)
    return page.done()


def lookup(rng: Random) -> Text:
    """Lines of keys and values, then questions about some of them, in another notation."""
    keys = list(dict.fromkeys(_token(rng) for _ in range(rng.randint(3, 8))))
    table = {key: _token(rng) for key in keys}
    asked = [rng.choice(keys) for _ in range(rng.randint(3, 8))]
    page = _Writer()
    style = rng.randrange(4)
    if style == 0:
        page.given("".join(f"{k}: {v}\n" for k, v in table.items()))
    elif style == 1:
        page.given(json.dumps(table) + "\n")
    elif style == 2:
        page.given(", ".join(f"{k} is {v}" for k, v in table.items()) + ".\n")
    else:
        page.given("".join(f"{v} belongs to {k}.\n" for k, v in table.items()))
    for key in asked:
        question, answer = rng.choice((("What is {k}? ", '"{v}"'), ("{k} = ", "{v}"), ('{{"{k}": ', '"{v}"}}')))
        page.given(question.format(k=key))
        page.answer(answer.format(v=table[key]) + "\n")
    return page.done()


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


def forms(rng: Random) -> Text:
    """Forms on offer, then notes, each followed by the forms that it asks for, or by the words that none fits.

    Forms resemble each other, and half of the invented names are letters in any order, so that a name has to be read.
    """
    tools = pick_tools(rng, "train", rng.choice((1, 2, 2)), near=0.6, odd=0.5)
    style = rng.choice((0, 0, 1, 2, 3))
    page = _Writer()
    page.given(f"Forms:\n{_listing(tools, rng.choice((0, 0, 1, 2, 3)))}\n")
    for _ in range(rng.randint(3, 9)):
        kind = rng.choices(("one", "two", "none"), (52, 28, 20))[0]
        if kind == "none":
            clauses, answer = frame(rng, make_request(_absent(tools, rng), rng, False).clause), "no form fits"
        elif kind == "two" and len(tools) > 1:
            first, second = (make_request(tool, rng, False) for tool in rng.sample(tools, 2))
            clauses = frame(rng, first.clause, second.clause)
            answer = f"{_filled(first, style)}\n{_filled(second, style)}"
        else:
            request = make_request(rng.choice(tools), rng, False)
            clauses, answer = frame(rng, request.clause), _filled(request, style)
        page.given(f"Note: {clauses}\n")
        page.answer(f"{answer}\nEnd.\n")
        if len(page.text) > FORM_CHARACTERS:
            break
    return page.done()


def _absent(tools: list[DemoTool], rng: Random) -> DemoTool:
    """A tool that is not among `tools`, but has (two in three) a verb or a noun of theirs."""
    names = {tool.name for tool in tools}
    while True:
        other, one = pick_tools(rng, "train", 1, odd=0.5)[0], rng.choice(tools)
        other = rng.choice((other, make_tool(other.verb, one.noun), make_tool(one.verb, other.noun)))
        if other.name not in names:
            return other


def records(rng: Random) -> Text:
    """Short notes and what they say, field by field, without a choice of forms."""
    page = _Writer()
    for _ in range(rng.randint(2, 5)):
        request = make_request(pick_tools(rng, "train", 1)[0], rng, False)
        page.given(f"{capitalize(request.clause)}.\n")
        page.answer(json.dumps({"do": request.tool.name, **request.arguments}) + "\n")
    return page.done()


def make_text(index: int, seed: int = 0, easy: float = 0.0) -> Text:
    """Document number `index`. `easy` (0 to 1) is the share of documents that only copy and look up."""
    rng = Random(f"{seed}/text/{index}")
    if rng.random() < easy:
        return rng.choice((copying, lookup))(rng)
    return rng.choices((copying, lookup, records, forms), (5, 8, 7, 80))[0](rng)
