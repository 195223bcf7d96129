"""Compose abstentions, the answers when no tool fits, from parts. Thousands of combinations avoid a fixed formula."""

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
_ANY_ACTION: tuple[str, ...] = ("do that", "do this", "help with that", "help you with this", "do what you ask")
_ANY_ACTION += ("take care of that", "handle this request", "carry that out", "see to that")
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
MAX_LISTED_TOOLS = 4
MAX_ACTION_WORDS = 8


def make_abstention(rng: Random, called: list[Tool], offered: list[Tool]) -> str:
    """Return a short refusal: what cannot be done (the action of `called`), sometimes what can be done instead.

    Tools are listed by name only if the name can only be an identifier, because masking then renames it. Otherwise they
    are listed by the actions that their descriptions name.
    """
    actions = {describe_action(tool) for tool in called}
    action = actions.pop() if len(actions) == 1 else None
    if not action or rng.random() < 0.4:
        action = rng.choice(_ANY_ACTION)
    refusal = rng.choice(_REFUSALS + (_WITH_TOOLS if offered else _WITHOUT_TOOLS)).format(d=action)
    opening = rng.choice(_OPENINGS)
    parts = [_capitalize(opening + refusal) + "."]
    if offered and rng.random() < 0.4:
        parts.append(_list_alternatives(rng, offered))
    if rng.random() < 0.35:
        parts.append(rng.choice(_CLOSINGS))
    return " ".join(part for part in parts if part)


def describe_action(tool: Tool) -> str | None:
    """Return a tool's action as words after "I cannot", from its description's first sentence; None if unclear."""
    sentence = tool["function"]["description"].strip().split(". ")[0].rstrip(".").strip()
    first, _, rest = sentence.partition(" ")
    is_plain = rest and not set("()[]{}`'\"/:;,_!?\n") & set(rest) and len(rest.split()) < MAX_ACTION_WORDS
    verb = base_form(first.lower())
    if not is_plain or not is_command(f"{verb} {rest}") or "you" in rest.lower():
        return None
    return f"{verb} {rest}"


def _list_alternatives(rng: Random, offered: list[Tool]) -> str:
    sample = rng.sample(offered, min(MAX_LISTED_TOOLS, len(offered)))
    names = [tool["function"]["name"] for tool in sample]
    actions = [describe_action(tool) for tool in sample]
    options = []
    if all(map(is_identifier, names)) and len(offered) <= MAX_LISTED_TOOLS:
        options.append((_LISTS + (_LISTS_OF_MORE if len(names) > 1 else _LISTS_OF_ONE), names, "and"))
    if all(actions):
        options.append((_OFFERS, [a for a in actions if a], "or"))
    if not options:
        return ""
    templates, parts, word = rng.choice(options)
    return rng.choice(templates).format(
        t=parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
    )


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]
