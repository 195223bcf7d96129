"""Generated documents for pretraining the embedded base: copying, looking up, and filling in forms.

A document is plain text or a chat, in several notations, and never contains a tool call. The base learns the skills
that a caller needs: repeating meaningless words, finding the line that a question is about, and filling a form with the
values of a note. Held-out tools do not occur; their nouns occur, but only with the verbs `words.BASE_VERBS`.

Most of a document is random and cannot be predicted. A document therefore marks its answers, which follow from the text
before them, and only the answers are trained on.
"""

import json
from random import Random
from typing import Any

from poe.calls.conversation import Text
from poe.demo import words as w
from poe.demo.conversations import capitalize, frame_request, pick_tools
from poe.demo.world import DemoTool, make_request, make_tool

CHAT_SHARE = 0.6  # share of the documents; the others are plain text
FORM_CHARACTERS = 1250  # no note is added after this length, so that a document fits in a row


class DocumentBuilder:
    """Builds a `Text` from contexts, questions and answers. With `chat`, turns have special tokens."""

    def __init__(self, chat: bool = False) -> None:
        self.text = ""
        self.answers: list[tuple[int, int]] = []
        self.chat = chat

    def add_context(self, text: str) -> None:
        """Add text that is not trained on: a system message or plain lines."""
        self.text += f"<|system_start|>{text}<|system_end|>" if self.chat else f"{text}\n"

    def add_question(self, text: str) -> None:
        """Add a question: a user message or a note."""
        self.text += f"<|user_start|>{text}<|user_end|><|assistant_start|>" if self.chat else f"Note: {text}\n"

    def add_answer(self, text: str) -> None:
        """Add an answer and mark it for training."""
        text += "<|assistant_end|>" if self.chat else "\nEnd.\n"
        self.answers.append((len(self.text), len(self.text) + len(text)))
        self.text += text

    def build(self) -> Text:
        """Return the document."""
        return Text(self.text, self.answers)


def _random_item(rng: Random) -> str:
    """Return an item to copy: an invented word, a name, a number, a code, a noun, or random letters."""
    return rng.choice(
        (
            lambda: w.invent_word(rng),
            lambda: w.invent_odd_word(rng),
            lambda: w.invent_odd_word(rng),
            lambda: w.invent_name(rng),
            lambda: str(rng.randint(2, 9999)),
            lambda: f"{rng.choice('ABCDEFGHKLMNPRSTUVWXZ')}{rng.randint(10, 9999)}",
            lambda: rng.choice(w.NOUNS),
            lambda: rng.choice(w.THINGS),
        )
    )()


def make_copying(rng: Random, chat: bool) -> Text:
    """Write a list of items that the answer repeats, once or twice."""
    items = [_random_item(rng) for _ in range(rng.randint(3, 12))]
    line = rng.choice((" ", ", ", " / ", "_")).join(items)
    document = DocumentBuilder(chat)
    for _ in range(rng.randint(1, 2)):
        document.add_question(line)
        document.add_answer(line)
    return document.build()


def make_lookup(rng: Random, chat: bool) -> Text:
    """Write a table of keys and values, then questions about its entries in another notation."""
    keys = list(dict.fromkeys(_random_item(rng) for _ in range(rng.randint(3, 8))))
    table = {key: _random_item(rng) for key in keys}
    document = DocumentBuilder(chat)
    style = rng.randrange(4)
    if style == 0:
        document.add_context("\n".join(f"{k}: {v}" for k, v in table.items()))
    elif style == 1:
        document.add_context(json.dumps(table))
    elif style == 2:
        document.add_context(", ".join(f"{k} is {v}" for k, v in table.items()) + ".")
    else:
        document.add_context("\n".join(f"{v} belongs to {k}." for k, v in table.items()))
    for _ in range(rng.randint(3, 8)):
        key = rng.choice(keys)
        question, answer = rng.choice((("What is {k}?", '"{v}"'), ("{k}", "{v}"), ("And {k}?", '{{"{k}": "{v}"}}')))
        document.add_question(question.format(k=key))
        document.add_answer(answer.format(k=key, v=table[key]))
    return document.build()


def _listing(tools: list[DemoTool], style: int) -> str:
    """Return the offered forms in one of four notations."""
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


def _as_json(value: Any) -> str:
    return json.dumps(value)


NO_FORM = "no form fits"
KEYS = (("form", "fields"), ("use", "with"), ("sheet", "entries"), ("pick", "inputs"), ("action", "values"))


def fill_form(name: str, arguments: dict[str, Any], style: int) -> str:
    """Return a form with its values. Styles 0 to 2 are words or lines, the others are JSON with the keys of `KEYS`."""
    if style == 0:
        return f"{name}: " + "; ".join(f"{k} = {_as_json(v)}" for k, v in arguments.items())
    if style == 1:
        return "\n".join([f"form: {name}", *(f"{k}: {_as_json(v)}" for k, v in arguments.items())])
    if style == 2:
        return json.dumps({name: arguments})
    first, second = KEYS[style - 3]
    return json.dumps({first: name, second: arguments})


def make_forms(rng: Random, chat: bool) -> Text:
    """Write the offered forms, then notes, each with the filled-in forms as its answer, or that no form fits.

    Forms are similar to each other, and half of the invented names are random letters, so a name has to be read.
    """
    tools = pick_tools(rng, "train", rng.choice((1, 2, 2)), near=0.6, odd=0.5)
    if rng.random() < 0.6:
        verb, nouns = rng.choice(sorted(w.BASE_VERBS)), rng.sample(w.NOUNS, 2)
        others = [make_tool(verb, noun) for noun in nouns[: rng.randint(1, 2)]]
        tools = others + tools[: rng.randint(0, 1)]
        rng.shuffle(tools)
    style = rng.randrange(3 + len(KEYS))
    document = DocumentBuilder(chat)
    listing = _listing(tools, 0 if chat else rng.choice((0, 0, 1, 2, 3)))
    document.add_context(listing if chat else f"Forms:\n{listing}")
    for _ in range(rng.randint(3, 9)):
        kind = rng.choices(("one", "two", "none"), (50, 26, 24))[0]
        if kind == "none":
            clauses, answer = frame_request(rng, make_request(make_absent_tool(tools, rng), rng, False).clause), NO_FORM
        elif kind == "two" and len(tools) > 1:
            first, second = (make_request(tool, rng, False) for tool in rng.sample(tools, 2))
            clauses = frame_request(rng, first.clause, second.clause)
            answer = "\n".join(fill_form(r.tool.name, r.arguments, style) for r in (first, second))
        else:
            request = make_request(rng.choice(tools), rng, False)
            clauses, answer = frame_request(rng, request.clause), fill_form(request.tool.name, request.arguments, style)
        document.add_question(clauses)
        document.add_answer(answer)
        if len(document.text) > FORM_CHARACTERS:
            break
    return document.build()


def make_absent_tool(tools: list[DemoTool], rng: Random) -> DemoTool:
    """Return a tool that is not in `tools`, two in three times with one of their verbs or nouns; never held out."""
    names = {tool.name for tool in tools}
    while True:
        other, neighbor = pick_tools(rng, "train", 1, odd=0.5)[0], rng.choice(tools)
        other = rng.choice((other, make_tool(other.verb, neighbor.noun), make_tool(neighbor.verb, other.noun)))
        held_out = other.verb in w.VERBS and other.noun in w.HELD_OUT_NOUNS
        if other.name not in names and not held_out:
            return other


def make_records(rng: Random, chat: bool) -> Text:
    """Write short notes, each with its fields as JSON, without a choice of forms."""
    document = DocumentBuilder(chat)
    for _ in range(rng.randint(2, 5)):
        request = make_request(pick_tools(rng, "train", 1)[0], rng, False)
        document.add_question(f"{capitalize(request.clause)}.")
        document.add_answer(json.dumps({"do": request.tool.name, **request.arguments}))
    return document.build()


def make_text(index: int, seed: int = 0, easy: float = 0.0) -> Text:
    """Return document number `index`. `easy` (0 to 1) is the share of documents that only copy and look up."""
    rng = Random(f"{seed}/text/{index}")
    chat = rng.random() < CHAT_SHARE
    if rng.random() < easy:
        return rng.choice((make_copying, make_lookup))(rng, chat)
    return rng.choices((make_copying, make_lookup, make_records, make_forms), (5, 8, 5, 82))[0](rng, chat)
