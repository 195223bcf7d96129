"""Generated documents in all tool forms and call forms, with random names.

The documents of `poe.demo.text` use their own notations and names that are words, and contain no calls. These documents
teach what a stage needs in order to read any prompt form: copying and looking up meaningless names
(`poe.calls.renaming.random_name`), reading a list of tools in each form of `poe.calls.forms.tool_forms`, and writing a
call in the form of `poe.calls.forms.call_forms` that the prompt asks for.

Both mark their answers, and held-out tools and values occur in neither.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from keyword import iskeyword
from random import Random

from poe.calls.conversation import Call, Conversation, Text, Tool
from poe.calls.forms.call_forms import call_form
from poe.calls.forms.prompt_forms import join_request, random_form, write_request
from poe.calls.forms.tool_forms import TOOL_FORMS, write_tools
from poe.calls.renaming import random_name, rename_tools
from poe.demo import words as w
from poe.demo.conversations import frame, pick_tools
from poe.demo.text import KEYS, NO_FORM, Page, absent, filled
from poe.demo.world import KINDS, DemoTool, Request, make_request, make_tool

CHAT_SHARE = 0.8  # of the documents; the others are plain text
MASKED_SHARE = 0.6  # of the lists of tools have random names
ROOM = 480  # tokens of a document, as `cost` estimates them, so that it fits in a row of 512
TURN = 110  # of them are kept free for the first question and its answer

_PIECE = re.compile(r"<\|\w+\|>|[A-Za-z]+|\d|[^A-Za-z\d]+")
_TOLD = " ".join(text for kind in KINDS for text in (*kind.names, *kind.describe, *kind.phrases, *kind.when_false))
_SCHEMA = "type string integer number object array properties required description name parameters function"
_WORDS = {*re.findall("[a-z]+", f"{_TOLD} {_SCHEMA}"), *w.NOUNS, *w.VERBS, *w.THINGS, *w.TOPICS, *w.COLORS}


def cost(text: str) -> float:
    """About how many tokens a text has under the embedded base's tokenizer."""
    return sum(_piece_cost(piece) for piece in _PIECE.findall(text))


def _piece_cost(piece: str) -> float:
    if piece.isalpha() and piece.lower() not in _WORDS:
        return sum(0.5 if letter.islower() else 1.0 for letter in piece)
    return 2 + 0.4 * len(piece) if "\n" in piece else 1.0


def identifier(rng: Random) -> str:
    """A name that a tool or a parameter could have, most often as masking makes them; two to fourteen characters."""
    while True:
        name = rng.choice(
            (
                lambda: random_name(rng),
                lambda: random_name(rng),
                lambda: random_name(rng),
                lambda: w.odd_word(rng),
                lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 12))),
                lambda: "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 8))),
                lambda: f"{w.invented_word(rng, 1, 2)}_{w.invented_word(rng, 1, 1)}",
                lambda: w.invented_word(rng, 1, 2) + w.invented_word(rng, 1, 1).capitalize(),
                lambda: f"{rng.choice('abcdefghijklmnopqrstuvwxyz_')}{rng.randint(0, 999)}",
                lambda: f"{rng.choice('abcdef')}{rng.getrandbits(rng.choice((16, 32))):x}",
            )
        )()
        if not iskeyword(name):
            return name


def names(rng: Random, chat: bool) -> Text:
    """Identifiers to be said again, or a table of them and questions about its lines."""
    page = Page(chat)
    if rng.random() < 0.4:
        line = rng.choice((" ", ", ", " / ", ".", '", "', "\n")).join(
            identifier(rng) for _ in range(rng.randint(1, 10))
        )
        for _ in range(rng.randint(1, 2)):
            page.asked(line)
            page.answer(line)
        return page.done()
    table = {identifier(rng): rng.choice((identifier(rng), rng.choice(w.NOUNS))) for _ in range(rng.randint(2, 8))}
    if rng.random() < 0.5:  # what a name stands for, as a description says it
        table = {value: key for key, value in table.items()}
    shown = rng.choice(("{k}: {v}", '"{k}": "{v}"', "{k}={v}", "{v} <- {k}", "// {k}\n{v}", "{k}(*, {v}: str)"))
    page.given("\n".join(shown.format(k=key, v=value) for key, value in table.items()))
    for _ in range(rng.randint(3, 8)):
        key = rng.choice(sorted(table))
        question, answer = rng.choice((("{k}", "{v}"), ("What is {k}?", '"{v}"'), ("And {k}?", '{{"{k}": "{v}"}}')))
        page.asked(question.format(k=key))
        page.answer(answer.format(k=key, v=table[key]))
    return page.done()


@dataclass(frozen=True)
class _Offer:
    """Tools, how they are shown, and the names that then stand for theirs."""

    tools: list[DemoTool]
    shown: list[Tool]
    renamed: dict[str, str]

    def name(self, own: str) -> str:
        return self.renamed.get(own, own)

    def call(self, request: Request) -> Call:
        arguments = {self.name(name): value for name, value in request.arguments.items()}
        return Call(self.name(request.tool.name), arguments)


def _offer(rng: Random, form: str, room: float) -> _Offer:
    """One to three tools that resemble each other, as many as there is room for, in the tool form of that name."""
    tools = pick_tools(rng, "train", rng.choice((1, 2)), near=0.6, odd=0.5)
    if rng.random() < 0.5:
        verb, nouns = rng.choice(sorted(w.BASE_VERBS)), rng.sample(w.NOUNS, 2)
        tools = [make_tool(verb, noun) for noun in nouns] + tools[:1]
    rng.shuffle(tools)
    renamed = _masks(rng, tools) if rng.random() < MASKED_SHARE else {}
    shown = rename_tools(Conversation([], [tool.schema() for tool in tools]), renamed).tools
    while len(shown) > 1 and cost(write_tools(shown, form)) > room:
        shown = shown[:-1]
    return _Offer(tools[: len(shown)], shown, renamed)


def _masks(rng: Random, tools: list[DemoTool]) -> dict[str, str]:
    """A name for each name; those of one document are all as masking makes them, or of all kinds."""
    make: Callable[[Random], str] = rng.choice((random_name, identifier))
    masks: dict[str, str] = {}
    for name in (name for tool in tools for name in (tool.name, *(p.name for p in tool.parameters))):
        while name not in masks:
            if (mask := make(rng)) not in masks.values() and not iskeyword(mask):
                masks[name] = mask
    return masks


def listing(rng: Random, chat: bool) -> Text:
    """A list of tools, and questions that only ask to find something in it."""
    page = Page(chat)
    form = rng.choice(list(TOOL_FORMS))
    offer = _offer(rng, form, ROOM - TURN)
    page.given(write_tools(offer.shown, form))
    asked: set[str] = set()
    for _ in range(rng.randint(3, 8)):
        tool = rng.choice(offer.tools)
        name, parameter = offer.name(tool.name), rng.choice(tool.parameters)
        members = [offer.name(p.name) for p in tool.parameters]
        question, answer = rng.choice(
            (
                (f"Which one is for: {tool.description}?", name),
                (f"What is {name} for?", tool.description),
                (f"Parameters of {name}?", ", ".join(members)),
                (f"Required by {name}?", json.dumps([offer.name(p.name) for p in tool.parameters if p.required])),
                (f"What is {offer.name(parameter.name)} of {name}?", parameter.description),
                (f"In {name}, which is {parameter.description}?", offer.name(parameter.name)),
                ("All names?", json.dumps([offer.name(t.name) for t in offer.tools])),
            )
        )
        if cost(page.text + question + answer) > ROOM:
            break
        if question in asked:
            continue
        asked.add(question)
        page.asked(question)
        page.answer(answer)
    return page.done()


def _turns(
    page: Page,
    rng: Random,
    offer: _Offer,
    write: Callable[[list[Call]], str],
    placed: Callable[[str], str] = lambda note: note,
) -> Text:
    """Notes and what is called for, or that no tool fits, as many as there is room for; the first one is `placed`."""
    for number in range(rng.randint(1, 6)):
        kind = rng.choices(("one", "two", "none"), (60, 22, 18))[0]
        requests = [make_request(absent(offer.tools, rng), rng, False)]
        if kind != "none":
            count = 2 if kind == "two" and len(offer.tools) > 1 else 1
            requests = [make_request(tool, rng, False) for tool in rng.sample(offer.tools, count)]
        note = frame(rng, *(request.clause for request in requests))
        answer = NO_FORM if kind == "none" else write([offer.call(request) for request in requests])
        if number and cost(page.text + note + answer) > ROOM:
            break
        page.asked(note if number else placed(note))
        page.answer(answer)
    return page.done()


def filled_forms(rng: Random, chat: bool) -> Text:
    """A list of tools alone, and the notes filled in as `poe.demo.text.forms` does: never as a call."""
    style = rng.randrange(3 + len(KEYS))
    form = rng.choice(("lines", *TOOL_FORMS))
    offer = _offer(rng, form, ROOM - TURN)
    page = Page(chat)
    page.given(write_tools(offer.shown, form))
    return _turns(page, rng, offer, lambda calls: "\n".join(filled(c.name, c.arguments, style) for c in calls))


def calls(rng: Random, chat: bool) -> Text:
    """A prompt that lists tools and asks for a form of calls, then notes and the calls in that form."""
    form = random_form(rng)
    offer = _offer(rng, form.tools, ROOM - TURN - cost(write_request(form, [])))
    request = write_request(form, offer.shown)
    page = Page(chat)
    write = call_form(form.calls).write
    if form.place == "user":
        return _turns(page, rng, offer, write, lambda note: join_request(form, request, note))
    page.given(request)
    return _turns(page, rng, offer, write)


def make_notations(index: int, seed: int = 0, easy: float = 0.0) -> Text:
    """Document number `index`. `easy` (0 to 1) is the share of documents that only copy and look up names."""
    rng = Random(f"{seed}/notations/{index}")
    chat = rng.random() < CHAT_SHARE
    if rng.random() < easy:
        return names(rng, chat)
    kind = rng.choices((names, listing, filled_forms, calls), (15, 15, 20, 50))[0]
    while cost((text := kind(rng, chat)).text) > ROOM:
        pass
    return text
