"""Word lists and invented words. None of them comes from a data set."""

import hashlib
from random import Random

# Nouns of tools. Every fifth noun is held out: its tools with verbs of `VERBS` are in no training row or base text.
NOUNS = (
    "flight hotel table taxi train ticket car bike room desk meeting reminder alarm event task note message email "
    "invoice payment order parcel shipment refund subscription account profile password report chart survey document "
    "folder photo video song playlist podcast movie recipe meal menu workout route map forecast sensor lamp heater "
    "thermostat camera lock printer server backup database deployment ticketing course lesson quiz translation "
    "contract visa license loan budget stock auction donation poem lamppost garden"
).split()
HELD_OUT_NOUNS = tuple(NOUNS[4::5])
TRAIN_NOUNS = tuple(n for n in NOUNS if n not in HELD_OUT_NOUNS)

# verb -> phrases that ask for it; {n} is the noun with its article
VERBS: dict[str, tuple[str, ...]] = {
    "book": ("book {n}", "reserve {n}", "make a booking for {n}"),
    "find": ("find {n}", "look for {n}", "search for {n}"),
    "get": ("get {n}", "fetch {n}", "show me {n}"),
    "create": ("create {n}", "make {n}", "set up a new {n}"),
    "cancel": ("cancel {n}", "call off {n}", "drop {n}"),
    "update": ("update {n}", "change {n}", "edit {n}"),
    "send": ("send {n}", "mail {n}", "forward {n}"),
    "check": ("check {n}", "look at {n}", "inspect {n}"),
    "start": ("start {n}", "begin {n}", "launch {n}"),
    "stop": ("stop {n}", "halt {n}", "end {n}"),
    "delete": ("delete {n}", "remove {n}", "erase {n}"),
    "share": ("share {n}", "give access to {n}"),
    "schedule": ("schedule {n}", "plan {n}", "put {n} on the calendar"),
    "rate": ("rate {n}", "review {n}"),
    "compare": ("compare {n}", "weigh up {n}"),
    "export": ("export {n}", "download {n}"),
    "buy": ("buy {n}", "purchase {n}"),
    "track": ("track {n}", "follow {n}"),
}

# Verbs that only the base's texts use. With them, held-out nouns occur in forms, as in any large text. The held-out
# tools, which combine a verb of `VERBS` with a held-out noun, do not occur.
BASE_VERBS: dict[str, tuple[str, ...]] = {
    verb: (f"{verb} {{n}}",) for verb in "paint weigh fold lift count polish carry print lend hide sell wrap".split()
}

ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl pr qu r s sh sk st t th tr v w z".split()
VOWELS = "a e i o u ai ea io ou y".split()
CODAS = ["", "", "", "l", "n", "r", "s", "t", "m", "nd", "rk", "x", "ck", "sh"]  # codespell:ignore nd
TOPICS = (
    "history music energy weather travel science health food sport money art nature school film law traffic robots "
    "space oceans bridges coffee winter gardens trains birds stars chess maps clocks rivers"
).split()
COLORS = "red blue green black white yellow silver orange".split()
THINGS = (
    "apples bread cheese rice tea pens paper soap candles batteries nails rope tape cups plates spoons towels socks "
    "gloves boots seeds paint glue milk eggs salt sugar flour pears plums"
).split()


def invent_word(rng: Random, min_syllables: int = 2, max_syllables: int = 3) -> str:
    """Return a pronounceable word in lower case that may not exist."""
    count = rng.randint(min_syllables, max_syllables)
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count)) + rng.choice(CODAS)


def invent_odd_word(rng: Random) -> str:
    """Return random letters, half of the time after a syllable, unlike any known word."""
    letters = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 9)))
    return letters if rng.random() < 0.5 else rng.choice(ONSETS) + rng.choice(VOWELS) + letters[:5]


def invent_name(rng: Random) -> str:
    """Return an invented proper name, `Velora` or (one in five) `Velora Krast`."""
    first = invent_word(rng, 1, 3).capitalize()
    return first if rng.random() < 0.8 else f"{first} {invent_word(rng, 1, 2).capitalize()}"


def is_held_out(value: object) -> bool:
    """Return whether an open-class value is only for evaluation rows: one value in eight, chosen by hash."""
    return hashlib.blake2b(str(value).encode(), digest_size=2).digest()[0] % 8 == 0


def with_article(noun: str) -> str:
    """Return `a noun` or `an noun`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def join_words(words: list[str]) -> str:
    """Join words as `a`, `a and b`, or `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
