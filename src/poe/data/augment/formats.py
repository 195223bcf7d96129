"""Formats: give a row a random prompt form (`poe.calls.forms`), because other systems write tools and calls so."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from poe.calls.conversation import Conversation
from poe.calls.forms.prompt_forms import random_form, write_as_text
from poe.errors import RowError

MAX_TRIES = 4


def set_random_form(
    conversation: Conversation, rng: Random, tools: Sequence[str] = (), calls: Sequence[str] = ()
) -> Conversation:
    """Return the row with a random `form` that can hold it, or unchanged if no form is found in `MAX_TRIES` tries.

    `tools` and `calls` name the forms to choose from; an empty sequence means all forms.
    """
    for _ in range(MAX_TRIES):
        form = random_form(rng, tools=list(tools) or None, calls=list(calls) or None)
        try:
            write_as_text(conversation, form)
        except RowError:
            continue
        return replace(conversation, form=form)
    return conversation
