"""What an assistant says when no tool serves: put together from parts, thousands of ways, so that none is a formula."""

from random import Random

from poe.calls.conversation import Tool
from poe.calls.renaming import is_identifier
from poe.data.augment.words import base_form, is_command

_OPENINGS: tuple[str, ...] = ("", "", "", "Sorry, ", "Sorry, but ", "I'm sorry, ", "I am sorry, but ")
_OPENINGS += ("Unfortunately, ", "Regrettably, ", "Apologies, ", "My apologies, but ", "I'm afraid ")
_OPENINGS += ("I am afraid that ",)
_REFUSALS = (
    "I cannot {d}",
    "I can't {d}",
    "I am not able to {d}",
    "I'm unable to {d}",
    "I have no way to {d}",
    "I have no means to {d} here",
    "there is no way for me to {d}",
    "it is not possible for me to {d}",
    "I do not have a tool to {d}",
    "I don't have what it takes to {d}",
    "I have nothing here that can {d}",
    "I lack a tool that can {d}",
    "to {d} I would need a tool that I do not have",
    "I would need another tool to {d}",
)
_WITH_TOOLS = (
    "none of my tools can {d}",
    "no tool of mine can {d}",
    "my tools do not let me {d}",
    "none of the tools I have can {d}",
    "I cannot {d} with the tools I have",
    "I can't {d} with what is available to me",
    "the tools I was given cannot {d}",
    "nothing among my tools can {d}",
)
_WITHOUT_TOOLS = (
    "I have no tools here, so I cannot {d}",
    "no tools are available to me, so I can't {d}",
    "without any tools I cannot {d}",
    "I was given no tools and cannot {d}",
)
_ANY_DEED: tuple[str, ...] = ("do that", "do this", "help with that", "help you with this", "do what you ask")
_ANY_DEED += ("take care of that", "handle this request", "carry that out", "see to that")
_LISTS = (
    "What I have is {t}.",
    "I only have {t}.",
    "All I can use is {t}.",
    "I could use {t} instead, if that helps.",
    "What is available here: {t}.",
)
_LISTS_OF_ONE = ("My only tool is {t}.", "The one tool on offer is {t}.")
_LISTS_OF_MORE = ("My tools are {t}.", "The tools on offer are {t}.", "I have a choice of {t}.")
_OFFERS = (
    "I can {t}.",
    "What I can do is {t}.",
    "I could {t} instead.",
    "Here I can only {t}.",
    "I am able to {t}, though.",
)
_CLOSINGS = (
    "Is there anything else I can do?",
    "Can I help with something else?",
    "Let me know if you need something else.",
    "You may have to do this elsewhere.",
    "If you can give me a tool for it, I will try again.",
    "Another service would have to do it.",
    "Please tell me if I can help in another way.",
    "Would something else help?",
)
MOST_LISTED = 4
LONGEST_DEED = 8  # words


def abstention(rng: Random, called: list[Tool], offered: list[Tool]) -> str:
    """A short refusal: what cannot be done (what `called` would have done), sometimes what can be done instead.

    Tools are listed by name only where the name can be nothing but an identifier, which masking then follows; by what
    their descriptions say they do otherwise.
    """
    deeds = {deed(tool) for tool in called}
    wanted = deeds.pop() if len(deeds) == 1 else None
    if not wanted or rng.random() < 0.4:
        wanted = rng.choice(_ANY_DEED)
    refusal = rng.choice(_REFUSALS + (_WITH_TOOLS if offered else _WITHOUT_TOOLS)).format(d=wanted)
    opening = rng.choice(_OPENINGS)
    parts = [_capital(opening + refusal) + "."]
    if offered and rng.random() < 0.4:
        parts.append(_instead(rng, offered))
    if rng.random() < 0.35:
        parts.append(rng.choice(_CLOSINGS))
    return " ".join(part for part in parts if part)


def deed(tool: Tool) -> str | None:
    """What a tool does as words to follow "I cannot", from the first sentence of its description; None if unclear."""
    sentence = tool["function"]["description"].strip().split(". ")[0].rstrip(".").strip()
    first, _, rest = sentence.partition(" ")
    plain = rest and not set("()[]{}`'\"/:;,_!?\n") & set(rest) and len(rest.split()) < LONGEST_DEED
    verb = base_form(first.lower())
    if not plain or not is_command(f"{verb} {rest}") or "you" in rest.lower():
        return None
    return f"{verb} {rest}"


def _instead(rng: Random, offered: list[Tool]) -> str:
    some = rng.sample(offered, min(MOST_LISTED, len(offered)))
    names = [tool["function"]["name"] for tool in some]
    deeds = [deed(tool) for tool in some]
    ways = []
    if all(map(is_identifier, names)) and len(offered) <= MOST_LISTED:
        ways.append((_LISTS + (_LISTS_OF_MORE if len(names) > 1 else _LISTS_OF_ONE), names, "and"))
    if all(deeds):
        ways.append((_OFFERS, [d for d in deeds if d], "or"))
    if not ways:
        return ""
    forms, parts, word = rng.choice(ways)
    return rng.choice(forms).format(t=parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
