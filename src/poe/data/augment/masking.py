"""Function masking: replace the names of tools and parameters by random identifiers, so that only descriptions help.

A caller that has learned names (`get_weather(city)`) fails on a tool with another name. With masked names it can only
use the descriptions. The idea comes from Hammer (arXiv 2410.04587). The paper masks 0.33 of the data; the released
script makes three copies of the data and masks 0.67 of them. Here the ratio is explicit: the share of the rows that are
masked in each epoch.

A row has one mask for each name, wherever the name occurs (`poe.calls.renaming`), so masking is a bijection. These rows
are not masked: rows without tools, rows where a tool or a parameter has no description, because nothing would describe
its purpose, and rows whose schemas use names other than by declaring them (`$ref`, `patternProperties`,
`dependentRequired` and others).
"""

from random import Random

from poe.calls.conversation import Conversation, Tool
from poe.calls.renaming import NameMap, can_rename, declared_names, declared_properties, random_name, rename_tools


def mask(conversation: Conversation, rng: Random) -> tuple[Conversation, NameMap]:
    """Return the row with random names and the map from old to new names; if it cannot be masked, the row and `{}`."""
    if not conversation.tools or not all(map(_can_mask, conversation.tools)):
        return conversation, {}
    text = conversation.key()
    names: NameMap = {}
    for name in declared_names(conversation.tools):
        if name not in names:
            names[name] = _unused_name(rng, text, names)
    return rename_tools(conversation, names), names


def _can_mask(tool: Tool) -> bool:
    """Return whether the tool and all of its parameters have descriptions, and its schema can be renamed."""
    return (
        bool(tool["function"]["description"].strip())
        and can_rename(tool)
        and all(
            isinstance(schema, dict) and str(schema.get("description") or "").strip()
            for _, schema in declared_properties(tool)
        )
    )


def _unused_name(rng: Random, text: str, names: NameMap) -> str:
    """Return a random name that does not occur in the row, so that every occurrence of it is a mention."""
    while True:
        name = random_name(rng)
        if name not in text and name not in names.values():
            return name
