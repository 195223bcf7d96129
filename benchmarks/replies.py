"""Replies to read: calls written in each form, mutated as broken models write them, and cut into pieces."""

import random

from poe.calls.conversation import Call
from poe.calls.forms.base import CallForm
from poe.errors import RowError

INSERTS = (
    *(
        "<tool_call>",
        "</tool_call>",
        "<functioncall>",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "<tool",
        "</",
        "[f(",
        "[f(a=1)]",
    ),
    *('"', "'", '\\"', "\\", "\\'", "{", "}", "[", "]", "]}]}]}", "}}", ":", ",", ";", " ; ", "\n", "   ", "=", "("),
    *(
        '"name"',
        '"arguments": ',
        '"parameters": {',
        '{"tool_calls": [',
        '{"name": "f", "arguments": {}}',
        "NaN",
        "1e999",
    ),
    *(
        "true",
        "-",
        "0",
        "\\u00",
        "\\ud800",
        "é",
        "日本",
        "\u2028",
        "\ufffd",
        "🎈",
        "<|im_end|>",
        "```json\n",
        "<think>",
    ),
)
WORDS = ("weather", "book", "größe", "a b", "x", "city", "日", "it's", 'say "hi"', "]", "}", "</tool_call>", "")
TEXTS = ("", "I look that up.", "Let me {see}: [1, 2], ", 'Say {"a": 1}. ', "a < b and <b>\n", "[see](https://x.y) ")


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 7:
        return {rng.choice(WORDS): random_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return (None, True, rng.randrange(-99, 10**6), rng.random(), rng.choice(WORDS), "".join(rng.choices(WORDS, k=3)))[
        kind
    ]


def random_reply(rng: random.Random, form: CallForm) -> str:
    """Return a reply with up to three calls, written by its form."""
    names = ("f", "get_weather", "shop.book") if form.name == "python" else WORDS
    keys = ("a", "city", "größe") if form.name == "python" else WORDS
    calls = [
        Call(rng.choice(names), {rng.choice(keys): random_value(rng) for _ in range(rng.randrange(4))})
        for _ in range(rng.randrange(4))
    ]
    try:
        return form.write(calls, rng.choice(TEXTS))
    except RowError:
        return form.write([Call("f", {"x": 1})])


def mutate(rng: random.Random, text: str) -> str:
    """Return a text that was cut, doubled, swapped, or had something inserted, up to four times."""
    for _ in range(rng.randrange(5)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice(
            (
                text[:i] + text[j:],
                text[:j] + text[i:],
                text[:i],
                text[:i] + rng.choice(INSERTS) + text[i:],
                text[:i] + rng.choice(INSERTS) * rng.randrange(1, 8) + text[j:],
                text[:i] + chr(rng.choice((0, 9, 27, 0x7F, 0xA0, 0xD800, 0x1F388, rng.randrange(0x3000)))) + text[i:],
                text[j:] + text[i:j] + text[:i],
            )
        )
    return text


def cut(rng: random.Random, text: str) -> list[str]:
    """Return the text in pieces: single characters, small or large ones, some of them empty."""
    size = rng.choice((1, 3, 10, 200))
    pieces, start = [], 0
    while start < len(text):
        end = start + rng.randint(0 if size > 1 else 1, size)
        pieces.append(text[start:end])
        start = end
    return pieces
