"""Paraphrase: reword the user's texts by rules, only at the start and the end of a text.

At the start, the rules add or change a greeting, add or remove "please", "can you ...?" or "I need you to ..." before a
command, and make or undo a contraction. At the end, they add "please" or thanks. The rules do not change

* quoted text, and text that a call repeats, in any case;
* the end of a text if a value reaches it, or if the text has several lines or a colon, because a value often follows;
* a row with a call that has a text of more than three words that is not a part of a user's text, because it is unclear
  which of its words come from the user.
"""

import re
from dataclasses import replace
from random import Random

from poe.calls.conversation import Conversation
from poe.data.augment.rows import Span, argument_strings, find_occurrences, find_quotations, user_texts
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
_ANY_GREETING = re.compile(r"(?:hi|hello|hey|good (?:morning|evening|afternoon|day)|greetings|dear)\b", re.I)
_GREETING = re.compile(r"(hi|hello|hey|hi there|hello there|good (?:morning|evening))(?=[,.!] )", re.I)
_REQUEST_OPENINGS = ("Can you", "Could you", "Would you", "Can you please", "Could you please", "Will you")
_COMMAND_OPENINGS = (
    "Please",
    "I need you to",
    "I want you to",
    "I'd like you to",
    "I would like you to",
    "Go ahead and",
)
_REQUEST = re.compile(r"(?:(?:can|could|would|will) you (?:please )?|please )(?=\w)", re.I)
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
    """Return the row with reworded user texts, or the row itself if no rule applies."""
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
    """Return a reworded text. `values` must not change; `first` allows a new greeting."""
    if text != text.strip():
        return text
    copied = [span for value in values for span in find_occurrences(text, value.strip(), re.I)]
    fixed = [*copied, *find_quotations(text)]
    body = text.rstrip(".!?")
    end_is_free = "\n" not in text and ":" not in text and not any(a < len(text) and b >= len(body) for a, b in copied)
    places = ["end"] if end_is_free and not _POLITE.search(text) else []
    places += ["start", "start"] if _is_free(fixed, 0, 1) else []
    if not places:
        return text
    if rng.choice(places) == "end":
        return _reword_end(text, body, rng)
    return _reword_start(text, body, fixed, end_is_free, rng, first)


def _is_free(spans: list[Span], start: int, end: int) -> bool:
    return not any(a < end and start < b for a, b in spans)


def _reword_end(text: str, body: str, rng: Random) -> str:
    mark = text[len(body) :]
    is_request = is_command(text) or _REQUEST.match(text)
    if not is_request or _SENTENCE_ENDS_INSIDE.search(text) or rng.random() < 0.5 or len(mark) > 1:
        return f"{text if mark else text + '.'} {rng.choice(_THANKS)}"
    return f"{body}, please{mark or '.'}"


def _reword_start(text: str, body: str, fixed: list[Span], end_is_free: bool, rng: Random, first: bool) -> str:
    rewordings: list[str] = []
    for long, short in _CONTRACTIONS:
        for old, new in ((long, short), (short, long)):
            if text.startswith(old) and _is_free(fixed, 0, len(old)):
                rewordings.append(new + text[len(old) :])
    mark, is_single = text[len(body) :], not _SENTENCE_ENDS_INSIDE.search(text) and "\n" not in text
    marked = len(mark) == 1 and _is_free(fixed, len(body), len(text))
    request = _REQUEST.match(text)
    if (
        is_command(text)
        and text[0].isupper()
        and not text.split()[0].isupper()
        and _is_free(fixed, 0, _first_word_end(text))
    ):
        command = text[0].lower() + text[1:]
        if not _POLITE.search(text):
            rewordings.append(f"{rng.choice(_COMMAND_OPENINGS)} {command}")
        if is_single and mark != "?" and (marked or (not mark and end_is_free)):
            rewordings.append(f"{rng.choice(_REQUEST_OPENINGS)} {command.removesuffix(mark)}?")
    elif (
        request and _is_free(fixed, 0, request.end() + 1) and is_command(text[request.end() :]) and is_single and marked
    ):
        rewordings.append(text[request.end()].upper() + body[request.end() + 1 :] + ("." if mark == "?" else mark))
    greeting = _GREETING.match(text)
    if greeting and _is_free(fixed, 0, greeting.end()):
        rewordings.append(rng.choice(_GREETINGS)[:-1] + text[greeting.end(1) :])
    elif first and not _ANY_GREETING.match(text):
        rewordings.append(f"{rng.choice(_GREETINGS)} {text}")
    return rng.choice(rewordings) if rewordings else text


def _first_word_end(text: str) -> int:
    return len(text.split(None, 1)[0])
