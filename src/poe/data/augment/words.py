"""English words for the augmentation rules: verbs that begin a command, and words without content."""

import re
from functools import lru_cache

COMMANDS = frozenset(
    "add analyze arrange book buy calculate cancel check compare compute convert count create delete describe detect "
    "determine download edit estimate evaluate explain export extract fetch find fix format generate get give identify "
    "import inform list locate look make measure order organize perform plan play post predict provide purchase rate "
    "recommend remind remove rename replace reserve retrieve return run save schedule search send set share show solve "
    "sort start stop subscribe suggest summarize tell track transfer translate turn update upload validate verify "
    "write".split()
)
"""Verbs that begin a request or a tool's description."""

ALSO_NOUNS = frozenset("book check count estimate format list look order plan play post rate run search set share sort "
                       "start stop track transfer turn update".split())  # fmt: skip
"""Commands that are also nouns. They begin a command only before a word of `AFTER_A_VERB`."""

AFTER_A_VERB = frozenset("a an the my me us our this that these those all some any it them for".split())

_WITHOUT_CONTENT = frozenset(
    "a an the of for to in on at by from with and or not no is are be was were will would can could should may might "
    "it its this that these those i me my we us our you your he she they them their as if so do does did done have has "
    "had please want need like just also based given using use used provided specified certain specific particular "
    "parameter parameters string value values default optional api data information info details about what which who "
    "how when where hi hello thanks thank".split()
)
_SYNONYMS = {
    word: base
    for base, words in {
        "get": "fetch retrieve find search lookup look show list return obtain give tell provide see view query",
        "create": "make generate add build new produce",
        "delete": "remove erase drop",
        "update": "edit change modify set",
        "calculate": "compute determine work",
        "book": "reserve booking reservation",
        "buy": "purchase order",
        "send": "mail forward",
    }.items()
    for word in (base, *words.split())
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")


@lru_cache(maxsize=65536)
def _normalize(word: str) -> str:
    """Return one spelling for a word, its plural (`city`, `cities`) and its synonyms. It may not be a word."""
    word = word.lower()
    for candidate in (word, base_form(word)):
        if candidate in _SYNONYMS:
            return _SYNONYMS[candidate]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if len(word) > 3:
        word = word.removesuffix("e")
        word = f"{word[:-1]}i" if word.endswith("y") else word
    return _SYNONYMS.get(word, word)


def content_words(text: str) -> frozenset[str]:
    """Return the content words of a text or a name (`getUserInfo`), with plurals and synonyms normalized."""
    return frozenset(_normalize(word) for word in _WORD.findall(text) if word.lower() not in _WITHOUT_CONTENT)


def base_form(word: str) -> str:
    """Return `fetch` for `fetches` if it is one of `COMMANDS`; otherwise the word itself."""
    for ending, replacement in (("", ""), ("s", ""), ("es", ""), ("ies", "y")):
        stem = word.removesuffix(ending) + replacement
        if word.endswith(ending) and stem in COMMANDS:
            return stem
    return word


def is_command(text: str) -> bool:
    """Return whether a text begins like a command: `Find flights`, `book a table`, but not `Book prices`."""
    first, second = [*text.lower().split(None, 2), "", ""][:2]
    return first in COMMANDS and (first not in ALSO_NOUNS or second in AFTER_A_VERB)
