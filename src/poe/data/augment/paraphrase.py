"""Paraphrase: other words for the same wish, by rules, in the two places where nothing of a value can stand.

At the start: a greeting (another, or one in the first text), "please", "can you ...?" or "I need you to ..." before a
command and back again, a contraction made or undone. At the end: "please" or thanks. Nothing else is touched, and

* nothing inside quotes, and nothing that a call repeats (whatever its case);
* no end of a text that a value reaches, or of one with lines or a colon in it: what follows them is often the value;
* no row at all whose calls hold a text of more than three words that is not in a user's text as it stands: nobody can
  say which of its words were his.
"""

import re
from dataclasses import replace
from random import Random

from poe.calls.conversation import Conversation
from poe.data.augment.copied import Span, argument_strings, occurrences, quotations
from poe.data.augment.rows import user_texts
from poe.data.augment.words import is_command

_GREETINGS = (
    "Hi!",
    "Hello!",
    "Hey!",
    "Hi there!",
    "Hello there!",
    "Good morning!",
    "Good evening!",
    "Hey there.",
    "Hello.",
)
_GREETED = re.compile(r"(?:hi|hello|hey|good (?:morning|evening|afternoon|day)|greetings|dear)\b", re.I)
_GREETING = re.compile(r"(hi|hello|hey|hi there|hello there|good (?:morning|evening))(?=[,.!] )", re.I)
_ASKING = ("Can you", "Could you", "Would you", "Can you please", "Could you please", "Will you")
_TELLING = ("Please", "I need you to", "I want you to", "I'd like you to", "I would like you to", "Go ahead and")
_ASKED = re.compile(r"(?:(?:can|could|would|will) you (?:please )?|please )(?=\w)", re.I)
_CONTRACTIONS = (
    ("What is ", "What's "),
    ("Who is ", "Who's "),
    ("Where is ", "Where's "),
    ("How is ", "How's "),
    ("I am ", "I'm "),
    ("I would like ", "I'd like "),
    ("I have ", "I've "),
    ("It is ", "It's "),
)
_THANKS = ("Thanks.", "Thank you.", "Thanks!", "Thank you!", "Thanks in advance.", "Many thanks.")
_POLITE = re.compile(r"\b(?:please|thanks?|cheers)\b", re.I)
_SENTENCE_ENDS_INSIDE = re.compile(r"[.!?]\s+\S")
MAX_FREE_WORDS = 3


def paraphrase(conversation: Conversation, rng: Random) -> Conversation:
    """The row with its user's texts worded otherwise, or the row itself where no rule applies."""
    values, texts = argument_strings(conversation), user_texts(conversation)
    if any(len(value.split()) > MAX_FREE_WORDS and not any(value in text for text in texts) for value in values):
        return conversation
    messages, first = [], True
    for message in conversation.messages:
        if message["role"] == "user" and message["content"]:
            message = {**message, "content": reword(message["content"], values, rng, first)}
            first = False
        messages.append(message)
    changed = replace(conversation, messages=messages)
    return conversation if changed.messages == conversation.messages else changed


def reword(text: str, values: list[str], rng: Random, first: bool = True) -> str:
    """One text worded otherwise; `values` are what must stay as it is, `first` whether a greeting may precede it."""
    if text != text.strip():
        return text
    copied = [span for value in values for span in occurrences(text, value.strip(), re.I)]
    fixed = [*copied, *quotations(text)]
    body = text.rstrip(".!?")
    end_is_free = "\n" not in text and ":" not in text and not any(a < len(text) and b >= len(body) for a, b in copied)
    ways = ["end"] if end_is_free and not _POLITE.search(text) else []
    ways += ["start", "start"] if _is_free(fixed, 0, 1) else []
    if not ways:
        return text
    way = rng.choice(ways)
    if way == "end":
        return _at_the_end(text, body, rng)
    return _at_the_start(text, body, fixed, end_is_free, rng, first)


def _is_free(spans: list[Span], start: int, end: int) -> bool:
    return not any(a < end and start < b for a, b in spans)


def _at_the_end(text: str, body: str, rng: Random) -> str:
    mark = text[len(body) :]
    wish = is_command(text) or _ASKED.match(text)
    if not wish or _SENTENCE_ENDS_INSIDE.search(text) or rng.random() < 0.5 or len(mark) > 1:
        return f"{text if mark else text + '.'} {rng.choice(_THANKS)}"
    return f"{body}, please{mark or '.'}"


def _at_the_start(text: str, body: str, fixed: list[Span], end_is_free: bool, rng: Random, first: bool) -> str:
    made: list[str] = []
    for long, short in _CONTRACTIONS:
        for one, other in ((long, short), (short, long)):
            if text.startswith(one) and _is_free(fixed, 0, len(one)):
                made.append(other + text[len(one) :])
    mark, single = text[len(body) :], not _SENTENCE_ENDS_INSIDE.search(text) and "\n" not in text
    marked = len(mark) == 1 and _is_free(fixed, len(body), len(text))
    asked = _ASKED.match(text)
    if is_command(text) and text[0].isupper() and not text.split()[0].isupper() and _is_free(fixed, 0, _first(text)):
        command = text[0].lower() + text[1:]
        if not _POLITE.search(text):
            made.append(f"{rng.choice(_TELLING)} {command}")
        if single and mark != "?" and (marked or (not mark and end_is_free)):
            made.append(f"{rng.choice(_ASKING)} {command.removesuffix(mark)}?")
    elif asked and _is_free(fixed, 0, asked.end() + 1) and is_command(text[asked.end() :]) and single and marked:
        made.append(text[asked.end()].upper() + body[asked.end() + 1 :] + ("." if mark == "?" else mark))
    greeting = _GREETING.match(text)
    if greeting and _is_free(fixed, 0, greeting.end()):
        made.append(rng.choice(_GREETINGS)[:-1] + text[greeting.end(1) :])
    elif first and not _GREETED.match(text):
        made.append(f"{rng.choice(_GREETINGS)} {text}")
    return rng.choice(made) if made else text


def _first(text: str) -> int:
    return len(text.split(None, 1)[0])
