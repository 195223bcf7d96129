"""Text of the demo world, for pretraining the embedded base: copying, looking up, and filling forms.

It is plain text or a chat, in several notations, and never holds a tool call. The base learns what a caller needs
underneath: repeating words that mean nothing, finding the line that a question is about, and writing down what a note
says in the words of a form. The tools that are held out do not occur; their nouns do, with verbs of their own.

Most of such a text is drawn at random and cannot be predicted. A document therefore marks its answers, what follows
from the text before them, and only those are learned.
"""

import json
from random import Random
from typing import Any

from poe.calls.conversation import Text
from poe.demo import words as w
from poe.demo.conversations import capitalize, frame, pick_tools
from poe.demo.world import DemoTool, make_request, make_tool

CHAT_SHARE = 0.6  # of the documents; the others are plain text
FORM_CHARACTERS = 1250  # a document of forms takes no further note beyond this, so that it fits in a row


class Page:
    """Builds a `Text` from what is given, what is asked and what is answered; `chat` is how turns are marked."""

    def __init__(self, chat: bool = False) -> None:
        self.text = ""
        self.answers: list[tuple[int, int]] = []
        self.chat = chat

    def given(self, text: str) -> None:
        self.text += f"<|system_start|>{text}<|system_end|>" if self.chat else f"{text}\n"

    def asked(self, text: str) -> None:
        self.text += f"<|user_start|>{text}<|user_end|><|assistant_start|>" if self.chat else f"Note: {text}\n"

    def answer(self, text: str) -> None:
        text += "<|assistant_end|>" if self.chat else "\nEnd.\n"
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


def copying(rng: Random, chat: bool) -> Text:
    """A list, said twice or more."""
    items = [_token(rng) for _ in range(rng.randint(3, 12))]
    line = rng.choice((" ", ", ", " / ", "_")).join(items)
    page = Page(chat)
    for _ in range(rng.randint(1, 2)):
        page.asked(line)
        page.answer(line)
    return page.done()


def lookup(rng: Random, chat: bool) -> Text:
    """Lines of keys and values, then questions about some of them, in another notation."""
    keys = list(dict.fromkeys(_token(rng) for _ in range(rng.randint(3, 8))))
    table = {key: _token(rng) for key in keys}
    page = Page(chat)
    style = rng.randrange(4)
    if style == 0:
        page.given("\n".join(f"{k}: {v}" for k, v in table.items()))
    elif style == 1:
        page.given(json.dumps(table))
    elif style == 2:
        page.given(", ".join(f"{k} is {v}" for k, v in table.items()) + ".")
    else:
        page.given("\n".join(f"{v} belongs to {k}." for k, v in table.items()))
    for _ in range(rng.randint(3, 8)):
        key = rng.choice(keys)
        question, answer = rng.choice((("What is {k}?", '"{v}"'), ("{k}", "{v}"), ("And {k}?", '{{"{k}": "{v}"}}')))
        page.asked(question.format(k=key))
        page.answer(answer.format(k=key, v=table[key]))
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


NO_FORM = "no form fits"
KEYS = (("form", "fields"), ("use", "with"), ("sheet", "entries"), ("pick", "inputs"), ("action", "values"))


def filled(name: str, arguments: dict[str, Any], style: int) -> str:
    """One form, filled in; notations 0 to 2 are words or lines, the others JSON with the keys of `KEYS`."""
    if style == 0:
        return f"{name}: " + "; ".join(f"{k} = {_value(v)}" for k, v in arguments.items())
    if style == 1:
        return "\n".join([f"form: {name}", *(f"{k}: {_value(v)}" for k, v in arguments.items())])
    if style == 2:
        return json.dumps({name: arguments})
    first, second = KEYS[style - 3]
    return json.dumps({first: name, second: arguments})


def forms(rng: Random, chat: bool) -> Text:
    """Forms on offer, then notes, each followed by the forms that it asks for, or by the words that none fits.

    Forms resemble each other, and half of the invented names are letters in any order, so that a name has to be read.
    """
    tools = pick_tools(rng, "train", rng.choice((1, 2, 2)), near=0.6, odd=0.5)
    if rng.random() < 0.6:
        verb, nouns = rng.choice(sorted(w.BASE_VERBS)), rng.sample(w.NOUNS, 2)
        others = [make_tool(verb, noun) for noun in nouns[: rng.randint(1, 2)]]
        tools = others + tools[: rng.randint(0, 1)]
        rng.shuffle(tools)
    style = rng.randrange(3 + len(KEYS))
    page = Page(chat)
    listing = _listing(tools, 0 if chat else rng.choice((0, 0, 1, 2, 3)))
    page.given(listing if chat else f"Forms:\n{listing}")
    for _ in range(rng.randint(3, 9)):
        kind = rng.choices(("one", "two", "none"), (50, 26, 24))[0]
        if kind == "none":
            clauses, answer = frame(rng, make_request(absent(tools, rng), rng, False).clause), NO_FORM
        elif kind == "two" and len(tools) > 1:
            first, second = (make_request(tool, rng, False) for tool in rng.sample(tools, 2))
            clauses = frame(rng, first.clause, second.clause)
            answer = "\n".join(filled(r.tool.name, r.arguments, style) for r in (first, second))
        else:
            request = make_request(rng.choice(tools), rng, False)
            clauses, answer = frame(rng, request.clause), filled(request.tool.name, request.arguments, style)
        page.asked(clauses)
        page.answer(answer)
        if len(page.text) > FORM_CHARACTERS:
            break
    return page.done()


def absent(tools: list[DemoTool], rng: Random) -> DemoTool:
    """A tool not among `tools`, but (two in three) with a verb or a noun of theirs; never one that is held out."""
    names = {tool.name for tool in tools}
    while True:
        other, one = pick_tools(rng, "train", 1, odd=0.5)[0], rng.choice(tools)
        other = rng.choice((other, make_tool(other.verb, one.noun), make_tool(one.verb, other.noun)))
        held_out = other.verb in w.VERBS and other.noun in w.HELD_OUT_NOUNS
        if other.name not in names and not held_out:
            return other


def records(rng: Random, chat: bool) -> Text:
    """Short notes and what they say, field by field, without a choice of forms."""
    page = Page(chat)
    for _ in range(rng.randint(2, 5)):
        request = make_request(pick_tools(rng, "train", 1)[0], rng, False)
        page.asked(f"{capitalize(request.clause)}.")
        page.answer(json.dumps({"do": request.tool.name, **request.arguments}))
    return page.done()


def make_text(index: int, seed: int = 0, easy: float = 0.0) -> Text:
    """Document number `index`. `easy` (0 to 1) is the share of documents that only copy and look up."""
    rng = Random(f"{seed}/text/{index}")
    chat = rng.random() < CHAT_SHARE
    if rng.random() < easy:
        return rng.choice((copying, lookup))(rng, chat)
    return rng.choices((copying, lookup, records, forms), (5, 8, 5, 82))[0](rng, chat)
