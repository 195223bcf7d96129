"""Formats: writes a row in another prompt form (`poe.calls.forms`), as other systems write tools and calls."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from poe.calls.conversation import Conversation
from poe.calls.forms.prompt_forms import random_form, write_as_text
from poe.errors import RowError

TRIES = 4


def with_random_form(
    conversation: Conversation, rng: Random, tools: Sequence[str] = (), calls: Sequence[str] = ()
) -> Conversation:
    """The row with a random `form` that can hold it, or as it is if some tries find none.

    `tools` and `calls` name the forms to choose from, none means any.
    """
    for _ in range(TRIES):
        form = random_form(rng, tools=list(tools) or None, calls=list(calls) or None)
        try:
            write_as_text(conversation, form)
        except RowError:
            continue
        return replace(conversation, form=form)
    return conversation
