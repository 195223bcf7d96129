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
from poe.demo.conversations import frame_request, pick_tools
from poe.demo.text import KEYS, NO_FORM, DocumentBuilder, fill_form, make_absent_tool
from poe.demo.world import KINDS, DemoTool, Request, make_request, make_tool

CHAT_SHARE = 0.8  # share of the documents; the others are plain text
MASKED_SHARE = 0.6  # share of the lists of tools that have random names
MAX_TOKENS = 480  # of a document, as `estimate_tokens` counts them, so that it fits in a row of 512
RESERVED_TOKENS = 110  # of MAX_TOKENS, for the first question and its answer

_PIECE = re.compile(r"<\|\w+\|>|[A-Za-z]+|\d|[^A-Za-z\d]+")
_KIND_WORDS = " ".join(
    text for kind in KINDS for text in (*kind.names, *kind.describe, *kind.phrases, *kind.when_false)
)
_SCHEMA_WORDS = "type string integer number object array properties required description name parameters function"
_WORDS = {*re.findall("[a-z]+", f"{_KIND_WORDS} {_SCHEMA_WORDS}"), *w.NOUNS, *w.VERBS, *w.THINGS, *w.TOPICS, *w.COLORS}


def estimate_tokens(text: str) -> float:
    """Estimate the number of tokens that the embedded base's tokenizer makes from a text."""
    return sum(_estimate_piece(piece) for piece in _PIECE.findall(text))


def _estimate_piece(piece: str) -> float:
    if piece.isalpha() and piece.lower() not in _WORDS:
        return sum(0.5 if letter.islower() else 1.0 for letter in piece)
    return 2 + 0.4 * len(piece) if "\n" in piece else 1.0


def random_identifier(rng: Random) -> str:
    """Return a random name for a tool or a parameter, most often in the style of masking; 2 to 14 characters."""
    while True:
        name = rng.choice(
            (
                lambda: random_name(rng),
                lambda: random_name(rng),
                lambda: random_name(rng),
                lambda: w.invent_odd_word(rng),
                lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 12))),
                lambda: "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 8))),
                lambda: f"{w.invent_word(rng, 1, 2)}_{w.invent_word(rng, 1, 1)}",
                lambda: w.invent_word(rng, 1, 2) + w.invent_word(rng, 1, 1).capitalize(),
                lambda: f"{rng.choice('abcdefghijklmnopqrstuvwxyz_')}{rng.randint(0, 999)}",
                lambda: f"{rng.choice('abcdef')}{rng.getrandbits(rng.choice((16, 32))):x}",
            )
        )()
        if not iskeyword(name):
            return name


def make_names(rng: Random, chat: bool) -> Text:
    """Write identifiers that the answer repeats, or a table of them with questions about its lines."""
    document = DocumentBuilder(chat)
    if rng.random() < 0.4:
        line = rng.choice((" ", ", ", " / ", ".", '", "', "\n")).join(
            random_identifier(rng) for _ in range(rng.randint(1, 10))
        )
        for _ in range(rng.randint(1, 2)):
            document.add_question(line)
            document.add_answer(line)
        return document.build()
    table = {
        random_identifier(rng): rng.choice((random_identifier(rng), rng.choice(w.NOUNS)))
        for _ in range(rng.randint(2, 8))
    }
    if rng.random() < 0.5:  # a question about the value, answered with its name
        table = {value: key for key, value in table.items()}
    template = rng.choice(("{k}: {v}", '"{k}": "{v}"', "{k}={v}", "{v} <- {k}", "// {k}\n{v}", "{k}(*, {v}: str)"))
    document.add_context("\n".join(template.format(k=key, v=value) for key, value in table.items()))
    for _ in range(rng.randint(3, 8)):
        key = rng.choice(sorted(table))
        question, answer = rng.choice((("{k}", "{v}"), ("What is {k}?", '"{v}"'), ("And {k}?", '{{"{k}": "{v}"}}')))
        document.add_question(question.format(k=key))
        document.add_answer(answer.format(k=key, v=table[key]))
    return document.build()


@dataclass(frozen=True)
class _Offer:
    """Tools, the same tools as they are shown, and the map from their names to the shown names."""

    tools: list[DemoTool]
    shown_tools: list[Tool]
    names: dict[str, str]

    def shown_name(self, name: str) -> str:
        return self.names.get(name, name)

    def call(self, request: Request) -> Call:
        arguments = {self.shown_name(name): value for name, value in request.arguments.items()}
        return Call(self.shown_name(request.tool.name), arguments)


def _make_offer(rng: Random, form: str, max_tokens: float) -> _Offer:
    """Return one to three similar tools, as many as fit in `max_tokens` in the named tool form."""
    tools = pick_tools(rng, "train", rng.choice((1, 2)), near=0.6, odd=0.5)
    if rng.random() < 0.5:
        verb, nouns = rng.choice(sorted(w.BASE_VERBS)), rng.sample(w.NOUNS, 2)
        tools = [make_tool(verb, noun) for noun in nouns] + tools[:1]
    rng.shuffle(tools)
    names = _draw_names(rng, tools) if rng.random() < MASKED_SHARE else {}
    shown_tools = rename_tools(Conversation([], [tool.schema() for tool in tools]), names).tools
    while len(shown_tools) > 1 and estimate_tokens(write_tools(shown_tools, form)) > max_tokens:
        shown_tools = shown_tools[:-1]
    return _Offer(tools[: len(shown_tools)], shown_tools, names)


def _draw_names(rng: Random, tools: list[DemoTool]) -> dict[str, str]:
    """Return a random name for each name. A document uses only names in the style of masking, or all styles."""
    draw: Callable[[Random], str] = rng.choice((random_name, random_identifier))
    names: dict[str, str] = {}
    for name in (name for tool in tools for name in (tool.name, *(p.name for p in tool.parameters))):
        while name not in names:
            if (drawn := draw(rng)) not in names.values() and not iskeyword(drawn):
                names[name] = drawn
    return names


def make_listing(rng: Random, chat: bool) -> Text:
    """Write a list of tools with questions about its content."""
    document = DocumentBuilder(chat)
    form = rng.choice(list(TOOL_FORMS))
    offer = _make_offer(rng, form, MAX_TOKENS - RESERVED_TOKENS)
    document.add_context(write_tools(offer.shown_tools, form))
    questions: set[str] = set()
    for _ in range(rng.randint(3, 8)):
        tool = rng.choice(offer.tools)
        name, parameter = offer.shown_name(tool.name), rng.choice(tool.parameters)
        members = [offer.shown_name(p.name) for p in tool.parameters]
        question, answer = rng.choice(
            (
                (f"Which one is for: {tool.description}?", name),
                (f"What is {name} for?", tool.description),
                (f"Parameters of {name}?", ", ".join(members)),
                (f"Required by {name}?", json.dumps([offer.shown_name(p.name) for p in tool.parameters if p.required])),
                (f"What is {offer.shown_name(parameter.name)} of {name}?", parameter.description),
                (f"In {name}, which is {parameter.description}?", offer.shown_name(parameter.name)),
                ("All names?", json.dumps([offer.shown_name(t.name) for t in offer.tools])),
            )
        )
        if estimate_tokens(document.text + question + answer) > MAX_TOKENS:
            break
        if question in questions:
            continue
        questions.add(question)
        document.add_question(question)
        document.add_answer(answer)
    return document.build()


def _add_turns(
    document: DocumentBuilder,
    rng: Random,
    offer: _Offer,
    write: Callable[[list[Call]], str],
    format_first: Callable[[str], str] = lambda note: note,
) -> Text:
    """Add notes with their calls, or that no tool fits, as many as fit. `format_first` changes the first note."""
    for number in range(rng.randint(1, 6)):
        kind = rng.choices(("one", "two", "none"), (60, 22, 18))[0]
        requests = [make_request(make_absent_tool(offer.tools, rng), rng, False)]
        if kind != "none":
            count = 2 if kind == "two" and len(offer.tools) > 1 else 1
            requests = [make_request(tool, rng, False) for tool in rng.sample(offer.tools, count)]
        note = frame_request(rng, *(request.clause for request in requests))
        answer = NO_FORM if kind == "none" else write([offer.call(request) for request in requests])
        if number and estimate_tokens(document.text + note + answer) > MAX_TOKENS:
            break
        document.add_question(note if number else format_first(note))
        document.add_answer(answer)
    return document.build()


def make_filled_forms(rng: Random, chat: bool) -> Text:
    """Write a list of tools and notes with filled-in forms, as `poe.demo.text.make_forms` does, without calls."""
    style = rng.randrange(3 + len(KEYS))
    form = rng.choice(("lines", *TOOL_FORMS))
    offer = _make_offer(rng, form, MAX_TOKENS - RESERVED_TOKENS)
    document = DocumentBuilder(chat)
    document.add_context(write_tools(offer.shown_tools, form))
    return _add_turns(
        document, rng, offer, lambda calls: "\n".join(fill_form(c.name, c.arguments, style) for c in calls)
    )


def make_calls(rng: Random, chat: bool) -> Text:
    """Write a prompt that lists tools and asks for a call form, then notes with calls in that form."""
    form = random_form(rng)
    offer = _make_offer(rng, form.tools, MAX_TOKENS - RESERVED_TOKENS - estimate_tokens(write_request(form, [])))
    request = write_request(form, offer.shown_tools)
    document = DocumentBuilder(chat)
    write = call_form(form.calls).write
    if form.place == "user":
        return _add_turns(document, rng, offer, write, lambda note: join_request(form, request, note))
    document.add_context(request)
    return _add_turns(document, rng, offer, write)


def make_notations(index: int, seed: int = 0, easy: float = 0.0) -> Text:
    """Return document number `index`. `easy` (0 to 1) is the share of documents that only copy and look up names."""
    rng = Random(f"{seed}/notations/{index}")
    chat = rng.random() < CHAT_SHARE
    if rng.random() < easy:
        return make_names(rng, chat)
    make = rng.choices((make_names, make_listing, make_filled_forms, make_calls), (15, 15, 20, 50))[0]
    while estimate_tokens((text := make(rng, chat)).text) > MAX_TOKENS:
        pass
    return text
