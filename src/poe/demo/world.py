"""Tools of the demo world: kinds of parameters, tools built from them, and requests for one tool."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from poe.calls.conversation import Tool
from poe.demo import words as w


@dataclass(frozen=True)
class Kind:
    """A kind of parameter: its possible names, JSON type, function that draws values, and phrases that mention one.

    A tool has at most one kind per `cue`, because requests with two ("to X", "to Y") are ambiguous. Phrases contain
    `{v}`; a boolean has phrases for true and for false. `open` kinds draw from a large set, which is split into
    training and evaluation values.
    """

    names: tuple[str, ...]
    type: str
    describe: tuple[str, ...]
    draw: Callable[[Random], Any]
    phrases: tuple[str, ...] = ()
    when_false: tuple[str, ...] = ()
    cue: str = ""
    enum: tuple[str, ...] = ()
    open: bool = True


def _date(rng: Random) -> str:
    return f"20{rng.randint(24, 29)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _time(rng: Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"


def _code(rng: Random) -> str:
    return "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXZ") for _ in range(2)) + str(rng.randint(100, 9999))


def _message(rng: Random) -> str:
    return " ".join(
        [rng.choice(w.TOPICS), rng.choice(("is", "about", "and", "needs")), w.invent_word(rng), rng.choice(w.THINGS)][
            : rng.randint(2, 4)
        ]
    )


def _draw_list(pool: Callable[[Random], str]) -> Callable[[Random], list[str]]:
    return lambda rng: [pool(rng) for _ in range(rng.randint(1, 3))]


def _integer(low: int, high: int) -> Callable[[Random], int]:
    return lambda rng: rng.randint(low, high)


def _decimal(low: int, high: int) -> Callable[[Random], float]:
    return lambda rng: rng.randint(low * 10, high * 10) / 10


def _enum(names: tuple[str, ...], describe: str, values: str, phrases: tuple[str, ...], cue: str) -> Kind:
    choices = tuple(values.split())
    return Kind(names, "string", (describe,), lambda r: r.choice(choices), phrases, cue=cue, enum=choices, open=False)


def _flag(names: tuple[str, ...], describe: str, yes: tuple[str, ...], no: tuple[str, ...]) -> Kind:
    return Kind(names, "boolean", (describe,), lambda r: r.random() < 0.5, yes, no, cue=names[0], open=False)


KINDS: tuple[Kind, ...] = (
    Kind(
        ("city", "location", "town"),
        "string",
        ("the city to use", "name of the place"),
        w.invent_name,
        ("in {v}", "in the city of {v}"),
        cue="in",
    ),
    Kind(
        ("origin", "departure"),
        "string",
        ("where it starts", "the starting place"),
        w.invent_name,
        ("from {v}", "starting from {v}"),
        cue="from",
    ),
    Kind(
        ("destination", "target"),
        "string",
        ("where it goes", "the place to reach"),
        w.invent_name,
        ("to {v}", "going to {v}"),
        cue="to",
    ),
    Kind(
        ("person", "customer", "user_name"),
        "string",
        ("who it is for", "name of the person"),
        w.invent_name,
        ("for {v}", "on behalf of {v}"),
        cue="for",
    ),
    Kind(
        ("title", "label"),
        "string",
        ("the title to give it", "what it is called"),
        w.invent_name,
        ("called {v}", "named {v}", "with the title {v}"),
        cue="called",
    ),
    Kind(
        ("text", "body"),
        "string",
        ("the words to use", "what it should say"),
        _message,
        ('saying "{v}"', 'with the words "{v}"'),
        cue="saying",
    ),
    Kind(("date", "day"), "string", ("date as year-month-day",), _date, ("on {v}", "dated {v}"), cue="on"),
    Kind(("time", "hour"), "string", ("time of day as hours:minutes",), _time, ("at {v}", "at {v} sharp"), cue="at"),
    Kind(
        ("code", "reference", "order_id"),
        "string",
        ("the reference code", "code that identifies it"),
        _code,
        ("with code {v}", "under reference {v}"),
        cue="code",
    ),
    Kind(
        ("topic", "subject"),
        "string",
        ("what it is about",),
        lambda r: r.choice((*w.TOPICS, w.invent_word(r))),
        ("about {v}", "on the subject of {v}"),
        cue="about",
    ),
    Kind(
        ("owner", "host"),
        "string",
        ("who owns it", "the person in charge"),
        w.invent_name,
        ("owned by {v}", "that belongs to {v}"),
        cue="by",
    ),
    Kind(
        ("days", "num_days"),
        "integer",
        ("how many days",),
        _integer(2, 400),
        ("for {v} days", "lasting {v} days"),
        cue="days",
    ),
    Kind(
        ("people", "party_size"),
        "integer",
        ("how many people",),
        _integer(2, 300),
        ("for {v} people", "with {v} people"),
        cue="people",
    ),
    Kind(
        ("limit", "max_results"),
        "integer",
        ("the most results to return",),
        _integer(2, 999),
        ("at most {v} results", "with no more than {v} results"),
        cue="limit",
    ),
    Kind(
        ("minutes", "duration"),
        "integer",
        ("length in minutes",),
        _integer(2, 999),
        ("for {v} minutes", "taking {v} minutes"),
        cue="minutes",
    ),
    Kind(
        ("number", "room_number"),
        "integer",
        ("its number",),
        _integer(2, 9999),
        ("number {v}", "with the number {v}"),
        cue="number",
    ),
    Kind(
        ("quantity", "count"),
        "integer",
        ("how many units",),
        _integer(2, 5000),
        ("in a quantity of {v}", "{v} times"),
        cue="quantity",
    ),
    Kind(
        ("price", "max_price"),
        "number",
        ("highest price in dollars",),
        _decimal(3, 900),
        ("under {v} dollars", "for less than {v} dollars"),
        cue="price",
    ),
    Kind(
        ("weight", "mass"),
        "number",
        ("weight in kilograms",),
        _decimal(1, 90),
        ("weighing {v} kilograms", "of {v} kilograms"),
        cue="weight",
    ),
    Kind(
        ("distance", "radius"),
        "number",
        ("distance in kilometres",),  # codespell:ignore kilometres
        _decimal(1, 90),
        ("within {v} kilometres", "no further than {v} kilometres"),  # codespell:ignore kilometres
        cue="distance",
    ),
    Kind(
        ("temperature", "degrees"),
        "number",
        ("temperature in degrees",),
        _decimal(5, 60),
        ("at {v} degrees", "set to {v} degrees"),
        cue="degrees",
    ),
    Kind(
        ("items", "products"),
        "array",
        ("the things to include",),
        _draw_list(lambda r: r.choice(w.THINGS)),
        ("with {v}", "including {v}"),
        cue="with",
        open=False,
    ),
    Kind(
        ("tags", "keywords"),
        "array",
        ("words to mark it with",),
        _draw_list(lambda r: r.choice(w.TOPICS)),
        ("tagged {v}", "marked with {v}"),
        cue="tagged",
        open=False,
    ),
    Kind(
        ("guests", "members"),
        "array",
        ("who takes part",),
        _draw_list(lambda r: w.invent_word(r, 1, 2).capitalize()),
        ("together with {v}", "inviting {v}"),
        cue="guests",
    ),
    _enum(("size",), "how large it is", "small medium large", ("in size {v}", "of {v} size"), "size"),
    _enum(
        ("priority", "importance"),
        "how important it is",
        "low normal high",
        ("with {v} priority", "at {v} priority"),
        "priority",
    ),
    _enum(("color",), "which color", " ".join(w.COLORS), ("in {v}", "colored {v}"), "in"),
    _enum(("mode", "transport"), "means of travel", "bus boat car plane foot", ("by {v}", "travelling by {v}"), "by"),
    _enum(
        ("file_format", "output_format"),
        "format of the file",
        "pdf csv json html text",
        ("as {v}", "in {v} format"),
        "as",
    ),
    _enum(
        ("language",),
        "language to use",
        "english french german spanish dutch polish",
        ("in {v}", "written in {v}"),
        "in",
    ),
    _enum(("period", "interval"), "how often", "daily weekly monthly yearly", ("{v}", "on a {v} basis"), "period"),
    _flag(
        ("urgent", "express"),
        "whether it is urgent",
        ("and make it urgent", "urgently"),
        ("it is not urgent", "without any hurry"),
    ),
    _flag(
        ("private", "hidden"),
        "whether others cannot see it",
        ("and keep it private", "visible to nobody else"),  # codespell:ignore nobody
        ("and make it public", "visible to everyone"),
    ),
    _flag(
        ("notify", "confirm"),
        "whether to tell me when done",
        ("and let me know", "and tell me when it is done"),
        ("without telling me", "no need to tell me"),
    ),
    _flag(
        ("insured", "insurance"),
        "whether to insure it",
        ("with insurance", "fully insured"),
        ("without insurance", "not insured"),
    ),
)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a demo tool."""

    name: str
    kind: Kind
    description: str
    required: bool

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the parameter."""
        schema: dict[str, Any] = {"type": self.kind.type, "description": self.description}
        if self.kind.enum:
            schema["enum"] = list(self.kind.enum)
        if self.kind.type == "array":
            schema["items"] = {"type": "string"}
        return schema


@dataclass(frozen=True)
class DemoTool:
    """A tool of the demo world: a verb, a noun and parameters."""

    verb: str
    noun: str
    parameters: tuple[Parameter, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"{self.verb}_{self.noun}"

    @property
    def description(self) -> str:
        return f"{self.verb.capitalize()} {w.with_article(self.noun)}"

    def schema(self) -> Tool:
        """Return the tool in OpenAI's format."""
        parameters: dict[str, Any] = {"type": "object", "properties": {p.name: p.schema() for p in self.parameters}}
        required = [p.name for p in self.parameters if p.required]
        if required:
            parameters["required"] = required
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


def make_tool(verb: str, noun: str) -> DemoTool:
    """Return the tool of that name. A hash of the name decides its parameters, so it is always the same."""
    rng = Random(hashlib.blake2b(f"{verb} {noun}".encode(), digest_size=8).digest())
    chosen: dict[str, Kind] = {}
    while len(chosen) < rng.choices((1, 2, 3, 4), (3, 5, 4, 2))[0]:
        kind = rng.choice(KINDS)
        chosen.setdefault(kind.cue, kind)
    parameters = []
    for position, kind in enumerate(chosen.values()):
        required = position == 0 or rng.random() < 0.5
        parameters.append(Parameter(rng.choice(kind.names), kind, rng.choice(kind.describe), required))
    return DemoTool(verb, noun, tuple(parameters))


def make_tools(nouns: tuple[str, ...], verbs_per_noun: int = 8) -> list[DemoTool]:
    """Return `verbs_per_noun` tools for each noun. The noun decides the verbs."""
    tools: list[DemoTool] = []
    for noun in nouns:
        rng = Random(f"verbs of {noun}")
        tools.extend(make_tool(verb, noun) for verb in rng.sample(sorted(w.VERBS), verbs_per_noun))
    return tools


TRAIN_TOOLS = make_tools(w.TRAIN_NOUNS)
HELD_OUT_TOOLS = make_tools(w.HELD_OUT_NOUNS)


def invent_tool(rng: Random, odd: float = 0.0) -> DemoTool:
    """Return a tool with an invented noun, so that a model must read names instead of memorizing them.

    `odd` is the share of nouns that are not pronounceable.
    """
    verb = rng.choice(sorted(w.VERBS))
    return make_tool(verb, w.invent_odd_word(rng) if odd and rng.random() < odd else w.invent_word(rng))


def draw_value(kind: Kind, rng: Random, held_out: bool) -> Any:
    """Draw a value of a kind, from the evaluation values if `held_out`. For an array, this holds for each element."""
    while True:
        value = kind.draw(rng)
        parts = value if isinstance(value, list) else [value]
        if not kind.open or all(w.is_held_out(part) == held_out for part in parts):
            return value


def mention_parameter(parameter: Parameter, value: Any, rng: Random) -> str:
    """Return a phrase that gives the parameter this value."""
    kind = parameter.kind
    if kind.type == "boolean":
        return rng.choice(kind.phrases if value else kind.when_false)
    value_text = w.join_words(value) if isinstance(value, list) else str(value)
    if rng.random() < 0.25:
        readable = parameter.name.replace("_", " ")
        return rng.choice(
            (f"with {readable} {value_text}", f"{readable} {value_text}", f"with {readable} set to {value_text}")
        )
    return rng.choice(kind.phrases).replace("{v}", value_text)


@dataclass(frozen=True)
class Request:
    """One request: the clause that asks for it, and the call that fulfills it."""

    tool: DemoTool
    clause: str
    arguments: dict[str, Any]


def make_request(tool: DemoTool, rng: Random, held_out: bool) -> Request:
    """Draw values and words for one call of `tool`. The arguments have the order of the schema."""
    arguments: dict[str, Any] = {}
    mentions: list[str] = []
    for parameter in tool.parameters:
        if parameter.required or rng.random() < 0.6:
            arguments[parameter.name] = draw_value(parameter.kind, rng, held_out)
            mentions.append(mention_parameter(parameter, arguments[parameter.name], rng))
    rng.shuffle(mentions)
    article = rng.choice((w.with_article(tool.noun), f"the {tool.noun}"))
    verb_phrase = rng.choice(w.VERBS.get(tool.verb) or w.BASE_VERBS[tool.verb])
    verb_phrase = verb_phrase.replace("a new {n}", f"a new {tool.noun}").replace("{n}", article)
    return Request(tool, " ".join([verb_phrase, *mentions]), arguments)
