"""Contrast: the same question twice, once with the tool that serves it and once without.

The second row is that of `irrelevance`. Tools that it was given because none was left are offered in the first row as
well, so that the two lists differ in the tools that serve the question and in those that fit them, in nothing else.
"""

from random import Random

from poe.calls.conversation import Conversation
from poe.data.augment.distractors import ToolPool, add_tools
from poe.data.augment.irrelevance import make_irrelevant


def make_pair(conversation: Conversation, rng: Random, pool: ToolPool) -> tuple[Conversation, Conversation] | None:
    """The row with its call, and the row that must abstain; None where `make_irrelevant` gives none."""
    without = make_irrelevant(conversation, rng, pool)
    if without is None:
        return None
    added = [tool for tool in without.tools if tool not in conversation.tools]
    return add_tools(conversation, added, rng), without
